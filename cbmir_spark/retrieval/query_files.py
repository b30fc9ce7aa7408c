"""Query files → queries: read, decoded and embedded in tasks, by the code that ingest and index use."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F
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

from cbmir_spark import extras, storage
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index import arrays
from cbmir_spark.index.open import Index
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.reports.gallery import ShownQuery
from cbmir_spark.retrieval.answer import Resolved
from cbmir_spark.retrieval.query import Query, QueryRow, QueryStatus, Status

# Queries that one task embeds; each costs tens of milliseconds on a CPU.
QUERIES_PER_TASK = 64

_ALLOWED = "allowed"
_LISTED = StructType(
    [
        StructField(cols.QUERY_ID, StringType(), False),
        StructField(cols.URI, StringType(), False),
        StructField(cols.FRAME, IntegerType()),
        StructField(_ALLOWED, BooleanType(), False),
    ]
)
CARD_TAGS = (cols.SEX, cols.TEXT_RISK, cols.AGE_YEARS, cols.YEAR)
QUERY_FILE_ROWS = StructType(
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
QUERY_TAGS = (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID, cols.MODALITY, cols.BODY_PART)


@dataclass(frozen=True)
class Reader:
    """What a task needs to turn a URI into a query; it carries the path of the pseudonym key, never the key."""

    folder: str
    roots: tuple[str, ...]
    parser: parse.Parser
    shown: frozenset[str]


def read_files(lake: OpenLake, rows: Sequence[QueryRow], index: Index, reader: Reader) -> Resolved:
    """Read, decode and embed the files that rows name by `uri`, in tasks.

    The driver gets a vector per file, and the picture of those in `reader.shown`. Raises EnvironmentProblem without
    torch.
    """
    extras.require(extras.EMBED, "retrieve by uri")
    spark = lake.spark
    tasks = max(math.ceil(len(rows) / QUERIES_PER_TASK), min(len(rows), spark.sparkContext.defaultParallelism))
    # Relative paths are the driver's.
    uris = [storage.canonical(row.value) for row in rows]
    known = _in_archive(lake, uris)
    listed = [(row.query_id, uri, row.frame, uri in known) for row, uri in zip(rows, uris, strict=True)]

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from read_batch(batch, reader)

    wanted = spark.createDataFrame(listed, _LISTED).repartition(tasks, cols.QUERY_ID)
    overrides = {row.query_id: row.overrides for row in rows}
    queries, failed, cards = {}, {}, {}
    for batch in wanted.mapInArrow(read, QUERY_FILE_ROWS).toArrow().to_batches():
        embedded = batch.filter(batch.column(cols.STATUS).is_null())
        vectors = iter(arrays.vectors_of(embedded, index.manifest.embedding_dim))
        others = batch.select([name for name in batch.schema.names if name != cols.VECTOR])
        for row in others.to_pylist():
            query_id = row[cols.QUERY_ID]
            if row[cols.STATUS] is not None:
                failed[query_id] = Status(query_id, QueryStatus(row[cols.STATUS]), row[cols.REASON])
                continue
            values = {
                name: row[name] for name in (cols.QUERY_ID, cols.FRAME, cols.PREDICTED, cols.PROBABILITY, *QUERY_TAGS)
            }
            queries[query_id] = Query(vector=next(vectors), overrides=overrides[query_id], **values)
            if query_id in reader.shown:
                shown = (cols.QUERY_ID, cols.FRAME, cols.MODALITY, cols.BODY_PART, cols.PREDICTED, *CARD_TAGS)
                cards[query_id] = ShownQuery(
                    image_id=None, pixels=row[cols.PIXELS_COLUMN], **{name: row[name] for name in shown}
                )
    return Resolved(queries, failed, cards)


def middle(frames: Sequence[int]) -> int | None:
    """Choose the frame that stands for an image: the middle one of those there are."""
    return frames[len(frames) // 2] if frames else None


def read_batch(batch: pa.RecordBatch, reader: Reader) -> Iterator[pa.RecordBatch]:
    """Turn rows of query_id, uri, frame into QUERY_FILE_ROWS. Runs per task, with ingest's parser and its child."""
    arrow = arrow_schema(QUERY_FILE_ROWS)
    failed, read, pixels = [], [], []
    for row in batch.to_pylist():
        parsed = read_uri(row[cols.URI], row[cols.FRAME], row[_ALLOWED], reader)
        values = {cols.QUERY_ID: row[cols.QUERY_ID], **parsed}
        if cols.STATUS in parsed:
            failed.append(values)
            continue
        pixels.append(np.frombuffer(values[cols.PIXELS_COLUMN], dtype=np.uint8).reshape(cols.SIDE, cols.SIDE))
        if row[cols.QUERY_ID] not in reader.shown:
            values[cols.PIXELS_COLUMN] = None
        read.append(values)
    if failed:
        yield pa.RecordBatch.from_pylist(failed, schema=arrow)
    if read:
        # Torch is optional: lists without files do without it.
        from cbmir_spark.index.load import load
        from cbmir_spark.models import embed as embedding

        loaded = load(reader.folder, reader.parser.store)
        embedded = embedding.embed_batches(loaded, np.stack(pixels), [row[cols.MODALITY] for row in read])
        for row, label, probability in zip(read, embedded.labels, embedded.probabilities.tolist(), strict=True):
            row |= {cols.PREDICTED: label or UNKNOWN, cols.PROBABILITY: probability}
        columns = pa.RecordBatch.from_pylist(read, schema=arrow).columns
        vectors = arrow.get_field_index(cols.VECTOR)
        columns[vectors] = arrays.vector_column(embedded.vectors).cast(arrow.field(vectors).type)
        yield pa.RecordBatch.from_arrays(columns, schema=arrow)


