"""A list of query images → the nearest images of the archive, exactly: plan → prune → broadcast → kernel → top-k.

Where each step runs: the driver reads the list and plans which partitions each query may see; the scan is filtered
by those partitions before anything is joined, because a join alone prunes nothing (measured: 8 of 8 files, design
decision 1); the queries are broadcast; each task keeps one partial top-k over all that it scans (scan_task.py); one
shuffle by query merges them. Neither the number of tasks nor the order of rows can change an answer.
"""

import csv
import io
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
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

from cbmir_spark import __version__, arrays, features, ingest, model, pseudonyms, reconcile, report, scan_task, storage
from cbmir_spark import tables as t
from cbmir_spark.config import RetrievalSettings, Settings, StorageSettings
from cbmir_spark.errors import InputError, ModelError, TableError
from cbmir_spark.features import Index
from cbmir_spark.pseudonyms import Pseudonyms
from cbmir_spark.scan_task import Job, Place
from cbmir_spark.vocabulary import UNKNOWN

SOP_INSTANCE_UID = "sop_instance_uid"
NAMING = (t.URI, t.IMAGE_ID, SOP_INSTANCE_UID)

# Queries that one task embeds; each costs tens of milliseconds on a CPU.
QUERIES_PER_TASK = 64
# Longer cells hold no identifier and no path.
LONGEST_CELL = 4096

_IMAGE_ID = re.compile(r"[0-9a-f]{32}")
_UID = re.compile(r"[0-9.]{1,64}")
_FRAME_NUMBER = re.compile(r"[0-9]{1,9}")


class Answered(StrEnum):
    """What became of a query."""

    ANSWERED = "answered"
    NO_CANDIDATES = "no_candidates"
    NOT_FOUND = "not_found"
    UNREADABLE = "unreadable"
    BAD_ROW = "bad_row"


@dataclass(frozen=True)
class Wanted:
    """One row of a query list that can be looked for; `frame` is None for the middle one of those indexed."""

    query_id: str
    naming: str
    value: str
    frame: int | None


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


@dataclass(frozen=True)
class Status:
    """A query's end: the partitions searched, as CT/CHEST, the rows it was compared with, and its hits."""

    query_id: str
    status: Answered
    reason: str | None = None
    partitions: tuple[str, ...] = ()
    candidates: int = 0
    hits: int = 0


@dataclass(frozen=True)
class Scanned:
    """Files and bytes that an executed plan read."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Answer:
    """Hits (RESULTS_HITS, cached: `hits.unpersist()` when done) and one status a query, in the queries' order."""

    hits: DataFrame
    statuses: tuple[Status, ...]
    partitions: tuple[Place, ...]
    existing: tuple[Place, ...]
    scanned: Scanned


@dataclass(frozen=True)
class Report:
    """What a retrieve run did."""

    model_id: str
    index_version: int
    queries: int
    answered: int
    empty: int
    failed: int
    statuses: Mapping[str, int]
    partitions_searched: int
    partitions: int
    files_read: int
    files: int
    bytes_read: int
    bytes: int
    ignored_columns: tuple[str, ...]
    seconds: Mapping[str, float]
    out: str
    gallery: str | None


# --- the query list; on the driver ---


@dataclass(frozen=True)
class QueryList:
    """Rows of a list in its order: those to look for, and the statuses of those that cannot be."""

    rows: tuple[Wanted | Status, ...]
    ignored: tuple[str, ...]


