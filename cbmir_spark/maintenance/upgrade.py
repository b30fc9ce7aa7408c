"""`cbmir upgrade`: find the objects of a lake that this version reads in another way, and mark them.

The next ingest reads what is marked again, and writes only what really differs; the next index embeds only that. Models
remain valid. Runs on the driver; tasks compare.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.config import Settings
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.errors import TableError
from cbmir_spark.ingest.parse import preprocessing_of
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, lease, publication, schemas
from cbmir_spark.lake.conform import add_missing_columns
from cbmir_spark.lake.open import OpenLake, open_for_writing, open_lake
from cbmir_spark.lake.pseudonyms import PatientRule, patient_rule
from cbmir_spark.lake.runs import Record
from cbmir_spark.maintenance.revisions import (
    FIXED_WINDOWS_SCHEMA,
    MAY_CHANGE,
    PATIENTS,
    Change,
    chosen,
    fixed_windows,
    may_change,
    objects_of,
)


@dataclass(frozen=True)
class Affected:
    """One change, and the number of objects that it may concern."""

    name: str
    what: str
    objects: int


@dataclass(frozen=True)
class Report:
    """What an upgrade marks, or would mark; an object may be concerned by several of the `changes`.

    `marked` objects were marked before and are not read again yet. `written_by` is the version that last published the
    lake ("": one that did not say so). `patients` and `patients_before` are the rules for what identifies a patient.
    """

    applied: bool
    objects: int
    marked: int
    changes: tuple[Affected, ...]
    patients: PatientRule
    patients_before: PatientRule
    written_by: str
    seconds: Mapping[str, float]

    @property
    def is_current(self) -> bool:
        """True if there is nothing to mark and nothing marked."""
        return not self.objects and not self.marked and self.patients is self.patients_before


def run(spark: SparkSession, settings: Settings, *, apply: bool = False, skip: Collection[str] = ()) -> Report:
    """Count the objects to read again by change; with `apply`, mark them and give the lake the settings' patient rule.

    Raises InputError for an unknown change in `skip`, TableError for a lake without images or of other pixel settings;
    with `apply` also Busy while another job writes to the lake.
    """
    changes = chosen(skip)
    record = Record.begin("upgrade")
    if not apply:
        return _report(open_lake(spark, settings), settings, changes, record)
    with open_for_writing(spark, settings, lease.TABLES) as lake:
        pinned = lake.versions
        publication.roll_back(spark, lake.paths, pinned)
        evolved = delta.evolve(lake.table(schemas.SOURCES, pinned.sources), schemas.SOURCES, pinned.message())
        if evolved is not None:
            lake = lake.at(replace(pinned, sources=evolved))
        return _report(lake, settings, changes, record, apply=True)


def _report(
    lake: OpenLake, settings: Settings, changes: tuple[Change, ...], record: Record, *, apply: bool = False
) -> Report:
    pinned = lake.versions
    preprocessing = preprocessing_of(settings.pixels)
    if pinned.preprocessing != preprocessing.version:
        raise TableError(
            f"lake {lake.paths.uri} holds pixels of preprocessing {pinned.preprocessing}, the `pixels` settings give "
            f"{preprocessing.version}: put the settings back"
        )
    wanted = patient_rule(settings.privacy) if PATIENTS in changes else pinned.patients
    applicable = [change for change in changes if change is not PATIENTS or wanted is not pinned.patients]
    with record.stage("compare"):
        sources = add_missing_columns(lake.sources, schemas.SOURCES)
        is_marked = F.coalesce(F.col(cols.REASON) == cols.REREAD, F.lit(False))
        marked = sources.where(is_marked).count()
        found = may_change(_objects(lake, sources.where(~is_marked), preprocessing), applicable)
        found = found.persist(StorageLevel.MEMORY_AND_DISK)
        counts = {row["name"]: row["count"] for row in _by_change(found).collect()}
        objects = found.count()
    if apply and (objects or wanted is not pinned.patients):
        with record.stage("mark"):
            again = sources.join(found.select(cols.URI), on=cols.URI, how="left_semi")
            again = again.withColumn(cols.REASON, F.lit(cols.REREAD))
            belongs = replace(pinned, patients=wanted)
            lake.check_leases()
            published = (
                publication.publish(lake.spark, lake.paths, again, belongs)
                if objects
                else publication.publish_without_rows(lake.spark, lake.paths, belongs)
            )
        written = {"sources": published.sources, "tags": published.tags, "pixels": published.pixels}
        record.write(lake.spark, lake.paths, counts={"marked": objects}, versions_written=written)
    found.unpersist()
    return Report(
        applied=apply,
        objects=objects,
        marked=marked,
        changes=tuple(Affected(each.name, each.what, counts.get(each.name, 0)) for each in applicable),
        patients=wanted,
        patients_before=pinned.patients,
        written_by=pinned.software,
        seconds=record.seconds,
    )


def _objects(lake: OpenLake, sources: DataFrame, preprocessing: Preprocessing) -> DataFrame:
    places = [(row[0], row[1]) for row in lake.tags.select(cols.MODALITY, cols.BODY_PART).distinct().collect()]
    windows = lake.spark.createDataFrame(fixed_windows(places, preprocessing), FIXED_WINDOWS_SCHEMA)
    return objects_of(sources, lake.tags, lake.pixels, windows)


def _by_change(found: DataFrame) -> DataFrame:
    return found.select(F.explode(MAY_CHANGE).alias("name")).groupBy("name").count()
