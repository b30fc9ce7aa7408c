"""The index, on a published lake of drawn frames and the real small network with fresh weights."""

import dataclasses
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index import arrays
from cbmir_spark.index import embed as index_embed
from cbmir_spark.index import job as index_job
from cbmir_spark.index import verify as index_verify
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import embed as embedding
from cbmir_spark.models import weights
from cbmir_spark.models.artifact import Saved
from cbmir_spark.models.registry import Registry
from cbmir_spark.models.weights import Loaded
from cbmir_spark.storage import ObjectStore
from tests.conftest import MakeSettings
from tests.support.models import open_index, registry_of, save_model
from tests.support.tiny_lake import PREPROCESSING, Drawn, draw, pseudonym, publish

pytestmark = pytest.mark.slow

IMAGES = [
    Drawn("a", "p1", "CT", "CHEST"),
    Drawn("b", "p1", "CT", "HEAD", frames=3),
    Drawn("c", "p2", "MR", "UNKNOWN"),
    Drawn("d", "p2", "US", "UNKNOWN"),
    Drawn("e", "p3", "CT", "CHEST"),
    Drawn("f", "p3", "CT", "CHEST", kind="localizer"),
]
FRAMES = 7


@dataclass(frozen=True)
class Indexed:
    """One lake for all tests here, its first index run, and the model."""

    settings: Settings
    lake: LakePaths
    report: index_job.Report
    model: Loaded

    def with_model(self, folder: Path) -> Settings:
        return self.settings.override({"index.model": folder, "retrieval.model": folder})


