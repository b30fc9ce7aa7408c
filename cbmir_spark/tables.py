"""THE tables: schema, partitioning, constraints; how they are read, conformed, written and published.

Two roots: the lake (de-identified, for everyone) and the vault (for those who may see identities). TAGS and PIXELS
are written first; the commit of SOURCES comes last and pins the versions of both that belong to it. Readers open the
pinned versions, so a job killed between two tables is never seen. The next writer brings both back to what is
published before it appends a batch, so that none is there twice.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
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

from cbmir_spark import storage, vocabulary
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError, TableError

SIDE = 256
FRAME_BYTES = SIDE * SIDE

# Columns, by the name that every table uses for them.
IMAGE_ID = "image_id"
SERIES_ID = "series_id"
STUDY_ID = "study_id"
PATIENT_ID = "patient_id"
MODALITY = "modality"
BODY_PART = "body_part"
MODALITY_RAW = "modality_raw"
BODY_PART_RAW = "body_part_raw"
KIND = "kind"
SEX = "sex"
AGE_YEARS = "age_years"
YEAR = "year"
LATERALITY = "laterality"
VIEW_POSITION = "view_position"
ROWS = "rows"
COLUMNS = "columns"
FRAMES = "frames"
PIXEL_SPACING_ROW = "pixel_spacing_row"
PIXEL_SPACING_COLUMN = "pixel_spacing_column"
SLICE_THICKNESS = "slice_thickness"
PHOTOMETRIC = "photometric"
BITS_STORED = "bits_stored"
SIGNED = "signed"
SAMPLES_PER_PIXEL = "samples_per_pixel"
TRANSFER_SYNTAX = "transfer_syntax"
SOP_CLASS = "sop_class"
BURNED_IN = "burned_in"
TEXT_RISK = "text_risk"
BATCH = "batch"
FRAME = "frame"
PIXELS_COLUMN = "pixels"
PREPROCESSING = "preprocessing"
WINDOW_LOW = "window_low"
WINDOW_HIGH = "window_high"
PIXEL_DIGEST = "pixel_digest"
VECTOR = "vector"
PROJECTION = "projection"
RESIDUAL_NORM = "residual_norm"
PREDICTED = "predicted"
PROBABILITY = "probability"
BODY_PART_SOURCE = "body_part_source"
PIXELS_BATCH = "pixels_batch"
URI = "uri"
SIZE = "size"
MODIFIED = "modified"
ETAG = "etag"
DIGEST = "digest"
OUTCOME = "outcome"
REASON = "reason"
KEY_ID = "key_id"
QUERY_ID = "query_id"
RANK = "rank"
DISTANCE = "distance"
STATUS = "status"
PARTITIONS = "partitions"
CANDIDATES = "candidates"
HITS = "hits"
RUN_ID = "run_id"
JOB = "job"
PSEUDONYM = "pseudonym"
IDENTIFIER = "identifier"
FORGOTTEN_AT = "forgotten_at"

# Outcomes of an object in SOURCES.
INGESTED = "ingested"
DUPLICATE = "duplicate"
CONFLICT = "conflict"
NOT_AN_IMAGE = "not_an_image"
REJECTED = "rejected"
VANISHED = "vanished"
DELETED = "deleted"
OUTCOMES = (INGESTED, DUPLICATE, CONFLICT, NOT_AN_IMAGE, REJECTED, VANISHED, DELETED)

IMAGE_KIND = "image"
KINDS = (IMAGE_KIND, "localizer", "screen", "whole_slide")
FROM_TAG, FROM_PREDICTION, FROM_NOTHING = "tag", "predicted", "unknown"

# Reasons for which an object is read again although storage holds what it held: its pixels have to be made anew, or
# storage refused it.
REREAD, UNREADABLE = "REREAD", "UNREADABLE"
# Why nothing is kept of an object: its image, series, study or patient was erased.
ERASED = "FORGOTTEN"

LAKE, VAULT = "lake", "vault"

# A property of SOURCES: the vocabulary that was last published without rows.
VOCABULARY_PROPERTY = "cbmir.vocabulary"


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
        "modality_known": _one_of(MODALITY, vocabulary.MODALITIES),
        "body_part_known": _one_of(BODY_PART, vocabulary.BODY_PARTS),
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
        "modality_known": _one_of(MODALITY, vocabulary.MODALITIES),
        "body_part_known": _one_of(BODY_PART, vocabulary.BODY_PARTS),
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


@dataclass(frozen=True)
class Lake:
    """The two roots of one installation, as canonical URIs."""

    uri: str
    vault: str

    @classmethod
    def of(cls, settings: Settings) -> "Lake":
        """The lake that the settings name. Raises InputError where a file stands in its place."""
        uri = storage.canonical(settings.lake.uri)
        vault = storage.canonical(settings.lake.vault) if settings.lake.vault else storage.join(uri, "vault")
        for root in (uri, vault):
            if storage.kind(root, settings.storage) == "file":
                raise InputError(f"lake {root} is a file: give a folder or prefix, with --lake")
        return cls(uri, vault)

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.uri)

    def path(self, table: Table) -> str:
        """Where a table lives; FEATURES has one table for each model, see `features`."""
        return storage.join(self.vault if table.root == VAULT else self.uri, table.name)

    def features(self, model_id: str) -> str:
        """Where the FEATURES table of one model lives."""
        return storage.join(self.uri, FEATURES.name, model_id)

    def models(self, model_id: str) -> str:
        """The folder of a model's weights and manifest that every worker can read."""
        return storage.join(self.uri, "models", model_id)

    def snapshots(self) -> str:
        """The folder of training snapshots."""
        return storage.join(self.uri, "snapshots")

    def checkpoints(self) -> str:
        """The folder of unfinished trainings' checkpoints, a folder for each."""
        return storage.join(self.uri, "training")


