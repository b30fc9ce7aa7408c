"""Read, write and compare Delta tables. The only module that touches Delta's classes."""

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
from pyspark.sql.types import DataType

from cbmir_spark import storage
from cbmir_spark.errors import TableError
from cbmir_spark.lake.columns import BATCH, IMAGE_ID
from cbmir_spark.lake.schemas import Table

# What a condition on the rows of a table that is changed calls them.
TARGET = "target"
_SOURCE = "source"
# Delta's own Scala class, reached by py4j: no public API answers without a Spark job.
DELTA_LOG = "org.apache.spark.sql.delta.DeltaLog"


@dataclass(frozen=True)
class TableVersion:
    """A Delta table at one version; its rows and files are looked up once, when they are first asked for."""

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


def latest(spark: SparkSession, path: str) -> Latest | None:
    """Look up the newest version and the properties of a Delta table at once; None if there is no table.

    Reads Delta's log on the driver without a Spark job. A version of Delta that has other classes inside is asked
    through its public API, by two Spark jobs.
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


def exists(spark: SparkSession, path: str) -> bool:
    """Whether a Delta table stands at `path`."""
    return bool(DeltaTable.isDeltaTable(spark, path))


def ensure(spark: SparkSession, table: Table, path: str, properties: Mapping[str, str] | None = None) -> None:
    """Create a table with its constraints and further `properties`, in one commit, where it is not there yet."""
    if exists(spark, path):
        return
    builder = DeltaTable.createIfNotExists(spark).location(path).addColumns(table.schema)
    if table.partitioned_by:
        builder = builder.partitionedBy(*table.partitioned_by)
    # Readers other than Spark (deltalake, polars, plain pyarrow) cannot apply deletion vectors.
    builder = builder.property("delta.enableDeletionVectors", "false")
    # Statistics hold the least and greatest value of a column in a file: a leak, and of random keys no help.
    builder = builder.property("delta.dataSkippingNumIndexedCols", "0")
    for name, condition in table.constraints.items():
        builder = builder.property(f"delta.constraints.{name}", condition)
    for name, value in (properties or {}).items():
        builder = builder.property(name, value)
    builder.execute()


def read(spark: SparkSession, path: str, version: int | None = None) -> DataFrame:
    """Read a Delta table, lazily, at a version where one is given. Raises TableError where there is no table."""
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    try:
        return reader.load(path)
    except AnalysisException:
        if exists(spark, path):
            raise
        raise TableError(f"there is no table at {path}") from None


def evolve(opened: TableVersion, table: Table, message: str = "") -> int | None:
    """Add the columns that a table made by an older version lacks, empty in its rows; the version written, if any.

    `message` travels in the commit.

    Raises TableError, before anything is written, where a column has another type, or where rows cannot do without one
    that is missing.
    """
    spark, path = opened.spark, opened.path
    found = {f.name: f.dataType for f in opened.rows.schema}
    missing = [f for f in table.schema if f.name not in found]
    problems = [
        f"{f.name} is {found[f.name].simpleString()} instead of {f.dataType.simpleString()}"
        for f in table.schema
        if f.name in found and _without_nullability(found[f.name]) != _without_nullability(f.dataType)
    ]
    problems += [f"{f.name} is missing" for f in missing if not f.nullable]
    if problems:
        raise TableError(
            f"table {table.name} at {path} was made by a version that this one cannot carry on: {'; '.join(problems)}"
        )
    if not missing:
        return None
    writer = spark.createDataFrame([], table.schema).write.format("delta").mode("append")
    writer.option("mergeSchema", "true").option("userMetadata", message).save(path)
    return version(spark, path)


def widened(df: DataFrame, table: Table) -> DataFrame:
    """`df` with those nullable columns of the table that it lacks, empty: rows that an older version wrote."""
    lacking = [f for f in table.schema if f.nullable and f.name not in df.columns]
    return df.withColumns({f.name: F.lit(None).cast(f.dataType) for f in lacking}) if lacking else df


def conform(df: DataFrame, table: Table) -> DataFrame:
    """`df` with the table's columns in its order. Raises TableError naming missing, extra and mistyped columns."""
    wanted = {f.name: f.dataType for f in table.schema}
    given = {f.name: f.dataType for f in df.schema}
    problems = []
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [name for name in given if name not in wanted]:
        problems.append(f"not in the schema: {', '.join(extra)}")
    for name, kind in wanted.items():
        if name in given and _without_nullability(given[name]) != _without_nullability(kind):
            problems.append(f"{name} is {given[name].simpleString()} instead of {kind.simpleString()}")
    if problems:
        raise TableError(f"rows for table {table.name}: {'; '.join(problems)}")
    return df.select(*wanted)


def append(df: DataFrame, table: Table, path: str, message: str = "", rows_per_file: int = 0) -> int:
    """Append conforming rows in one commit; the version written. `message` travels in the commit.

    `rows_per_file` bounds the rows of one file (0: no bound).
    """
    writer = conform(df, table).write.format("delta").mode("append").option("maxRecordsPerFile", rows_per_file)
    with session_settings(df.sparkSession, table.write_settings):
        writer.option("userMetadata", message).save(path)
    return version(df.sparkSession, path)