@pytest.fixture(scope="module")
def indexed(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    folder = tmp_path_factory.mktemp("indexed")
    saved = save_model(folder / "model")
    overrides = [f"lake.uri={folder / 'a lake'}", "index.min_probability=0.0"]
    overrides += [f"{section}.model={folder / 'model'}" for section in ("index", "retrieval")]
    settings = config.load(overrides=overrides, environ={})
    lake = publish(spark, settings, IMAGES)
    loaded = weights.load_files(saved.weights, saved.manifest.to_json())
    return Indexed(settings, lake, index_job.run(spark, settings), loaded)


def rows_of(df: DataFrame) -> list[Row]:
    return sorted(df.collect(), key=lambda row: (row[cols.IMAGE_ID], row[cols.FRAME]))


def test_each_live_frame_has_the_vector_that_a_query_of_it_gets(spark: SparkSession, indexed: Indexed) -> None:
    report = indexed.report
    assert (report.embedded, report.deleted, report.rows, report.partitions) == (FRAMES, 0, FRAMES, 4)
    assert report.sources == {cols.FROM_TAG: 5, cols.FROM_PREDICTION: 1, cols.FROM_NOTHING: 1}
    assert report.champion is None
    assert report.table == indexed.lake.features(report.model_id)
    rows = rows_of(open_index(spark, indexed.settings).rows)
    assert {row[cols.IMAGE_ID] for row in rows} == {pseudonym(name) for name in "abcde"}
    by_name = {pseudonym(image.name): image for image in IMAGES}
    for row in rows:
        image = by_name[row[cols.IMAGE_ID]]
        alone = embedding.embed_batches(indexed.model, draw(image, row[cols.FRAME])[None], [image.modality])
        assert np.array(row[cols.VECTOR], dtype=np.float32).tobytes() == alone.vectors[0].tobytes()
        assert row[cols.PREDICTED] == (alone.labels[0] or "UNKNOWN")
        assert np.float32(row[cols.PROBABILITY]) == alone.probabilities[0]
        projection, residual = indexed.model.projection.apply(alone.vectors)
        np.testing.assert_allclose(row[cols.PROJECTION], projection[0], rtol=1e-5, atol=1e-5)
        assert row[cols.RESIDUAL_NORM] == pytest.approx(residual[0], rel=1e-9)
        assert row[cols.PATIENT_ID] == pseudonym(image.patient)
    parts = {(row[cols.IMAGE_ID], row[cols.BODY_PART], row[cols.BODY_PART_SOURCE]) for row in rows}
    assert (pseudonym("c"), "BRAIN", cols.FROM_PREDICTION) in parts
    # The model learned no class of ultrasound.
    assert (pseudonym("d"), "UNKNOWN", cols.FROM_NOTHING) in parts


def test_run_again_it_embeds_and_commits_nothing_and_asks_for_the_champion(
    spark: SparkSession, indexed: Indexed, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The registry itself is training's, and tested there; here it matters when it is asked and for what.
    asked: list[str] = []
    moved: list[tuple[str, str]] = []

    def resolve(registry: Registry, uri: str) -> Saved:
        asked.append(uri)
        return resolved

    def move(registry: Registry, alias: str, model_id: str) -> str:
        moved.append((alias, model_id))
        return "4"

    resolved = registry_of(indexed.settings).resolve(str(indexed.settings.index.model))
    monkeypatch.setattr(Registry, "resolve", resolve)
    monkeypatch.setattr(Registry, "move_alias", move)
    registered = indexed.settings.override({"index.model": None})
    again = index_job.run(spark, registered)
    assert (again.embedded, again.deleted, again.rows, again.version) == (0, 0, FRAMES, indexed.report.version)
    assert delta.version(spark, again.table) == indexed.report.version
    assert asked == ["models:/cbmir@candidate"]
    assert moved == [("champion", again.model_id)]
    assert again.champion == "4"


@pytest.mark.parametrize(("spoil", "words"), [(float("nan"), "7 with NaN"), (0.0, "7 all zero")])
def test_vectors_that_cannot_be_searched_stop_the_job_before_they_are_seen(
    spark: SparkSession, indexed: Indexed, tmp_path: Path, spoil: float, words: str
) -> None:
    saved = save_model(tmp_path / "spoilt", spoil=spoil)
    with pytest.raises(TableError, match=words):
        index_job.run(spark, indexed.with_model(tmp_path / "spoilt"))
    assert delta.read(spark, indexed.lake.features(saved.manifest.model_id)).count() == 0


def test_a_model_of_other_pixels_is_refused(spark: SparkSession, indexed: Indexed, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", preprocessing="px9-else").manifest.model_id
    with pytest.raises(ModelError, match=f"px9-else.*{PREPROCESSING}"):
        index_job.run(spark, indexed.with_model(tmp_path / "other"))
    assert ObjectStore(indexed.settings.storage).kind(indexed.lake.features(other)) == "nothing"


def test_a_table_of_another_model_is_refused_naming_both(spark: SparkSession, indexed: Indexed, tmp_path: Path) -> None:
    mine, other = indexed.report.model_id, save_model(tmp_path / "second", seed=2).manifest.model_id
    with pytest.raises(TableError, match=f"{other} has no index.*cbmir index"):
        open_index(spark, indexed.with_model(tmp_path / "second"))
    shutil.copytree(storage.local_path(indexed.report.table), storage.local_path(indexed.lake.features(other)))
    with pytest.raises(ModelError, match=f"{mine}.*{other}"):
        open_index(spark, indexed.with_model(tmp_path / "second"))


def test_a_row_twice_is_found(spark: SparkSession, indexed: Indexed) -> None:
    pinned = publication.require_published(spark, indexed.lake)
    tags = delta.read(spark, indexed.lake.path(schemas.TAGS), pinned.tags)
    pixels = delta.read(spark, indexed.lake.path(schemas.PIXELS), pinned.pixels)
    rows = open_index(spark, indexed.settings).rows
    doubled = rows.unionByName(rows.where(F.col(cols.IMAGE_ID) == pseudonym("b")))
    with pytest.raises(TableError, match="lacks 0 frames, has 0 rows without a frame and 3 duplicate rows"):
        index_verify.verify(index_verify.live_frames(tags, pixels), doubled, indexed.model.manifest, [])


def test_what_changes_is_followed_and_any_parquet_reader_reads_it(spark: SparkSession, indexed: Indexed) -> None:
    """Last of those that use the lake, since it changes it."""
    before = {(row[cols.IMAGE_ID], row[cols.FRAME]): row for row in open_index(spark, indexed.settings).rows.collect()}
    # The batch is replaced: e is gone, a has other pixels (another drawing), g is new, the rest is the same.
    changed = [image for image in IMAGES if image.name not in "ae"]
    publish(spark, indexed.settings, [*changed, Drawn("a", "p1", "MR", "BRAIN"), Drawn("g", "p9", "MR", "BRAIN")])
    report = index_job.run(spark, indexed.settings)
    assert (report.embedded, report.deleted, report.rows) == (2, 2, FRAMES)
    index = open_index(spark, indexed.settings)
    for row in rows_of(index.rows):
        same = before.get((row[cols.IMAGE_ID], row[cols.FRAME])) == row
        assert same == (row[cols.IMAGE_ID] not in {pseudonym("a"), pseudonym("g")})

    folder = storage.local_path(index.path)
    names = [storage.local_path(uri) for uri in index.files]
    assert all("/modality=" in name and "/body_part=" in name for name in names)
    # Files of deleted rows still lie in the folder, and must not be among the live ones.
    assert set(names) < {str(file) for file in Path(folder).rglob("*.parquet")}
    plain = ds.dataset(names, partitioning="hive", partition_base_dir=folder).to_table()
    order = [(cols.IMAGE_ID, "ascending"), (cols.FRAME, "ascending")]
    columns = FEATURES.schema.names
    through_delta = index.rows.toArrow()
    assert plain.num_rows == FRAMES
    assert plain.sort_by(order).select(columns).to_pylist() == through_delta.sort_by(order).select(columns).to_pylist()


def test_without_a_champion_the_error_says_what_to_run(spark: SparkSession, make_settings: MakeSettings) -> None:
    with pytest.raises(ModelError, match="run `cbmir train`, then `cbmir index`"):
        open_index(spark, make_settings())


def test_inspection_counts_each_fault(spark: SparkSession) -> None:
    good, infinite = [1.0, 0.0], [float("inf"), 1.0]
    rows = [(good, 0.5), (infinite, 0.5), ([0.0, 0.0], 0.0), ([1.0], 0.5), ([1.0, 2.0, 3.0], 0.5), (good, float("nan"))]
    df = spark.createDataFrame(rows, "vector array<float>, residual_norm double").repartition(3)
    found = index_verify.inspect(df, 2)
    assert dataclasses.astuple(found) == (6, 2, 2, 1)
    assert found.faults == "2 of another dimension, 2 with NaN or infinite values, 1 all zero"
    assert index_verify.inspect(df.where("false"), 2) == index_verify.Inspection(0, 0, 0, 0)


def test_body_parts_come_from_the_tag_then_from_a_sure_prediction() -> None:
    found = index_embed.body_parts(
        ["CHEST", "UNKNOWN", "UNKNOWN", "UNKNOWN", "UNKNOWN"],
        ["CT/HEAD", "CT/HEAD", "HEAD", "CT/HEAD", None],
        [1.0, 0.8, 0.9, 0.79, 0.0],
        0.8,
    )
    assert found == [
        ("CHEST", cols.FROM_TAG),
        ("HEAD", cols.FROM_PREDICTION),
        ("HEAD", cols.FROM_PREDICTION),
        ("UNKNOWN", cols.FROM_NOTHING),
        ("UNKNOWN", cols.FROM_NOTHING),
    ]


def test_big_partitions_are_spread_and_what_is_alike_lies_side_by_side(spark: SparkSession) -> None:
    rows = spark.range(5000).select(
        F.concat(F.lit("i"), F.col("id")).alias(cols.IMAGE_ID),
        F.lit(0).alias(cols.FRAME),
        (F.col("id") / 10).cast("int").cast("string").alias(cols.SERIES_ID),
        F.when(F.col("id") % 3 == 0, "CT/HEAD").otherwise("CT/CHEST").alias(cols.PREDICTED),
        F.array(F.sin(F.col("id") * 7), F.sin(F.col("id") * 11)).alias(cols.PROJECTION),
        F.when(F.col("id") < 4900, "CT").otherwise("MR").alias(cols.MODALITY),
        F.when(F.col("id") < 4900, "CHEST").otherwise("BRAIN").alias(cols.BODY_PART),
    )
    counts = {("CT", "CHEST"): 4900, ("MR", "BRAIN"): 100}
    laid = index_embed.spread(rows, counts, 1000)
    sizes = [row["count"] for row in laid.groupBy(F.spark_partition_id(), cols.MODALITY).count().collect()]
    assert sum(sizes) == 5000
    assert 3 <= len(sizes) <= 6
    found = laid.select(F.spark_partition_id().alias("file"), cols.MODALITY, cols.PREDICTED, cols.PROJECTION).collect()
    # Class, and the side of the first direction and then of the second one: each stretch of rows comes once in a file.
    kinds = [
        (row["file"], row[cols.MODALITY], row[cols.PREDICTED], *(x > 0 for x in row[cols.PROJECTION])) for row in found
    ]
    assert sum(one != other for one, other in itertools.pairwise(kinds)) + 1 == len(set(kinds)) > 20


def test_batches_are_read_without_a_copy() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(6, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 256, 256)).astype(np.uint8)
    batch = pa.RecordBatch.from_arrays(
        [arrays.vector_column(vectors), pa.array([frame.tobytes() for frame in pixels], pa.binary())],
        names=[cols.VECTOR, cols.PIXELS_COLUMN],
    )
    part = batch.slice(2, 3)
    assert (arrays.vectors_of(part, 4) == vectors[2:5]).all()
    assert (arrays.pixels_of(part) == pixels[2:5]).all()
    assert not arrays.vectors_of(part, 4).flags.owndata
    assert not arrays.pixels_of(part).flags.owndata
    with pytest.raises(TableError, match="3 of 3 vectors do not have 5"):
        arrays.vectors_of(part, 5)