@dataclass(frozen=True)
class Published:
    """Versions of the three ingest tables that belong together, and what all their rows have in common.

    `batch` is the newest one in them (0: none yet), `key_id` names the key of their pseudonyms, `preprocessing` is the
    version of their pixels, `vocabulary` that of the mapping which gave them modality and body part ("": unknown).
    """

    sources: int
    tags: int
    pixels: int
    batch: int
    key_id: str
    preprocessing: str
    vocabulary: str = ""

    def message(self) -> str:
        """What the commit of SOURCES carries; its own version is the commit's."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != SOURCES.name})


def exists(spark: SparkSession, path: str) -> bool:
    """Whether a Delta table stands at `path`."""
    return bool(DeltaTable.isDeltaTable(spark, path))


def ensure(spark: SparkSession, table: Table, path: str, properties: Mapping[str, str] | None = None) -> None:
    """Create a table with its constraints and further `properties`, in one commit, where it is not there yet."""
    if exists(spark, path):
        return
    builder = DeltaTable.createIfNotExists(spark).location(path).addColumns(table.schema)
    if table.partitioned_by:
        builder = builder.partitionedBy(*table.partitioned_by)
    # Readers other than Spark (deltalake, polars, plain pyarrow) cannot apply deletion vectors.
    builder = builder.property("delta.enableDeletionVectors", "false")
    # Statistics hold the least and greatest value of a column in a file: a leak, and of random keys no help.
    builder = builder.property("delta.dataSkippingNumIndexedCols", "0")
    for name, condition in table.constraints.items():
        builder = builder.property(f"delta.constraints.{name}", condition)
    for name, value in (properties or {}).items():
        builder = builder.property(name, value)
    builder.execute()


def properties(spark: SparkSession, path: str) -> dict[str, str]:
    """The properties of a Delta table, ours among them."""
    detail = DeltaTable.forPath(spark, path).detail().select("properties").first()
    return dict(detail["properties"]) if detail else {}


def read(spark: SparkSession, path: str, version: int | None = None) -> DataFrame:
    """A Delta table, at a version where one is given. Raises TableError where there is none."""
    if not exists(spark, path):
        raise TableError(f"there is no table at {path}")
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(path)


def evolve(spark: SparkSession, table: Table, path: str, message: str = "") -> int | None:
    """Add the columns that a table made by an older version lacks, empty in its rows; the version written, if any.

    `message` travels in the commit.

    Raises TableError, before anything is written, where a column has another type, or where rows cannot do without one
    that is missing.
    """
    found = {f.name: f.dataType for f in read(spark, path).schema}
    missing = [f for f in table.schema if f.name not in found]
    problems = [
        f"{f.name} is {found[f.name].simpleString()} instead of {f.dataType.simpleString()}"
        for f in table.schema
        if f.name in found and _without_nullability(found[f.name]) != _without_nullability(f.dataType)
    ]
    problems += [f"{f.name} is missing" for f in missing if not f.nullable]
    if problems:
        raise TableError(
            f"table {table.name} at {path} was made by a version that this one cannot carry on: {'; '.join(problems)}"
        )
    if not missing:
        return None
    writer = spark.createDataFrame([], table.schema).write.format("delta").mode("append")
    writer.option("mergeSchema", "true").option("userMetadata", message).save(path)
    return version(spark, path)


def widened(df: DataFrame, table: Table) -> DataFrame:
    """`df` with those nullable columns of the table that it lacks, empty: rows that an older version wrote."""
    lacking = [f for f in table.schema if f.nullable and f.name not in df.columns]
    return df.withColumns({f.name: F.lit(None).cast(f.dataType) for f in lacking}) if lacking else df


def conform(df: DataFrame, table: Table) -> DataFrame:
    """`df` with the table's columns in its order. Raises TableError naming missing, extra and mistyped columns."""
    wanted = {f.name: f.dataType for f in table.schema}
    given = {f.name: f.dataType for f in df.schema}
    problems = []
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [name for name in given if name not in wanted]:
        problems.append(f"not in the schema: {', '.join(extra)}")
    for name, kind in wanted.items():
        if name in given and _without_nullability(given[name]) != _without_nullability(kind):
            problems.append(f"{name} is {given[name].simpleString()} instead of {kind.simpleString()}")
    if problems:
        raise TableError(f"rows for table {table.name}: {'; '.join(problems)}")
    return df.select(*wanted)


