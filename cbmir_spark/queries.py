"""A list of query images → queries with vectors: read and checked on the driver, files embedded in tasks.

A row names an image of the index, or a file, which is then read, decoded and embedded by the code that the archive
went through. What is wrong with a row becomes its status; it never costs the other rows theirs.
"""

import csv
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    DoubleType,
    FloatType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from cbmir_spark import arrays, features, model, parse, pseudonyms, reconcile, report, storage, vocabulary
from cbmir_spark import tables as t
from cbmir_spark.config import MOST_HITS, RetrievalSettings, Settings, StorageSettings
from cbmir_spark.errors import InputError, ModelError, TableError
from cbmir_spark.features import Index
from cbmir_spark.pseudonyms import Pseudonyms
from cbmir_spark.scan_task import ANYTHING, Within
from cbmir_spark.vector_files import Place
from cbmir_spark.vocabulary import UNKNOWN

SOP_INSTANCE_UID = "sop_instance_uid"
SERIES_INSTANCE_UID = "series_instance_uid"
# What a row may name its query by, at each level.
NAMING = {
    "image": (t.URI, t.IMAGE_ID, SOP_INSTANCE_UID),
    "series": (t.SERIES_ID, SERIES_INSTANCE_UID, t.IMAGE_ID, SOP_INSTANCE_UID),
}
K, EXCLUDE_SAME, UNIQUE = "k", "exclude_same", "unique"
AGE_MIN, AGE_MAX, YEAR_MIN, YEAR_MAX = "age_min", "age_max", "year_min", "year_max"
# What a row may ask for otherwise than the settings do.
OWN = (K, t.MODALITY, t.BODY_PART, t.SEX, AGE_MIN, AGE_MAX, YEAR_MIN, YEAR_MAX, EXCLUDE_SAME, UNIQUE)

# Queries that one task embeds; each costs tens of milliseconds on a CPU.
QUERIES_PER_TASK = 64
# Longer cells hold no identifier and no path.
LONGEST_CELL = 4096

_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_UID = re.compile(r"[0-9.]{1,64}")
_FRAME_NUMBER = re.compile(r"[0-9]{1,9}")
# Parquet may hold whole numbers as floating ones.
_WHOLE = re.compile(r"[0-9]{1,6}(\.0)?")
_AGE = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?")


class Answered(StrEnum):
    """What became of a query."""

    ANSWERED = "answered"
    NO_CANDIDATES = "no_candidates"
    NOT_FOUND = "not_found"
    UNREADABLE = "unreadable"
    BAD_ROW = "bad_row"


@dataclass(frozen=True)
class Own:
    """What one row of a list asks for otherwise than the settings do; None: as they do.

    `modality` and `body_part` say which partitions are searched, `within` what rows must have there.
    """

    k: int | None = None
    modality: str | None = None
    body_part: str | None = None
    exclude_same: str | None = None
    unique: str | None = None
    within: Within = ANYTHING


AS_SET = Own()


@dataclass(frozen=True)
class Wanted:
    """One row of a query list that can be looked for; `frame` is None for the middle one of those indexed."""

    query_id: str
    naming: str
    value: str
    frame: int | None
    own: Own = AS_SET


@dataclass(frozen=True)
class Query:
    """A query as the search takes it: its vector, (D,) float32, and what is known of its image.

    UNKNOWN stands for a modality or body part that the tags do not give. `predicted` is the model's label, UNKNOWN
    where it has none. Without ids nothing is excluded as being the same.
    """

    query_id: str
    vector: NDArray[np.float32]
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    predicted: str = UNKNOWN
    probability: float = 0.0
    image_id: str | None = None
    series_id: str | None = None
    study_id: str | None = None
    patient_id: str | None = None
    frame: int | None = None
    own: Own = AS_SET


@dataclass(frozen=True)
class Status:
    """A query's end: the partitions searched, as CT/CHEST, the rows it was compared with, and its hits."""

    query_id: str
    status: Answered
    reason: str | None = None
    partitions: tuple[str, ...] = ()
    candidates: int = 0
    hits: int = 0


# --- the query list; on the driver ---


@dataclass(frozen=True)
class QueryList:
    """Rows of a list in its order: those to look for, and the statuses of those that cannot be."""

    rows: tuple[Wanted | Status, ...]
    ignored: tuple[str, ...]


