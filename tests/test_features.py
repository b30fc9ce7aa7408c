"""The index, on a published lake of drawn frames and the real small network with fresh weights."""

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import features, model, storage, training
from cbmir_spark import tables as t
from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.model import Saved
from tests.conftest import MakeSettings
from tests.tiny_lake import PREPROCESSING, Drawn, draw, pseudonym, publish

UNSURE = "index.min_probability=1.0"
SURE = "index.min_probability=0.0"


def save_model(folder: Path, seed: int = 1, preprocessing: str = PREPROCESSING, spoil: float | None = None) -> Saved:
    """The small network, untrained; `spoil` is put into the weights of its feature layer."""
    torch.manual_seed(seed)
    network = model.build("alexnet-small", 3).eval()
    if spoil is not None:
        with torch.no_grad():
            for parameter in network.fc2.parameters():
                parameter.fill_(spoil)
    random = np.random.default_rng(seed)
    saved = model.save(
        network,
        model.Projection.fit([random.random((64, 512), dtype=np.float32)]),
        label="modality/body_part",
        classes=("CT/CHEST", "CT/HEAD", "MR/BRAIN"),
        possible={"CT": ("CT/CHEST", "CT/HEAD"), "MR": ("MR/BRAIN",)},
        preprocessing=preprocessing,
        snapshot="s",
    )
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(saved.manifest.to_json())
    (folder / "weights.safetensors").write_bytes(saved.weights)
    return saved


IMAGES = [
    Drawn("a", "p1", "CT", "CHEST"),
    Drawn("b", "p1", "CT", "HEAD", frames=3),
    Drawn("c", "p2", "MR", "UNKNOWN"),
    Drawn("d", "p2", "US", "UNKNOWN"),
    Drawn("e", "p3", "CT", "CHEST"),
    Drawn("f", "p3", "CT", "CHEST", kind="localizer"),
]
FRAMES = 7


def rows_of(df: DataFrame) -> list[Row]:
    return sorted(df.drop(t.PIXELS_BATCH).collect(), key=lambda row: (row[t.IMAGE_ID], row[t.FRAME]))


@pytest.fixture
def settings(make_settings: MakeSettings, tmp_path: Path) -> Settings:
    save_model(tmp_path / "model")
    return make_settings(f"index.model={tmp_path / 'model'}", f"retrieval.model={tmp_path / 'model'}", SURE)