def append(df: DataFrame, table: Table, path: str, message: str = "", rows_per_file: int = 0) -> int:
    """Append conforming rows in one commit; the version written. `message` travels in the commit.

    `rows_per_file` bounds the rows of one file (0: no bound).
    """
    writer = conform(df, table).write.format("delta").mode("append").option("maxRecordsPerFile", rows_per_file)
    writer.option("userMetadata", message).option("compression", table.codec).save(path)
    return version(df.sparkSession, path)


def delete_images(spark: SparkSession, path: str, images: DataFrame, batches: Iterable[int]) -> int:
    """Remove the rows of `images` (one column, image_id) from the partitions of `batches`; the version written."""
    inside = ", ".join(str(batch) for batch in sorted(batches))
    condition = f"t.{BATCH} IN ({inside}) AND t.{IMAGE_ID} = s.{IMAGE_ID}"
    merge = DeltaTable.forPath(spark, path).alias("t").merge(images.alias("s"), condition)
    merge.whenMatchedDelete().execute()
    return version(spark, path)


def delete_rows(spark: SparkSession, path: str, rows: DataFrame, within: str, message: str = "") -> int:
    """Remove what equals one of `rows` in all their columns; the version written. `message` travels in the commit.

    `within` is a condition on partition columns of the table, here called `t`, that bounds the files looked at.
    """
    same = " AND ".join(f"t.{column} = s.{column}" for column in rows.columns)
    merge = DeltaTable.forPath(spark, path).alias("t").merge(rows.alias("s"), f"({within}) AND {same}")
    with _commit_message(spark, message):
        merge.whenMatchedDelete().execute()
    return version(spark, path)


def rearrange(df: DataFrame, table: Table, path: str, where: str, message: str = "", rows_per_file: int = 0) -> int:
    """Put the rows of some partitions, all those and no others, into other files; the version written.

    `where` is a condition on partition columns. The commit says that no row changed, and readers of older versions keep
    their files.
    """
    writer = conform(df, table).write.format("delta").mode("overwrite").option("replaceWhere", where)
    writer = writer.option("dataChange", "false").option("maxRecordsPerFile", rows_per_file)
    writer.option("userMetadata", message).option("compression", table.codec).save(path)
    return version(df.sparkSession, path)