def read_queries(uri: str, files: StorageSettings) -> QueryList:
    """A CSV or Parquet query list: `query_id` and one of uri, image_id, sop_instance_uid in each row; `frame` if asked.

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
    missing += [] if set(NAMING) & set(columns) else [f"one of {', '.join(NAMING)}"]
    if missing:
        there = ", ".join(name[:64] for name in columns[:20]) or "nothing"
        raise InputError(f"query list {uri} lacks column {' and '.join(missing)}; it has {there}")
    times = Counter(row.get(t.QUERY_ID) for row in rows)
    asked = [_asked(number, row, times[row.get(t.QUERY_ID)]) for number, row in enumerate(rows, start=1)]
    known = {t.QUERY_ID, t.FRAME, *NAMING}
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
    wanted = [name for name in (t.QUERY_ID, t.FRAME, *NAMING) if name in columns]
    table = pa.parquet.read_table(io.BytesIO(content), columns=wanted)
    text = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    return columns, [{name: cell for name, cell in row.items() if cell} for row in text.to_pylist()]


def _check_unique(columns: Sequence[str]) -> None:
    twice = [name[:64] for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise csv.Error(f"column {twice[0]} occurs more than once")


def _asked(number: int, row: Mapping[str, str], times: int) -> Wanted | Status:
    query_id, frame = row.get(t.QUERY_ID, ""), row.get(t.FRAME)
    given = {name: row[name] for name in NAMING if name in row}
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
        problem = f"{' and '.join(given) or 'none'} of {', '.join(NAMING)} given; give one"
    elif frame is not None and not _FRAME_NUMBER.fullmatch(frame):
        problem = "frame is not a number from 0"
    if problem is None:
        naming, value = next(iter(given.items()))
        problem = _unfit(naming, value.strip())
    if problem is None:
        return Wanted(query_id, naming, value.strip(), None if frame is None else int(frame))
    return Status(query_id[:LONGEST_CELL], Answered.BAD_ROW, problem)


def _unfit(naming: str, value: str) -> str | None:
    """Why a cell cannot name an image, None where it can."""
    if naming == t.IMAGE_ID:
        return None if _IMAGE_ID.fullmatch(value) else "image_id is not 32 hexadecimal digits"
    if naming == SOP_INSTANCE_UID:
        return None if _UID.fullmatch(value) else "sop_instance_uid is not a UID"
    if len(value) > LONGEST_CELL or not value.isprintable():
        return "uri is too long or holds control characters"
    try:
        storage.canonical(value)
    except InputError:
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
    names = _pseudonyms(spark, settings) if any(row.naming == SOP_INSTANCE_UID for row in rows) else None
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
    return Resolved({query: replace(found[key], query_id=query) for query, key in wanted.items()}, failed)


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
    rows = scan(index.rows, places).select(*columns, *ids)
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
_SHOWN = (t.KIND, t.BURNED_IN, t.SOP_CLASS, t.SEX)
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
        *[StructField(name, StringType()) for name in _SHOWN],
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
    parser: ingest.Parser
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
            queries[query_id] = Query(vector=next(vectors), **values)
            if query_id in reader.pictured:
                shown = (t.QUERY_ID, t.FRAME, t.MODALITY, t.BODY_PART, t.PREDICTED, *_SHOWN, t.AGE_YEARS, t.YEAR)
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

    Nothing is opened but what ingest has read before (`allowed`) and what lies below the roots.
    """
    if not (allowed or any(storage.is_below(uri, root) for root in reader.roots)):
        return _status(Answered.BAD_ROW, "uri is neither in the ingested archive nor below retrieval.roots")
    try:
        found = storage.find(uri, reader.parser.storage)
    except OSError:
        return _status(Answered.UNREADABLE, ingest.UNREADABLE)
    if found is None:
        return _status(Answered.NOT_FOUND, "there is no such object")
    listed = {t.URI: uri, t.SIZE: found.size, t.MODIFIED: found.modified}
    parsed: dict[str, Any] = ingest.parse_object(listed, reader.parser)
    if parsed[t.OUTCOME] == t.VANISHED:
        return _status(Answered.NOT_FOUND, parsed[t.REASON])
    if parsed[t.OUTCOME] != reconcile.PARSED:
        return _status(Answered.UNREADABLE, parsed[t.REASON])
    frames = {each[t.FRAME]: each for each in parsed["frames"]}
    wanted = middle(sorted(frames)) if frame is None else frame
    if wanted is None or wanted not in frames:
        return _status(Answered.NOT_FOUND, f"frame {wanted} is not among the {len(frames)} that are read of the image")
    tags = parsed["tags"]
    return {
        **{name: tags[name] for name in (*_OF_QUERY, *_SHOWN, t.AGE_YEARS, t.YEAR)},
        t.FRAME: wanted,
        t.PIXELS_COLUMN: frames[wanted][t.PIXELS_COLUMN],
    }


