"""List every object below an archive, in parallel; a listing that fails anywhere fails as a whole."""

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType

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
# The column, beside those of LISTING, that says why a folder could not be listed; null in the row of an object.
CAUSE = "cause"
WITH_CAUSE = StructType([*LISTING.fields, StructField(CAUSE, StringType())])
# The size in the row of an entry that is neither a folder nor a file.
NOT_A_FILE = -2
# Folders that the file of a failed listing names, and causes that its message does.
_FOLDERS_NAMED, _CAUSES_NAMED = 10_000, 3
_NO_TIME = datetime.fromtimestamp(0, UTC)
CONTENT = "content"
_OBJECTS_AT_A_TIME = 8


@dataclass(frozen=True)
class Unlisted:
    """A folder or prefix that could not be listed, by its URI, and what the system or the server said."""

    folder: str
    cause: str


def list_archive(spark: SparkSession, archive: str, store: ObjectStore) -> DataFrame:
    """List every object below an archive, hidden names included: (uri, size, modified, etag, cause).

    Entries that are neither folders nor files have the size NOT_A_FILE. The driver descends folder by folder until
    there are enough folders to distribute; tasks list the rest. A folder that cannot be listed becomes a row with its
    cause, which `check_listing` finds: its name must not reach the logs of a failed task. Where permissions refuse a
    folder, the others are listed all the same; any other failure ends the listing early. Schemes other than `file:` and
    `s3a:` are listed by Hadoop's connectors, which skip empty objects and names that begin with a dot or an underscore.
    Raises InputError where an archive of theirs does not exist.
    """
    if not storage.is_native(archive):
        return _listed_by_hadoop(spark, archive)
    found: list[storage.StoredObject | Unlisted] = []
    folders, arrow = [archive], arrow_schema(WITH_CAUSE)
    broken = False
    tasks = TASKS_FOR_A_CORE * spark.sparkContext.defaultParallelism
    while folders and len(folders) < tasks and not broken:
        deeper: list[str] = []
        for folder in folders:
            try:
                below, objects = _below(folder, store)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and folder != archive:
                    continue  # deleted since its parent was listed, with its objects
                found.append(Unlisted(folder, _cause(error)))
                broken = broken or not isinstance(error, PermissionError)
                continue
            deeper += below
            found += objects
        folders = deeper
    here = spark.createDataFrame(pa.Table.from_batches(_batches(found), arrow))
    if not folders or broken:
        return here

    def list_below(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for folder in batch.column(0).to_pylist():
                yield from _batches(objects_below(folder, store))

    shared = spark.createDataFrame([(folder,) for folder in folders], "folder string")
    return here.unionByName(shared.repartition(tasks).mapInArrow(list_below, WITH_CAUSE))


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
        return _nothing_but(spark, Unlisted(archive, error.getCondition() or type(error).__name__))
    except Py4JJavaError as error:
        cause: Any = error.java_exception
        return _nothing_but(spark, Unlisted(archive, cause.getClass().getSimpleName()))
    return found.select(
        _spelled("path").alias(cols.URI),
        F.col("length").alias(cols.SIZE),
        F.col("modificationTime").alias(cols.MODIFIED),
        F.lit(None).cast("string").alias(cols.ETAG),
        F.lit(None).cast("string").alias(CAUSE),
    )


def _nothing_but(spark: SparkSession, failed: Unlisted) -> DataFrame:
    return spark.createDataFrame(pa.Table.from_batches(_batches([failed]), arrow_schema(WITH_CAUSE)))


def _spelled(column: str) -> Column:
    """Spell URIs as `storage.canonical` does: Hadoop leaves out an empty authority, `hdfs:/a` is `hdfs:///a`."""
    return F.regexp_replace(column, "^([a-z0-9]+):/(?!/)", "$1:///")


@dataclass(frozen=True)
class Listed:
    """Numbers of rows of a listing: all, and those that are NOT_A_FILE."""

    rows: int
    no_files: int


def check_listing(listing: DataFrame, named_in: str, store: ObjectStore) -> Listed:
    """Count a written listing, of WITH_CAUSE.

    Where folders could not be listed, writes them with their causes to the CSV file `named_in`, which must be in the
    vault, and raises EnvironmentProblem, whose message names that file but no folder.
    """
    counted = listing.select(
        F.count("*").alias("all"),
        F.count(CAUSE).alias("failed"),
        F.count_if(F.col(cols.SIZE) == NOT_A_FILE).alias("no_files"),
    ).collect()[0]
    if counted["failed"]:
        failed = listing.where(F.col(CAUSE).isNotNull()).select(cols.URI, CAUSE).orderBy(cols.URI)
        named = [Unlisted(row[cols.URI], row[CAUSE]) for row in failed.limit(_FOLDERS_NAMED).collect()]
        store.write_bytes(named_in, _as_csv(named))
        raise _failure(counted["failed"], named, named_in)
    return Listed(counted["all"], counted["no_files"])


def _below(folder: str, store: ObjectStore) -> tuple[list[str], list[storage.StoredObject]]:
    """List a folder and its objects, those that are no files among them; an unusable name makes a folder one too."""
    if not storage.is_local(folder):
        return store.list_folder(folder)
    try:
        folders, objects, others = store.scan_folder(folder)
    except OSError as error:
        if error.errno not in storage.NO_FILE:
            raise
        folders, objects, others = [], [], [folder]
    return folders, [*objects, *(storage.StoredObject(uri, NOT_A_FILE, _NO_TIME) for uri in others)]


def objects_below(folder: str, store: ObjectStore) -> Iterator[storage.StoredObject | Unlisted]:
    """List a folder with all below it, and the folders there that cannot be listed."""
    if not storage.is_local(folder):
        try:
            yield from store.list_objects(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            yield Unlisted(folder, _cause(error))
        return
    left = [folder]
    while left:
        folder = left.pop()
        try:
            below, objects = _below(folder, store)
        except FileNotFoundError:
            continue  # deleted since its parent was listed, with its objects
        except PermissionError as error:
            yield Unlisted(folder, _cause(error))
            continue
        except OSError as error:
            yield Unlisted(folder, _cause(error))
            return
        yield from objects
        left += reversed(below)


def _cause(error: OSError) -> str:
    """What the system says of an error, or what the text of a StorageError does: neither names a folder."""
    return error.strerror or str(error) or type(error).__name__


def _batches(found: Iterable[storage.StoredObject | Unlisted]) -> Iterator[pa.RecordBatch]:
    left, arrow = iter(found), arrow_schema(WITH_CAUSE)
    while some := list(islice(left, _ROWS)):
        columns = zip(*(_row(each) for each in some), strict=True)
        yield pa.RecordBatch.from_pydict({f.name: list(c) for f, c in zip(arrow, columns, strict=True)}, schema=arrow)


def _row(found: storage.StoredObject | Unlisted) -> tuple[object, ...]:
    """A row of WITH_CAUSE."""
    if isinstance(found, Unlisted):
        return found.folder, 0, _NO_TIME, None, found.cause
    return found.uri, found.size, found.modified, found.etag, None


def _as_csv(folders: Iterable[Unlisted]) -> bytes:
    text = io.StringIO(newline="")
    sheet = csv.writer(text)
    sheet.writerow(("folder", CAUSE))
    sheet.writerows((each.folder, each.cause) for each in folders)
    return text.getvalue().encode()


def _failure(count: int, named: Iterable[Unlisted], named_in: str) -> EnvironmentProblem:
    causes = sorted({each.cause for each in named})
    why = "; ".join(causes[:_CAUSES_NAMED]) + ("; …" if len(causes) > _CAUSES_NAMED else "")
    place = storage.local_path(named_in) if storage.is_local(named_in) else named_in
    return EnvironmentProblem(
        f"{count} folders or prefixes of the archive could not be listed ({why}): nothing was read and nothing marked "
        f"as deleted; {place} names them; check the storage and its permissions, then run `cbmir ingest` again"
    )
