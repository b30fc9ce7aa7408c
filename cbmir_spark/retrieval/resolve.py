"""A list of query images → queries with vectors: read and checked on the driver, files embedded in tasks.

A row names an image of the index, or a file, which is then read, decoded and embedded by the code that the archive
went through. What is wrong with a row becomes its status; it never costs the other rows theirs.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
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

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index import arrays
from cbmir_spark.index import open as index_open
from cbmir_spark.index.open import Index
from cbmir_spark.index.vector_files import Place
from cbmir_spark.ingest import parse, reconcile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, pseudonyms, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import Pseudonyms
from cbmir_spark.models import embed as embedding
from cbmir_spark.reports import gallery
from cbmir_spark.retrieval.query import Answered, Query, Status, Wanted
from cbmir_spark.retrieval.query_list import SOP_INSTANCE_UID
from cbmir_spark.storage import ObjectStore

# Queries that one task embeds; each costs tens of milliseconds on a CPU.
QUERIES_PER_TASK = 64


# --- resolve: a row of the list → a Query ---


@dataclass(frozen=True)
class Resolved:
    """Queries, or the statuses of those that are not to be had, by query_id; and the pictures of those from files."""

    queries: Mapping[str, Query] = field(default_factory=dict)
    failed: Mapping[str, Status] = field(default_factory=dict)
    pictures: Mapping[str, gallery.Asked] = field(default_factory=dict)


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
    found = _look_up(spark, [row for row in rows if row.naming != cols.URI], index, settings)
    read = _read_uris(spark, [row for row in rows if row.naming == cols.URI], index, settings, pictured)
    return Resolved({**found.queries, **read.queries}, {**found.failed, **read.failed}, read.pictures)


def _look_up(spark: SparkSession, rows: Sequence[Wanted], index: Index, settings: Settings) -> Resolved:
    if not rows:
        return Resolved()
    names = pseudonyms_of(spark, settings) if any(row.naming == SOP_INSTANCE_UID for row in rows) else None
    image_of = {
        row.query_id: names.image(row.value) if names is not None and row.naming == SOP_INSTANCE_UID else row.value
        for row in rows
    }
    images = spark.createDataFrame([(i,) for i in sorted(set(image_of.values()))], f"{cols.IMAGE_ID} string")
    # Keys first, a sixtieth of the bytes: they say which frame, and so which partitions hold the vectors.
    keys = (
        index.rows.select(cols.IMAGE_ID, cols.FRAME, cols.MODALITY, cols.BODY_PART)
        .join(F.broadcast(images), on=cols.IMAGE_ID, how="left_semi")
        .collect()
    )
    frames: dict[str, dict[int, Place]] = {}
    for key in keys:
        frames.setdefault(key[cols.IMAGE_ID], {})[key[cols.FRAME]] = (key[cols.MODALITY], key[cols.BODY_PART])
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
    chosen = spark.createDataFrame(sorted(keys), f"{cols.IMAGE_ID} string, {cols.FRAME} int")
    columns = (
        cols.IMAGE_ID,
        cols.FRAME,
        cols.VECTOR,
        cols.PREDICTED,
        cols.PROBABILITY,
        cols.BODY_PART_SOURCE,
        cols.MODALITY,
        cols.BODY_PART,
    )
    ids = (cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
    rows = index_open.scan(index.rows, places).select(*columns, *ids)
    table = rows.join(F.broadcast(chosen), on=[cols.IMAGE_ID, cols.FRAME], how="left_semi").toArrow()
    found = {}
    for batch in table.to_batches():
        vectors = arrays.vectors_of(batch, index.manifest.embedding_dim)
        others = batch.select([name for name in batch.schema.names if name != cols.VECTOR])
        for vector, row in zip(vectors, others.to_pylist(), strict=True):
            # An imputed body part is no tag: the query then goes by its predicted class.
            tagged = row.pop(cols.BODY_PART_SOURCE) == cols.FROM_TAG
            part = row.pop(cols.BODY_PART)
            query = Query(query_id="", vector=vector, body_part=part if tagged else UNKNOWN, **row)
            found[row[cols.IMAGE_ID], row[cols.FRAME]] = query
    return found


_ALLOWED = "allowed"
_WANTED = StructType(
    [
        StructField(cols.QUERY_ID, StringType(), False),
        StructField(cols.URI, StringType(), False),
        StructField(cols.FRAME, IntegerType()),
        StructField(_ALLOWED, BooleanType(), False),
    ]
)
_SHOWN = (cols.SEX, cols.TEXT_RISK, cols.AGE_YEARS, cols.YEAR)
_READ = StructType(
    [
        StructField(cols.QUERY_ID, StringType(), False),
        StructField(cols.STATUS, StringType()),
        StructField(cols.REASON, StringType()),
        StructField(cols.VECTOR, ArrayType(FloatType(), containsNull=False)),
        *[StructField(name, StringType()) for name in (cols.MODALITY, cols.BODY_PART, cols.PREDICTED)],
        StructField(cols.PROBABILITY, FloatType()),
        *[StructField(name, StringType()) for name in (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)],
        StructField(cols.FRAME, IntegerType()),
        StructField(cols.PIXELS_COLUMN, BinaryType()),
        StructField(cols.SEX, StringType()),
        StructField(cols.TEXT_RISK, BooleanType()),
        StructField(cols.AGE_YEARS, DoubleType()),
        StructField(cols.YEAR, IntegerType()),
    ]
)
_OF_QUERY = (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID, cols.MODALITY, cols.BODY_PART)


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

    wanted = spark.createDataFrame(listed, _WANTED).repartition(tasks, cols.QUERY_ID)
    own = {row.query_id: row.own for row in rows}
    queries, failed, pictures = {}, {}, {}
    for batch in wanted.mapInArrow(read, _READ).toArrow().to_batches():
        vectors = iter(
            arrays.vectors_of(batch.filter(batch.column(cols.STATUS).is_null()), index.manifest.embedding_dim)
        )
        others = batch.select([name for name in batch.schema.names if name != cols.VECTOR])
        for row in others.to_pylist():
            query_id = row[cols.QUERY_ID]
            if row[cols.STATUS] is not None:
                failed[query_id] = Status(query_id, Answered(row[cols.STATUS]), row[cols.REASON])
                continue
            values = {
                name: row[name] for name in (cols.QUERY_ID, cols.FRAME, cols.PREDICTED, cols.PROBABILITY, *_OF_QUERY)
            }
            queries[query_id] = Query(vector=next(vectors), own=own[query_id], **values)
            if query_id in reader.pictured:
                shown = (cols.QUERY_ID, cols.FRAME, cols.MODALITY, cols.BODY_PART, cols.PREDICTED, *_SHOWN)
                pictures[query_id] = gallery.Asked(
                    image_id=None, pixels=row[cols.PIXELS_COLUMN], **{name: row[name] for name in shown}
                )
    return Resolved(queries, failed, pictures)


def read_batch(batch: pa.RecordBatch, reader: Reader) -> Iterator[pa.RecordBatch]:
    """Rows of query_id, uri, frame → rows of `_READ`. Per task, with the archive's parser and its child process."""
    arrow = to_arrow_schema(_READ)
    failed, read, pixels = [], [], []
    for row in batch.to_pylist():
        made = read_uri(row[cols.URI], row[cols.FRAME], row[_ALLOWED], reader)
        values = {cols.QUERY_ID: row[cols.QUERY_ID], **made}
        if cols.STATUS in made:
            failed.append(values)
            continue
        pixels.append(np.frombuffer(values[cols.PIXELS_COLUMN], dtype=np.uint8).reshape(cols.SIDE, cols.SIDE))
        if row[cols.QUERY_ID] not in reader.pictured:
            values[cols.PIXELS_COLUMN] = None
        read.append(values)
    if failed:
        yield pa.RecordBatch.from_pylist(failed, schema=arrow)
    if read:
        loaded = index_open.load(reader.folder, reader.parser.store)
        embedded = embedding.embed_batches(loaded, np.stack(pixels), [row[cols.MODALITY] for row in read])
        for row, label, probability in zip(read, embedded.labels, embedded.probabilities.tolist(), strict=True):
            row |= {cols.PREDICTED: label or UNKNOWN, cols.PROBABILITY: probability}
        columns = pa.RecordBatch.from_pylist(read, schema=arrow).columns
        vectors = arrow.get_field_index(cols.VECTOR)
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
        found = reader.parser.store.find(uri)
    except OSError:
        return _status(Answered.UNREADABLE, cols.UNREADABLE)
    if found is None:
        return _status(Answered.NOT_FOUND, "there is no such object")
    parsed = parse.parse_object(uri, found.size, reader.parser)
    if parsed[cols.OUTCOME] == cols.VANISHED or parsed.get(cols.REASON) == cols.ERASED:
        return _status(Answered.NOT_FOUND, parsed[cols.REASON])
    if parsed[cols.OUTCOME] != reconcile.PARSED:
        return _status(Answered.UNREADABLE, parsed[cols.REASON])
    frames = {each[cols.FRAME]: each for each in parsed["frames"]}
    wanted = middle(sorted(frames)) if frame is None else frame
    if wanted is None or wanted not in frames:
        return _status(Answered.NOT_FOUND, f"frame {wanted} is not among the {len(frames)} that are read of the image")
    tags = parsed["tags"]
    return {
        **{name: tags[name] for name in (*_OF_QUERY, *_SHOWN)},
        cols.FRAME: wanted,
        cols.PIXELS_COLUMN: frames[wanted][cols.PIXELS_COLUMN],
    }


