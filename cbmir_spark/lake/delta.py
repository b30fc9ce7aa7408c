"""Read, write and compare Delta tables. The only module that touches Delta's classes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType

from cbmir_spark import storage
from cbmir_spark.errors import TableError
from cbmir_spark.lake.columns import BATCH, IMAGE_ID
from cbmir_spark.lake.schemas import Table


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


def newest(spark: SparkSession, path: str) -> TableVersion | None:
    """The newest version of a Delta table, None where there is no table."""
    return TableVersion(spark, path, version(spark, path)) if exists(spark, path) else None


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


def properties(spark: SparkSession, path: str) -> dict[str, str]:
    """The properties of a Delta table, ours among them."""
    detail = DeltaTable.forPath(spark, path).detail().select("properties").first()
    return dict(detail["properties"]) if detail else {}


def read(spark: SparkSession, path: str, version: int | None = None) -> DataFrame:
    """A Delta table, at a version where one is given. Raises TableError where there is none."""
    if not exists(spark, path):
        raise TableError(f"there is no table at {path}")
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(path)


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
    writer.option("userMetadata", message).option("compression", table.codec).save(path)
    return version(df.sparkSession, path)


def delete_images(spark: SparkSession, path: str, images: DataFrame, batches: Iterable[int]) -> int:
    """Remove the rows of `images` (one column, image_id) from the partitions of `batches`; the version written."""
    inside = ", ".join(str(batch) for batch in sorted(batches))
    condition = f"t.{BATCH} IN ({inside}) AND t.{IMAGE_ID} = s.{IMAGE_ID}"
    merge = DeltaTable.forPath(spark, path).alias("t").merge(images.alias("s"), condition)
    merge.whenMatchedDelete().execute()
    return version(spark, path)


def delete_rows(spark: SparkSession, path: str, rows: DataFrame, within: str, message: str = "") -> int:
    """Remove what equals one of `rows` in all their columns; the version written. `message` travels in the commit.

    `within` is a condition on partition columns of the table, here called `t`, that bounds the files looked at.
    """
    same = " AND ".join(f"t.{column} = s.{column}" for column in rows.columns)
    merge = DeltaTable.forPath(spark, path).alias("t").merge(rows.alias("s"), f"({within}) AND {same}")
    with commit_message(spark, message):
        merge.whenMatchedDelete().execute()
    return version(spark, path)


def rearrange(df: DataFrame, table: Table, path: str, where: str, message: str = "", rows_per_file: int = 0) -> int:
    """Put the rows of some partitions, all those and no others, into other files; the version written.

    `where` is a condition on partition columns. The commit says that no row changed, and readers of older versions keep
    their files.
    """
    writer = conform(df, table).write.format("delta").mode("overwrite").option("replaceWhere", where)
    writer = writer.option("dataChange", "false").option("maxRecordsPerFile", rows_per_file)
    writer.option("userMetadata", message).option("compression", table.codec).save(path)
    return version(df.sparkSession, path)


def last_message(spark: SparkSession, path: str) -> str | None:
    """The message of the newest commit that has one, among the last hundred."""
    told = DeltaTable.forPath(spark, path).history(100).select("version", "userMetadata")
    found = told.where("userMetadata IS NOT NULL AND userMetadata != ''").orderBy(F.desc("version")).first()
    return None if found is None else str(found["userMetadata"])


def changed_batches(spark: SparkSession, path: str, before: int, after: int) -> frozenset[int] | None:
    """Batches of an ingest table whose files are not the same in two versions; None where the older one is gone."""
    if before == after:
        return frozenset()
    try:
        old = set(live_files(spark, path, before))
    except (AnalysisException, Py4JJavaError):
        return None
    return frozenset(_batch_of(uri) for uri in old ^ set(live_files(spark, path, after)))


def _batch_of(uri: str) -> int:
    return int(next(part for part in uri.split("/") if part.startswith(f"{BATCH}=")).partition("=")[2])


def update_rows(
    spark: SparkSession, path: str, rows: DataFrame, keys: Iterable[str], values: Iterable[str], within: str
) -> int:
    """Set columns of what equals one of `rows` in all `keys`, two nulls being equal; the version written.

    The new value of each of `values` is the column of `rows` called `new_` and its name. `within` is as in
    `delete_rows`. One commit, also where rows change partitions: a reader finds each of them once.
    """
    same = " AND ".join(f"t.{column} <=> s.{column}" for column in keys)
    merge = DeltaTable.forPath(spark, path).alias("t").merge(rows.alias("s"), f"({within}) AND {same}")
    merge.whenMatchedUpdate(set={column: f"s.new_{column}" for column in values}).execute()
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
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        DeltaTable.forPath(spark, path).vacuum(hours)
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


def version(spark: SparkSession, path: str) -> int:
    """The newest version of a Delta table. Raises TableError where there is none."""
    jvm: Any = spark.sparkContext._jvm
    # `DeltaTable.history` answers the same by a Spark job of a quarter of a second, and a run asks ten times.
    log = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path)
    found = int(log.update(False, jvm.scala.Option.empty(), jvm.scala.Option.empty()).version())
    if found < 0:
        raise TableError(f"there is no table at {path}")
    return found


def live_files(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    """Canonical URIs of the Parquet files that are live in a Delta table, sorted."""
    return sorted(storage.canonical(uri) for uri in read(spark, path, version).inputFiles())


def _without_nullability(kind: DataType) -> str:
    return kind.simpleString()


@contextmanager
def commit_message(spark: SparkSession, message: str) -> Iterator[None]:
    """MERGE and CREATE take a commit's message from the session only, so it is set around one statement."""
    key = "spark.databricks.delta.commitInfo.userMetadata"
    spark.conf.set(key, message)
    try:
        yield
    finally:
        spark.conf.unset(key)
