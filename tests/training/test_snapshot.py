"""Snapshots hold every usable frame of the published versions once, split by patient, and are written once."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.open import open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import snapshot as snapshots
from cbmir_spark.training.loader import Loader
from cbmir_spark.training.manifest import TEST, TRAIN, Snapshot
from tests.support.archives import at
from tests.support.tiny_lake import Drawn, draw, pseudonym, publish

LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)


def some_images() -> list[Drawn]:
    plain = [
        Drawn(f"{modality}{part}{patient}{number}", f"{modality}{part}{patient}", modality, part)
        for modality, part, patients in (("CT", "CHEST", 4), ("MR", "HEAD", 3), ("US", "LIVER", 1))
        for patient in range(patients)
        for number in range(3)
    ]
    kept_out = [
        Drawn("burned", "x", "CT", "CHEST", burned_in="YES", text_risk=True),
        Drawn("of an older row", "x", "CT", "CHEST", burned_in="UNKNOWN", text_risk=None),
        Drawn("scout", "x", "CT", "CHEST", kind="localizer"),
        Drawn("untagged", "x", "MR", "UNKNOWN"),
        Drawn("rare", "x", "CT", "KNEE"),
    ]
    return [*plain, Drawn("volume", "CTCHEST0", "CT", "CHEST", frames=5), *kept_out]


@pytest.fixture(scope="module")
def lake_and_settings(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[LakePaths, Settings]:
    from cbmir_spark import config

    folder = tmp_path_factory.mktemp("lake")
    overrides = [f"lake.uri={folder / 'lake'}", "dataset.min_images=3", "dataset.rows_per_group=4", *SPLIT]
    settings = config.load(overrides=overrides, environ={})
    return publish(spark, settings, some_images()), settings


SPLIT = ("dataset.test_fraction=0.3", "dataset.validation_fraction=0")


def make(spark: SparkSession, settings: Settings) -> Snapshot:
    return snapshots.write_snapshot(open_lake(spark, settings), settings.dataset)


def content(snapshot: Snapshot, split: str) -> pd.DataFrame:
    folder = Path(storage.local_path(snapshot.uri))
    return pd.concat([pq.read_table(folder / file.path).to_pandas() for file in snapshot.files[split]])


def test_snapshot_holds_every_usable_frame_once_and_no_patient_twice(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    snapshot = make(spark, lake_and_settings[1])
    assert snapshot.classes == ("CT/CHEST", "MR/HEAD", "US/LIVER")
    assert snapshot.possible == {"CT": ("CT/CHEST",), "MR": ("MR/HEAD",), "US": ("US/LIVER",)}
    assert snapshot.single_patient_classes == ("US/LIVER",) and snapshot.left_out == {"CT/KNEE": 1}
    train, test = content(snapshot, TRAIN), content(snapshot, TEST)
    assert not set(train.patient_id) & set(test.patient_id)
    assert set(test.label) == {"CT/CHEST", "MR/HEAD"}
    rows = pd.concat([train, test])
    expected = {
        (pseudonym(image.name), frame): draw(image, frame).tobytes()
        for image in some_images()[:-5]
        for frame in range(image.frames)
    }
    assert len(rows) == len(expected) == snapshot.rows(TRAIN) + snapshot.rows(TEST)
    assert {(row.image_id, row.frame): row.pixels for row in rows.itertuples()} == expected
    assert all(snapshot.classes[row.target] == row.label for row in rows.itertuples())
    # Rows lie in random order: a row group is a fair sample, not one class.
    assert any(a != b for a, b in zip(train.label, sorted(train.label), strict=True))


def test_rows_of_older_lakes_are_left_out_unless_the_policy_includes_them(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    lake, _ = lake_and_settings
    pinned = publication.require_published(spark, lake)
    pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels)
    tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
    older = tags.drop(cols.TEXT_RISK)
    assert pixels.transform(snapshots.labelled(older, "body_part")).isEmpty()
    included = pixels.transform(snapshots.labelled(older, "body_part", "include")).count()
    assert included == pixels.transform(snapshots.labelled(tags, "body_part", "include")).count()
    assert included == pixels.transform(snapshots.labelled(tags, "body_part")).count() + 2


def test_snapshot_manifest_says_what_the_files_hold(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    snapshot = make(spark, lake_and_settings[1])
    folder = Path(storage.local_path(snapshot.uri))
    for split in (TRAIN, TEST):
        for file in snapshot.files[split]:
            footer = pq.read_metadata(folder / file.path)
            groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            assert groups == list(file.groups) and max(groups) <= 4
        assert sum(snapshot.images[split].values()) == snapshot.rows(split)
    assert Snapshot.from_json((folder / "manifest.json").read_bytes(), snapshot.uri) == snapshot


def test_snapshot_is_written_once_and_found_again(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    _, settings = lake_and_settings
    first = make(spark, settings)
    folder = Path(storage.local_path(first.uri))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # A batch with nothing to learn from moves the Delta versions and leaves the rows as they are.
    publish(spark, settings, [Drawn("late scout", "y", "CT", "CHEST", kind="localizer")], batch=2)
    again = make(spark, settings)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_an_unfinished_snapshot_is_written_again_to_the_same_bytes(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    first = make(spark, lake_and_settings[1])
    folder = Path(storage.local_path(first.uri))
    (folder / "manifest.json").unlink()
    (folder / "train" / "part-00099.parquet").write_bytes(b"left by a killed job")
    again = make(spark, lake_and_settings[1])
    assert again.files == first.files
    assert not (folder / "train" / "part-00099.parquet").exists()


def test_snapshot_errors_name_the_cause(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings], tmp_path: Path
) -> None:
    _, settings = lake_and_settings

    def ask(settings: Settings, **changes: object) -> None:
        make(spark, settings.override({"dataset": changes}))

    with pytest.raises(TrainingError, match=r"1 class\(es\).*\(CT/CHEST\).*MR/HEAD \(9\).*Two are needed"):
        ask(settings, min_images=10)
    with pytest.raises(TrainingError, match=r"0 class\(es\).*\(none\).*US/LIVER \(3\)"):
        ask(settings, min_images=100)
    small = settings.override({"lake.uri": str(tmp_path / "lake")})
    publish(spark, small, [Drawn(name, name, "CT", "UNKNOWN") for name in "abc"])
    with pytest.raises(TrainingError, match="every body part is UNKNOWN"):
        ask(small)
    publish(spark, small, [Drawn("d", "d", "CT", "CHEST"), Drawn("e", "e", "MR", "HEAD")], batch=2)
    with pytest.raises(TrainingError, match="the test split is empty: no class has enough patients"):
        ask(small, min_images=1)
    with pytest.raises(TrainingError, match=r"validation split is empty.*validation_fraction=0"):
        ask(small, min_images=1, test_fraction=0.0, validation_fraction=0.2)


# After an update of the lake


def write_slice(archive: Path, number: int, part: str, turned: int = 0, hour: int = 1) -> Path:
    """An image of patient `number` in four, whose pixels are like no other's; `turned` makes others of them."""
    image = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    image.PatientID, image.BodyPartExamined = f"patient {number % 4}", part
    image.StudyInstanceUID, image.SeriesInstanceUID = f"1.2.3.{number % 4}", f"1.2.3.{number % 4}.{len(part)}"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{len(part)}.{number}"
    image.PixelData = np.roll(image.pixel_array, 8 * number + turned + len(part), axis=1).tobytes()
    path = archive / part / f"{number}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path)
    os.utime(path, (at(hour).timestamp(),) * 2)
    return path