def last_message(spark: SparkSession, path: str) -> str | None:
    """The message of the newest commit that has one, among the last hundred."""
    told = DeltaTable.forPath(spark, path).history(100).select("version", "userMetadata")
    found = told.where("userMetadata IS NOT NULL AND userMetadata != ''").orderBy(F.desc("version")).first()
    return None if found is None else str(found["userMetadata"])


def changed_batches(spark: SparkSession, path: str, before: int, after: int) -> frozenset[int] | None:
    """Batches of an ingest table whose files are not the same in two versions; None where the older one is gone."""
    if before == after:
        return frozenset()
    try:
        old = set(live_files(spark, path, before))
    except (AnalysisException, Py4JJavaError):
        return None
    return frozenset(_batch_of(uri) for uri in old ^ set(live_files(spark, path, after)))


def _batch_of(uri: str) -> int:
    return int(next(part for part in uri.split("/") if part.startswith(f"{BATCH}=")).partition("=")[2])


def update_rows(
    spark: SparkSession, path: str, rows: DataFrame, keys: Iterable[str], values: Iterable[str], within: str
) -> int:
    """Set columns of what equals one of `rows` in all `keys`, two nulls being equal; the version written.

    The new value of each of `values` is the column of `rows` called `new_` and its name. `within` is as in
    `delete_rows`. One commit, also where rows change partitions: a reader finds each of them once.
    """
    same = " AND ".join(f"t.{column} <=> s.{column}" for column in keys)
    merge = DeltaTable.forPath(spark, path).alias("t").merge(rows.alias("s"), f"({within}) AND {same}")
    merge.whenMatchedUpdate(set={column: f"s.new_{column}" for column in values}).execute()
    return version(spark, path)


def publish_empty(spark: SparkSession, lake: Lake, key_id: str, preprocessing: str, vocabulary: str = "") -> Published:
    """Create TAGS, PIXELS and at last SOURCES, whose first commit publishes that they are empty: batch 0."""
    ensure(spark, TAGS, lake.path(TAGS))
    ensure(spark, PIXELS, lake.path(PIXELS))
    pinned = Published(
        sources=-1,
        tags=version(spark, lake.path(TAGS)),
        pixels=version(spark, lake.path(PIXELS)),
        batch=0,
        key_id=key_id,
        preprocessing=preprocessing,
        vocabulary=vocabulary,
    )
    with _commit_message(spark, pinned.message()):
        ensure(spark, SOURCES, lake.path(SOURCES))
    return replace(pinned, sources=version(spark, lake.path(SOURCES)))


def publish(spark: SparkSession, lake: Lake, rows: DataFrame, pinned: Published, only_new: bool = False) -> Published:
    """Commit SOURCES by URI, pinning the versions of TAGS and PIXELS that belong to it; readers see the batch now.

    With `only_new` no URI of `rows` is in SOURCES yet: they are appended, and nothing of it has to be read.
    """
    path = lake.path(SOURCES)
    if only_new:
        return replace(pinned, sources=append(rows, SOURCES, path, pinned.message()))
    target = DeltaTable.forPath(spark, path).alias("t")
    merge = target.merge(conform(rows, SOURCES).alias("s"), f"t.{URI} = s.{URI}")
    with _commit_message(spark, pinned.message()):
        merge.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()
    return replace(pinned, sources=version(spark, path))


def publish_without_rows(spark: SparkSession, lake: Lake, pinned: Published) -> Published:
    """Commit that other versions of TAGS and PIXELS, or another vocabulary, belong to the same rows of SOURCES."""
    path = lake.path(SOURCES)
    with _commit_message(spark, pinned.message()):
        # An empty append or merge leaves no commit behind.
        spark.sql(
            f"ALTER TABLE delta.`{path.replace('`', '``')}` SET TBLPROPERTIES "
            f"('{VOCABULARY_PROPERTY}' = '{pinned.vocabulary}')"
        )
    return replace(pinned, sources=version(spark, path))


def published(spark: SparkSession, lake: Lake) -> Published | None:
    """The newest versions that belong together, or None before the first batch is published."""
    path = lake.path(SOURCES)
    if not exists(spark, path):
        return None
    history = DeltaTable.forPath(spark, path)
    for limit in (20, None):
        commits = history.history(limit) if limit else history.history()
        rows = commits.where(F.col("userMetadata").isNotNull()).orderBy(F.desc("version"))
        for row in rows.select("version", "userMetadata").take(1):
            return Published(sources=row["version"], **json.loads(row["userMetadata"]))
    return None


