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
from cbmir_spark.lake.columns import (
    AGE_YEARS,
    BATCH,
    BITS_STORED,
    BODY_PART,
    BODY_PART_RAW,
    BODY_PART_SOURCE,
    BURNED_IN,
    CANDIDATES,
    COLUMNS,
    CONFLICT,
    DIGEST,
    DISTANCE,
    DUPLICATE,
    ETAG,
    FORGOTTEN_AT,
    FRAME,
    FRAME_BYTES,
    FRAMES,
    HITS,
    IDENTIFIER,
    IMAGE_ID,
    INGESTED,
    JOB,
    KEY_ID,
    KIND,
    KINDS,
    LATERALITY,
    MODALITY,
    MODALITY_RAW,
    MODIFIED,
    NOT_AN_IMAGE,
    OUTCOME,
    OUTCOMES,
    PARTITIONS,
    PATIENT_ID,
    PHOTOMETRIC,
    PIXEL_DIGEST,
    PIXEL_SPACING_COLUMN,
    PIXEL_SPACING_ROW,
    PIXELS_COLUMN,
    PREDICTED,
    PREPROCESSING,
    PSEUDONYM,
    QUERY_ID,
    RANK,
    REASON,
    REJECTED,
    ROWS,
    RUN_ID,
    SAMPLES_PER_PIXEL,
    SERIES_ID,
    SEX,
    SIGNED,
    SIZE,
    SLICE_THICKNESS,
    SOP_CLASS,
    STATUS,
    STUDY_ID,
    TEXT_RISK,
    TRANSFER_SYNTAX,
    URI,
    VIEW_POSITION,
    WINDOW_HIGH,
    WINDOW_LOW,
    YEAR,
)

LAKE, VAULT = "lake", "vault"


def required(name: str, kind: DataType) -> StructField:
    """A column without nulls."""
    return StructField(name, kind, nullable=False)


def optional(name: str, kind: DataType) -> StructField:
    """A column that may hold nulls."""
    return StructField(name, kind, nullable=True)


def one_of(column: str, values: Iterable[str]) -> str:
    """The constraint that a column holds one of some values, in SQL."""
    return f"{column} IN ({', '.join(repr(value) for value in sorted(values))})"


@dataclass(frozen=True)
class Table:
    """One table: its name below the lake or the vault, its columns, its partitions, and the rows that Delta refuses.

    `write_settings` are the session's settings while one of the table's files is written.
    """

    name: str
    root: str
    schema: StructType
    partitioned_by: tuple[str, ...] = ()
    constraints: Mapping[str, str] = field(default_factory=dict)
    write_settings: Mapping[str, str] = field(default_factory=dict)


_PSEUDONYMS = [
    required(IMAGE_ID, StringType()),
    required(SERIES_ID, StringType()),
    required(STUDY_ID, StringType()),
    required(PATIENT_ID, StringType()),
]

TAGS = Table(
    name="tags",
    root=LAKE,
    schema=StructType(
        [
            *_PSEUDONYMS,
            required(MODALITY, StringType()),
            required(BODY_PART, StringType()),
            optional(MODALITY_RAW, StringType()),
            optional(BODY_PART_RAW, StringType()),
            required(KIND, StringType()),
            optional(SEX, StringType()),
            optional(AGE_YEARS, DoubleType()),
            optional(YEAR, IntegerType()),
            optional(LATERALITY, StringType()),
            optional(VIEW_POSITION, StringType()),
            required(ROWS, IntegerType()),
            required(COLUMNS, IntegerType()),
            required(FRAMES, IntegerType()),
            optional(PIXEL_SPACING_ROW, DoubleType()),
            optional(PIXEL_SPACING_COLUMN, DoubleType()),
            optional(SLICE_THICKNESS, DoubleType()),
            required(PHOTOMETRIC, StringType()),
            required(BITS_STORED, IntegerType()),
            required(SIGNED, BooleanType()),
            required(SAMPLES_PER_PIXEL, IntegerType()),
            required(TRANSFER_SYNTAX, StringType()),
            required(SOP_CLASS, StringType()),
            required(BURNED_IN, StringType()),
            optional(TEXT_RISK, BooleanType()),
            required(BATCH, LongType()),
        ]
    ),
    partitioned_by=(BATCH,),
    constraints={
        "modality_known": one_of(MODALITY, vocabulary_tables.MODALITIES),
        "body_part_known": one_of(BODY_PART, vocabulary_tables.BODY_PARTS),
        "kind_known": one_of(KIND, KINDS),
        "sex_known": f"{SEX} IS NULL OR {one_of(SEX, 'MFO')}",
        # PS3.15 Annex E and HIPAA alike: nobody is told to be older than 90.
        "age_possible": f"{AGE_YEARS} IS NULL OR ({AGE_YEARS} >= 0 AND {AGE_YEARS} <= 90)",
        "burned_in_known": one_of(BURNED_IN, ("YES", "NO", "UNKNOWN")),
    },
)

