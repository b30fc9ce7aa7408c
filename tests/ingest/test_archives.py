"""Archives of every kind: real files, other file systems, and those that cannot be listed or read."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.dicom.read import Reason
from cbmir_spark.errors import EnvironmentProblem, InputError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import MakeSettings
from tests.support.archives import sample
from tests.support.dicom_index import predicted
from tests.support.nights import Night, key_file_of, live_rows

pytestmark = pytest.mark.slow


def test_real_files_have_the_outcome_that_their_index_predicts(
    spark: SparkSession, make_settings: MakeSettings, shared_data: Path
) -> None:
    """Every file below the folder gets exactly one outcome, and whatever decodes yields frames or a reason."""
    settings = make_settings(f"ingest.archive={shared_data / 'dicom'}")
    report = ingest_job.run(spark, settings)
    files = sorted(str(p) for p in (shared_data / "dicom").rglob("*") if p.is_file())
    lake = LakePaths.of(settings.lake)
    rows = delta.read(spark, lake.path(schemas.SOURCES)).collect()
    assert sorted(storage.local_path(row["uri"]) for row in rows) == [os.path.abspath(f) for f in files]
    assert report.listed == len(files) == sum(report.outcomes.values())
    with (shared_data / "dicom_index.csv").open(newline="", encoding="utf-8") as index:
        wanted = {os.path.abspath(shared_data / row["file"]): predicted(row) for row in csv.DictReader(index)}
    for row in rows:
        # Beside the files of the index lie their licences.
        outcome, reason = wanted.get(storage.local_path(row["uri"]), (cols.NOT_AN_IMAGE, Reason.NOT_DICOM))
        may_be = (cols.INGESTED, cols.DUPLICATE, cols.CONFLICT) if outcome == cols.INGESTED else (outcome,)
        assert row["outcome"] in may_be and row["reason"] == reason, row["uri"]
    images = [row["image_id"] for row in rows if row["outcome"] == cols.INGESTED]
    assert len(images) == len(set(images)) > 150
    pixels = delta.read(spark, lake.path(schemas.PIXELS), report.published.pixels)
    assert {row["image_id"] for row in pixels.select("image_id").distinct().collect()} == set(images)
    assert "INTERNAL" not in report.reasons
    again = ingest_job.run(spark, settings)
    assert (again.read, again.unchanged) == (0, len(files))


def test_an_archive_that_only_hadoop_can_read(spark: SparkSession, night: Night, tmp_path: Path) -> None:
    """By a mount of Hadoop's ViewFs, the same rows as from the folder itself; Spark sees no empty or hidden one."""
    jvm = spark.sparkContext._jsc
    assert jvm is not None
    jvm.hadoopConfiguration().set("fs.viewfs.mounttable.clinic.link./pacs", night.archive.as_uri())
    lake = LakePaths.of(night.settings.lake)
    settings = config.load(
        overrides=["ingest.archive=viewfs://clinic/pacs", f"lake.uri={tmp_path / 'lake'}", key_file_of(lake)],
        environ={},
    )
    report = ingest_job.run(spark, settings)
    assert report.listed == report.read == 9
    mounted, direct = live_rows(spark, settings), live_rows(spark, night.settings)
    assert mounted["tags"] == direct["tags"]
    assert mounted["pixels"] == direct["pixels"]
    assert ingest_job.run(spark, settings).unchanged == 9
    absent = config.load(overrides=[f"lake.uri={tmp_path / 'other'}", "ingest.archive=viewfs://clinic/no"], environ={})
    with pytest.raises(InputError, match="does not exist"):
        ingest_job.run(spark, absent)


def test_bad_archives_and_lakes_are_refused_before_anything_is_made(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "file").touch()
    for overrides, message in [
        ((), "no archive named"),
        ((f"ingest.archive={tmp_path / 'absent'}",), "does not exist"),
        ((f"ingest.archive={tmp_path / 'file'}",), "is a file"),
        ((f"ingest.archive={archive}", f"lake.uri={tmp_path / 'file'}"), "is a file"),
        ((f"ingest.archive={archive}", f"lake.uri={archive / 'lake'}"), "is inside archive"),
    ]:
        with pytest.raises(InputError, match=message):
            ingest_job.run(spark, make_settings(*overrides))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "file"]


def test_an_empty_archive_that_is_known_is_refused_as_a_lost_mount(spark: SparkSession, night: Night) -> None:
    before = live_rows(spark, night.settings)
    away = night.archive.with_name("away")
    night.archive.rename(away)
    night.archive.mkdir()
    try:
        with pytest.raises(InputError, match="is it mounted"):
            ingest_job.run(spark, night.settings)
    finally:
        night.archive.rmdir()
        away.rename(night.archive)
    assert live_rows(spark, night.settings) == before


def test_a_folder_that_cannot_be_listed_deletes_nothing(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Nor does it name the folder: names of folders may be patients'."""
    archive = tmp_path / "archive"
    for number in range(40):
        sample(archive, f"MILLER{number}/one.dcm", hour=1, SOPInstanceUID=f"1.2.3.{number}")
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    before = live_rows(spark, settings)
    # A name that is a loop of links is an error for everybody, root included.
    shutil.rmtree(archive / "MILLER7")
    (archive / "MILLER7").symlink_to(archive / "MILLER7")
    with pytest.raises(EnvironmentProblem, match="could not be listed") as raised:
        ingest_job.run(spark, settings)
    assert "MILLER" not in str(raised.value)
    assert live_rows(spark, settings) == before


def test_a_storage_that_refuses_everything_rejects_no_object(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """One object that cannot be read is rejected and tried again every night; all of them are the storage's fault."""
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in range(11):
        # Listed like any file; reading it fails for everybody, root included.
        (archive / f"{number}.dcm").symlink_to("/proc/self/mem")
    settings = make_settings(f"ingest.archive={archive}")
    with pytest.raises(EnvironmentProblem, match="refused all 11 objects"):
        ingest_job.run(spark, settings)
    sample(archive, "readable.dcm")
    report = ingest_job.run(spark, settings)
    assert report.reasons == {cols.UNREADABLE: 11} and report.outcomes[cols.INGESTED] == 1
