"""Each table: where it lives, its columns, partitions and constraints."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    DataType,
    DoubleType,
    FloatType,
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
    FROM_NOTHING,
    FROM_PREDICTION,
    FROM_TAG,
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
    PIXELS_BATCH,
    PIXELS_COLUMN,
    PREDICTED,
    PREPROCESSING,
    PROBABILITY,
    PROJECTION,
    PSEUDONYM,
    QUERY_ID,
    RANK,
    REASON,
    REJECTED,
    RESIDUAL_NORM,
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
    VECTOR,
    VIEW_POSITION,
    WINDOW_HIGH,
    WINDOW_LOW,
    YEAR,
)

LAKE, VAULT = "lake", "vault"


def _required(name: str, kind: DataType) -> StructField:
    return StructField(name, kind, nullable=False)


def _optional(name: str, kind: DataType) -> StructField:
    return StructField(name, kind, nullable=True)


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in sorted(values))})"


@dataclass(frozen=True)
class Table:
    """One table: where it lives, its columns, how its files are laid out, and what Delta refuses to let in."""

    name: str
    root: str
    schema: StructType
    partitioned_by: tuple[str, ...] = ()
    constraints: Mapping[str, str] = field(default_factory=dict)
    codec: str = "snappy"
    """How Parquet pages are compressed; every reader of Parquet knows these names."""


_PSEUDONYMS = [
    _required(IMAGE_ID, StringType()),
    _required(SERIES_ID, StringType()),
    _required(STUDY_ID, StringType()),
    _required(PATIENT_ID, StringType()),
]

TAGS = Table(
    name="tags",
    root=LAKE,
    schema=StructType(
        [
            *_PSEUDONYMS,
            _required(MODALITY, StringType()),
            _required(BODY_PART, StringType()),
            _optional(MODALITY_RAW, StringType()),
            _optional(BODY_PART_RAW, StringType()),
            _required(KIND, StringType()),
            _optional(SEX, StringType()),
            _optional(AGE_YEARS, DoubleType()),
            _optional(YEAR, IntegerType()),
            _optional(LATERALITY, StringType()),
            _optional(VIEW_POSITION, StringType()),
            _required(ROWS, IntegerType()),
            _required(COLUMNS, IntegerType()),
            _required(FRAMES, IntegerType()),
            _optional(PIXEL_SPACING_ROW, DoubleType()),
            _optional(PIXEL_SPACING_COLUMN, DoubleType()),
            _optional(SLICE_THICKNESS, DoubleType()),
            _required(PHOTOMETRIC, StringType()),
            _required(BITS_STORED, IntegerType()),
            _required(SIGNED, BooleanType()),
            _required(SAMPLES_PER_PIXEL, IntegerType()),
            _required(TRANSFER_SYNTAX, StringType()),
            _required(SOP_CLASS, StringType()),
            _required(BURNED_IN, StringType()),
            _optional(TEXT_RISK, BooleanType()),
            _required(BATCH, LongType()),
        ]
    ),
    partitioned_by=(BATCH,),
    constraints={
        "modality_known": _one_of(MODALITY, vocabulary_tables.MODALITIES),
        "body_part_known": _one_of(BODY_PART, vocabulary_tables.BODY_PARTS),
        "kind_known": _one_of(KIND, KINDS),
        "sex_known": f"{SEX} IS NULL OR {_one_of(SEX, 'MFO')}",
        # PS3.15 Annex E and HIPAA alike: nobody is told to be older than 90.
        "age_possible": f"{AGE_YEARS} IS NULL OR ({AGE_YEARS} >= 0 AND {AGE_YEARS} <= 90)",
        "burned_in_known": _one_of(BURNED_IN, ("YES", "NO", "UNKNOWN")),
    },
)

PIXELS = Table(
    name="pixels",
    root=LAKE,
    schema=StructType(
        [
            _required(IMAGE_ID, StringType()),
            _required(FRAME, IntegerType()),
            _required(PIXELS_COLUMN, BinaryType()),
            _required(PREPROCESSING, StringType()),
            _required(WINDOW_LOW, DoubleType()),
            _required(WINDOW_HIGH, DoubleType()),
            _required(PIXEL_DIGEST, StringType()),
            _required(BATCH, LongType()),
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
            _required(URI, StringType()),
            _required(SIZE, LongType()),
            _required(MODIFIED, TimestampType()),
            _optional(ETAG, StringType()),
            _optional(DIGEST, StringType()),
            _required(OUTCOME, StringType()),
            _optional(REASON, StringType()),
            _optional(IMAGE_ID, StringType()),
            _required(KEY_ID, StringType()),
            _required(BATCH, LongType()),
        ]
    ),
    constraints={
        "outcome_known": _one_of(OUTCOME, OUTCOMES),
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
            _required(KIND, StringType()),
            _required(PSEUDONYM, StringType()),
            _required(IDENTIFIER, StringType()),
            _required(KEY_ID, StringType()),
        ]
    ),
    partitioned_by=(KIND,),
    constraints={"kind_known": _one_of(KIND, OWNERS)},
)

FORGOTTEN = Table(
    name="forgotten",
    root=VAULT,
    schema=StructType(
        [
            _required(KIND, StringType()),
            _required(PSEUDONYM, StringType()),
            _required(KEY_ID, StringType()),
            _required(FORGOTTEN_AT, TimestampType()),
        ]
    ),
    constraints={"kind_known": _one_of(KIND, OWNERS)},
)

FEATURES = Table(
    name="features",
    root=LAKE,
    schema=StructType(
        [
            _required(IMAGE_ID, StringType()),
            _required(FRAME, IntegerType()),
            _required(VECTOR, ArrayType(FloatType(), containsNull=False)),
            _required(PROJECTION, ArrayType(FloatType(), containsNull=False)),
            _required(RESIDUAL_NORM, DoubleType()),
            _required(PREDICTED, StringType()),
            _required(PROBABILITY, FloatType()),
            _required(BODY_PART_SOURCE, StringType()),
            _required(SERIES_ID, StringType()),
            _required(STUDY_ID, StringType()),
            _required(PATIENT_ID, StringType()),
            _optional(SEX, StringType()),
            _optional(AGE_YEARS, DoubleType()),
            _optional(YEAR, IntegerType()),
            _required(PIXELS_BATCH, LongType()),
            _required(PIXEL_DIGEST, StringType()),
            _required(MODALITY, StringType()),
            _required(BODY_PART, StringType()),
        ]
    ),
    partitioned_by=(MODALITY, BODY_PART),
    constraints={
        "modality_known": _one_of(MODALITY, vocabulary_tables.MODALITIES),
        "body_part_known": _one_of(BODY_PART, vocabulary_tables.BODY_PARTS),
        "source_known": _one_of(BODY_PART_SOURCE, (FROM_TAG, FROM_PREDICTION, FROM_NOTHING)),
        "residual_finite": f"{RESIDUAL_NORM} >= 0 AND {RESIDUAL_NORM} < double('infinity')",
    },
    # Vectors are read by their place in the file, see vector_files.py.
    codec="none",
)

RESULTS_HITS = Table(
    name="hits",
    root=LAKE,
    schema=StructType(
        [
            _required(QUERY_ID, StringType()),
            _required(RANK, IntegerType()),
            _required(DISTANCE, DoubleType()),
            _required(IMAGE_ID, StringType()),
            _required(FRAME, IntegerType()),
            _required(SERIES_ID, StringType()),
            _required(STUDY_ID, StringType()),
            _required(PATIENT_ID, StringType()),
            _required(MODALITY, StringType()),
            _required(BODY_PART, StringType()),
            _required(BODY_PART_SOURCE, StringType()),
            _required(PREDICTED, StringType()),
            _optional(SEX, StringType()),
            _optional(AGE_YEARS, DoubleType()),
            _optional(YEAR, IntegerType()),
        ]
    ),
)

RESULTS_STATUSES = Table(
    name="statuses",
    root=LAKE,
    schema=StructType(
        [
            _required(QUERY_ID, StringType()),
            _required(STATUS, StringType()),
            _optional(REASON, StringType()),
            _required(PARTITIONS, ArrayType(StringType(), containsNull=False)),
            _required(CANDIDATES, LongType()),
            _required(HITS, IntegerType()),
        ]
    ),
)

RESULTS_QUERIES = Table(
    name="queries",
    root=LAKE,
    schema=StructType(
        [_required(QUERY_ID, StringType()), *[_optional(name, StringType()) for name in OWNERS.values()]]
    ),
)

RUNS = Table(
    name="runs",
    root=LAKE,
    schema=StructType(
        [
            _required(RUN_ID, StringType()),
            _required(JOB, StringType()),
            _required("started", TimestampType()),
            _required("ended", TimestampType()),
            _required(OUTCOME, StringType()),
            _required("counts", MapType(StringType(), LongType(), valueContainsNull=False)),
            _required("seconds", MapType(StringType(), DoubleType(), valueContainsNull=False)),
            _required("versions_read", MapType(StringType(), LongType(), valueContainsNull=False)),
            _required("versions_written", MapType(StringType(), LongType(), valueContainsNull=False)),
            _required("software", StringType()),
        ]
    ),
)