def read_uri(uri: str, frame: int | None, allowed: bool, reader: Reader) -> dict[str, Any]:
    """Return one file's tags and the pixels of one frame, or a status and its reason.

    Opens a file only if ingest has read it before (`allowed`) and it is no link, or if it lies below the roots.
    """
    known = allowed and not storage.is_link(uri)
    if not (known or any(storage.is_below(uri, root) for root in reader.roots)):
        return _status(QueryStatus.BAD_ROW, "uri is neither in the ingested archive nor below retrieval.roots")
    try:
        found = reader.parser.store.find(uri)
    except OSError:
        return _status(QueryStatus.UNREADABLE, cols.UNREADABLE)
    if found is None:
        return _status(QueryStatus.NOT_FOUND, "there is no such object")
    parsed = parse.parse_object(uri, found.size, reader.parser)
    if parsed.outcome == cols.VANISHED or parsed.reason == cols.ERASED:
        return _status(QueryStatus.NOT_FOUND, str(parsed.reason))
    if parsed.tags is None:
        return _status(QueryStatus.UNREADABLE, str(parsed.reason))
    frames = {each.number: each for each in parsed.frames}
    wanted = middle(sorted(frames)) if frame is None else frame
    if wanted is None or wanted not in frames:
        return _status(QueryStatus.NOT_FOUND, f"frame {wanted} is not among the {len(frames)} frames read")
    return {
        **{name: parsed.tags[name] for name in (*QUERY_TAGS, *CARD_TAGS)},
        cols.FRAME: wanted,
        cols.PIXELS_COLUMN: frames[wanted].pixels,
    }


def _in_archive(lake: OpenLake, uris: Sequence[str]) -> set[str]:
    """Find the URIs that SOURCES lists: ingest has read them already, so a query may."""
    asked = lake.spark.createDataFrame([(uri,) for uri in sorted(set(uris))], f"{cols.URI} string")
    listed = lake.sources.where(F.col(cols.OUTCOME) != cols.DELETED).select(cols.URI)
    return {row[cols.URI] for row in listed.join(F.broadcast(asked), on=cols.URI, how="left_semi").collect()}


def _status(status: QueryStatus, reason: str) -> dict[str, Any]:
    return {cols.STATUS: str(status), cols.REASON: reason}