def _status(status: Answered, reason: str) -> dict[str, Any]:
    return {t.STATUS: str(status), t.REASON: reason}


def _reader(spark: SparkSession, index: Index, settings: Settings, pictured: frozenset[str]) -> Reader:
    preprocessing = ingest.preprocessing_of(settings)
    manifest = index.manifest
    if preprocessing.version != manifest.preprocessing:
        raise ModelError(
            f"the `pixels` settings make preprocessing {preprocessing.version}, model {manifest.model_id} was trained "
            f"with {manifest.preprocessing}: put the settings back, or name a model trained with them"
        )
    roots = [*settings.retrieval.roots, *([settings.ingest.archive] if settings.ingest.archive else [])]
    parser = ingest.Parser(
        settings.storage,
        settings.ingest,
        preprocessing,
        settings.vocabulary.body_parts,
        _pseudonyms(spark, settings),
    )
    return Reader(index.folder, tuple(storage.canonical(root) for root in roots), parser, pictured)


def _in_archive(spark: SparkSession, settings: Settings, uris: Sequence[str]) -> set[str]:
    """Those of some URIs that SOURCES lists: ingest has read them already, so a query may."""
    lake = t.Lake.of(settings)
    pinned = t.require_published(spark, lake)
    sources = t.read(spark, lake.path(t.SOURCES), pinned.sources).where(F.col(t.OUTCOME) != t.DELETED)
    asked = spark.createDataFrame([(uri,) for uri in sorted(set(uris))], f"{t.URI} string")
    return {row[t.URI] for row in sources.select(t.URI).join(F.broadcast(asked), on=t.URI, how="left_semi").collect()}


def _pseudonyms(spark: SparkSession, settings: Settings) -> Pseudonyms:
    lake = t.Lake.of(settings)
    names = pseudonyms.of(settings, storage.local_path(lake.vault) if storage.is_local(lake.vault) else None)
    pinned = t.require_published(spark, lake)
    if names.key_id != pinned.key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {names.key_id}: "
            "with another key no image would be found"
        )
    return names


# --- plan; on the driver ---


def plan(query: Query, options: RetrievalSettings, existing: Iterable[Place]) -> frozenset[Place]:
    """The partitions that a query meets, of those that exist.

    `tags` goes by the query's body part, or by its predicted class where the tags have none; `predicted` by the
    predicted class. A prediction below `min_probability`, or none, widens either to the query's modality, which is
    all that `modality` looks at. Where not even the modality is known, and under `none`, all are searched. In every
    mode `unknown` says whether the partitions of the UNKNOWN body part are: with `include` they join the query's own.
    """
    modality, body_part = _sought(query, options)
    found = set()
    for place in existing:
        if modality not in (None, place[0]):
            continue
        if place[1] == UNKNOWN:
            if options.unknown == "include":
                found.add(place)
        elif body_part in (None, place[1]):
            found.add(place)
    return frozenset(found)


def _sought(query: Query, options: RetrievalSettings) -> tuple[str | None, str | None]:
    """Modality and body part to search; None for any."""
    if options.prefilter == "none":
        return None, None
    sure = query.predicted != UNKNOWN and query.probability >= options.min_probability
    predicted_modality = query.predicted.rpartition("/")[0] if sure else ""
    modality = query.modality if query.modality != UNKNOWN else predicted_modality or None
    if options.prefilter == "modality":
        return modality, None
    if options.prefilter == "tags" and query.body_part != UNKNOWN:
        return modality, query.body_part
    return modality, model.body_part_of(query.predicted) if sure else None