PIXELS = Table(
    name="pixels",
    root=LAKE,
    schema=StructType(
        [
            required(IMAGE_ID, StringType()),
            required(FRAME, IntegerType()),
            required(PIXELS_COLUMN, BinaryType()),
            required(PREPROCESSING, StringType()),
            required(WINDOW_LOW, DoubleType()),
            required(WINDOW_HIGH, DoubleType()),
            required(PIXEL_DIGEST, StringType()),
            required(BATCH, LongType()),
        ]
    ),
    partitioned_by=(BATCH,),
    constraints={"whole_frame": f"octet_length({PIXELS_COLUMN}) = {FRAME_BYTES}", "frame_counted": f"{FRAME} >= 0"},
)

SOURCES = Table(
    name="sources",
    root=VAULT,
    schema=StructType(
        [
            required(URI, StringType()),
            required(SIZE, LongType()),
            required(MODIFIED, TimestampType()),
            optional(ETAG, StringType()),
            optional(DIGEST, StringType()),
            required(OUTCOME, StringType()),
            optional(REASON, StringType()),
            optional(IMAGE_ID, StringType()),
            required(KEY_ID, StringType()),
            required(BATCH, LongType()),
        ]
    ),
    constraints={
        "outcome_known": one_of(OUTCOME, OUTCOMES),
        "image_named": f"{OUTCOME} NOT IN ('{INGESTED}', '{DUPLICATE}', '{CONFLICT}') OR {IMAGE_ID} IS NOT NULL",
        "reason_given": f"{OUTCOME} NOT IN ('{REJECTED}', '{NOT_AN_IMAGE}') OR {REASON} IS NOT NULL",
    },
)

# Whose column holds the pseudonym of each kind of identifier.
OWNERS = {"image": IMAGE_ID, "series": SERIES_ID, "study": STUDY_ID, "patient": PATIENT_ID}

IDENTITY = Table(
    name="identity",
    root=VAULT,
    schema=StructType(
        [
            required(KIND, StringType()),
            required(PSEUDONYM, StringType()),
            required(IDENTIFIER, StringType()),
            required(KEY_ID, StringType()),
        ]
    ),
    partitioned_by=(KIND,),
    constraints={"kind_known": one_of(KIND, OWNERS)},
)

FORGOTTEN = Table(
    name="forgotten",
    root=VAULT,
    schema=StructType(
        [
            required(KIND, StringType()),
            required(PSEUDONYM, StringType()),
            required(KEY_ID, StringType()),
            required(FORGOTTEN_AT, TimestampType()),
        ]
    ),
    constraints={"kind_known": one_of(KIND, OWNERS)},
)

RESULTS_HITS = Table(
    name="hits",
    root=LAKE,
    schema=StructType(
        [
            required(QUERY_ID, StringType()),
            required(RANK, IntegerType()),
            required(DISTANCE, DoubleType()),
            required(IMAGE_ID, StringType()),
            required(FRAME, IntegerType()),
            required(SERIES_ID, StringType()),
            required(STUDY_ID, StringType()),
            required(PATIENT_ID, StringType()),
            required(MODALITY, StringType()),
            required(BODY_PART, StringType()),
            required(BODY_PART_SOURCE, StringType()),
            required(PREDICTED, StringType()),
            optional(SEX, StringType()),
            optional(AGE_YEARS, DoubleType()),
            optional(YEAR, IntegerType()),
        ]
    ),
)

RESULTS_STATUSES = Table(
    name="statuses",
    root=LAKE,
    schema=StructType(
        [
            required(QUERY_ID, StringType()),
            required(STATUS, StringType()),
            optional(REASON, StringType()),
            required(PARTITIONS, ArrayType(StringType(), containsNull=False)),
            required(CANDIDATES, LongType()),
            required(HITS, IntegerType()),
        ]
    ),
)

RESULTS_QUERIES = Table(
    name="queries",
    root=LAKE,
    schema=StructType([required(QUERY_ID, StringType()), *[optional(name, StringType()) for name in OWNERS.values()]]),
)

RUNS = Table(
    name="runs",
    root=LAKE,
    schema=StructType(
        [
            required(RUN_ID, StringType()),
            required(JOB, StringType()),
            required("started", TimestampType()),
            required("ended", TimestampType()),
            required(OUTCOME, StringType()),
            required("counts", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("seconds", MapType(StringType(), DoubleType(), valueContainsNull=False)),
            required("versions_read", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("versions_written", MapType(StringType(), LongType(), valueContainsNull=False)),
            required("software", StringType()),
        ]
    ),
)
