"""Bring rows into the columns of a table. Lazy: the rows are not read."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cbmir_spark.errors import TableError
from cbmir_spark.lake.schemas import Table


def add_missing_columns(df: DataFrame, table: Table) -> DataFrame:
    """Add the nullable columns of the table that `df` lacks, since an older version wrote it; all null."""
    lacking = [f for f in table.schema if f.nullable and f.name not in df.columns]
    return df.withColumns({f.name: F.lit(None).cast(f.dataType) for f in lacking}) if lacking else df


def conform(df: DataFrame, table: Table) -> DataFrame:
    """Put columns into the table's order. Raises TableError naming missing, extra and mistyped columns."""
    expected = {f.name: f.dataType.simpleString() for f in table.schema}
    given = {f.name: f.dataType.simpleString() for f in df.schema}
    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [name for name in given if name not in expected]:
        problems.append(f"not in the schema: {', '.join(extra)}")
    for name, kind in expected.items():
        if name in given and given[name] != kind:
            problems.append(f"{name} is {given[name]} instead of {kind}")
    if problems:
        raise TableError(f"rows for table {table.name}: {'; '.join(problems)}")
    return df.select(*expected)