def digests(snapshot: Snapshot) -> list[str]:
    """Of the pixels of every row that the loaders of both splits give."""
    found = []
    for split in (TRAIN, TEST):
        for pixels, _ in Loader(snapshot, split, ObjectStore(LOCAL), batch_size=4, seed=1).epoch(0):
            found += [hashlib.sha256(row.tobytes()).hexdigest() for row in pixels.numpy()]
    return sorted(found)


def test_rows_of_files_that_delta_removed_are_in_no_snapshot_and_in_no_batch(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Their files stay in the table's folder, where whoever reads folders finds them."""
    from cbmir_spark import config

    archive = tmp_path / "archive"
    for number in range(8):
        for part in ("CHEST", "HEAD"):
            write_slice(archive, number, part)
    own = [f"lake.uri={tmp_path / 'lake'}", f"ingest.archive={archive}"]
    settings = config.load(overrides=[*own, "dataset.min_images=2", "dataset.rows_per_group=2", *SPLIT], environ={})
    ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    before = digests(make(spark, settings))
    assert len(set(before)) == 16

    write_slice(archive, 1, "CHEST", turned=64, hour=30)
    (archive / "HEAD" / "2.dcm").unlink()
    report = ingest_job.run(spark, settings)
    assert (report.read, report.deleted) == (1, 1)
    pinned = publication.require_published(spark, lake)
    pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels)
    live = sorted(row[cols.PIXEL_DIGEST] for row in pixels.select(cols.PIXEL_DIGEST).collect())
    named = {storage.local_path(uri) for uri in delta.live_files(spark, lake.path(schemas.PIXELS), pinned.pixels)}
    removed = {str(file) for file in Path(storage.local_path(lake.path(schemas.PIXELS))).rglob("*.parquet")} - named
    left = {digest for file in removed for digest in pq.read_table(file)[cols.PIXEL_DIGEST].to_pylist()}
    dead = left - set(live)
    assert len(dead) == 2 and dead < set(before), "nothing to be read by mistake"

    snapshot = make(spark, settings)
    assert digests(snapshot) == live and len(live) == 15
    rows = pd.concat([content(snapshot, split) for split in (TRAIN, TEST)])
    assert sorted(hashlib.sha256(row).hexdigest() for row in rows.pixels) == live
    ids = [row[cols.IMAGE_ID] for row in pixels.select(cols.IMAGE_ID).collect()]
    assert sorted(rows.image_id) == sorted(ids)
