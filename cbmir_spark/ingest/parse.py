"""One object → one staged row and the frames that were kept of it; runs per task.

A task writes the frames itself, as Parquet below the staging folder of the vault, and hands only the rows about the
objects to Spark: 64 KB of pixels for each frame have no business in the JVM before it is known which of them stay.
"""

import gc
import hashlib
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import IntegerType, MapType, StringType, StructField, StructType

from cbmir_spark import storage
from cbmir_spark.config import IngestSettings, Settings
from cbmir_spark.dicom.decoder import Decoder
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import Instance, NotAnImage, Rejected
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.ingest.listing import CONTENT
from cbmir_spark.ingest.reconcile import IDENTIFIERS, PARSED, STAGED_BY
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.pseudonyms import Identity, Pseudonyms, identities, is_forgotten
from cbmir_spark.storage import ObjectStore

# Reasons that storage gives, beside those of preflight.Reason.
TOO_LARGE = "TOO_LARGE"
GONE = "GONE"
REPLACED = "REPLACED_WHILE_READ"

# Objects and bytes that a task reads ahead of the one that it decodes: storage answers late, and a core need not wait.
READ_AHEAD, READ_AHEAD_BYTES = 4, 64 * 2**20
# Frames in one staged file: 32 MB, held in memory until it is written.
FRAMES_PER_FILE = 512

KEPT_FRAMES = "kept_frames"
_LISTED = [f for f in schemas.SOURCES.schema if f.name in (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG)]
_TAGS_OF_INSTANCE = StructType([f for f in schemas.TAGS.schema if f.name != cols.BATCH])
# `staged_by` names the attempt of a task: what an attempt wrote that Spark then gave up is found by no row.
STAGED = StructType(
    [
        *[StructField(f.name, f.dataType) for f in _LISTED],
        StructField(cols.DIGEST, StringType()),
        StructField(cols.OUTCOME, StringType()),
        StructField(cols.REASON, StringType()),
        StructField(cols.IMAGE_ID, StringType()),
        StructField("tags", _TAGS_OF_INSTANCE),
        StructField(IDENTIFIERS, MapType(StringType(), StringType())),
        StructField(KEPT_FRAMES, IntegerType()),
        StructField(STAGED_BY, StringType()),
    ]
)
STAGED_FRAMES = StructType(
    [
        StructField(cols.URI, StringType()),
        StructField(STAGED_BY, StringType()),
        *[StructField(f.name, f.dataType) for f in schemas.PIXELS.schema if f.name != cols.BATCH],
    ]
)

Tally = Callable[[Counter[str]], None]
"""Where a task reports what it has done: objects, bytes, and objects by reason."""


@dataclass(frozen=True)
class Parser:
    """Everything a task needs to turn an object into a staged row; carries the key's path, never the key.

    `forgotten` are tombstones (see tables.tombstones): nothing is kept of what they name. With `identity` staged rows
    carry the identifiers, which belong in the vault alone.
    """

    store: ObjectStore
    limits: IngestSettings
    preprocessing: Preprocessing
    body_parts: Mapping[str, str]
    pseudonyms: Pseudonyms
    forgotten: frozenset[str] = frozenset()
    identity: bool = False


@dataclass(frozen=True)
class _Decoding:
    """What a decoding process has to be told, all that decides whether one can be kept."""

    preprocessing: Preprocessing
    body_parts: Mapping[str, str]
    memory_mb: int
    seconds: float

    def __hash__(self) -> int:
        return hash(self.preprocessing.version)


def preprocessing_of(settings: Settings) -> Preprocessing:
    """The one reading of the `pixels` settings: archive, queries and training all see pictures made by it."""
    return Preprocessing(
        aspect=settings.pixels.aspect,
        windows=settings.pixels.windows,
        percentiles=settings.pixels.percentiles,
        max_frames=settings.pixels.max_frames,
        frames=settings.pixels.frames,
    )


