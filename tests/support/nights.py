"""An archive with an object of every kind, the lake after its first night, and what is in a lake."""

import shutil
from pathlib import Path
from typing import NamedTuple

from pydicom.data import get_testdata_file
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from tests.support.archives import sample


def fill(folder: Path) -> Path:
    """Twelve objects: three images in five objects, a non-image, and six that cannot be used."""
    sample(folder, "ct/one.dcm", hour=1)
    shutil.copy2(folder / "ct/one.dcm", folder / "ct/one again.dcm")
    sample(folder, "ct/two.dcm", hour=1, SOPInstanceUID="1.2.3.2", PatientSex="F")
    sample(folder, "ct/two corrected.dcm", hour=2, SOPInstanceUID="1.2.3.2", PatientSex="M")
    sample(folder, "mr/three.dcm", source="MR_small.dcm", hour=1)
    shutil.copy(str(get_testdata_file("reportsi.dcm")), folder / "report.dcm")
    whole = (folder / "ct/one.dcm").read_bytes()
    (folder / "cut.dcm").write_bytes(whole[:-700])
    (folder / "empty.dcm").touch()
    (folder / ".hidden").write_text("not DICOM at all")
    (folder / "_notes.txt").write_text("nor this")
    (folder / "zeros.dcm").write_bytes(bytes(5000))
    sample(folder, "nameless.dcm", SOPInstanceUID="not.a.uid")
    return folder


def live_rows(spark: SparkSession, settings: config.Settings) -> dict[str, list[tuple[object, ...]]]:
    """The live rows of the three tables without what depends on the run."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    found = {}
    for table, version in (
        (schemas.TAGS, pinned.tags),
        (schemas.PIXELS, pinned.pixels),
        (schemas.SOURCES, pinned.sources),
    ):
        rows = delta.read(spark, lake.path(table), version).drop(cols.BATCH, cols.KEY_ID).collect()
        found[table.name] = sorted((tuple(row) for row in rows), key=repr)
    return found


def outcomes_of(spark: SparkSession, settings: config.Settings) -> dict[str, str]:
    """Outcomes by path below the archive."""
    sources = delta.read(spark, LakePaths.of(settings.lake).path(schemas.SOURCES))
    return {row["uri"].rsplit("/archive/", 1)[1]: row["outcome"] for row in sources.collect()}


def key_file_of(lake: LakePaths) -> str:
    """The setting that gives another lake the key of this one."""
    return f"privacy.key_file={storage.local_path(lake.vault)}/pseudonym.key"


class Night(NamedTuple):
    """A lake after its first night; tests of it change neither lake nor archive."""

    archive: Path
    overrides: tuple[str, ...]
    settings: config.Settings
    report: ingest_job.Report