def partitions_of(rows: DataFrame) -> tuple[Place, ...]:
    """The partitions that hold rows, sorted: one action on partition columns, at most some hundred values."""
    found = rows.select(t.MODALITY, t.BODY_PART).distinct().collect()
    return tuple(sorted((row[t.MODALITY], row[t.BODY_PART]) for row in found))


def scan(rows: DataFrame, places: Iterable[Place]) -> DataFrame:
    """The rows of some partitions: an explicit filter on partition columns, which is what prunes files."""
    parts: dict[str, list[str]] = {}
    for modality, body_part in sorted(places):
        parts.setdefault(modality, []).append(body_part)
    conditions = [(F.col(t.MODALITY) == m) & F.col(t.BODY_PART).isin(*found) for m, found in parts.items()]
    return rows.where(reduce(or_, conditions) if conditions else F.lit(False))


# --- search ---

_GROUP: Mapping[str, str | None] = {
    "none": None,
    "image": t.IMAGE_ID,
    "series": t.SERIES_ID,
    "study": t.STUDY_ID,
    "patient": t.PATIENT_ID,
}


def search(spark: SparkSession, rows: DataFrame, queries: Sequence[Query], options: RetrievalSettings) -> Answer:
    """The k nearest rows of FEATURES for each query, by Euclidean distance, exactly as float64 brute force has them.

    `rows` may be filtered beforehand. Ties go by (distance, image_id, frame). Raises InputError where a query_id
    occurs twice, ModelError where queries and rows have vectors of different dimension.
    """
    if len({query.query_id for query in queries}) != len(queries):
        raise InputError("query_ids are not unique: each query needs a name of its own")
    existing = partitions_of(rows)
    plans = [plan(query, options, existing) for query in queries]
    searched = sorted(set().union(*plans))
    job = _job(queries, plans, options)
    if searched:
        _check_dimension(rows, job)
    pruned = scan(rows, searched)
    if options.imputed == "exclude":
        pruned = pruned.where(F.col(t.BODY_PART_SOURCE) != t.FROM_PREDICTION)
    tasks = options.tasks_per_core * spark.sparkContext.defaultParallelism
    broadcast = spark.sparkContext.broadcast(job)
    partial = pruned.select(*scan_task.COLUMNS).coalesce(tasks).mapInArrow(scan_task.of(broadcast), scan_task.PARTIAL)
    merged = merge(partial, options.k, job.group).persist(StorageLevel.MEMORY_AND_DISK)
    counted = merged.groupBy(t.QUERY_ID).agg(F.count("*").alias(t.HITS), F.max(t.CANDIDATES).alias(t.CANDIDATES))
    found = {row[t.QUERY_ID]: (row[t.HITS], row[t.CANDIDATES]) for row in counted.collect()}
    statuses = tuple(
        _answered(query, places, *found.get(query.query_id, (0, 0)), options)
        for query, places in zip(queries, plans, strict=True)
    )
    broadcast.unpersist()
    return Answer(merged.drop(t.CANDIDATES), statuses, tuple(searched), existing, scanned(counted))


def merge(partial: DataFrame, k: int, group: str | None) -> DataFrame:
    """Partial results of all tasks → RESULTS_HITS and `candidates`, the rows that the query was compared with.

    Each task holds the k best groups among its rows, each by its best row; so the k best of all are among them.
    """
    order = (F.col(t.DISTANCE), F.col(t.IMAGE_ID), F.col(t.FRAME))
    of_query = Window.partitionBy(t.QUERY_ID)
    counted = partial.withColumn(t.CANDIDATES, F.sum(t.CANDIDATES).over(of_query))
    if group is not None:
        best = F.row_number().over(Window.partitionBy(t.QUERY_ID, group).orderBy(*order))
        counted = counted.withColumn("place", best).where(F.col("place") == 1)
    ranked = counted.withColumn(t.RANK, F.row_number().over(of_query.orderBy(*order))).where(F.col(t.RANK) <= k)
    return ranked.select(*t.RESULTS_HITS.schema.names, t.CANDIDATES)