def delete_images(spark: SparkSession, path: str, images: DataFrame, batches: Iterable[int]) -> int:
    """Remove the rows of `images` (one column, image_id) from the partitions of `batches`; the version written."""
    inside = ", ".join(str(batch) for batch in sorted(batches))
    condition = f"{TARGET}.{BATCH} IN ({inside}) AND {TARGET}.{IMAGE_ID} = {_SOURCE}.{IMAGE_ID}"
    merge = DeltaTable.forPath(spark, path).alias(TARGET).merge(images.alias(_SOURCE), condition)
    merge.whenMatchedDelete().execute()
    return version(spark, path)


def delete_rows(spark: SparkSession, table: Table, path: str, rows: DataFrame, within: str, message: str = "") -> int:
    """Delete the rows that equal one of `rows` in all its columns; the version written.

    `message` travels in the commit. `within` bounds the files that are read: SQL on partition columns of the table,
    each qualified by TARGET.
    """
    same = " AND ".join(f"{TARGET}.{column} = {_SOURCE}.{column}" for column in rows.columns)
    merge = DeltaTable.forPath(spark, path).alias(TARGET).merge(rows.alias(_SOURCE), f"({within}) AND {same}")
    with commit_message(spark, message), session_settings(spark, table.write_settings):
        merge.whenMatchedDelete().execute()
    return version(spark, path)


def rearrange(df: DataFrame, table: Table, path: str, where: str, message: str = "", rows_per_file: int = 0) -> int:
    """Put the rows of some partitions, all those and no others, into other files; the version written.

    `where` is a condition on partition columns. The commit says that no row changed, and readers of older versions keep
    their files.
    """
    writer = conform(df, table).write.format("delta").mode("overwrite").option("replaceWhere", where)
    writer = writer.option("dataChange", "false").option("maxRecordsPerFile", rows_per_file)
    with session_settings(df.sparkSession, table.write_settings):
        writer.option("userMetadata", message).save(path)
    return version(df.sparkSession, path)


def last_message(spark: SparkSession, path: str) -> str | None:
    """The message of the newest commit that has one, among the last hundred."""
    told = DeltaTable.forPath(spark, path).history(100).select("version", "userMetadata")
    found = told.where("userMetadata IS NOT NULL AND userMetadata != ''").orderBy(F.desc("version")).first()
    return None if found is None else str(found["userMetadata"])


def changed_batches(before: TableVersion, after: TableVersion) -> frozenset[int] | None:
    """Batches of an ingest table whose files differ between two versions; None where the older one is gone."""
    if before.version == after.version:
        return frozenset()
    try:
        old = set(before.files)
    except (AnalysisException, Py4JJavaError):
        return None
    return frozenset(_batch_of(uri) for uri in old ^ set(after.files))


def _batch_of(uri: str) -> int:
    return int(next(part for part in uri.split("/") if part.startswith(f"{BATCH}=")).partition("=")[2])


def update_rows(
    spark: SparkSession,
    table: Table,
    path: str,
    rows: DataFrame,
    keys: Iterable[str],
    values: Iterable[str],
    within: str,
) -> int:
    """Update the rows that match one of `rows` on `keys` (null-safe); the version written.

    Each of `values` is set from the column of `rows` named `new_` and its name. `within` is as for `delete_rows`. One
    commit, also where rows change partitions: a reader finds each of them once.
    """
    same = " AND ".join(f"{TARGET}.{column} <=> {_SOURCE}.{column}" for column in keys)
    merge = DeltaTable.forPath(spark, path).alias(TARGET).merge(rows.alias(_SOURCE), f"({within}) AND {same}")
    update = merge.whenMatchedUpdate(set={column: f"{_SOURCE}.new_{column}" for column in values})
    with session_settings(spark, table.write_settings):
        update.execute()
    return version(spark, path)


def vacuum(spark: SparkSession, path: str, hours: int) -> None:
    """Remove the files that no version of the last `hours` needs; below 168 readers of older versions will fail."""
    settings = {
        "spark.databricks.delta.retentionDurationCheck.enabled": "false",
        # Logged, it would be a version of its own, which no published one names.
        "spark.databricks.delta.vacuum.logging.enabled": "false",
        # Delta lists a table in as many tasks as this says, by default 10,000, however few folders there are.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(4 * spark.sparkContext.defaultParallelism),
    }
    with session_settings(spark, settings):
        DeltaTable.forPath(spark, path).vacuum(hours)


def version(spark: SparkSession, path: str) -> int:
    """Look up the newest version of a Delta table. Raises TableError where there is none."""
    found = latest(spark, path)
    if found is None:
        raise TableError(f"there is no table at {path}")
    return found.version


def live_files(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    """Canonical URIs of the Parquet files that are live in a Delta table, sorted."""
    return sorted(storage.canonical(uri) for uri in read(spark, path, version).inputFiles())


def _without_nullability(kind: DataType) -> str:
    return kind.simpleString()


@contextmanager
def commit_message(spark: SparkSession, message: str) -> Iterator[None]:
    """Give the commit of one MERGE or CREATE a message, which these take from the session alone."""
    with session_settings(spark, {"spark.databricks.delta.commitInfo.userMetadata": message}):
        yield


@contextmanager
def session_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """Change settings of the session while the block runs; Parquet's writer reads them too."""
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