def read_queries(uri: str, files: StorageSettings, level: str = "image") -> QueryList:
    """A CSV or Parquet query list: `query_id` and one of the level's NAMING in each row; `frame`, which counts for
    images alone, and the columns of OWN if asked.

    A row that cannot be used becomes a status and hinders no other. Raises InputError where the list itself cannot be
    used, naming the columns that are missing and those that are there.
    """
    try:
        content = storage.read_bytes(storage.canonical(uri), files)
    except OSError as error:
        raise InputError(
            f"query list {uri}: {error.strerror or 'cannot be read'}; give a CSV or Parquet file"
        ) from None
    try:
        columns, rows = _parquet_rows(content) if content[:4] == b"PAR1" else _csv_rows(content)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"query list {uri} cannot be read as CSV (in UTF-8) or Parquet: {reason}") from None
    missing = [] if t.QUERY_ID in columns else [t.QUERY_ID]
    naming = NAMING[level]
    missing += [] if set(naming) & set(columns) else [f"one of {', '.join(naming)}"]
    if missing:
        there = ", ".join(name[:64] for name in columns[:20]) or "nothing"
        raise InputError(f"query list {uri} lacks column {' and '.join(missing)}; it has {there}")
    times = Counter(row.get(t.QUERY_ID) for row in rows)
    asked = [_asked(number, row, times[row.get(t.QUERY_ID)], naming) for number, row in enumerate(rows, start=1)]
    known = {t.QUERY_ID, t.FRAME, *naming, *OWN}
    return QueryList(tuple(asked), tuple(name for name in columns if name not in known))


# What a CSV row with too many or too few cells holds under this name: how many there were.
_CELLS = "\0cells"


