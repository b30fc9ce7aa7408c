"""IDENTITY and FORGOTTEN, the vault's tables about people: pseudonyms with their identifiers, and tombstones."""

from collections.abc import Mapping

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.lake import delta
from cbmir_spark.lake.columns import KIND, PATIENT_RULE, PSEUDONYM
from cbmir_spark.lake.delta import TableVersion
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import PatientRule
from cbmir_spark.lake.schemas import FORGOTTEN, IDENTITY, OWNERS, Table


def merge_new(spark: SparkSession, rows: DataFrame, table: Table, path: str, *more_keys: str) -> int:
    """Insert the rows whose kind, pseudonym and further keys the table (IDENTITY or FORGOTTEN) lacks; their number."""
    delta.ensure(spark, table, path)
    delta.evolve(TableVersion(spark, path, delta.version(spark, path)), table)
    return delta.insert_missing(rows, table, path, [KIND, PSEUDONYM, *more_keys])


def merge_identities(spark: SparkSession, lake: LakePaths, rows: DataFrame) -> int:
    """Insert what IDENTITY lacks, before SOURCES is published: a batch that is retried adds nothing; the number."""
    return merge_new(spark, rows, IDENTITY, lake.path(IDENTITY))


def prune_identities(spark: SparkSession, lake: LakePaths, tags: DataFrame, left: DataFrame | None = None) -> int:
    """Delete from IDENTITY what no row of `tags` belongs to; the number of rows deleted.

    `left` are rows of an earlier TAGS, those of images that have just left: only what they belong to is checked, by
    image_id, series_id, study_id and patient_id. Without it all of IDENTITY is. Call it once `tags` is published.
    """
    path = lake.path(IDENTITY)
    if not delta.exists(spark, path):
        return 0
    candidates = delta.read(spark, path).select(KIND, PSEUDONYM)
    if left is not None:
        candidates = candidates.join(_owners(left), on=[KIND, PSEUDONYM], how="left_semi")
    orphans = candidates.join(_owners(tags), on=[KIND, PSEUDONYM], how="left_anti").persist()
    count = orphans.count()
    if count:
        delta.delete_rows(spark, IDENTITY, path, orphans, "true")
    orphans.unpersist()
    return count


def _owners(tags: DataFrame) -> DataFrame:
    """(kind, pseudonym) of everything that rows with the four ids belong to."""
    named = [F.struct(F.lit(kind).alias(KIND), F.col(column).alias(PSEUDONYM)) for kind, column in OWNERS.items()]
    return tags.select(F.explode(F.array(*named)).alias("owner")).select("owner.*")


def tombstones(spark: SparkSession, lake: LakePaths) -> Mapping[PatientRule, frozenset[str]]:
    """Collect what ingest must not store: kind:pseudonym by the rule that made the pseudonyms of patients.

    Requests to forget are few enough for a driver.
    """
    path = lake.path(FORGOTTEN)
    if not delta.exists(spark, path):
        return {}
    found: dict[PatientRule, set[str]] = {}
    for row in delta.read(spark, path).collect():
        rule = PatientRule(row.asDict().get(PATIENT_RULE) or PatientRule.FIRST)
        found.setdefault(rule, set()).add(f"{row[KIND]}:{row[PSEUDONYM]}")
    return {rule: frozenset(names) for rule, names in found.items()}
