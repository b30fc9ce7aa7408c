"""Parse objects: one object → one STAGED row and its chosen frames. Runs per task.

A task writes the frames itself, as Parquet below the staging folder of the vault, and hands only the rows about the
objects to Spark: 64 KB of pixels for each frame would only pass through the JVM before it is known which images stay.
"""

import gc
import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql.types import IntegerType, MapType, StringType, StructField, StructType

from cbmir_spark import storage
from cbmir_spark.config import IngestSettings, PixelsSettings
from cbmir_spark.dicom.decoder import Decoder
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import Instance, NotAnImage, Rejected
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.ingest.fetch import READ_AHEAD, Fetched, fetch, fetch_ahead
from cbmir_spark.ingest.listing import CONTENT
from cbmir_spark.ingest.reconcile import IDENTIFIERS, PARSED, STAGED_BY
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.pseudonyms import Identity, Patient, PatientRule, Pseudonyms, identities, is_forgotten
from cbmir_spark.storage import ObjectStore, StoredObject

# Frames in one staged file: 32 MB in memory until it is written.
FRAMES_PER_FILE = 512

FRAME_COUNT = "frame_count"
_LISTED = [f for f in schemas.SOURCES.schema if f.name in (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG)]
_TAGS_OF_INSTANCE = StructType([f for f in schemas.TAGS.schema if f.name != cols.BATCH])
# `staged_by` names the attempt of a task: no row refers to the frames of an attempt that Spark aborted.
STAGED = StructType(
    [
        *[StructField(f.name, f.dataType) for f in _LISTED],
        StructField(cols.DIGEST, StringType()),
        StructField(cols.OUTCOME, StringType()),
        StructField(cols.REASON, StringType()),
        StructField(cols.DETAIL, StringType()),
        StructField(cols.IMAGE_ID, StringType()),
        StructField("tags", _TAGS_OF_INSTANCE),
        StructField(IDENTIFIERS, MapType(StringType(), StringType())),
        StructField(FRAME_COUNT, IntegerType()),
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
"""Called by a task with what it has done: objects, bytes, and objects by reason."""


@dataclass(frozen=True)
class Parser:
    """Everything a task needs to turn an object into a staged row; carries the key's path, never the key.

    `forgotten` are what `identity.tombstones` returns: nothing is stored of what they name. With `identity` staged rows
    carry the identifiers, which belong in the vault alone.
    """

    store: ObjectStore
    limits: IngestSettings
    preprocessing: Preprocessing
    body_parts: Mapping[str, str]
    pseudonyms: Pseudonyms
    forgotten: Mapping[PatientRule, frozenset[str]] = field(default_factory=dict)
    identity: bool = False

    @property
    def max_bytes(self) -> int:
        """The size past which an object is not read."""
        return self.limits.max_object_mb * 2**20


@dataclass(frozen=True)
class ParsedFrame:
    """One chosen frame: 65,536 bytes of pixels, the window in output units of the Modality LUT, and the SHA-256."""

    number: int
    pixels: bytes
    window_low: float
    window_high: float
    digest: str


@dataclass(frozen=True)
class ParsedObject:
    """One object: PARSED, with its tags and frames, or an outcome of SOURCES with the reason for it.

    `found` and `digest` describe the bytes that were read, where any were. `tags` is the TAGS row without its batch;
    `identifiers` by kind are there only where the vault is to keep them.
    """

    outcome: str
    reason: str | None = None
    detail: str | None = None
    found: StoredObject | None = None
    digest: str | None = None
    tags: Mapping[str, object] | None = None
    identifiers: Mapping[str, str] | None = None
    frames: tuple[ParsedFrame, ...] = ()

    @property
    def image_id(self) -> str | None:
        return None if self.tags is None else str(self.tags[cols.IMAGE_ID])


@dataclass(frozen=True)
class _Decoding:
    """Parameters of a decoding process: it is replaced where any of them differs."""

    preprocessing: Preprocessing
    body_parts: Mapping[str, str]
    memory_mb: int
    seconds: float

    def __hash__(self) -> int:
        return hash(self.preprocessing.version)


def preprocessing_of(settings: PixelsSettings) -> Preprocessing:
    """Build the preprocessing that the `pixels` settings ask for: the same for archive, queries and training."""
    return Preprocessing(
        aspect=settings.aspect,
        windows=settings.windows,
        percentiles=settings.percentiles,
        max_frames=settings.max_frames,
        frames=settings.frames,
    )


def parse(objects: DataFrame, parser: Parser, frames_folder: str, tally: Tally) -> DataFrame:
    """Read and decode each object: (uri, size, …) → STAGED rows, lazily; tasks write the frames to `frames_folder`.

    Objects that come with their bytes, in the column CONTENT, are not read again.
    """
    arrow = arrow_schema(STAGED)

    def stage(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        frames = _Frames(frames_folder, parser.store, parser.preprocessing.version)
        with ThreadPoolExecutor(READ_AHEAD) as readers:
            for batch in batches:
                rows, done = [], Counter[str]()
                for listed, fetched in fetch_ahead(batch.to_pylist(), parser.store, parser.max_bytes, readers):
                    parsed = _parsed(fetched, parser)
                    frames.add(listed[cols.URI], parsed)
                    rows.append(_staged(listed, parsed, frames.attempt))
                    done.update(["objects"] if parsed.reason is None else ["objects", parsed.reason])
                    done["bytes"] += parsed.found.size if parsed.found is not None else 0
                tally(done)
                yield pa.RecordBatch.from_pylist(rows, schema=arrow)
        frames.write()

    brought = [name for name in objects.columns if name == CONTENT]
    return objects.select(*[f.name for f in _LISTED], *brought).mapInArrow(stage, STAGED)


def parse_object(uri: str, size: int, parser: Parser) -> ParsedObject:
    """Read and decode one object. Runs per task.

    Whatever the object holds, the answer is its outcome; only faults of this machine raise. `size` is that of the
    listing: an object past the limit is not read at all.
    """
    return _parsed(fetch(uri, size, parser.store, parser.max_bytes), parser)


def _parsed(fetched: Fetched, parser: Parser) -> ParsedObject:
    if fetched.content is None:
        return ParsedObject(fetched.outcome, fetched.reason)
    found, digest = fetched.found, fetched.digest
    try:
        instance = _decoder(_decoding(parser)).read(fetched.content)
    except NotAnImage as error:
        return ParsedObject(cols.NOT_AN_IMAGE, str(error.reason), None, found, digest)
    except Rejected as error:
        return ParsedObject(cols.REJECTED, str(error.reason), error.detail or None, found, digest)
    if _is_forgotten(instance, parser):
        return ParsedObject(cols.REJECTED, cols.ERASED, found=found)
    owners = owners_of(instance, parser.pseudonyms)
    frames = tuple(
        ParsedFrame(
            frame.number, (pixels := frame.pixels.tobytes()), frame.low, frame.high, hashlib.sha256(pixels).hexdigest()
        )
        for frame in instance.frames
    )
    identifiers = None
    if parser.identity:
        identifiers = {each.kind: each.identifier for each in owners if each.identifier is not None}
        identifiers |= {cols.ISSUER: issuer} if (issuer := owners[-1].issuer) is not None else {}
    return ParsedObject(PARSED, None, None, found, digest, tags_of(instance, owners), identifiers, frames)


def _staged(listed: dict[str, Any], parsed: ParsedObject, attempt: str) -> dict[str, Any]:
    """The STAGED row of an object, in which what was read takes the place of what was listed."""
    row = {
        **listed,
        cols.DIGEST: parsed.digest,
        cols.OUTCOME: parsed.outcome,
        cols.REASON: parsed.reason,
        cols.DETAIL: parsed.detail,
        cols.IMAGE_ID: parsed.image_id,
        "tags": parsed.tags,
        IDENTIFIERS: parsed.identifiers,
        FRAME_COUNT: len(parsed.frames),
        STAGED_BY: attempt,
    }
    if parsed.found is not None:
        row |= {cols.SIZE: parsed.found.size, cols.MODIFIED: parsed.found.modified, cols.ETAG: parsed.found.etag}
    return row


def owners_of(instance: Instance, names: Pseudonyms) -> tuple[Identity, ...]:
    """The pseudonyms of an instance and of what it belongs to."""
    tags = instance.tags
    uids = (tags.sop_instance_uid, tags.series_instance_uid, tags.study_instance_uid)
    patient = Patient(tags.patient_id_raw, tags.patient_id_first, tags.patient_issuer)
    return identities(*uids, patient, names)


def _is_forgotten(instance: Instance, parser: Parser) -> bool:
    """True if a tombstone names the instance, or did by the rule for patients that the lake had then."""
    return any(
        is_forgotten(owners_of(instance, replace(parser.pseudonyms, patients=rule)), names)
        for rule, names in parser.forgotten.items()
    )


def tags_of(instance: Instance, owners: Iterable[Identity]) -> dict[str, object]:
    """Make the TAGS row of an instance without its batch: pseudonyms for identifiers, and nothing beyond the schema."""
    values = vars(instance.tags)
    ids: dict[str, object] = {schemas.OWNERS[owner.kind]: owner.pseudonym for owner in owners}
    return ids | {f.name: values[f.name] for f in _TAGS_OF_INSTANCE if f.name in values and f.name not in ids}


class _Frames:
    """Frames of one attempt of a task, written to a file whenever there are enough of them."""

    def __init__(self, folder: str, store: ObjectStore, preprocessing: str) -> None:
        self.attempt = uuid.uuid4().hex
        self._folder = folder
        self._store = store
        self._preprocessing = preprocessing
        self._schema = arrow_schema(STAGED_FRAMES)
        self._rows: list[dict[str, Any]] = []
        self._files = 0

    def add(self, uri: str, parsed: ParsedObject) -> None:
        for frame in parsed.frames:
            self._rows.append(
                {
                    cols.URI: uri,
                    STAGED_BY: self.attempt,
                    cols.IMAGE_ID: parsed.image_id,
                    cols.FRAME: frame.number,
                    cols.PIXELS_COLUMN: frame.pixels,
                    cols.PREPROCESSING: self._preprocessing,
                    cols.WINDOW_LOW: frame.window_low,
                    cols.WINDOW_HIGH: frame.window_high,
                    cols.PIXEL_DIGEST: frame.digest,
                }
            )
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
    """The decoding process of this Python worker, started once for all of its tasks."""
    # Spark's workers collect garbage after every task; the modules imported by now are none, and most of the work.
    gc.freeze()
    return Decoder(
        decoding.preprocessing,
        Vocabulary(decoding.body_parts),
        memory_mb=decoding.memory_mb,
        seconds=decoding.seconds,
    )
