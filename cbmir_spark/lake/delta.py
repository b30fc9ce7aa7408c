"""Read, compare and write Delta tables. The only module that touches Delta's classes.

Each function that writes makes one commit and returns the version that it wrote. Runs on the driver; rows are read and
written by Spark's tasks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

from delta.tables import DeltaTable
from py4j.protocol import Py4JError, Py4JJavaError, Py4JNetworkError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.errors import TableError
from cbmir_spark.lake.columns import BATCH, IMAGE_ID
from cbmir_spark.lake.conform import conform
from cbmir_spark.lake.schemas import Table

# The alias of the table that a statement changes, for conditions on its rows.
TARGET = "target"
_SOURCE = "source"
# Delta's Scala class, reached by py4j: no public API answers without a Spark job.
DELTA_LOG = "org.apache.spark.sql.delta.DeltaLog"


# Versions


@dataclass(frozen=True)
class TableVersion:
    """A Delta table at one version; its rows and files are looked up once, on first use."""

    spark: SparkSession
    path: str
    version: int

    @cached_property
    def rows(self) -> DataFrame:
        """The table's rows; lazy."""
        return self.spark.read.format("delta").option("versionAsOf", self.version).load(self.path)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Canonical URIs of the Parquet files that hold the rows, sorted."""
        return tuple(sorted(storage.canonical(uri) for uri in self.rows.inputFiles()))


@dataclass(frozen=True)
class Latest:
    """The newest version of a Delta table, and the table's properties there."""

    version: int
    properties: Mapping[str, str]


@dataclass(frozen=True)
class Message:
    """The message of a commit, and the version that it made."""

    version: int
    text: str


def latest(spark: SparkSession, path: str) -> Latest | None:
    """Look up the newest version and the properties of a Delta table at once; None if there is no table.

    Reads Delta's log on the driver without a Spark job. If Delta has other classes inside, its public API answers, by
    two Spark jobs.
    """
    jvm: Any = spark.sparkContext._jvm
    log_class = reduce(getattr, DELTA_LOG.split("."), jvm)
    try:
        snapshot = log_class.forTable(spark._jsparkSession, path).update(
            False, jvm.scala.Option.empty(), jvm.scala.Option.empty()
        )
        version = int(snapshot.version())
        properties = jvm.scala.jdk.javaapi.CollectionConverters.asJava(snapshot.metadata().configuration())
    except (Py4JJavaError, Py4JNetworkError):
        raise
    except (TypeError, Py4JError):
        return _latest_by_public_api(spark, path)
    return Latest(version, dict(properties)) if version >= 0 else None


def _latest_by_public_api(spark: SparkSession, path: str) -> Latest | None:
    if not exists(spark, path):
        return None
    table = DeltaTable.forPath(spark, path)
    detail, commit = table.detail().select("properties").collect()[0], table.history(1).select("version").collect()[0]
    return Latest(int(commit["version"]), dict(detail["properties"]))


def version(spark: SparkSession, path: str) -> int:
    """Look up the newest version of a Delta table. Raises TableError if there is no table."""
    found = latest(spark, path)
    if found is None:
        raise TableError(_missing(path))
    return found.version


def last_message(spark: SparkSession, path: str) -> Message | None:
    """Find the newest commit with a message; None if there is no table, or no commit has one."""
    try:
        table = DeltaTable.forPath(spark, path)
    except AnalysisException:
        if exists(spark, path):
            raise
        return None
    # Nearly always among the last few: older commits lie in other files.
    for limit in (20, None):
        commits = table.history(limit) if limit else table.history()
        with_message = commits.where("userMetadata IS NOT NULL AND userMetadata != ''").orderBy(F.desc("version"))
        for row in with_message.select("version", "userMetadata").take(1):
            return Message(int(row["version"]), str(row["userMetadata"]))
    return None


def changed_batches(before: TableVersion, after: TableVersion) -> frozenset[int] | None:
    """Find the batches of an ingest table whose files differ between two versions; None if the older one is gone."""
    if before.version == after.version:
        return frozenset()
    try:
        old = set(before.files)
    except (AnalysisException, Py4JJavaError):
        return None
    return frozenset(_batch_of(uri) for uri in old ^ set(after.files))