def test_a_lake_is_indexed_once_and_follows_what_changes(
    spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    lake = publish(spark, settings, IMAGES)
    first = features.run(spark, settings)
    assert (first.embedded, first.deleted, first.rows, first.partitions) == (FRAMES, 0, FRAMES, 4)
    assert first.sources == {t.FROM_TAG: 5, t.FROM_PREDICTION: 1, t.FROM_NOTHING: 1}
    assert first.champion is None
    assert first.table == lake.features(first.model_id)

    index = features.open_index(spark, settings)
    rows = rows_of(index.rows)
    assert {row[t.IMAGE_ID] for row in rows} == {pseudonym(name) for name in "abcde"}
    # Each vector is that of the picture alone: what a query of it gets.
    loaded = model.load(
        (tmp_path / "model/weights.safetensors").read_bytes(), (tmp_path / "model/manifest.json").read_bytes()
    )
    by_name = {pseudonym(image.name): image for image in IMAGES}
    for row in rows:
        image = by_name[row[t.IMAGE_ID]]
        alone = model.embed_batches(loaded, draw(image, row[t.FRAME])[None], [image.modality])
        assert np.array(row[t.VECTOR], dtype=np.float32).tobytes() == alone.vectors[0].tobytes()
        assert row[t.PREDICTED] == (alone.labels[0] or "UNKNOWN")
        projection, residual = loaded.projection.apply(alone.vectors)
        np.testing.assert_allclose(row[t.PROJECTION], projection[0], rtol=1e-5, atol=1e-5)
        assert row[t.RESIDUAL_NORM] == pytest.approx(residual[0], rel=1e-9)
        assert row[t.PATIENT_ID] == pseudonym(image.patient)
    parts = {(row[t.IMAGE_ID], row[t.BODY_PART], row[t.BODY_PART_SOURCE]) for row in rows}
    assert (pseudonym("c"), "BRAIN", t.FROM_PREDICTION) in parts
    # The model learned no class of ultrasound.
    assert (pseudonym("d"), "UNKNOWN", t.FROM_NOTHING) in parts

    again = features.run(spark, settings)
    assert (again.embedded, again.deleted, again.version) == (0, 0, first.version)
    assert t.version(spark, first.table) == first.version

    # The batch is replaced: e is gone, a has other pixels (another drawing), the rest is the same, g is new.
    changed = [image for image in IMAGES if image.name not in "ae"]
    publish(spark, settings, [*changed, Drawn("a", "p1", "MR", "BRAIN"), Drawn("g", "p9", "MR", "BRAIN")])
    third = features.run(spark, settings)
    assert (third.embedded, third.deleted, third.rows) == (2, 2, FRAMES)
    kept = {(row[t.IMAGE_ID], row[t.FRAME]): row for row in rows}
    for row in rows_of(features.open_index(spark, settings).rows):
        old = kept.get((row[t.IMAGE_ID], row[t.FRAME]))
        assert (old == row) == (row[t.IMAGE_ID] not in {pseudonym("a"), pseudonym("g")})


def test_any_parquet_reader_reads_the_live_files(spark: SparkSession, settings: Settings) -> None:
    lake = publish(spark, settings, IMAGES)
    features.run(spark, settings)
    publish(spark, settings, IMAGES[1:])
    report = features.run(spark, settings)
    assert report.deleted == 1
    path, uris = features.live_files(spark, settings)
    assert path == lake.features(report.model_id)
    names = [storage.local_path(uri) for uri in uris]
    assert all("/modality=" in name and "/body_part=" in name for name in names)
    # The deleted row's file still lies in the folder, and must not be among the live ones.
    assert set(names) < {str(file) for file in Path(storage.local_path(path)).rglob("*.parquet")}
    plain = ds.dataset(names, partitioning="hive", partition_base_dir=storage.local_path(path)).to_table()
    through_delta = features.open_index(spark, settings).rows.toArrow()
    order = [(t.IMAGE_ID, "ascending"), (t.FRAME, "ascending")]
    columns = t.FEATURES.schema.names
    assert plain.num_rows == FRAMES - 1
    assert plain.sort_by(order).select(columns).to_pylist() == through_delta.sort_by(order).select(columns).to_pylist()


@pytest.mark.parametrize(("spoil", "words"), [(float("nan"), "2 with NaN"), (0.0, "2 of zeros alone")])
def test_vectors_that_cannot_be_searched_stop_the_job_before_they_are_seen(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, spoil: float, words: str
) -> None:
    saved = save_model(tmp_path / "spoilt", spoil=spoil)
    settings = make_settings(f"index.model={tmp_path / 'spoilt'}")
    lake = publish(spark, settings, [IMAGES[0], IMAGES[4]])
    with pytest.raises(TableError, match=words):
        features.run(spark, settings)
    assert t.read(spark, lake.features(saved.manifest.model_id)).count() == 0


def test_inspection_counts_each_fault(spark: SparkSession) -> None:
    good, infinite = [1.0, 0.0], [float("inf"), 1.0]
    rows = [(good, 0.5), (infinite, 0.5), ([0.0, 0.0], 0.0), ([1.0], 0.5), ([1.0, 2.0, 3.0], 0.5), (good, float("nan"))]
    df = spark.createDataFrame(rows, "vector array<float>, residual_norm double").repartition(3)
    found = features.inspect(df, 2)
    assert dataclasses.astuple(found) == (6, 2, 2, 1)
    assert found.faults == "2 of another dimension, 2 with NaN or infinite values, 1 of zeros alone"
    assert features.inspect(df.where("false"), 2) == features.Inspection(0, 0, 0, 0)


def test_a_model_of_other_pixels_is_refused(spark: SparkSession, make_settings: MakeSettings, tmp_path: Path) -> None:
    save_model(tmp_path / "other", preprocessing="px9-else")
    settings = make_settings(f"index.model={tmp_path / 'other'}")
    lake = publish(spark, settings, IMAGES[:1])
    with pytest.raises(ModelError, match=f"px9-else.*{PREPROCESSING}"):
        features.run(spark, settings)
    assert storage.kind(storage.join(lake.uri, "features"), settings.storage) == "nothing"


def test_a_table_of_another_model_is_refused_naming_both(
    spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    lake = publish(spark, settings, IMAGES[:1])
    mine = features.run(spark, settings).model_id
    other = save_model(tmp_path / "second", seed=2).manifest.model_id
    os.rename(storage.local_path(lake.features(mine)), storage.local_path(lake.features(other)))
    second = settings.model_copy(
        update={"retrieval": settings.retrieval.model_copy(update={"model": str(tmp_path / "second")})}
    )
    with pytest.raises(ModelError, match=f"{mine}.*{other}"):
        features.open_index(spark, second)
    with pytest.raises(TableError, match=f"{mine} has no index"):
        features.open_index(spark, settings)


def test_without_a_champion_the_error_says_what_to_run(spark: SparkSession, make_settings: MakeSettings) -> None:
    with pytest.raises(ModelError, match="run `cbmir train`, then `cbmir index`"):
        features.open_index(spark, make_settings())


def test_a_model_that_a_registry_knows_becomes_its_champion(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The registry itself is training's, and tested there; here it matters when it is asked and for what.
    asked: list[str] = []
    moved: list[tuple[str, str]] = []
    files = ((tmp_path / "model/manifest.json").read_text(), (tmp_path / "model/weights.safetensors").read_bytes())

    def resolve(uri: str, _: Settings) -> tuple[str, bytes]:
        asked.append(uri)
        return files

    def move(_: Settings, alias: str, model_id: str) -> str:
        moved.append((alias, model_id))
        return "4"

    monkeypatch.setattr(training, "resolve_model", resolve)
    monkeypatch.setattr(training, "move_alias", move)
    registered = settings.model_copy(update={"index": settings.index.model_copy(update={"model": None})})
    publish(spark, settings, IMAGES[:1])
    report = features.run(spark, registered)
    assert asked == ["models:/cbmir@candidate"]
    assert moved == [("champion", report.model_id)]
    assert report.champion == "4"


def test_body_parts_come_from_the_tag_then_from_a_sure_prediction() -> None:
    found = features.body_parts(
        ["CHEST", "UNKNOWN", "UNKNOWN", "UNKNOWN", "UNKNOWN"],
        ["CT/HEAD", "CT/HEAD", "HEAD", "CT/HEAD", None],
        [1.0, 0.8, 0.9, 0.79, 0.0],
        0.8,
    )
    assert found == [
        ("CHEST", t.FROM_TAG),
        ("HEAD", t.FROM_PREDICTION),
        ("HEAD", t.FROM_PREDICTION),
        ("UNKNOWN", t.FROM_NOTHING),
        ("UNKNOWN", t.FROM_NOTHING),
    ]


def test_big_partitions_are_spread_and_small_ones_are_one_file(spark: SparkSession, tmp_path: Path) -> None:
    rows = spark.range(5000).select(
        F.concat(F.lit("i"), F.col("id")).alias(t.IMAGE_ID),
        F.lit(0).alias(t.FRAME),
        (F.col("id") / 10).cast("int").cast("string").alias(t.SERIES_ID),
        F.when(F.col("id") < 4900, "CT").otherwise("MR").alias(t.MODALITY),
        F.when(F.col("id") < 4900, "CHEST").otherwise("BRAIN").alias(t.BODY_PART),
    )
    counts = {("CT", "CHEST"): 4900, ("MR", "BRAIN"): 100}
    laid = features.spread(rows, counts, 1000)
    sizes = [row["count"] for row in laid.groupBy(F.spark_partition_id(), t.MODALITY).count().collect()]
    assert sum(sizes) == 5000
    assert 3 <= len(sizes) <= 6
    partition = laid.where("modality = 'CT'").select(F.spark_partition_id().alias("p"), t.SERIES_ID).toArrow()
    runs = [(p, s) for p, s in zip(*(partition.column(n).to_pylist() for n in ("p", t.SERIES_ID)), strict=True)]
    changes = sum(one != other for one, other in itertools.pairwise(runs)) + 1
    assert changes == len(set(runs))


def test_batches_are_read_without_a_copy() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(6, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 256, 256)).astype(np.uint8)
    batch = pa.RecordBatch.from_arrays(
        [features.vector_column(vectors), pa.array([frame.tobytes() for frame in pixels], pa.binary())],
        names=[t.VECTOR, t.PIXELS_COLUMN],
    )
    part = batch.slice(2, 3)
    assert (features.vectors_of(part, 4) == vectors[2:5]).all()
    assert (features.pixels_of(part) == pixels[2:5]).all()
    assert not features.vectors_of(part, 4).flags.owndata
    assert not features.pixels_of(part).flags.owndata
    with pytest.raises(TableError, match="3 of 3 vectors do not have 5"):
        features.vectors_of(part, 5)
