"""IDENTITY and FORGOTTEN, the vault's tables about people."""

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.lake.columns import KIND, PSEUDONYM
from cbmir_spark.lake.delta import conform, delete_rows, ensure, exists, read
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.schemas import FORGOTTEN, IDENTITY, OWNERS, Table


def merge_new(spark: SparkSession, rows: DataFrame, table: Table, path: str) -> int:
    """Insert those of `rows` whose kind and pseudonym the table (IDENTITY or FORGOTTEN) lacks; how many went in."""
    ensure(spark, table, path)
    merge = (
        DeltaTable.forPath(spark, path)
        .alias("t")
        .merge(
            conform(rows, table).dropDuplicates([KIND, PSEUDONYM]).alias("s"),
            f"t.{KIND} = s.{KIND} AND t.{PSEUDONYM} = s.{PSEUDONYM}",
        )
    )
    done = merge.whenNotMatchedInsertAll().execute().select("num_inserted_rows").first()
    return int(done["num_inserted_rows"]) if done else 0


def merge_identities(spark: SparkSession, lake: LakePaths, rows: DataFrame) -> int:
    """Add what the vault's IDENTITY lacks of `rows`, before SOURCES is published: a batch tried again adds nothing."""
    return merge_new(spark, rows, IDENTITY, lake.path(IDENTITY))


def prune_identities(spark: SparkSession, lake: LakePaths, tags: DataFrame, left: DataFrame | None = None) -> int:
    """Remove from IDENTITY what no row of `tags` belongs to any more; how many rows went.

    `left` are rows of an earlier TAGS whose image_id, series_id, study_id and patient_id alone are looked at: those of
    images that have just left. Without it all of IDENTITY is. To be called when `tags` is published.
    """
    path = lake.path(IDENTITY)
    if not exists(spark, path):
        return 0
    candidates = read(spark, path).select(KIND, PSEUDONYM)
    if left is not None:
        candidates = candidates.join(_owners(left), on=[KIND, PSEUDONYM], how="left_semi")
    orphans = candidates.join(_owners(tags), on=[KIND, PSEUDONYM], how="left_anti").persist()
    count = orphans.count()
    if count:
        delete_rows(spark, IDENTITY, path, orphans, "true")
    orphans.unpersist()
    return count


def _owners(tags: DataFrame) -> DataFrame:
    """(kind, pseudonym) of all that rows with the four ids belong to."""
    named = [F.struct(F.lit(kind).alias(KIND), F.col(column).alias(PSEUDONYM)) for kind, column in OWNERS.items()]
    return tags.select(F.explode(F.array(*named)).alias("owner")).select("owner.*")


def tombstones(spark: SparkSession, lake: LakePaths) -> frozenset[str]:
    """What must not be kept, as kind:pseudonym; what was asked to be forgotten is a list that a driver can hold."""
    path = lake.path(FORGOTTEN)
    if not exists(spark, path):
        return frozenset()
    return frozenset(f"{row[KIND]}:{row[PSEUDONYM]}" for row in read(spark, path).select(KIND, PSEUDONYM).collect())
