"""Python workers import pyspark as a package, and look into no archive."""

from pathlib import Path

from pyspark.sql import SparkSession

from cbmir_spark.spark import session
from cbmir_spark.spark.python_workers import without_archives


def test_workers_do_not_look_for_modules_in_archives(spark: SparkSession) -> None:
    def path(_: int) -> list[str]:
        import sys

        return sys.path

    (found,) = spark.sparkContext.parallelize([0], 1).map(path).collect()
    assert found and not [entry for entry in found if entry.endswith((".zip", ".jar"))]


def test_archives_stay_where_pyspark_is_nowhere_else() -> None:
    only = ["/opt/spark/python/lib/pyspark.zip", "/opt/empty"]
    assert without_archives(only) == only
    installed = str(Path(session.pyspark.__file__).parent.parent)
    assert without_archives([*only, installed]) == ["/opt/empty", installed]