def _job(queries: Sequence[Query], plans: Sequence[frozenset[Place]], options: RetrievalSettings) -> Job:
    meets: dict[Place, list[int]] = {}
    for number, places in enumerate(plans):
        for place in places:
            meets.setdefault(place, []).append(number)
    lists: dict[tuple[int, ...], int] = {}
    list_of = {place: lists.setdefault(tuple(numbers), len(lists)) for place, numbers in sorted(meets.items())}
    exclude = _GROUP[options.exclude_same]
    own: dict[str, list[int]] = {}
    for number, query in enumerate(queries):
        value = None if exclude is None else getattr(query, exclude)
        if value is not None:
            own.setdefault(value, []).append(number)
    dimensions = {query.vector.shape for query in queries}
    if len(dimensions) > 1:
        raise ModelError(f"the queries have vectors of different shapes {sorted(dimensions)}: embed them by one model")
    return Job(
        query_ids=tuple(query.query_id for query in queries),
        vectors=np.stack([query.vector for query in queries]) if queries else np.zeros((0, 1), dtype=np.float32),
        list_of=list_of,
        lists=tuple(np.array(numbers, dtype=np.int64) for numbers in lists),
        exclude=exclude,
        own=own,
        group=_GROUP[options.unique],
        k=options.k,
        block_bytes=options.block_mb * 2**20,
    )


def _check_dimension(rows: DataFrame, job: Job) -> None:
    first = rows.select(F.size(t.VECTOR).alias("size")).first()
    if first is not None and first["size"] != job.vectors.shape[1]:
        raise ModelError(
            f"the queries have vectors of {job.vectors.shape[1]} values, the index has {first['size']}: they are of "
            "different models; search the index of the queries' model"
        )


def _answered(query: Query, places: frozenset[Place], hits: int, candidates: int, options: RetrievalSettings) -> Status:
    named = tuple("/".join(place) for place in sorted(places))
    if hits:
        return Status(query.query_id, Answered.ANSWERED, None, named, candidates, hits)
    if places:
        reason = f"nothing is left of the searched partitions (exclude_same {options.exclude_same})"
    else:
        sought = "/".join(part or "any" for part in _sought(query, options))
        reason = f"the index has no partition for {sought} (prefilter {options.prefilter}, unknown {options.unknown})"
    return Status(query.query_id, Answered.NO_CANDIDATES, reason, named, candidates, 0)


# --- what was read ---


def scanned(df: DataFrame) -> Scanned:
    """Files and bytes that the executed plan of `df`, an action on which has ended, took from file scans."""
    files = size = 0
    plans = [df._jdf.queryExecution().executedPlan()]
    while plans:
        plan = plans.pop()
        kind = plan.getClass().getSimpleName()
        if kind == "AdaptiveSparkPlanExec":
            plans.append(plan.executedPlan())
        elif kind.endswith("QueryStageExec"):
            plans.append(plan.plan())
        elif kind == "InMemoryTableScanExec":
            plans.append(plan.relation().cachedPlan())
        elif kind == "FileSourceScanExec":
            metrics = plan.metrics()
            files += metrics.apply("numFiles").value()
            size += metrics.apply("filesSize").value()
        elif kind != "ReusedExchangeExec":
            children = plan.children()
            plans += [children.apply(number) for number in range(children.size())]
    return Scanned(files, size)


# --- the job ---


