"""FEATURES, one vector per frame and one table per model: columns, partitions, and how its files are written.

Vectors are written so that retrieval reads each by its offset in the file, without decoding (see vector_files.py).
"""

from collections.abc import Iterable
from urllib.parse import unquote

from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType, DoubleType, FloatType, IntegerType, LongType, StringType, StructType

from cbmir_spark.dicom import vocabulary_tables
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.schemas import LAKE, Table, one_of, optional, required

# (modality, body_part)
Place = tuple[str, str]

# Delta passes no such options from a writer to Parquet, and a MERGE has no writer: the session carries them.
_WRITE_SETTINGS = {
    # Compressed pages would have to be decompressed to find a vector.
    "spark.sql.parquet.compression.codec": "none",
    # The row group that another tool decodes should fit the processor's cache.
    "parquet.block.size": str(8 * 2**20),
    # All vectors of a row group in one page, so that they lie side by side.
    "parquet.page.size": str(2**26),
    # Floats of a network hardly ever repeat: a dictionary would be tried in vain.
    "parquet.enable.dictionary#vector.list.element": "false",
    "parquet.enable.dictionary#projection.list.element": "false",
}

FEATURES = Table(
    name="features",
    root=LAKE,
    schema=StructType(
        [
            required(cols.IMAGE_ID, StringType()),
            required(cols.FRAME, IntegerType()),
            required(cols.VECTOR, ArrayType(FloatType(), containsNull=False)),
            required(cols.PROJECTION, ArrayType(FloatType(), containsNull=False)),
            required(cols.RESIDUAL_NORM, DoubleType()),
            required(cols.PREDICTED, StringType()),
            required(cols.PROBABILITY, FloatType()),
            required(cols.BODY_PART_SOURCE, StringType()),
            required(cols.SERIES_ID, StringType()),
            required(cols.STUDY_ID, StringType()),
            required(cols.PATIENT_ID, StringType()),
            optional(cols.SEX, StringType()),
            optional(cols.AGE_YEARS, DoubleType()),
            optional(cols.YEAR, IntegerType()),
            required(cols.PIXELS_BATCH, LongType()),
            required(cols.PIXEL_DIGEST, StringType()),
            required(cols.MODALITY, StringType()),
            required(cols.BODY_PART, StringType()),
        ]
    ),
    partitioned_by=(cols.MODALITY, cols.BODY_PART),
    constraints={
        "modality_known": one_of(cols.MODALITY, vocabulary_tables.MODALITIES),
        "body_part_known": one_of(cols.BODY_PART, vocabulary_tables.BODY_PARTS),
        "source_known": one_of(cols.BODY_PART_SOURCE, (cols.FROM_TAG, cols.FROM_PREDICTION, cols.FROM_NOTHING)),
        "residual_finite": f"{cols.RESIDUAL_NORM} >= 0 AND {cols.RESIDUAL_NORM} < double('infinity')",
    },
    write_settings=_WRITE_SETTINGS,
)


def place_of(uri: str) -> Place:
    """Read modality and body part off the path of a file, which lies in a folder named by both."""
    values = dict(part.split("=", 1) for part in uri.split("/") if "=" in part)
    return unquote(values[cols.MODALITY]), unquote(values[cols.BODY_PART])


def scan(rows: DataFrame, places: Iterable[Place]) -> DataFrame:
    """The rows of some partitions; lazy. Files of other partitions are not opened."""
    return rows.where(predicate(places))


def predicate(places: Iterable[Place], table: str = "") -> str:
    """Name some partitions in SQL, their columns qualified by an alias of the `table` if one is given.

    A filter on partition columns prunes files, which a join does not (measured: 8 of 8 files read).
    """
    prefix = f"{table}." if table else ""
    parts: dict[str, list[str]] = {}
    for modality, body_part in sorted(places):
        parts.setdefault(modality, []).append(_quoted(body_part))
    return (
        " OR ".join(
            f"({prefix}{cols.MODALITY} = {_quoted(modality)} AND {prefix}{cols.BODY_PART} IN ({', '.join(body_parts)}))"
            for modality, body_parts in parts.items()
        )
        or "false"
    )


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
