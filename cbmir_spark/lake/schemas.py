"""Define the tables: where each lives, its columns, partitions and constraints. FEATURES is in index/layout.py."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    DataType,
    DoubleType,
    IntegerType,
    LongType,
    MapType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from cbmir_spark.dicom import vocabulary_tables
from cbmir_spark.lake import columns as cols

LAKE, VAULT = "lake", "vault"


def required(name: str, kind: DataType) -> StructField:
    """Declare a column without nulls."""
    return StructField(name, kind, nullable=False)


def optional(name: str, kind: DataType) -> StructField:
    """Declare a column that may hold nulls."""
    return StructField(name, kind, nullable=True)


def one_of(column: str, values: Iterable[str]) -> str:
    """Write the constraint, in SQL, that a column holds one of some values."""
    return f"{column} IN ({', '.join(repr(value) for value in sorted(values))})"


@dataclass(frozen=True)
class Table:
    """One table: its name below the lake or the vault, its columns, its partitions, and what its rows must satisfy.

    `write_settings` are the session's settings while one of the table's files is written.
    """

    name: str
    root: str
    schema: StructType
    partitioned_by: tuple[str, ...] = ()
    constraints: Mapping[str, str] = field(default_factory=dict)
    write_settings: Mapping[str, str] = field(default_factory=dict)


_PSEUDONYMS = [
    required(cols.IMAGE_ID, StringType()),
    required(cols.SERIES_ID, StringType()),
    required(cols.STUDY_ID, StringType()),
    required(cols.PATIENT_ID, StringType()),
]

TAGS = Table(
    name="tags",
    root=LAKE,
    schema=StructType(
        [
            *_PSEUDONYMS,
            required(cols.MODALITY, StringType()),
            required(cols.BODY_PART, StringType()),
            optional(cols.MODALITY_RAW, StringType()),
            optional(cols.BODY_PART_RAW, StringType()),
            required(cols.KIND, StringType()),
            optional(cols.SEX, StringType()),
            optional(cols.AGE_YEARS, DoubleType()),
            optional(cols.YEAR, IntegerType()),
            optional(cols.LATERALITY, StringType()),
            optional(cols.VIEW_POSITION, StringType()),
            required(cols.ROWS, IntegerType()),
            required(cols.COLUMNS, IntegerType()),
            required(cols.FRAMES, IntegerType()),
            optional(cols.PIXEL_SPACING_ROW, DoubleType()),
            optional(cols.PIXEL_SPACING_COLUMN, DoubleType()),
            optional(cols.SLICE_THICKNESS, DoubleType()),
            required(cols.PHOTOMETRIC, StringType()),
            required(cols.BITS_STORED, IntegerType()),
            required(cols.SIGNED, BooleanType()),
            required(cols.SAMPLES_PER_PIXEL, IntegerType()),
            required(cols.TRANSFER_SYNTAX, StringType()),
            required(cols.SOP_CLASS, StringType()),
            required(cols.BURNED_IN, StringType()),
            optional(cols.TEXT_RISK, BooleanType()),
            required(cols.BATCH, LongType()),
        ]
    ),
    partitioned_by=(cols.BATCH,),
    constraints={
        "modality_known": one_of(cols.MODALITY, vocabulary_tables.MODALITIES),
        "body_part_known": one_of(cols.BODY_PART, vocabulary_tables.BODY_PARTS),
        "kind_known": one_of(cols.KIND, cols.KINDS),
        "sex_known": f"{cols.SEX} IS NULL OR {one_of(cols.SEX, 'MFO')}",
        # PS3.15 Annex E and HIPAA alike: ages above 90 are stored as 90.
        "age_possible": f"{cols.AGE_YEARS} IS NULL OR ({cols.AGE_YEARS} >= 0 AND {cols.AGE_YEARS} <= 90)",
        "burned_in_known": one_of(cols.BURNED_IN, ("YES", "NO", "UNKNOWN")),
    },
)

PIXELS = Table(
    name="pixels",
    root=LAKE,
    schema=StructType(
        [
            required(cols.IMAGE_ID, StringType()),
            required(cols.FRAME, IntegerType()),
            required(cols.PIXELS_COLUMN, BinaryType()),
            required(cols.PREPROCESSING, StringType()),
            required(cols.WINDOW_LOW, DoubleType()),
            required(cols.WINDOW_HIGH, DoubleType()),
            required(cols.PIXEL_DIGEST, StringType()),
            required(cols.BATCH, LongType()),
        ]
    ),
    partitioned_by=(cols.BATCH,),
    constraints={
        "whole_frame": f"octet_length({cols.PIXELS_COLUMN}) = {cols.FRAME_BYTES}",
        "frame_counted": f"{cols.FRAME} >= 0",
    },
)

SOURCES = Table(
    name="sources",
    root=VAULT,
    schema=StructType(
        [
            required(cols.URI, StringType()),
            required(cols.SIZE, LongType()),
            required(cols.MODIFIED, TimestampType()),
            optional(cols.ETAG, StringType()),
            optional(cols.DIGEST, StringType()),
            required(cols.OUTCOME, StringType()),
            optional(cols.REASON, StringType()),
            # What the reason means for this object, such as how a codestream differs from the header.
            optional(cols.DETAIL, StringType()),
            optional(cols.IMAGE_ID, StringType()),
            required(cols.KEY_ID, StringType()),
            required(cols.BATCH, LongType()),
            # The READING_REVISION that read the object; null: 1.
            optional(cols.REVISION, IntegerType()),
        ]
    ),
    constraints={
        "outcome_known": one_of(cols.OUTCOME, cols.OUTCOMES),
        "image_named": (
            f"{cols.OUTCOME} NOT IN ('{cols.INGESTED}', '{cols.DUPLICATE}', '{cols.CONFLICT}') "
            f"OR {cols.IMAGE_ID} IS NOT NULL"
        ),
        "reason_given": (
            f"{cols.OUTCOME} NOT IN ('{cols.REJECTED}', '{cols.NOT_AN_IMAGE}') OR {cols.REASON} IS NOT NULL"
        ),
    },
)

# The column of the pseudonym of each kind of identifier.
OWNERS = {"image": cols.IMAGE_ID, "series": cols.SERIES_ID, "study": cols.STUDY_ID, "patient": cols.PATIENT_ID}

IDENTITY = Table(
    name="identity",
    root=VAULT,
    schema=StructType(
        [
            required(cols.KIND, StringType()),
            required(cols.PSEUDONYM, StringType()),
            required(cols.IDENTIFIER, StringType()),
            optional(cols.ISSUER, StringType()),  # of a Patient ID
            required(cols.KEY_ID, StringType()),
        ]
    ),
    partitioned_by=(cols.KIND,),
    constraints={"kind_known": one_of(cols.KIND, OWNERS)},
)

FORGOTTEN = Table(
    name="forgotten",
    root=VAULT,
    schema=StructType(
        [
            required(cols.KIND, StringType()),
            required(cols.PSEUDONYM, StringType()),
            required(cols.KEY_ID, StringType()),
            required(cols.FORGOTTEN_AT, TimestampType()),
            # The PatientRule that the pseudonym was made by; null: first.
            optional(cols.PATIENT_RULE, StringType()),
        ]
    ),
    constraints={"kind_known": one_of(cols.KIND, OWNERS)},
)

RESULTS_HITS = Table(
    name="hits",
    root=LAKE,
    schema=StructType(
        [
            required(cols.QUERY_ID, StringType()),
            required(cols.RANK, IntegerType()),
            required(cols.DISTANCE, DoubleType()),
            required(cols.IMAGE_ID, StringType()),
            required(cols.FRAME, IntegerType()),
            required(cols.SERIES_ID, StringType()),
            required(cols.STUDY_ID, StringType()),
            required(cols.PATIENT_ID, StringType()),
            required(cols.MODALITY, StringType()),
            required(cols.BODY_PART, StringType()),
            required(cols.BODY_PART_SOURCE, StringType()),
            required(cols.PREDICTED, StringType()),
            optional(cols.SEX, StringType()),
            optional(cols.AGE_YEARS, DoubleType()),
            optional(cols.YEAR, IntegerType()),
        ]
    ),
)

RESULTS_STATUSES = Table(
    name="statuses",
    root=LAKE,
    schema=StructType(
        [
            required(cols.QUERY_ID, StringType()),
            required(cols.STATUS, StringType()),
            optional(cols.REASON, StringType()),
            required(cols.PARTITIONS, ArrayType(StringType(), containsNull=False)),
            required(cols.CANDIDATES, LongType()),
            required(cols.HITS, IntegerType()),
        ]
    ),
)

RESULTS_QUERIES = Table(
    name="queries",
    root=LAKE,
    schema=StructType(
        [required(cols.QUERY_ID, StringType()), *[optional(name, StringType()) for name in OWNERS.values()]]
    ),
)

RUNS = Table(
    name="runs",
    root=LAKE,
    schema=StructType(
        [
            required(cols.RUN_ID, StringType()),
            required(cols.JOB, StringType()),
            required("started", TimestampType()),
            required("ended", TimestampType()),
            required(cols.OUTCOME, StringType()),
            required("counts", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("seconds", MapType(StringType(), DoubleType(), valueContainsNull=False)),
            required("versions_read", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("versions_written", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("software", StringType()),
        ]
    ),
)