def _status(status: Answered, reason: str) -> dict[str, Any]:
    return {cols.STATUS: str(status), cols.REASON: reason}


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
        ObjectStore(settings.storage),
        settings.ingest,
        preprocessing,
        settings.vocabulary.body_parts,
        pseudonyms_of(spark, settings),
        identity.tombstones(spark, LakePaths.of(settings.lake)),
    )
    return Reader(index.folder, tuple(storage.canonical(root) for root in roots), parser, pictured)


def _in_archive(spark: SparkSession, settings: Settings, uris: Sequence[str]) -> set[str]:
    """Those of some URIs that SOURCES lists: ingest has read them already, so a query may."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    sources = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).where(F.col(cols.OUTCOME) != cols.DELETED)
    asked = spark.createDataFrame([(uri,) for uri in sorted(set(uris))], f"{cols.URI} string")
    return {
        row[cols.URI]
        for row in sources.select(cols.URI).join(F.broadcast(asked), on=cols.URI, how="left_semi").collect()
    }


def pseudonyms_of(spark: SparkSession, settings: Settings) -> Pseudonyms:
    lake = LakePaths.of(settings.lake)
    names = pseudonyms.load(settings.privacy, lake.vault_folder)
    pinned = publication.require_published(spark, lake)
    if names.key_id != pinned.key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {names.key_id}: "
            "with another key no image would be found"
        )
    return names