def _batch_of(uri: str) -> int:
    return int(next(part for part in uri.split("/") if part.startswith(f"{BATCH}=")).partition("=")[2])


# Reading


def exists(spark: SparkSession, path: str) -> bool:
    """True if there is a Delta table at `path`."""
    return bool(DeltaTable.isDeltaTable(spark, path))


def read(spark: SparkSession, path: str, version: int | None = None) -> DataFrame:
    """Read a Delta table, lazily, at a version if one is given. Raises TableError if there is no table."""
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    try:
        return reader.load(path)
    except AnalysisException:
        if exists(spark, path):
            raise
        raise TableError(_missing(path)) from None


def _missing(path: str) -> str:
    return f"there is no table at {path}: run `cbmir ingest` first, or check the lake's URI"


# Creating and changing tables


def ensure(spark: SparkSession, table: Table, path: str, properties: Mapping[str, str] | None = None) -> None:
    """Create a table with its constraints and further `properties`, in one commit, if it does not exist yet."""
    if exists(spark, path):
        return
    builder = DeltaTable.createIfNotExists(spark).location(path).addColumns(table.schema)
    if table.partitioned_by:
        builder = builder.partitionedBy(*table.partitioned_by)
    # Readers other than Spark (deltalake, polars, plain pyarrow) cannot apply deletion vectors.
    builder = builder.property("delta.enableDeletionVectors", "false")
    # Statistics hold the minimum and maximum of a column in a file: a leak, and useless for random keys.
    builder = builder.property("delta.dataSkippingNumIndexedCols", "0")
    for name, condition in table.constraints.items():
        builder = builder.property(f"delta.constraints.{name}", condition)
    for name, value in (properties or {}).items():
        builder = builder.property(name, value)
    builder.execute()


def evolve(opened: TableVersion, table: Table, message: str = "") -> int | None:
    """Add the columns that a table of an older version lacks, null in its rows; None if it lacks none.

    Raises TableError, before anything is written, if a column has another type, or if one that is missing cannot be
    null.
    """
    found = {f.name: f.dataType.simpleString() for f in opened.rows.schema}
    missing = [f for f in table.schema if f.name not in found]
    problems = [
        f"{f.name} is {found[f.name]} instead of {f.dataType.simpleString()}"
        for f in table.schema
        if f.name in found and found[f.name] != f.dataType.simpleString()
    ]
    problems += [f"{f.name} is missing" for f in missing if not f.nullable]
    if problems:
        raise TableError(
            f"table {table.name} at {opened.path} was made by a version that this one cannot continue "
            f"({'; '.join(problems)}): ingest into a new lake"
        )
    if not missing:
        return None
    writer = opened.spark.createDataFrame([], table.schema).write.format("delta").mode("append")
    writer.option("mergeSchema", "true").option("userMetadata", message).save(opened.path)
    return version(opened.spark, opened.path)


def set_property(spark: SparkSession, path: str, name: str, value: str, message: str) -> int:
    """Set a property of a table, in a commit of its own."""
    table = path.replace("`", "``")
    with commit_message(spark, message):
        spark.sql(f"ALTER TABLE delta.`{table}` SET TBLPROPERTIES ('{name}' = '{value}')")
    return version(spark, path)


def restore(spark: SparkSession, path: str, wanted: int) -> None:
    """Bring a table back to an older version."""
    DeltaTable.forPath(spark, path).restoreToVersion(wanted)


def vacuum(spark: SparkSession, path: str, hours: int) -> None:
    """Delete the files that no version of the last `hours` needs; below 168 readers of older versions will fail."""
    settings = {
        "spark.databricks.delta.retentionDurationCheck.enabled": "false",
        # Logging would add a version, which no published one names.
        "spark.databricks.delta.vacuum.logging.enabled": "false",
        # Delta lists a table in so many tasks, by default 10,000, however few folders there are.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(4 * spark.sparkContext.defaultParallelism),
    }
    with session_settings(spark, settings):
        DeltaTable.forPath(spark, path).vacuum(hours)


# Writing rows


def append(df: DataFrame, table: Table, path: str, message: str = "", rows_per_file: int = 0) -> int:
    """Append conforming rows; `rows_per_file` bounds the rows of a file (0: no bound)."""
    writer = conform(df, table).write.format("delta").mode("append").option("maxRecordsPerFile", rows_per_file)
    with session_settings(df.sparkSession, table.write_settings):
        writer.option("userMetadata", message).save(path)
    return version(df.sparkSession, path)


