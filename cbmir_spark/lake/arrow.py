"""Arrow's schema of a Spark schema. PySpark's own conversion is private, and its parameters change between releases."""

import pyarrow as pa
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    DataType,
    DateType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    MapType,
    StringType,
    StructType,
    TimestampType,
)

_PLAIN = {
    StringType: pa.string(),
    BinaryType: pa.binary(),
    BooleanType: pa.bool_(),
    IntegerType: pa.int32(),
    LongType: pa.int64(),
    FloatType: pa.float32(),
    DoubleType: pa.float64(),
    DateType: pa.date32(),
    # Instants: Spark takes UTC from Arrow whatever the session's time zone is.
    TimestampType: pa.timestamp("us", tz="UTC"),
}


def arrow_schema(schema: StructType) -> pa.Schema:
    """Convert a schema of the product's tables. Raises TypeError for a type that none of them has."""
    return pa.schema([pa.field(field.name, _type(field.dataType), field.nullable) for field in schema.fields])


def _type(spark: DataType) -> pa.DataType:
    if isinstance(spark, ArrayType):
        return pa.list_(pa.field("element", _type(spark.elementType), spark.containsNull))
    if isinstance(spark, MapType):
        value = pa.field("value", _type(spark.valueType), spark.valueContainsNull)
        return pa.map_(pa.field("key", _type(spark.keyType), False), value)
    if isinstance(spark, StructType):
        return pa.struct(list(arrow_schema(spark)))
    plain = _PLAIN.get(type(spark))
    if plain is None:
        raise TypeError(f"no Arrow type for Spark's {spark.simpleString()}")
    return plain
