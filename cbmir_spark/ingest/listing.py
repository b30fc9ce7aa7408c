"""List every object below an archive, in parallel; a listing that fails anywhere fails as a whole."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from cbmir_spark import storage
from cbmir_spark.errors import EnvironmentProblem, InputError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.storage import ObjectStore

# Tasks that list, for each core: folders differ in size, and a task costs a third of a second.
TASKS_FOR_A_CORE = 4
# Rows that a task hands over at a time.
_ROWS = 10_000

LISTING = StructType([f for f in schemas.SOURCES.schema if f.name in (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG)])
# The size in a row that marks a folder which could not be listed.
_FAILED = -1
CONTENT = "content"
_OBJECTS_AT_A_TIME = 8


def list_archive(spark: SparkSession, archive: str, store: ObjectStore) -> DataFrame:
    """List every object below an archive, hidden names included: (uri, size, modified, etag).

    The driver descends folder by folder until there are enough folders to distribute; tasks list the rest. A folder
    that cannot be listed becomes a row that `check_listing` finds: its name must not reach the logs of a failed task.
    Schemes other than `file:` and `s3a:` are listed by Hadoop's connectors, which skip empty objects and names that
    begin with a dot or an underscore. Raises InputError where the archive does not exist, EnvironmentProblem where
    listing fails.
    """
    if not storage.is_native(archive):
        return _listed_by_hadoop(spark, archive)
    found: list[storage.StoredObject] = []
    folders, arrow = [archive], arrow_schema(LISTING)
    tasks = TASKS_FOR_A_CORE * spark.sparkContext.defaultParallelism
    while folders and len(folders) < tasks:
        deeper: list[str] = []
        for folder in folders:
            try:
                below, objects = store.list_folder(folder)
            except FileNotFoundError:
                if folder == archive:
                    raise _failure(1) from None
                continue  # deleted since its parent was listed, with its objects
            except OSError as error:
                raise _failure(1, error.strerror or type(error).__name__) from None
            deeper += below
            found += objects
        folders = deeper
    here = spark.createDataFrame(pa.Table.from_batches(_batches(found), arrow))
    if not folders:
        return here

    def list_below(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for folder in batch.column(0).to_pylist():
                yield from _batches(_objects(folder, store))

    shared = spark.createDataFrame([(folder,) for folder in folders], "folder string")
    return here.unionByName(shared.repartition(tasks).mapInArrow(list_below, LISTING))


def with_content(spark: SparkSession, objects: DataFrame) -> DataFrame:
    """Read objects that only Hadoop's connectors can read, with their bytes in the column CONTENT.

    Objects deleted since they were listed have no row. The URIs of `objects`, at most a batch, pass through the driver.
    """
    uris = [row[cols.URI] for row in objects.select(cols.URI).collect()]
    # Names may hold brackets and asterisks; each is one object, never a pattern.
    reader = spark.read.format("binaryFile").option("__globPaths__", "false").option("ignoreMissingFiles", "true")
    try:
        read = reader.load(uris)
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            raise EnvironmentProblem(
                "objects were deleted while the batch was planned: run `cbmir ingest` again"
            ) from None
        raise
    return read.select(
        _spelled("path").alias(cols.URI),
        F.col("length").alias(cols.SIZE),
        F.col("modificationTime").alias(cols.MODIFIED),
        F.lit(None).cast("string").alias(cols.ETAG),
        F.col("content").alias(CONTENT),
    )


@contextmanager
def few_rows_at_a_time(spark: SparkSession) -> Iterator[None]:
    """Pass rows to Python in small batches while the block runs, since each holds a whole object."""
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(key, None)
    spark.conf.set(key, str(_OBJECTS_AT_A_TIME))
    try:
        yield
    finally:
        if before is None:
            spark.conf.unset(key)
        else:
            spark.conf.set(key, before)


def _listed_by_hadoop(spark: SparkSession, archive: str) -> DataFrame:
    reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true").option("__globPaths__", "false")
    try:
        found = reader.load(archive)
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            raise InputError(
                f"archive {archive} does not exist: give the folder or prefix that holds the .dcm objects"
            ) from None
        raise _failure(1) from None
    except Py4JJavaError as error:
        cause: Any = error.java_exception
        raise _failure(1, cause.getClass().getSimpleName()) from None
    return found.select(
        _spelled("path").alias(cols.URI),
        F.col("length").alias(cols.SIZE),
        F.col("modificationTime").alias(cols.MODIFIED),
        F.lit(None).cast("string").alias(cols.ETAG),
    )


def _spelled(column: str) -> Column:
    """Spell URIs as `storage.canonical` does: Hadoop leaves out an empty authority, `hdfs:/a` is `hdfs:///a`."""
    return F.regexp_replace(column, "^([a-z0-9]+):/(?!/)", "$1:///")


def check_listing(listing: DataFrame) -> int:
    """Count the objects of a written listing. Raises EnvironmentProblem where a folder could not be listed."""
    counted = listing.select(F.count("*").alias("all"), F.count_if(F.col(cols.SIZE) == _FAILED).alias("failed")).first()
    listed, failed = (counted["all"], counted["failed"]) if counted else (0, 0)
    if failed:
        raise _failure(failed)
    return int(listed)


def _objects(folder: str, store: ObjectStore) -> Iterator[storage.StoredObject]:
    try:
        yield from store.list_objects(folder)
    except FileNotFoundError:
        return  # deleted since its parent was listed, with its objects
    except OSError:
        yield storage.StoredObject(folder, _FAILED, datetime.fromtimestamp(0, UTC))


def _batches(objects: Iterable[storage.StoredObject]) -> Iterator[pa.RecordBatch]:
    left, arrow = iter(objects), arrow_schema(LISTING)
    while some := list(islice(left, _ROWS)):
        columns = {
            cols.URI: [each.uri for each in some],
            cols.SIZE: [each.size for each in some],
            cols.MODIFIED: [each.modified for each in some],
            cols.ETAG: [each.etag for each in some],
        }
        yield pa.RecordBatch.from_pydict(columns, schema=arrow)


def _failure(folders: int, cause: str = "") -> EnvironmentProblem:
    why = f" ({cause})" if cause else ""
    return EnvironmentProblem(
        f"{folders} folders or prefixes of the archive could not be listed{why}: nothing was read and nothing marked "
        "as deleted; check the storage and its permissions, then run `cbmir ingest` again"
    )