def parse(objects: DataFrame, parser: Parser, frames_folder: str, tally: Tally) -> DataFrame:
    """Read and decode each object: (uri, size, …) → STAGED rows, lazily; the frames go to files in `frames_folder`.

    Objects that come with their bytes, in the column CONTENT, are not read again.
    """
    arrow = to_arrow_schema(STAGED)

    def stage(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        frames = _Frames(frames_folder, parser.store)
        with ThreadPoolExecutor(READ_AHEAD) as readers:
            for batch in batches:
                rows, done = [], Counter[str]()
                for listed, fetched in _fetched(batch.to_pylist(), parser, readers):
                    row = _parsed(fetched, parser)
                    kept = row.pop("frames", [])
                    frames.add(listed[cols.URI], row.get(cols.IMAGE_ID), kept)
                    rows.append(listed | row | {KEPT_FRAMES: len(kept), STAGED_BY: frames.attempt})
                    done.update(["objects"] if row.get(cols.REASON) is None else ["objects", row[cols.REASON]])
                    done["bytes"] += row.get(cols.SIZE, 0)
                tally(done)
                yield pa.RecordBatch.from_pylist(rows, schema=arrow)
        frames.write()

    brought = [name for name in objects.columns if name == CONTENT]
    return objects.select(*[f.name for f in _LISTED], *brought).mapInArrow(stage, STAGED)


def parse_object(uri: str, size: int, parser: Parser) -> dict[str, Any]:
    """What became of one object, with size, time and ETag of what was read, and under `frames` rows of its frames.

    Runs per task. Whatever the object holds, the row says what became of it; nothing is raised but what is wrong with
    this machine. `size` is what the listing said: an object past the limit is not read at all.
    """
    return _parsed(_fetch({cols.URI: uri, cols.SIZE: size}, parser), parser)


@dataclass(frozen=True)
class _Fetched:
    """What storage gave of an object: what is known of it by now, and its bytes unless that is all there is to say."""

    row: dict[str, Any]
    content: bytes | None = None


def _fetched(
    objects: Iterable[dict[str, Any]], parser: Parser, readers: Executor
) -> Iterator[tuple[dict[str, Any], _Fetched]]:
    """Each object in turn and what was fetched of it; the next ones are read while one is decoded."""
    ahead: deque[tuple[dict[str, Any], Future[_Fetched]]] = deque()
    size = 0

    def first() -> tuple[dict[str, Any], _Fetched]:
        listed, reading = ahead.popleft()
        return listed, reading.result()

    for listed in objects:
        content = listed.pop(CONTENT, None)
        ahead.append((listed, readers.submit(_fetch, listed, parser, content)))
        size += listed[cols.SIZE]
        while ahead and (len(ahead) > READ_AHEAD or size > READ_AHEAD_BYTES):
            size -= ahead[0][0][cols.SIZE]
            yield first()
    while ahead:
        yield first()


def _fetch(listed: Mapping[str, Any], parser: Parser, content: bytes | None = None) -> _Fetched:
    """Read an object, unless `content` came with it. Runs in a thread of a task."""
    if content is not None:
        if len(content) != listed[cols.SIZE]:
            return _Fetched({cols.OUTCOME: cols.VANISHED, cols.REASON: REPLACED})
        return _Fetched({cols.DIGEST: hashlib.sha256(content).hexdigest()}, content)
    if listed[cols.SIZE] > parser.limits.max_object_mb * 2**20:
        return _Fetched({cols.OUTCOME: cols.REJECTED, cols.REASON: TOO_LARGE})
    try:
        content, found = parser.store.read(listed[cols.URI])
    except FileNotFoundError:
        return _Fetched({cols.OUTCOME: cols.VANISHED, cols.REASON: GONE})
    except storage.Replaced:
        return _Fetched({cols.OUTCOME: cols.VANISHED, cols.REASON: REPLACED})
    except OSError:
        return _Fetched({cols.OUTCOME: cols.REJECTED, cols.REASON: cols.UNREADABLE})
    described = {cols.SIZE: found.size, cols.MODIFIED: found.modified, cols.ETAG: found.etag}
    return _Fetched(described | {cols.DIGEST: hashlib.sha256(content).hexdigest()}, content)


def _parsed(fetched: _Fetched, parser: Parser) -> dict[str, Any]:
    """What became of an object: outcome, digest, tags and under `frames` rows of its frames."""
    row, content = fetched.row, fetched.content
    if content is None:
        return row
    try:
        instance = _decoder(_decoding(parser)).read(content)
    except NotAnImage as error:
        return row | {cols.OUTCOME: cols.NOT_AN_IMAGE, cols.REASON: str(error.reason)}
    except Rejected as error:
        return row | {cols.OUTCOME: cols.REJECTED, cols.REASON: str(error.reason)}
    owners = owners_of(instance, parser.pseudonyms)
    if is_forgotten(owners, parser.forgotten):
        return {**row, cols.DIGEST: None, cols.OUTCOME: cols.REJECTED, cols.REASON: cols.ERASED}
    tags = tags_of(instance, owners)
    if parser.identity:
        row[IDENTIFIERS] = {owner.kind: owner.identifier for owner in owners if owner.identifier is not None}
    frames = [
        {
            cols.FRAME: frame.number,
            cols.PIXELS_COLUMN: (pixels := frame.pixels.tobytes()),
            cols.PREPROCESSING: parser.preprocessing.version,
            cols.WINDOW_LOW: frame.low,
            cols.WINDOW_HIGH: frame.high,
            cols.PIXEL_DIGEST: hashlib.sha256(pixels).hexdigest(),
        }
        for frame in instance.frames
    ]
    return row | {cols.OUTCOME: PARSED, cols.IMAGE_ID: tags[cols.IMAGE_ID], "tags": tags, "frames": frames}


def owners_of(instance: Instance, names: Pseudonyms) -> tuple[Identity, ...]:
    """What an instance is and belongs to."""
    tags = instance.tags
    uids = (tags.sop_instance_uid, tags.series_instance_uid, tags.study_instance_uid)
    return identities(*uids, tags.patient_id_raw, names)


def tags_of(instance: Instance, owners: Iterable[Identity]) -> dict[str, object]:
    """The TAGS row of an instance without its batch: pseudonyms for identifiers, and nothing else is kept."""
    values = vars(instance.tags)
    ids: dict[str, object] = {schemas.OWNERS[owner.kind]: owner.pseudonym for owner in owners}
    return ids | {f.name: values[f.name] for f in _TAGS_OF_INSTANCE if f.name in values and f.name not in ids}


class _Frames:
    """Frames of one attempt of a task, written to a file whenever there are enough of them."""

    def __init__(self, folder: str, store: ObjectStore) -> None:
        self.attempt = uuid.uuid4().hex
        self._folder = folder
        self._store = store
        self._schema = to_arrow_schema(STAGED_FRAMES)
        self._rows: list[dict[str, Any]] = []
        self._files = 0

    def add(self, uri: str, image_id: str | None, frames: Iterable[Mapping[str, Any]]) -> None:
        keys = {cols.URI: uri, STAGED_BY: self.attempt, cols.IMAGE_ID: image_id}
        for frame in frames:
            self._rows.append({**keys, **frame})
            if len(self._rows) >= FRAMES_PER_FILE:
                self.write()

    def write(self) -> None:
        if not self._rows:
            return
        sink = pa.BufferOutputStream()
        # Read once and thrown away: neither compression nor statistics would pay.
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
        self._rows = []
        uri = storage.join(self._folder, f"{self.attempt}-{self._files}.parquet")
        self._store.write_bytes(uri, sink.getvalue(), durable=False)
        self._files += 1


def _decoding(parser: Parser) -> _Decoding:
    limits = parser.limits
    return _Decoding(parser.preprocessing, parser.body_parts, limits.decoder_memory_mb, limits.decoder_seconds)


@lru_cache(maxsize=1)
def _decoder(decoding: _Decoding) -> Decoder:
    """The decoding process of this Python worker, started once and kept for its later tasks."""
    # Spark's workers collect garbage after every task; the modules imported by now are none, and most of the work.
    gc.freeze()
    return Decoder(
        decoding.preprocessing,
        Vocabulary(decoding.body_parts),
        memory_mb=decoding.memory_mb,
        seconds=decoding.seconds,
    )
