"""Arrow's schema of Spark's is the one that Spark itself gives and takes."""

import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import CharType, StructField, StructType

from cbmir_spark.ingest.listing import WITH_CAUSE
from cbmir_spark.ingest.parse import STAGED, STAGED_FRAMES
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema

TABLES = [each for each in vars(schemas).values() if isinstance(each, schemas.Table)]


@pytest.mark.parametrize(
    "schema",
    [*(table.schema for table in TABLES), WITH_CAUSE, STAGED, STAGED_FRAMES],
    ids=[*(table.name for table in TABLES), "WITH_CAUSE", "STAGED", "STAGED_FRAMES"],
)
def test_it_is_the_schema_of_what_spark_hands_over(spark: SparkSession, schema: StructType) -> None:
    assert spark.createDataFrame([], schema).toArrow().schema.equals(arrow_schema(schema))


def test_a_type_that_no_table_has_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no Arrow type for Spark's char\(3\)"):
        arrow_schema(StructType([StructField("code", CharType(3))]))