def upsert(df: DataFrame, table: Table, path: str, keys: Iterable[str], message: str = "") -> int:
    """Replace the rows that match a conforming row on `keys`, and insert the other ones."""
    merge = _merge(df.sparkSession, path, conform(df, table), _equal(keys))
    with commit_message(df.sparkSession, message), session_settings(df.sparkSession, table.write_settings):
        merge.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()
    return version(df.sparkSession, path)


def insert_missing(df: DataFrame, table: Table, path: str, keys: list[str]) -> int:
    """Insert the conforming rows whose `keys` the table lacks; returns the number of rows inserted."""
    merge = _merge(df.sparkSession, path, conform(df, table).dropDuplicates(keys), _equal(keys))
    with session_settings(df.sparkSession, table.write_settings):
        done = merge.whenNotMatchedInsertAll().execute().select("num_inserted_rows").first()
    return int(done["num_inserted_rows"]) if done else 0


def update_rows(
    spark: SparkSession,
    table: Table,
    path: str,
    rows: DataFrame,
    keys: Iterable[str],
    values: Iterable[str],
    within: str,
) -> int:
    """Update the rows that match one of `rows` on `keys` (null-safe).

    Each of `values` is set from the column of `rows` named `new_` and its name. `within` is as for `delete_rows`. Rows
    may change partitions: a reader finds each of them once.
    """
    merge = _merge(spark, path, rows, f"({within}) AND {_equal(keys, '<=>')}")
    update = merge.whenMatchedUpdate(set={column: f"{_SOURCE}.new_{column}" for column in values})
    with session_settings(spark, table.write_settings):
        update.execute()
    return version(spark, path)


def delete_rows(spark: SparkSession, table: Table, path: str, rows: DataFrame, within: str, message: str = "") -> int:
    """Delete the rows that equal one of `rows` in all its columns.

    `within` bounds the files that are read: SQL on partition columns of the table, each qualified by TARGET.
    """
    merge = _merge(spark, path, rows, f"({within}) AND {_equal(rows.columns)}")
    with commit_message(spark, message), session_settings(spark, table.write_settings):
        merge.whenMatchedDelete().execute()
    return version(spark, path)


def delete_images(spark: SparkSession, path: str, images: DataFrame, batches: Iterable[int]) -> int:
    """Delete the rows of `images` (one column, image_id) from the partitions of `batches`."""
    inside = ", ".join(str(batch) for batch in sorted(batches))
    _merge(
        spark, path, images, f"{TARGET}.{BATCH} IN ({inside}) AND {_equal([IMAGE_ID])}"
    ).whenMatchedDelete().execute()
    return version(spark, path)


def rearrange(df: DataFrame, table: Table, path: str, where: str, message: str = "", rows_per_file: int = 0) -> int:
    """Put the rows of some partitions, exactly those, into other files.

    `where` is SQL on partition columns. The commit states that no row changed; readers of older versions find their
    files.
    """
    writer = conform(df, table).write.format("delta").mode("overwrite").option("replaceWhere", where)
    writer = writer.option("dataChange", "false").option("maxRecordsPerFile", rows_per_file)
    with session_settings(df.sparkSession, table.write_settings):
        writer.option("userMetadata", message).save(path)
    return version(df.sparkSession, path)


def _merge(spark: SparkSession, path: str, rows: DataFrame, condition: str) -> Any:
    return DeltaTable.forPath(spark, path).alias(TARGET).merge(rows.alias(_SOURCE), condition)


def _equal(columns: Iterable[str], operator: str = "=") -> str:
    return " AND ".join(f"{TARGET}.{column} {operator} {_SOURCE}.{column}" for column in columns)


@contextmanager
def commit_message(spark: SparkSession, message: str) -> Iterator[None]:
    """Give the commit of one MERGE, CREATE or ALTER a message, which these take from the session alone."""
    with session_settings(spark, {"spark.databricks.delta.commitInfo.userMetadata": message}):
        yield


@contextmanager
def session_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """Change settings of the session for the duration of the block; Parquet's writer reads them too."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)
