"""list → compare → parse → SOURCES, TAGS, PIXELS: every object of an archive gets exactly one outcome.

A run lists the archive, compares the listing with SOURCES by URI, size and time, and reads only what is new or
changed, in batches that are each published by themselves. What tasks parsed is staged as Parquet first: all three
tables are written from the same bytes, whatever is lost and computed again in between.
"""

import hashlib
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import (
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from cbmir_spark import __version__, pseudonyms, storage
from cbmir_spark import tables as t
from cbmir_spark.config import IngestSettings, Settings, StorageSettings
from cbmir_spark.decoder import Decoder
from cbmir_spark.dicom import Instance, NotAnImage, Preprocessing, Rejected
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.pseudonyms import Pseudonyms
from cbmir_spark.reconcile import (
    ACTION,
    MISSING,
    PARSED,
    PROMOTED,
    READ,
    SLICE,
    UNCHANGED,
    arrivals,
    compare,
    newcomers,
    pixel_rows,
    promote,
    resolve,
    slices,
    source_rows,
    superseded,
    tag_rows,
)
from cbmir_spark.vocabulary import Vocabulary

# Folders are listed by tasks once the driver has found this many; fewer would leave cores idle.
LISTING_TASKS = 32
# Frames in one file of PIXELS: 128 MB before compression.
FRAMES_PER_FILE = 2048
TAGS_PER_FILE = 200_000

TOO_LARGE = "TOO_LARGE"
UNREADABLE = "UNREADABLE"
GONE = "GONE"
REPLACED = "REPLACED_WHILE_READ"

_LISTING = StructType(
    [
        StructField(t.URI, StringType(), False),
        StructField(t.SIZE, LongType(), False),
        StructField(t.MODIFIED, TimestampType(), False),
    ]
)
_TAGS_OF_INSTANCE = StructType([f for f in t.TAGS.schema if f.name != t.BATCH])
_OF_FRAME = [f for f in t.PIXELS.schema if f.name not in (t.IMAGE_ID, t.BATCH)]
_KEPT_FRAMES = "kept_frames"
# One row for each object, then one for each of its frames, in which only uri, image_id and the frame are set. Frames
# are rows of their own because readers take hundreds of rows at a time, and one enhanced object alone has 32 MB.
_STAGED = StructType(
    [
        *[StructField(f.name, f.dataType) for f in _LISTING],
        StructField(t.DIGEST, StringType()),
        StructField(t.OUTCOME, StringType()),
        StructField(t.REASON, StringType()),
        StructField(t.IMAGE_ID, StringType()),
        StructField("tags", _TAGS_OF_INSTANCE),
        StructField(_KEPT_FRAMES, IntegerType()),
        *[StructField(f.name, f.dataType) for f in _OF_FRAME],
    ]
)
_FRAMES_PER_BATCH = 64

Progress = Callable[[int, int, Mapping[str, int]], None]


@dataclass(frozen=True)
class Report:
    """What a run did: outcomes of the objects read, those left alone, and the law that both must obey."""

    archive: str
    listed: int
    unchanged: int
    outcomes: Mapping[str, int]
    reasons: Mapping[str, int]
    deleted: int
    frames: int
    batches: int
    seconds: Mapping[str, float]
    published: t.Published
    mended: tuple[str, ...]

    @property
    def read(self) -> int:
        """Objects that were new or changed."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class Parser:
    """Everything a task needs to turn an object into a staged row; carries the key's path, never the key."""

    storage: StorageSettings
    limits: IngestSettings
    preprocessing: Preprocessing
    body_parts: Mapping[str, str]
    pseudonyms: Pseudonyms

    def __hash__(self) -> int:
        return hash((self.preprocessing.version, self.pseudonyms))


def preprocessing_of(settings: Settings) -> Preprocessing:
    """The one reading of the `pixels` settings: archive, queries and training all see pictures made by it."""
    return Preprocessing(
        aspect=settings.pixels.aspect,
        windows=settings.pixels.windows,
        percentiles=settings.pixels.percentiles,
        max_frames=settings.pixels.max_frames,
    )


def parse(objects: DataFrame, parser: Parser) -> DataFrame:
    """Read and decode each object: (uri, size, modified) → staged rows. Runs per task, lazily."""
    arrow = to_arrow_schema(_STAGED)

    def stage(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                parsed = parse_object(row, parser)
                frames: list[dict[str, object]] = parsed.pop("frames", [])
                head = parsed | {_KEPT_FRAMES: len(frames)}
                yield pa.RecordBatch.from_pylist([head], schema=arrow)
                keys = {t.URI: row[t.URI], t.IMAGE_ID: parsed.get(t.IMAGE_ID)}
                for start in range(0, len(frames), _FRAMES_PER_BATCH):
                    rows = [keys | frame for frame in frames[start : start + _FRAMES_PER_BATCH]]
                    yield pa.RecordBatch.from_pylist(rows, schema=arrow)

    return objects.select(t.URI, t.SIZE, t.MODIFIED).mapInArrow(stage, _STAGED)


def parse_object(listed: Mapping[str, object], parser: Parser) -> dict[str, Any]:
    """One object's staged row and, under `frames`, rows of its frames. Runs per task.

    Whatever the object holds, the row says what became of it; nothing is raised but what is wrong with this machine.
    """
    row: dict[str, Any] = dict(listed)
    uri, size = str(listed[t.URI]), int(str(listed[t.SIZE]))
    if size > parser.limits.max_object_mb * 2**20:
        return row | {t.OUTCOME: t.REJECTED, t.REASON: TOO_LARGE}
    try:
        content = storage.read_bytes(uri, parser.storage)
    except FileNotFoundError:
        return row | {t.OUTCOME: t.VANISHED, t.REASON: GONE}
    except OSError:
        return row | {t.OUTCOME: t.REJECTED, t.REASON: UNREADABLE}
    if len(content) != size:
        # Replaced since it was listed: the next run sees its new size and time, and reads it then.
        return row | {t.OUTCOME: t.VANISHED, t.REASON: REPLACED}
    row[t.DIGEST] = hashlib.sha256(content).hexdigest()
    try:
        instance = _decoder(parser).read(content)
    except NotAnImage as error:
        return row | {t.OUTCOME: t.NOT_AN_IMAGE, t.REASON: str(error.reason)}
    except Rejected as error:
        return row | {t.OUTCOME: t.REJECTED, t.REASON: str(error.reason)}
    tags = tags_of(instance, parser.pseudonyms)
    frames = [
        {
            t.FRAME: frame.number,
            t.PIXELS_COLUMN: (pixels := frame.pixels.tobytes()),
            t.PREPROCESSING: parser.preprocessing.version,
            t.WINDOW_LOW: frame.low,
            t.WINDOW_HIGH: frame.high,
            t.PIXEL_DIGEST: hashlib.sha256(pixels).hexdigest(),
        }
        for frame in instance.frames
    ]
    return row | {t.OUTCOME: PARSED, t.IMAGE_ID: tags[t.IMAGE_ID], "tags": tags, "frames": frames}


def tags_of(instance: Instance, names: Pseudonyms) -> dict[str, object]:
    """The TAGS row of an instance without its batch: identifiers become pseudonyms, and nothing else is kept.

    An empty identifier must not make one patient, study or series of all who lack it: the next one below stands in.
    """
    values = asdict(instance.tags)
    image = str(values["sop_instance_uid"])
    series = str(values["series_instance_uid"] or image)
    study = str(values["study_instance_uid"] or series)
    patient = str(values["patient_id_raw"] or study)
    ids = {
        t.IMAGE_ID: names.image(image),
        t.SERIES_ID: names.series(series),
        t.STUDY_ID: names.study(study),
        t.PATIENT_ID: names.patient(patient),
    }
    return ids | {f.name: values[f.name] for f in _TAGS_OF_INSTANCE if f.name not in ids}


def list_archive(spark: SparkSession, archive: str, settings: StorageSettings) -> DataFrame:
    """Every object below an archive, hidden names included: (uri, size, modified).

    The driver goes down folder by folder until there are enough of them to share out; tasks list the rest.
    """
    found: list[storage.StoredObject] = []
    folders = [archive]
    while folders and len(folders) < LISTING_TASKS:
        deeper: list[str] = []
        for folder in folders:
            below, objects = storage.list_folder(folder, settings)
            deeper += below
            found += objects
        folders = deeper
    here = spark.createDataFrame([(o.uri, o.size, o.modified) for o in found], _LISTING)
    if not folders:
        return here
    arrow = to_arrow_schema(_LISTING)

    def list_below(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for folder in batch.column(0).to_pylist():
                rows = [asdict(o) for o in storage.list_objects(folder, settings)]
                yield pa.RecordBatch.from_pylist(rows, schema=arrow)

    shared = spark.createDataFrame([(folder,) for folder in folders], "folder string")
    return here.unionByName(shared.repartition(LISTING_TASKS, "folder").mapInArrow(list_below, _LISTING))


def run(spark: SparkSession, settings: Settings, progress: Progress | None = None) -> Report:
    """Ingest what is new in `ingest.archive`; a second run over the same archive writes nothing but its RUNS row.

    Raises InputError for an archive that is not there, TableError for a lake made with another key or other pixel
    settings.
    """
    started = datetime.now(UTC)
    clock = _Clock()
    archive = _archive(settings)
    lake = t.Lake.of(settings)
    if storage.is_below(lake.uri, archive) or lake.uri == archive:
        raise InputError(f"lake {lake.uri} lies inside archive {archive}: give a lake elsewhere, with --lake")
    preprocessing = preprocessing_of(settings)
    names = pseudonyms.of(settings, storage.local_path(lake.vault) if storage.is_local(lake.vault) else None)
    pinned, mended = _open_tables(spark, lake, names.key_id, preprocessing.version)
    parser = Parser(settings.storage, settings.ingest, preprocessing, settings.vocabulary.body_parts, names)
    staging = storage.join(lake.vault, "staging")
    storage.delete_folder(staging, settings.storage)
    try:
        report = _ingest(spark, settings, lake, archive, parser, pinned, mended, staging, clock, progress)
    finally:
        storage.delete_folder(staging, settings.storage)
    t.record_run(
        spark,
        lake,
        run_id=uuid.uuid4().hex,
        job="ingest",
        started=started,
        ended=datetime.now(UTC),
        outcome="done",
        software=__version__,
        counts={"listed": report.listed, UNCHANGED: report.unchanged, "frames": report.frames}
        | {t.DELETED: report.deleted, **report.outcomes},
        seconds=report.seconds,
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={
            "sources": report.published.sources,
            "tags": report.published.tags,
            "pixels": report.published.pixels,
        },
    )
    return report


def _ingest(
    spark: SparkSession,
    settings: Settings,
    lake: t.Lake,
    archive: str,
    parser: Parser,
    pinned: t.Published,
    mended: list[str],
    staging: str,
    clock: "_Clock",
    progress: Progress | None,
) -> Report:
    with clock.stage("list"):
        listing_path = storage.join(staging, "listing")
        list_archive(spark, archive, settings.storage).write.parquet(listing_path)
        listing = spark.read.schema(_LISTING).parquet(listing_path)
    with clock.stage("compare"):
        sources = t.read(spark, lake.path(t.SOURCES), pinned.sources)
        known = sources.where(F.startswith(F.col(t.URI), F.lit(archive + "/")))
        actions_path = storage.join(staging, "actions")
        compare(listing, known).write.parquet(actions_path)
        actions = spark.read.parquet(actions_path)
        counted = {row[ACTION]: row["count"] for row in actions.groupBy(ACTION).count().collect()}
    to_read, unchanged, missing = (counted.get(action, 0) for action in (READ, UNCHANGED, MISSING))
    listed = listing.count()
    _obey_law(listed, unchanged + to_read, "compared with SOURCES")
    if listed == 0 and missing > 0:
        raise InputError(
            f"archive {archive} is empty, yet {missing} objects are known in it: is it mounted? Nothing was deleted"
        )
    batches = math.ceil(to_read / settings.ingest.max_files_per_batch) or int(missing > 0)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    frames = 0
    published = pinned
    present: list[int] = []
    if batches:
        with clock.stage("compare"):
            work_path = storage.join(staging, "work")
            slices(actions, promote(actions, sources), batches).write.partitionBy(SLICE).parquet(work_path)
            work = spark.read.parquet(work_path)
            # A hash may leave a slice of few objects empty; there is nothing to publish for it.
            present = sorted(row[SLICE] for row in work.select(SLICE).distinct().collect())
    for number in present:
        done = _ingest_slice(spark, settings, lake, parser, published, work, number, staging, clock)
        published = done.published
        outcomes.update(done.outcomes)
        reasons.update(done.reasons)
        frames += done.frames
        if progress is not None:
            progress(sum(outcomes.values()), to_read, outcomes)
    _obey_law(listed, unchanged + sum(outcomes.values()), "given an outcome")
    return Report(
        archive=archive,
        listed=listed,
        unchanged=unchanged,
        outcomes=dict(outcomes),
        reasons=dict(reasons),
        deleted=missing,
        frames=frames,
        batches=len(present),
        seconds=clock.seconds,
        published=published,
        mended=tuple(mended),
    )


@dataclass(frozen=True)
class _Done:
    published: t.Published
    outcomes: Mapping[str, int]
    reasons: Mapping[str, int]
    frames: int


def _ingest_slice(
    spark: SparkSession,
    settings: Settings,
    lake: t.Lake,
    parser: Parser,
    pinned: t.Published,
    work: DataFrame,
    number: int,
    staging: str,
    clock: "_Clock",
) -> _Done:
    """Read, stage, resolve and publish one batch; nothing is visible before its commit of SOURCES."""
    batch = pinned.batch + 1
    of_slice = work.where(F.col(SLICE) == number)
    objects = of_slice.where(F.col(ACTION) == READ)
    with clock.stage("parse"):
        planned = objects.count()
        tasks = max(1, math.ceil(planned / settings.ingest.files_per_task))
        staged_path = storage.join(staging, f"parsed-{number}")
        parse(objects.repartition(tasks, t.URI), parser).write.parquet(staged_path)
        rows = spark.read.schema(_STAGED).parquet(staged_path)
        is_frame = F.col(t.FRAME).isNotNull()
        staged = rows.where(~is_frame).drop(*[f.name for f in _OF_FRAME])
        staged_frames = rows.where(is_frame).select(t.URI, t.IMAGE_ID, *[f.name for f in _OF_FRAME])
        _obey_law(planned, staged.count(), "parsed")
    with clock.stage("resolve"):
        sources = t.read(spark, lake.path(t.SOURCES), pinned.sources)
        resolved_path = storage.join(staging, f"resolved-{number}")
        resolve(staged, sources, work, number).write.parquet(resolved_path)
        resolved = spark.read.parquet(resolved_path)
        leaving = superseded(resolved)
        leaving_batches = [row[t.BATCH] for row in leaving.select(t.BATCH).distinct().collect()]
        arrived = arrivals(staged, resolved)
        counts = arrived.select(F.count("*").alias("images"), F.sum(_KEPT_FRAMES).alias("frames")).first()
        images, frames = (counts["images"], counts["frames"] or 0) if counts else (0, 0)
        _obey_law(newcomers(resolved).count(), images, "found among the parsed")
    with clock.stage("write"):
        tags_path, pixels_path = lake.path(t.TAGS), lake.path(t.PIXELS)
        versions = {tags_path: pinned.tags, pixels_path: pinned.pixels}
        if images:
            tag_files, pixel_files = math.ceil(images / TAGS_PER_FILE), math.ceil(frames / FRAMES_PER_FILE)
            rows = tag_rows(arrived, batch).coalesce(tag_files)
            versions[tags_path] = t.replace_batch(rows, t.TAGS, tags_path, batch)
            rows = pixel_rows(staged_frames, arrived, batch).coalesce(pixel_files)
            versions[pixels_path] = t.replace_batch(rows, t.PIXELS, pixels_path, batch)
        if leaving_batches:
            gone_images = leaving.select(t.IMAGE_ID)
            for path in versions:
                versions[path] = t.delete_images(spark, path, gone_images, leaving_batches)
    with clock.stage("publish"):
        gone = of_slice.where(F.col(ACTION) == MISSING)
        rows = source_rows(staged, resolved, gone, parser.pseudonyms.key_id, batch)
        belongs = replace(pinned, tags=versions[tags_path], pixels=versions[pixels_path], batch=batch)
        published = t.publish(spark, lake, rows, belongs)
        read = of_slice.where(~F.col(PROMOTED)).where(F.col(ACTION) == READ).select(t.URI)
        ended = t.read(spark, lake.path(t.SOURCES), published.sources).join(read, on=t.URI, how="left_semi")
        tally = ended.groupBy(t.OUTCOME, t.REASON).count().collect()
    outcomes: Counter[str] = Counter()
    for row in tally:
        outcomes[row[t.OUTCOME]] += row["count"]
    reasons = {row[t.REASON]: row["count"] for row in tally if row[t.REASON] is not None}
    return _Done(published, outcomes, reasons, frames)


def _archive(settings: Settings) -> str:
    if settings.ingest.archive is None:
        raise InputError("no archive named: give --archive URI, the folder or prefix that holds the .dcm objects")
    archive = storage.canonical(settings.ingest.archive)
    found = storage.kind(archive, settings.storage)
    if found != "folder":
        problem = "is a file, not a folder" if found == "file" else "does not exist"
        raise InputError(f"archive {archive} {problem}: give the folder or prefix that holds the .dcm objects")
    return archive


def _open_tables(spark: SparkSession, lake: t.Lake, key_id: str, preprocessing: str) -> tuple[t.Published, list[str]]:
    """Tables created where missing, brought back to what is published, and checked to belong to these settings."""
    pinned = t.published(spark, lake)
    if pinned is None:
        return t.publish_empty(spark, lake, key_id, preprocessing), []
    if pinned.key_id != key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {key_id}: "
            "use its own key, or the same image would get a second identity"
        )
    if pinned.preprocessing != preprocessing:
        raise TableError(
            f"lake {lake.uri} holds pixels of preprocessing {pinned.preprocessing}, the `pixels` settings give "
            f"{preprocessing}: put the settings back, or ingest into another lake"
        )
    return pinned, t.roll_back(spark, lake, pinned)


def _obey_law(expected: int, found: int, step: str) -> None:
    """Each object has exactly one outcome; a count that does not match stops the job before it publishes."""
    if expected != found:
        raise TableError(f"{expected} objects, yet {found} were {step}: nothing was published; run ingest again")


class _Clock:
    """Seconds by stage, added up over batches."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage: tuple[str, float] | None = None

    def stage(self, name: str) -> "_Clock":
        self._stage = (name, time.monotonic())
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._stage is not None:
            name, began = self._stage
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@lru_cache(maxsize=1)
def _decoder(parser: Parser) -> Decoder:
    """The decoding process of this Python worker, started once and kept for its later tasks."""
    return Decoder(
        parser.preprocessing,
        Vocabulary(parser.body_parts),
        memory_mb=parser.limits.decoder_memory_mb,
        seconds=parser.limits.decoder_seconds,
    )
