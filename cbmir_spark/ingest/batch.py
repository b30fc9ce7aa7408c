"""Parse one batch of an ingest: its objects → STAGED rows and frames, as Parquet below the staging folder.

Everything that is published later is written from these files, so that all tables hold the same bytes even where Spark
loses a partition and computes it again.
"""

import math
from dataclasses import dataclass

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.dicom.reasons import Reason
from cbmir_spark.errors import EnvironmentProblem
from cbmir_spark.ingest.compare import ACTION, PROMOTED, READ
from cbmir_spark.ingest.listing import few_rows_at_a_time, with_content
from cbmir_spark.ingest.parse import FRAME_COUNT, STAGED, Parser, Tally, parse
from cbmir_spark.ingest.plan import Staging, check_counts
from cbmir_spark.lake import columns as cols

# If storage refuses every object of a batch of at least this size, the storage is at fault, not the objects.
REFUSED_OBJECTS = 10
# Each core gets at least TASKS_FOR_A_CORE tasks, as long as each of them has WORTH_A_TASK objects to read.
TASKS_FOR_A_CORE, WORTH_A_TASK = 4, 32


@dataclass(frozen=True)
class Parsed:
    """STAGED rows of one batch; `read` of them were new or changed in the listing, the others are read again."""

    number: int
    staged: DataFrame
    read: int


def parse_batch(
    spark: SparkSession, archive: str, work: DataFrame, number: int, parser: Parser, staging: Staging, tally: Tally
) -> Parsed:
    """Read and parse the objects of one batch; `work` is `Plan.batch(number)`. Tasks read, decode and write frames.

    Raises EnvironmentProblem where storage refuses all objects, TableError where objects have no outcome.
    """
    objects = work.where(F.col(ACTION) == READ)
    counted = objects.select(F.count("*").alias("all"), F.count_if(~F.col(PROMOTED)).alias(READ)).first()
    planned, read = (counted["all"], counted[READ]) if counted else (0, 0)
    frames_folder, staged_folder = staging.frames(number), staging.parsed(number)
    if storage.is_native(archive):
        tasks = _tasks(planned, spark.sparkContext.defaultParallelism, parser.limits.files_per_task)
        objects = objects.repartition(tasks, cols.URI)
        parse(objects, parser, frames_folder, tally).write.parquet(staged_folder)
    else:
        _parse_by_hadoop(spark, objects, parser, frames_folder, staged_folder, tally)
    staged = spark.read.schema(STAGED).parquet(staged_folder)
    refused = F.count_if(F.col(cols.REASON) == cols.UNREADABLE)
    ended = staged.select(F.count("*").alias("all"), refused.alias("refused")).first()
    done, failed = (ended["all"], ended["refused"]) if ended else (0, 0)
    check_counts(planned, done, "parsed")
    if failed == planned >= REFUSED_OBJECTS:
        raise EnvironmentProblem(
            f"storage refused all {planned} objects of a batch: check the storage and its permissions, then run "
            "`cbmir ingest` again; earlier batches remain published"
        )
    return Parsed(number, staged, read)


def _tasks(objects: int, cores: int, files_per_task: int) -> int:
    """As few tasks as allowed, since each costs a third of a second, but enough that no core waits for the last one."""
    busy = min(TASKS_FOR_A_CORE * cores, objects // WORTH_A_TASK)
    return max(1, busy, math.ceil(objects / files_per_task))


def _parse_by_hadoop(
    spark: SparkSession, objects: DataFrame, parser: Parser, frames_folder: str, staged_folder: str, tally: Tally
) -> None:
    """Parse objects whose bytes come through the JVM: few at a time, since each may have a gigabyte."""
    too_large = F.col(cols.SIZE) > parser.limits.max_object_mb * 2**20
    fitting = objects.where(~too_large)
    with few_rows_at_a_time(spark):
        if not fitting.isEmpty():
            parse(with_content(spark, fitting), parser, frames_folder, tally).write.parquet(staged_folder)
    _unread(objects.where(too_large), cols.REJECTED, Reason.TOO_LARGE.value).write.mode("append").parquet(staged_folder)
    staged = spark.read.schema(STAGED).parquet(staged_folder)
    vanished = objects.join(staged.select(cols.URI), on=cols.URI, how="left_anti")
    _unread(vanished, cols.VANISHED, cols.GONE).write.mode("append").parquet(staged_folder)


def _unread(objects: DataFrame, outcome: str, reason: str) -> DataFrame:
    """STAGED rows of objects that were not read."""
    known = {cols.OUTCOME: F.lit(outcome), cols.REASON: F.lit(reason), FRAME_COUNT: F.lit(0)}
    known |= {name: F.col(name) for name in (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG)}
    empty = {f.name: F.lit(None) for f in STAGED}
    return objects.select(*[(empty | known)[f.name].cast(f.dataType).alias(f.name) for f in STAGED])