def require_published(spark: SparkSession, lake: Lake) -> Published:
    """As `published`, with at least one batch. Raises TableError saying to ingest first."""
    found = published(spark, lake)
    if found is None or found.batch == 0:
        raise TableError(f"lake {lake.uri} holds no images yet: run `cbmir ingest` first")
    return found


def roll_back(spark: SparkSession, lake: Lake, pinned: Published) -> list[str]:
    """Bring TAGS and PIXELS back to what is published, where a job died before it published; the tables mended."""
    mended = []
    for table, wanted in ((TAGS, pinned.tags), (PIXELS, pinned.pixels)):
        path = lake.path(table)
        if version(spark, path) != wanted:
            DeltaTable.forPath(spark, path).restoreToVersion(wanted)
            mended.append(table.name)
    return mended


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


def merge_identities(spark: SparkSession, lake: Lake, rows: DataFrame) -> int:
    """Add what the vault's IDENTITY lacks of `rows`, before SOURCES is published: a batch tried again adds nothing."""
    return merge_new(spark, rows, IDENTITY, lake.path(IDENTITY))


def prune_identities(spark: SparkSession, lake: Lake, tags: DataFrame, left: DataFrame | None = None) -> int:
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
        delete_rows(spark, path, orphans, "true")
    orphans.unpersist()
    return count


def _owners(tags: DataFrame) -> DataFrame:
    """(kind, pseudonym) of all that rows with the four ids belong to."""
    named = [F.struct(F.lit(kind).alias(KIND), F.col(column).alias(PSEUDONYM)) for kind, column in OWNERS.items()]
    return tags.select(F.explode(F.array(*named)).alias("owner")).select("owner.*")


def tombstones(spark: SparkSession, lake: Lake) -> frozenset[str]:
    """What must not be kept, as kind:pseudonym; what was asked to be forgotten is a list that a driver can hold."""
    path = lake.path(FORGOTTEN)
    if not exists(spark, path):
        return frozenset()
    return frozenset(f"{row[KIND]}:{row[PSEUDONYM]}" for row in read(spark, path).select(KIND, PSEUDONYM).collect())


def vacuum(spark: SparkSession, path: str, hours: int) -> None:
    """Remove the files that no version of the last `hours` needs; below 168 readers of older versions will fail."""
    settings = {
        "spark.databricks.delta.retentionDurationCheck.enabled": "false",
        # Logged, it would be a version of its own, which no published one names.
        "spark.databricks.delta.vacuum.logging.enabled": "false",
        # Delta lists a table in as many tasks as this says, by default 10,000, however few folders there are.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(4 * spark.sparkContext.defaultParallelism),
    }
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        DeltaTable.forPath(spark, path).vacuum(hours)
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


def version(spark: SparkSession, path: str) -> int:
    """The newest version of a Delta table. Raises TableError where there is none."""
    jvm: Any = spark.sparkContext._jvm
    # `DeltaTable.history` answers the same by a Spark job of a quarter of a second, and a run asks ten times.
    log = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path)
    found = int(log.update(False, jvm.scala.Option.empty(), jvm.scala.Option.empty()).version())
    if found < 0:
        raise TableError(f"there is no table at {path}")
    return found


def live_files(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    """Canonical URIs of the Parquet files that are live in a Delta table, sorted."""
    return sorted(storage.canonical(uri) for uri in read(spark, path, version).inputFiles())


def place_of(uri: str) -> tuple[str, str]:
    """Modality and body part of a file of FEATURES, which lies in a folder named by both."""
    values = dict(part.split("=", 1) for part in uri.split("/") if "=" in part)
    return unquote(values[MODALITY]), unquote(values[BODY_PART])


def _without_nullability(kind: DataType) -> str:
    return kind.simpleString()


@contextmanager
def _commit_message(spark: SparkSession, message: str) -> Iterator[None]:
    """MERGE and CREATE take a commit's message from the session only, so it is set around one statement."""
    key = "spark.databricks.delta.commitInfo.userMetadata"
    spark.conf.set(key, message)
    try:
        yield
    finally:
        spark.conf.unset(key)
