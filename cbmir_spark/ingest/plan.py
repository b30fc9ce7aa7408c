"""Plan the work of an ingest: list the archive, compare it with SOURCES, divide what is to be done into batches.

The plan is stored in Parquet files below the staging folder, so that no step is computed twice and the objects of an
archive never pass through the driver. Runs on the driver; listing and comparing are Spark jobs.
"""

import math
from dataclasses import dataclass

from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import IngestSettings
from cbmir_spark.errors import EnvironmentProblem, InputError, TableError
from cbmir_spark.ingest.compare import (
    ACTION,
    KNOWN_OUTCOME,
    MARKED,
    MISSING,
    PROMOTED,
    READ,
    SLICE,
    UNCHANGED,
    compare,
    keep_unreachable,
    promote,
    slices,
)
from cbmir_spark.ingest.listing import LISTING, WITH_CAUSE, Listed, check_listing, list_archive
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.lake.runs import Record


@dataclass(frozen=True)
class Staging:
    """Names of the Parquet folders that one run writes below its staging folder; nothing is read or written here."""

    folder: str

    @property
    def listing(self) -> str:
        """Every object of the archive."""
        return storage.join(self.folder, "listing")

    @property
    def actions(self) -> str:
        """The action for each object that is not unchanged."""
        return storage.join(self.folder, "actions")

    @property
    def work(self) -> str:
        """The actions, partitioned by batch."""
        return storage.join(self.folder, "work")

    def frames(self, number: int) -> str:
        """Frames of one batch's objects; tasks write them."""
        return storage.join(self.folder, f"frames-{number}")

    def parsed(self, number: int) -> str:
        """STAGED rows of one batch."""
        return storage.join(self.folder, f"parsed-{number}")

    def resolved(self, number: int) -> str:
        """Outcomes of the images that one batch touches."""
        return storage.join(self.folder, f"resolved-{number}")


@dataclass(frozen=True)
class Plan:
    """The work of one run.

    Of the `listed` objects, `unchanged` need nothing and `to_read` are new, changed, or marked to be read again, as
    `marked` of them are; `missing` objects are in SOURCES but no longer in the archive. `work` has the columns that
    `compare.slices` returns; `batches` are the numbers of its slices that are not empty, in the order in which to
    publish them.
    """

    listed: int
    unchanged: int
    to_read: int
    missing: int
    marked: int
    work: DataFrame
    batches: tuple[int, ...]

    def batch(self, number: int) -> DataFrame:
        """Select the work of one batch."""
        return self.work.where(F.col(SLICE) == number)

    def deferred(self, done: int) -> int:
        """Count the objects to read in the batches after the first `done` ones."""
        if done >= len(self.batches):
            return 0
        rest = self.work.where(F.col(SLICE).isin(*self.batches[done:]))
        return rest.where((F.col(ACTION) == READ) & ~F.col(PROMOTED)).count()


def make_plan(
    lake: OpenLake, archive: str, sources: DataFrame, limits: IngestSettings, staging: Staging, record: Record
) -> Plan:
    """Plan what to do with each object of an archive (canonical URI), compared with the published `sources`.

    Raises InputError where a known archive is empty, EnvironmentProblem where it cannot be listed completely.
    """
    with record.stage("list"):
        listed = _write_listing(lake, archive, staging)
    with record.stage("compare"):
        compared = _compare(lake, archive, sources, listed, staging)
        check_counts(listed.rows, compared.unchanged + compared.to_read, "compared with SOURCES")
        count = math.ceil(compared.to_read / limits.max_files_per_batch) or int(compared.missing > 0)
        work, batches = _divide(lake, compared, sources, count, staging)
    return Plan(listed.rows, compared.unchanged, compared.to_read, compared.missing, compared.marked, work, batches)


def check_counts(expected: int, found: int, step: str) -> None:
    """Check the invariant that each object has exactly one outcome. Raises TableError before anything is published."""
    if expected != found:
        raise TableError(
            f"{expected} objects, but {found} were {step}: this batch was not published; run `cbmir ingest` again"
        )


@dataclass(frozen=True)
class _Compared:
    """Actions that are not UNCHANGED, and counts of all; `known` objects to read are in SOURCES already."""

    actions: DataFrame
    to_read: int = 0
    unchanged: int = 0
    missing: int = 0
    known: int = 0
    marked: int = 0


def _write_listing(lake: OpenLake, archive: str, staging: Staging) -> Listed:
    """List the archive into the staging folder."""
    mount = storage.mount_of(archive)
    list_archive(lake.spark, archive, lake.store).write.parquet(staging.listing)
    if storage.mount_of(archive) != mount:
        raise EnvironmentProblem(
            f"archive {archive} was mounted or unmounted while it was listed: nothing was read and nothing marked as "
            "deleted; run `cbmir ingest` again"
        )
    written = lake.spark.read.schema(WITH_CAUSE).parquet(staging.listing)
    return check_listing(written, lake.paths.unlisted, lake.store)


def _compare(lake: OpenLake, archive: str, sources: DataFrame, listed: Listed, staging: Staging) -> _Compared:
    listing = lake.spark.read.schema(LISTING).parquet(staging.listing)
    known = sources.where(F.startswith(F.col(cols.URI), F.lit(archive + "/")))
    if not listed.rows and (missing := known.where(F.col(cols.OUTCOME) != cols.DELETED).count()):
        raise InputError(
            f"archive {archive} is empty, but {missing} of its objects are known: is it mounted? Nothing was deleted"
        )
    if listed.no_files:
        listing, known = keep_unreachable(listing, known)
    compared = compare(listing, known)
    if not listed.rows:
        return _Compared(compared)
    is_read = F.col(ACTION) == READ
    # One pass over an archive of millions: its unchanged objects are counted and not written.
    counts = Observation()
    observed = compared.observe(
        counts,
        F.count_if(is_read).alias("to_read"),
        F.count_if(F.col(ACTION) == UNCHANGED).alias("unchanged"),
        F.count_if(F.col(ACTION) == MISSING).alias("missing"),
        F.count_if(is_read & F.col(KNOWN_OUTCOME).isNotNull()).alias("known"),
        F.count_if(is_read & F.col(MARKED)).alias("marked"),
    )
    observed.where(F.col(ACTION) != UNCHANGED).write.parquet(staging.actions)
    return _Compared(lake.spark.read.schema(compared.schema).parquet(staging.actions), **counts.get)


def _divide(
    lake: OpenLake, compared: _Compared, sources: DataFrame, count: int, staging: Staging
) -> tuple[DataFrame, tuple[int, ...]]:
    """Divide the work into `count` batches; the work, and the numbers of the batches that are not empty."""
    if not count:
        return compared.actions, ()
    changed = compared.known + compared.missing > 0
    promoted = promote(compared.actions, sources)
    work = slices(compared.actions, promoted if changed else promoted.limit(0), count)
    if count == 1 and not changed:
        return work, (0,)
    work.write.partitionBy(SLICE).parquet(staging.work)
    work = lake.spark.read.schema(work.schema).parquet(staging.work)
    # A hash may leave a slice of few objects empty; there is nothing to publish for it.
    return work, tuple(sorted(row[SLICE] for row in work.select(SLICE).distinct().collect()))