def _csv_rows(content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """Column names, and the cells of each row that are not empty."""
    before = csv.field_size_limit(len(content) + 1)
    try:
        lines = [cells for cells in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if cells]
    finally:
        csv.field_size_limit(before)
    columns = [name.strip() for name in lines[0]] if lines else []
    _check_unique(columns)
    rows = []
    for cells in lines[1:]:
        row = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
        if len(cells) != len(columns):
            row[_CELLS] = str(len(cells))
        rows.append(row)
    return columns, rows


def _parquet_rows(content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    columns = pa.parquet.read_schema(io.BytesIO(content)).names
    _check_unique(columns)
    known = {t.QUERY_ID, t.FRAME, *itertools.chain(*NAMING.values()), *OWN}
    wanted = [name for name in columns if name in known]
    table = pa.parquet.read_table(io.BytesIO(content), columns=wanted)
    text = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    return columns, [{name: cell for name, cell in row.items() if cell} for row in text.to_pylist()]


def _check_unique(columns: Sequence[str]) -> None:
    twice = [name[:64] for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise csv.Error(f"column {twice[0]} occurs more than once")


def _asked(number: int, row: Mapping[str, str], times: int, names: Sequence[str]) -> Wanted | Status:
    query_id, frame = row.get(t.QUERY_ID, ""), row.get(t.FRAME)
    given = {name: row[name] for name in names if name in row}
    problem = None
    if _CELLS in row:
        problem = f"row {number} has {row[_CELLS]} cells, the header has another number"
    elif not query_id:
        problem = f"row {number} has no query_id"
    elif len(query_id) > LONGEST_CELL:
        problem = f"row {number} has a query_id of {len(query_id)} characters"
    elif times > 1:
        problem = f"query_id occurs {times} times"
    elif len(given) != 1:
        problem = f"{' and '.join(given) or 'none'} of {', '.join(names)} given; give one"
    elif frame is not None and not _FRAME_NUMBER.fullmatch(frame):
        problem = "frame is not a number from 0"
    if problem is None:
        naming, value = next(iter(given.items()))
        problem = _unfit(naming, value.strip())
    if problem is None:
        own = _own({name: row[name].strip() for name in OWN if name in row})
        if isinstance(own, Own):
            return Wanted(query_id, naming, value.strip(), None if frame is None else int(frame), own)
        problem = own
    return Status(query_id[:LONGEST_CELL], Answered.BAD_ROW, problem)


def _own(cells: Mapping[str, str]) -> Own | str:
    """What a row asks for, or why it cannot be had."""
    for name, words in (
        (t.MODALITY, vocabulary.MODALITIES),
        (t.BODY_PART, frozenset(vocabulary.BODY_PARTS)),
        (t.SEX, frozenset("FMO")),
        (EXCLUDE_SAME, frozenset(RetrievalSettings.choices(EXCLUDE_SAME))),
        (UNIQUE, frozenset(RetrievalSettings.choices(UNIQUE))),
    ):
        if name in cells and cells[name] not in words:
            few = f"; it is one of {', '.join(sorted(words))}" if len(words) < 10 else ""
            return f"{name} {_quoted(cells[name])} is no term of ours{few}"
    numbers: dict[str, float] = {}
    for name, most in ((K, MOST_HITS), (AGE_MIN, 200), (AGE_MAX, 200), (YEAR_MIN, 9999), (YEAR_MAX, 9999)):
        if name not in cells:
            continue
        pattern = _AGE if name in (AGE_MIN, AGE_MAX) else _WHOLE
        if not pattern.fullmatch(cells[name]) or not (name == K) <= float(cells[name]) <= most:
            return f"{name} {_quoted(cells[name])} is not a number from {int(name == K)} to {most}"
        numbers[name] = float(cells[name])
    for least, greatest in ((AGE_MIN, AGE_MAX), (YEAR_MIN, YEAR_MAX)):
        if numbers.get(least, -math.inf) > numbers.get(greatest, math.inf):
            return f"{least} is above {greatest}"
    return Own(
        k=int(numbers[K]) if K in numbers else None,
        modality=cells.get(t.MODALITY),
        body_part=cells.get(t.BODY_PART),
        exclude_same=cells.get(EXCLUDE_SAME),
        unique=cells.get(UNIQUE),
        within=Within(
            sex=cells.get(t.SEX),
            age_min=numbers.get(AGE_MIN),
            age_max=numbers.get(AGE_MAX),
            year_min=int(numbers[YEAR_MIN]) if YEAR_MIN in numbers else None,
            year_max=int(numbers[YEAR_MAX]) if YEAR_MAX in numbers else None,
        ),
    )


def _quoted(cell: str) -> str:
    """A cell as an error may show it: short, and without characters that could steer a terminal."""
    return repr(cell[:32])


def _unfit(naming: str, value: str) -> str | None:
    """Why a cell cannot name an image, None where it can."""
    if naming in (t.IMAGE_ID, t.SERIES_ID):
        return None if _PSEUDONYM.fullmatch(value) else f"{naming} is not 32 hexadecimal digits"
    if naming in (SOP_INSTANCE_UID, SERIES_INSTANCE_UID):
        return None if _UID.fullmatch(value) else f"{naming} is not a UID"
    if len(value) > LONGEST_CELL or not value.isprintable():
        return "uri is too long or holds control characters"
    try:
        usable = storage.is_native(storage.canonical(value))
    except InputError:
        usable = False
    if not usable:
        return "uri has a scheme that is not supported; use a path, file: or s3a:"
    return None


# --- resolve: a row of the list → a Query ---


@dataclass(frozen=True)
class Resolved:
    """Queries, or the statuses of those that are not to be had, by query_id; and the pictures of those from files."""

    queries: Mapping[str, Query] = field(default_factory=dict)
    failed: Mapping[str, Status] = field(default_factory=dict)
    pictures: Mapping[str, report.Asked] = field(default_factory=dict)


def resolve(
    spark: SparkSession,
    rows: Sequence[Wanted],
    index: Index,
    settings: Settings,
    pictured: Collection[str] = (),
) -> Resolved:
    """The queries of a list's rows.

    What the index holds is looked up there; a `uri` is read, decoded by the archive's own code and embedded by the
    index's model, in tasks. `pictured` are query_ids whose picture is wanted. Raises ModelError where a file is to be
    read and the `pixels` settings are not those that the model was trained with.
    """
    found = _look_up(spark, [row for row in rows if row.naming != t.URI], index, settings)
    read = _read_uris(spark, [row for row in rows if row.naming == t.URI], index, settings, pictured)
    return Resolved({**found.queries, **read.queries}, {**found.failed, **read.failed}, read.pictures)


def _look_up(spark: SparkSession, rows: Sequence[Wanted], index: Index, settings: Settings) -> Resolved:
    if not rows:
        return Resolved()
    names = pseudonyms_of(spark, settings) if any(row.naming == SOP_INSTANCE_UID for row in rows) else None
    image_of = {
        row.query_id: names.image(row.value) if names is not None and row.naming == SOP_INSTANCE_UID else row.value
        for row in rows
    }
    images = spark.createDataFrame([(i,) for i in sorted(set(image_of.values()))], f"{t.IMAGE_ID} string")
    # Keys first, a sixtieth of the bytes: they say which frame, and so which partitions hold the vectors.
    keys = (
        index.rows.select(t.IMAGE_ID, t.FRAME, t.MODALITY, t.BODY_PART)
        .join(F.broadcast(images), on=t.IMAGE_ID, how="left_semi")
        .collect()
    )
    frames: dict[str, dict[int, Place]] = {}
    for key in keys:
        frames.setdefault(key[t.IMAGE_ID], {})[key[t.FRAME]] = (key[t.MODALITY], key[t.BODY_PART])
    wanted: dict[str, tuple[str, int]] = {}
    failed: dict[str, Status] = {}
    for row in rows:
        there = frames.get(image_of[row.query_id], {})
        frame = middle(sorted(there)) if row.frame is None else row.frame
        if frame is None or frame not in there:
            reason = f"the image is not in the index of {index.manifest.model_id}"
            if there:
                reason = f"frame {frame} is not indexed; the image has {len(there)}, from {min(there)} to {max(there)}"
            failed[row.query_id] = Status(row.query_id, Answered.NOT_FOUND, reason)
        else:
            wanted[row.query_id] = (image_of[row.query_id], frame)
    found = _fetch(spark, index, set(wanted.values()), {frames[image][frame] for image, frame in wanted.values()})
    own = {row.query_id: row.own for row in rows}
    queries = {name: replace(found[key], query_id=name, own=own[name]) for name, key in wanted.items()}
    return Resolved(queries, failed)


def middle(frames: Sequence[int]) -> int | None:
    """The frame that stands for an image: the middle one of those there are."""
    return frames[len(frames) // 2] if frames else None


def _fetch(
    spark: SparkSession, index: Index, keys: set[tuple[str, int]], places: set[Place]
) -> dict[tuple[str, int], Query]:
    if not keys:
        return {}
    chosen = spark.createDataFrame(sorted(keys), f"{t.IMAGE_ID} string, {t.FRAME} int")
    columns = (t.IMAGE_ID, t.FRAME, t.VECTOR, t.PREDICTED, t.PROBABILITY, t.BODY_PART_SOURCE, t.MODALITY, t.BODY_PART)
    ids = (t.SERIES_ID, t.STUDY_ID, t.PATIENT_ID)
    rows = features.scan(index.rows, places).select(*columns, *ids)
    table = rows.join(F.broadcast(chosen), on=[t.IMAGE_ID, t.FRAME], how="left_semi").toArrow()
    found = {}
    for batch in table.to_batches():
        vectors = arrays.vectors_of(batch, index.manifest.embedding_dim)
        others = batch.select([name for name in batch.schema.names if name != t.VECTOR])
        for vector, row in zip(vectors, others.to_pylist(), strict=True):
            # An imputed body part is no tag: the query then goes by its predicted class.
            tagged = row.pop(t.BODY_PART_SOURCE) == t.FROM_TAG
            part = row.pop(t.BODY_PART)
            query = Query(query_id="", vector=vector, body_part=part if tagged else UNKNOWN, **row)
            found[row[t.IMAGE_ID], row[t.FRAME]] = query
    return found


_ALLOWED = "allowed"
_WANTED = StructType(
    [
        StructField(t.QUERY_ID, StringType(), False),
        StructField(t.URI, StringType(), False),
        StructField(t.FRAME, IntegerType()),
        StructField(_ALLOWED, BooleanType(), False),
    ]
)
_SHOWN = (t.SEX, t.TEXT_RISK, t.AGE_YEARS, t.YEAR)
_READ = StructType(
    [
        StructField(t.QUERY_ID, StringType(), False),
        StructField(t.STATUS, StringType()),
        StructField(t.REASON, StringType()),
        StructField(t.VECTOR, ArrayType(FloatType(), containsNull=False)),
        *[StructField(name, StringType()) for name in (t.MODALITY, t.BODY_PART, t.PREDICTED)],
        StructField(t.PROBABILITY, FloatType()),
        *[StructField(name, StringType()) for name in (t.IMAGE_ID, t.SERIES_ID, t.STUDY_ID, t.PATIENT_ID)],
        StructField(t.FRAME, IntegerType()),
        StructField(t.PIXELS_COLUMN, BinaryType()),
        StructField(t.SEX, StringType()),
        StructField(t.TEXT_RISK, BooleanType()),
        StructField(t.AGE_YEARS, DoubleType()),
        StructField(t.YEAR, IntegerType()),
    ]
)
_OF_QUERY = (t.IMAGE_ID, t.SERIES_ID, t.STUDY_ID, t.PATIENT_ID, t.MODALITY, t.BODY_PART)


@dataclass(frozen=True)
class Reader:
    """What a task needs to turn a uri into a query; it carries the key's path, never the key."""

    folder: str
    roots: tuple[str, ...]
    parser: parse.Parser
    pictured: frozenset[str]


def _read_uris(
    spark: SparkSession, rows: Sequence[Wanted], index: Index, settings: Settings, pictured: Collection[str]
) -> Resolved:
    if not rows:
        return Resolved()
    reader = _reader(spark, index, settings, frozenset(pictured))
    tasks = max(math.ceil(len(rows) / QUERIES_PER_TASK), min(len(rows), spark.sparkContext.defaultParallelism))
    # Relative paths are the driver's.
    uris = [storage.canonical(row.value) for row in rows]
    known = _in_archive(spark, settings, uris)
    listed = [(row.query_id, uri, row.frame, uri in known) for row, uri in zip(rows, uris, strict=True)]

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from read_batch(batch, reader)

    wanted = spark.createDataFrame(listed, _WANTED).repartition(tasks, t.QUERY_ID)
    own = {row.query_id: row.own for row in rows}
    queries, failed, pictures = {}, {}, {}
    for batch in wanted.mapInArrow(read, _READ).toArrow().to_batches():
        vectors = iter(arrays.vectors_of(batch.filter(batch.column(t.STATUS).is_null()), index.manifest.embedding_dim))
        others = batch.select([name for name in batch.schema.names if name != t.VECTOR])
        for row in others.to_pylist():
            query_id = row[t.QUERY_ID]
            if row[t.STATUS] is not None:
                failed[query_id] = Status(query_id, Answered(row[t.STATUS]), row[t.REASON])
                continue
            values = {name: row[name] for name in (t.QUERY_ID, t.FRAME, t.PREDICTED, t.PROBABILITY, *_OF_QUERY)}
            queries[query_id] = Query(vector=next(vectors), own=own[query_id], **values)
            if query_id in reader.pictured:
                shown = (t.QUERY_ID, t.FRAME, t.MODALITY, t.BODY_PART, t.PREDICTED, *_SHOWN)
                pictures[query_id] = report.Asked(
                    image_id=None, pixels=row[t.PIXELS_COLUMN], **{name: row[name] for name in shown}
                )
    return Resolved(queries, failed, pictures)


def read_batch(batch: pa.RecordBatch, reader: Reader) -> Iterator[pa.RecordBatch]:
    """Rows of query_id, uri, frame → rows of `_READ`. Per task, with the archive's parser and its child process."""
    arrow = to_arrow_schema(_READ)
    failed, read, pixels = [], [], []
    for row in batch.to_pylist():
        made = read_uri(row[t.URI], row[t.FRAME], row[_ALLOWED], reader)
        values = {t.QUERY_ID: row[t.QUERY_ID], **made}
        if t.STATUS in made:
            failed.append(values)
            continue
        pixels.append(np.frombuffer(values[t.PIXELS_COLUMN], dtype=np.uint8).reshape(t.SIDE, t.SIDE))
        if row[t.QUERY_ID] not in reader.pictured:
            values[t.PIXELS_COLUMN] = None
        read.append(values)
    if failed:
        yield pa.RecordBatch.from_pylist(failed, schema=arrow)
    if read:
        loaded = features.load(reader.folder, reader.parser.storage)
        embedded = model.embed_batches(loaded, np.stack(pixels), [row[t.MODALITY] for row in read])
        for row, label, probability in zip(read, embedded.labels, embedded.probabilities.tolist(), strict=True):
            row |= {t.PREDICTED: label or UNKNOWN, t.PROBABILITY: probability}
        columns = pa.RecordBatch.from_pylist(read, schema=arrow).columns
        vectors = arrow.get_field_index(t.VECTOR)
        columns[vectors] = arrays.vector_column(embedded.vectors).cast(arrow.field(vectors).type)
        yield pa.RecordBatch.from_arrays(columns, schema=arrow)


def read_uri(uri: str, frame: int | None, allowed: bool, reader: Reader) -> dict[str, Any]:
    """One file's tags and the pixels of one frame, or a status and its reason.

    Nothing is opened but what ingest has read before (`allowed`), unless it is a link, and what lies below the roots.
    """
    known = allowed and not storage.is_link(uri)
    if not (known or any(storage.is_below(uri, root) for root in reader.roots)):
        return _status(Answered.BAD_ROW, "uri is neither in the ingested archive nor below retrieval.roots")
    try:
        found = storage.find(uri, reader.parser.storage)
    except OSError:
        return _status(Answered.UNREADABLE, t.UNREADABLE)
    if found is None:
        return _status(Answered.NOT_FOUND, "there is no such object")
    parsed = parse.parse_object(uri, found.size, reader.parser)
    if parsed[t.OUTCOME] == t.VANISHED or parsed.get(t.REASON) == t.ERASED:
        return _status(Answered.NOT_FOUND, parsed[t.REASON])
    if parsed[t.OUTCOME] != reconcile.PARSED:
        return _status(Answered.UNREADABLE, parsed[t.REASON])
    frames = {each[t.FRAME]: each for each in parsed["frames"]}
    wanted = middle(sorted(frames)) if frame is None else frame
    if wanted is None or wanted not in frames:
        return _status(Answered.NOT_FOUND, f"frame {wanted} is not among the {len(frames)} that are read of the image")
    tags = parsed["tags"]
    return {
        **{name: tags[name] for name in (*_OF_QUERY, *_SHOWN)},
        t.FRAME: wanted,
        t.PIXELS_COLUMN: frames[wanted][t.PIXELS_COLUMN],
    }


def _status(status: Answered, reason: str) -> dict[str, Any]:
    return {t.STATUS: str(status), t.REASON: reason}


def _reader(spark: SparkSession, index: Index, settings: Settings, pictured: frozenset[str]) -> Reader:
    preprocessing = parse.preprocessing_of(settings)
    manifest = index.manifest
    if preprocessing.version != manifest.preprocessing:
        raise ModelError(
            f"the `pixels` settings make preprocessing {preprocessing.version}, model {manifest.model_id} was trained "
            f"with {manifest.preprocessing}: put the settings back, or name a model trained with them"
        )
    roots = [*settings.retrieval.roots, *([settings.ingest.archive] if settings.ingest.archive else [])]
    parser = parse.Parser(
        settings.storage,
        settings.ingest,
        preprocessing,
        settings.vocabulary.body_parts,
        pseudonyms_of(spark, settings),
        t.tombstones(spark, t.Lake.of(settings)),
    )
    return Reader(index.folder, tuple(storage.canonical(root) for root in roots), parser, pictured)


def _in_archive(spark: SparkSession, settings: Settings, uris: Sequence[str]) -> set[str]:
    """Those of some URIs that SOURCES lists: ingest has read them already, so a query may."""
    lake = t.Lake.of(settings)
    pinned = t.require_published(spark, lake)
    sources = t.read(spark, lake.path(t.SOURCES), pinned.sources).where(F.col(t.OUTCOME) != t.DELETED)
    asked = spark.createDataFrame([(uri,) for uri in sorted(set(uris))], f"{t.URI} string")
    return {row[t.URI] for row in sources.select(t.URI).join(F.broadcast(asked), on=t.URI, how="left_semi").collect()}


def pseudonyms_of(spark: SparkSession, settings: Settings) -> Pseudonyms:
    lake = t.Lake.of(settings)
    names = pseudonyms.of(settings, storage.local_path(lake.vault) if storage.is_local(lake.vault) else None)
    pinned = t.require_published(spark, lake)
    if names.key_id != pinned.key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {names.key_id}: "
            "with another key no image would be found"
        )
    return names