def run(spark: SparkSession, settings: Settings) -> Report:
    """Answer the query list of `retrieval.queries`: hits, statuses and a gallery in a folder of their own.

    Raises InputError for a list that cannot be used or a folder that holds something already, ModelError and
    TableError as `features.open_index` does; all before anything is written.
    """
    started = datetime.now(UTC)
    run_id = uuid.uuid4().hex
    seconds: dict[str, float] = {}
    options = settings.retrieval
    if options.queries is None:
        raise InputError("no query list named: give --queries FILE, a CSV or Parquet file")
    lake = t.Lake.of(settings)
    out = storage.canonical(options.out or storage.join(lake.uri, "results", run_id))
    _check_free(out, settings.storage)
    with _timed(seconds, "read"):
        asked = read_queries(options.queries, settings.storage)
        index = features.open_index(spark, settings)
    ids = sorted(row.query_id for row in asked.rows)
    pictured = set(ids[: options.gallery])
    with _timed(seconds, "resolve"):
        wanted = [row for row in asked.rows if isinstance(row, Wanted)]
        resolved = resolve(spark, wanted, index, settings, pictured)
    with _timed(seconds, "search"):
        answer = search(spark, index.rows, list(resolved.queries.values()), options)
    by_id = {**resolved.failed, **{status.query_id: status for status in answer.statuses}}
    statuses = [by_id[row.query_id] if isinstance(row, Wanted) else row for row in asked.rows]
    if len(statuses) != len(asked.rows) or len(by_id) != len(wanted):
        raise TableError(f"{len(asked.rows)} queries, yet {len(statuses)} statuses: nothing was written")
    with _timed(seconds, "write"):
        hits = answer.hits.orderBy(t.QUERY_ID, t.RANK)
        t.conform(hits, t.RESULTS_HITS).write.parquet(storage.join(out, t.RESULTS_HITS.name))
        answer.hits.unpersist()
        rows = [(s.query_id, str(s.status), s.reason, list(s.partitions), s.candidates, s.hits) for s in statuses]
        named = spark.createDataFrame(rows, t.RESULTS_STATUSES.schema).coalesce(1)
        t.conform(named, t.RESULTS_STATUSES).write.parquet(storage.join(out, t.RESULTS_STATUSES.name))
    counts = Counter(status.status for status in statuses)
    files = index.rows.inputFiles()
    size = t.size_of(spark, index.path)
    gallery = None
    if options.gallery:
        with _timed(seconds, "gallery"):
            facts = {
                "model": index.manifest.model_id,
                "prefilter": options.prefilter,
                "k": options.k,
                "partitions searched": f"{len(answer.partitions)} of {len(answer.existing)}",
            }
            shown = [_shown(query_id, resolved) for query_id in sorted(pictured & resolved.queries.keys())]
            gallery = report.gallery(spark, settings, out, shown, facts)
    ended = Report(
        model_id=index.manifest.model_id,
        index_version=index.version,
        queries=len(statuses),
        answered=counts[Answered.ANSWERED],
        empty=counts[Answered.NO_CANDIDATES],
        failed=counts[Answered.NOT_FOUND] + counts[Answered.UNREADABLE] + counts[Answered.BAD_ROW],
        statuses={str(status): counts[status] for status in Answered},
        partitions_searched=len(answer.partitions),
        partitions=len(answer.existing),
        files_read=answer.scanned.files,
        files=len(files),
        bytes_read=answer.scanned.bytes,
        bytes=size,
        ignored_columns=asked.ignored,
        seconds=seconds,
        out=out,
        gallery=gallery,
    )
    t.record_run(
        spark,
        lake,
        run_id=run_id,
        job="retrieve",
        started=started,
        ended=datetime.now(UTC),
        outcome="done",
        software=__version__,
        counts={
            "queries": ended.queries,
            **ended.statuses,
            "files_read": ended.files_read,
            "bytes_read": ended.bytes_read,
        },
        seconds=seconds,
        versions_read={"features": index.version},
        versions_written={},
    )
    return ended


def _shown(query_id: str, resolved: Resolved) -> report.Asked:
    """A query as the gallery shows it; pictures of indexed images are the lake's."""
    if query_id in resolved.pictures:
        return resolved.pictures[query_id]
    query = resolved.queries[query_id]
    return report.Asked(
        query_id=query_id,
        image_id=query.image_id,
        frame=query.frame or 0,
        modality=query.modality,
        body_part=query.body_part,
        predicted=query.predicted,
    )


def _check_free(out: str, files: StorageSettings) -> None:
    found = storage.kind(out, files)
    if found == "file" or (found == "folder" and any(storage.list_folder(out, files))):
        raise InputError(f"results folder {out} holds something already: give another, with --out")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = time.monotonic() - began
