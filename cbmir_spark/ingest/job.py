"""list → compare → parse → SOURCES, TAGS, PIXELS: every object of an archive gets exactly one outcome.

A run lists the archive, compares the listing with SOURCES by URI, size, time and ETag, and reads only what is new or
changed, in batches that are each published by themselves. What tasks parsed is staged as Parquet first: all three
tables are written from the same bytes, whatever is lost and computed again in between.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pyspark import AccumulatorParam, SparkContext
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.errors import EnvironmentProblem, InputError, TableError
from cbmir_spark.ingest.listing import LISTING, check_listing, few_rows_at_a_time, list_archive, with_content
from cbmir_spark.ingest.parse import (
    GONE,
    KEPT_FRAMES,
    STAGED,
    STAGED_FRAMES,
    TOO_LARGE,
    Parser,
    Tally,
    parse,
    preprocessing_of,
)
from cbmir_spark.ingest.reconcile import (
    ACTION,
    KNOWN,
    KNOWN_OUTCOME,
    MISSING,
    PROMOTED,
    READ,
    SLICE,
    TALLY,
    UNCHANGED,
    arrivals,
    compare,
    identity_rows,
    newcomers,
    pixel_rows,
    promote,
    resolve,
    slices,
    source_rows,
    superseded,
    tag_rows,
)
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, lease, pseudonyms, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.storage import ObjectStore

# Frames in one file of PIXELS: 128 MB before compression.
FRAMES_PER_FILE = 2048
TAGS_PER_FILE = 200_000
# A batch of at least so many objects of which storage refuses every one is a fault of the storage, not of theirs.
REFUSED_OBJECTS = 10
PROGRESS_SECONDS = 2.0
# Tasks that a core gets at least, if each of them has so many objects to read.
TASKS_FOR_A_CORE, WORTH_A_TASK = 4, 32

DEFERRED = "deferred"

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Told now and then: objects done, objects to do, and figures of the run such as MB/s and objects by reason."""


@dataclass(frozen=True)
class Report:
    """What a run did: outcomes of the objects read, those left alone, and the law that both must obey.

    listed = unchanged + deferred + the sum of `outcomes`. An object that was written anew with the bytes that it had
    is unchanged.
    """

    archive: str
    listed: int
    unchanged: int
    deferred: int
    outcomes: Mapping[str, int]
    reasons: Mapping[str, int]
    deleted: int
    frames: int
    batches: int
    seconds: Mapping[str, float]
    published: Published
    mended: tuple[str, ...]

    @property
    def read(self) -> int:
        """Objects that were new or changed."""
        return sum(self.outcomes.values())


def run(spark: SparkSession, settings: Settings, progress: Progress | None = None) -> Report:
    """Ingest what is new in `ingest.archive`; a second run over the same archive writes nothing but its RUNS row.

    Raises InputError for an archive that is not there, EnvironmentProblem where storage fails, TableError for a lake
    made with another key, other pixel settings or another vocabulary, Busy while another job writes to the lake.
    """
    record = Record.begin("ingest")
    archive = _archive(settings)
    lake = LakePaths.of(settings.lake)
    if storage.is_below(lake.uri, archive) or lake.uri == archive:
        raise InputError(f"lake {lake.uri} lies inside archive {archive}: give a lake elsewhere, with --lake")
    preprocessing = preprocessing_of(settings)
    names = (pseudonyms.create if publication.published(spark, lake) is None else pseudonyms.load)(
        settings.privacy, lake.vault_folder
    )
    with lease.hold(lake.vault, lease.TABLES, ObjectStore(settings.storage)) as held:
        parser = Parser(
            ObjectStore(settings.storage),
            settings.ingest,
            preprocessing,
            settings.vocabulary.body_parts,
            names,
            identity.tombstones(spark, lake),
            settings.privacy.identity,
        )
        return _ingest(spark, settings, lake, archive, parser, record, held, progress)


def _ingest(
    spark: SparkSession,
    settings: Settings,
    lake: LakePaths,
    archive: str,
    parser: Parser,
    record: Record,
    held: lease.Held,
    progress: Progress | None,
) -> Report:
    with record.stage("open"):
        pinned, mended = _open_tables(spark, lake, parser)
    staging = storage.join(lake.vault, "staging")
    ObjectStore(settings.storage).delete_folder(staging)
    try:
        report = _Run(spark, settings, lake, archive, parser, staging, record, held, progress).all(pinned, mended)
    finally:
        ObjectStore(settings.storage).delete_folder(staging)
    record.write(
        spark,
        lake,
        counts={"listed": report.listed, UNCHANGED: report.unchanged, DEFERRED: report.deferred}
        | {"frames": report.frames, cols.DELETED: report.deleted, **report.outcomes},
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={
            "sources": report.published.sources,
            "tags": report.published.tags,
            "pixels": report.published.pixels,
        },
    )
    return report


@dataclass(frozen=True)
class _Done:
    published: Published
    outcomes: Mapping[str, int]
    unchanged: int
    reasons: Mapping[str, int]
    frames: int


@dataclass(frozen=True)
class _Run:
    """What all steps of one run share."""

    spark: SparkSession
    settings: Settings
    lake: LakePaths
    archive: str
    parser: Parser
    staging: str
    record: Record
    held: lease.Held
    progress: Progress | None

    def all(self, pinned: Published, mended: list[str]) -> Report:
        limits = self.settings.ingest
        began = time.monotonic()
        listed = self._list()
        sources = delta.read(self.spark, self.lake.path(schemas.SOURCES), pinned.sources)
        actions, counted = self._compare(sources, listed)
        to_read, unchanged, missing = (counted.get(action, 0) for action in (READ, UNCHANGED, MISSING))
        _obey_law(listed, unchanged + to_read, "compared with SOURCES")
        batches = math.ceil(to_read / limits.max_files_per_batch) or int(missing > 0)
        moved = counted.get(KNOWN, 0) + missing > 0
        work, numbers = self._slices(actions, sources, batches, moved) if batches else (actions, [])
        outcomes: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        frames = 0
        published = pinned
        done = 0
        with _watch(self.spark.sparkContext, to_read, self.progress) as tally:
            for number in numbers:
                late = limits.max_minutes is not None and time.monotonic() - began > 60 * limits.max_minutes
                if done and (late or done == limits.max_batches):
                    break
                slice_done = self._slice(published, work, number, tally)
                published = slice_done.published
                outcomes.update(slice_done.outcomes)
                unchanged += slice_done.unchanged
                reasons.update(slice_done.reasons)
                frames += slice_done.frames
                done += 1
        deferred = 0
        if done < len(numbers):
            rest = work.where(F.col(SLICE).isin(numbers[done:]) & (F.col(ACTION) == READ) & ~F.col(PROMOTED))
            deferred = rest.count()
        _obey_law(listed, unchanged + deferred + sum(outcomes.values()), "given an outcome")
        return Report(
            archive=self.archive,
            listed=listed,
            unchanged=unchanged,
            deferred=deferred,
            outcomes=dict(outcomes),
            reasons=dict(reasons),
            deleted=missing,
            frames=frames,
            batches=done,
            seconds=self.record.seconds,
            published=published,
            mended=tuple(mended),
        )

    def _list(self) -> int:
        with self.record.stage("list"):
            mount = storage.mount_of(self.archive)
            list_archive(self.spark, self.archive, ObjectStore(self.settings.storage)).write.parquet(
                self._at("listing")
            )
            if storage.mount_of(self.archive) != mount:
                raise EnvironmentProblem(
                    f"archive {self.archive} was mounted or unmounted while it was listed: nothing was read and "
                    "nothing taken for deleted; run ingest again"
                )
            return check_listing(self.spark.read.schema(LISTING).parquet(self._at("listing")))

    def _compare(self, sources: DataFrame, listed: int) -> tuple[DataFrame, dict[str, int]]:
        """The objects to act on, and how many there are of each action; `known` are those to read that SOURCES has."""
        with self.record.stage("compare"):
            listing = self.spark.read.schema(LISTING).parquet(self._at("listing"))
            known = sources.where(F.startswith(F.col(cols.URI), F.lit(self.archive + "/")))
            if not listed and (missing := known.where(F.col(cols.OUTCOME) != cols.DELETED).count()):
                raise InputError(
                    f"archive {self.archive} is empty, yet {missing} objects are known in it: is it mounted? "
                    "Nothing was deleted"
                )
            compared = compare(listing, known)
            if not listed:
                return compared, {}
            is_read = F.col(ACTION) == READ
            # One pass over an archive of millions: its unchanged objects are counted and not written.
            counts = Observation()
            observed = compared.observe(
                counts,
                F.count_if(is_read).alias(READ),
                F.count_if(F.col(ACTION) == UNCHANGED).alias(UNCHANGED),
                F.count_if(F.col(ACTION) == MISSING).alias(MISSING),
                F.count_if(is_read & F.col(KNOWN_OUTCOME).isNotNull()).alias(KNOWN),
            )
            observed.where(F.col(ACTION) != UNCHANGED).write.parquet(self._at("actions"))
            return self.spark.read.schema(compared.schema).parquet(self._at("actions")), counts.get

    def _slices(self, actions: DataFrame, sources: DataFrame, batches: int, moved: bool) -> tuple[DataFrame, list[int]]:
        """The work in batches, and the numbers of those that are not empty; `moved`: known objects changed or left."""
        with self.record.stage("compare"):
            raised = promote(actions, sources)
            if not moved:
                raised = raised.limit(0)
            work = slices(actions, raised, max(1, batches))
            if batches == 1 and not moved:
                return work, [0]
            work.write.partitionBy(SLICE).parquet(self._at("work"))
            work = self.spark.read.schema(work.schema).parquet(self._at("work"))
            # A hash may leave a slice of few objects empty; there is nothing to publish for it.
            return work, sorted(row[SLICE] for row in work.select(SLICE).distinct().collect())

    def _slice(self, pinned: Published, work: DataFrame, number: int, tally: Tally) -> _Done:
        """Read, stage, resolve and publish one batch; nothing is visible before its commit of SOURCES."""
        batch = pinned.batch + 1
        of_slice = work.where(F.col(SLICE) == number)
        staged, read = self._parse(of_slice, number, tally)
        with self.record.stage("resolve"):
            sources = delta.read(self.spark, self.lake.path(schemas.SOURCES), pinned.sources)
            resolve(staged, sources, work, number).write.parquet(self._at(f"resolved-{number}"))
            resolved = self.spark.read.parquet(self._at(f"resolved-{number}"))
            rows = source_rows(staged, resolved, of_slice, self.parser.pseudonyms.key_id, batch)
            counted = rows.groupBy(TALLY, cols.REASON, KNOWN).count().collect()
            found: Counter[str] = Counter()
            reasons: Counter[str] = Counter()
            for row in counted:
                if row[TALLY] is not None:
                    found[row[TALLY]] += row["count"]
                    if row[cols.REASON] is not None:
                        reasons[row[cols.REASON]] += row["count"]
            _obey_law(read, found.total(), "given an outcome")
        belongs, frames = self._write(staged, resolved, number, replace(pinned, batch=batch))
        with self.record.stage("publish"):
            self.held.check()
            only_new = not any(row[KNOWN] for row in counted)
            published = publication.publish(self.spark, self.lake, rows.drop(TALLY, KNOWN), belongs, only_new)
        with self.record.stage("identity"):
            self._part_with(resolved, pinned, published)
        unchanged = found.pop(UNCHANGED, 0)
        return _Done(published, found, unchanged, reasons, frames)

    def _parse(self, of_slice: DataFrame, number: int, tally: Tally) -> tuple[DataFrame, int]:
        """Staged rows of the slice's objects, and how many of them the listing called new or changed."""
        with self.record.stage("parse"):
            objects = of_slice.where(F.col(ACTION) == READ)
            counted = objects.select(F.count("*").alias("all"), F.count_if(~F.col(PROMOTED)).alias(READ)).first()
            planned, read = (counted["all"], counted[READ]) if counted else (0, 0)
            tasks = self._tasks(planned)
            frames_folder, staged_folder = self._at(f"frames-{number}"), self._at(f"parsed-{number}")
            if storage.is_native(self.archive):
                objects = objects.repartition(tasks, cols.URI)
                parse(objects, self.parser, frames_folder, tally).write.parquet(staged_folder)
            else:
                self._parse_by_hadoop(objects, frames_folder, staged_folder, tally)
            staged = self.spark.read.schema(STAGED).parquet(staged_folder)
            refused = F.count_if(F.col(cols.REASON) == cols.UNREADABLE)
            ended = staged.select(F.count("*").alias("all"), refused.alias("refused")).first()
            done, failed = (ended["all"], ended["refused"]) if ended else (0, 0)
            _obey_law(planned, done, "parsed")
            if failed == planned >= REFUSED_OBJECTS:
                raise EnvironmentProblem(
                    f"storage refused all {planned} objects of a batch: check its state and the permissions, and run "
                    "ingest again; what was published before stands"
                )
        return staged, read

    def _tasks(self, objects: int) -> int:
        """As few as allowed, since a task costs a third of a second, yet enough that no core waits for the last one."""
        busy = min(TASKS_FOR_A_CORE * self.spark.sparkContext.defaultParallelism, objects // WORTH_A_TASK)
        return max(1, busy, math.ceil(objects / self.settings.ingest.files_per_task))

    def _parse_by_hadoop(self, objects: DataFrame, frames_folder: str, staged_folder: str, tally: Tally) -> None:
        """As `parse`, of objects whose bytes come through the JVM: few at a time, since each may have a gigabyte."""
        too_large = F.col(cols.SIZE) > self.settings.ingest.max_object_mb * 2**20
        wanted = objects.where(~too_large)
        with few_rows_at_a_time(self.spark):
            if not wanted.isEmpty():
                parse(with_content(self.spark, wanted), self.parser, frames_folder, tally).write.parquet(staged_folder)
        refused = self._unread(objects.where(too_large), cols.REJECTED, TOO_LARGE)
        refused.write.mode("append").parquet(staged_folder)
        staged = self.spark.read.schema(STAGED).parquet(staged_folder)
        gone = objects.join(staged.select(cols.URI), on=cols.URI, how="left_anti")
        self._unread(gone, cols.VANISHED, GONE).write.mode("append").parquet(staged_folder)

    def _unread(self, objects: DataFrame, outcome: str, reason: str) -> DataFrame:
        """STAGED rows of objects that were not read."""
        known = {cols.OUTCOME: F.lit(outcome), cols.REASON: F.lit(reason), KEPT_FRAMES: F.lit(0)}
        known |= {name: F.col(name) for name in (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG)}
        empty = {f.name: F.lit(None) for f in STAGED}
        return objects.select(*[(empty | known)[f.name].cast(f.dataType).alias(f.name) for f in STAGED])

    def _write(self, staged: DataFrame, resolved: DataFrame, number: int, pinned: Published) -> tuple[Published, int]:
        """Arrivals into PIXELS and TAGS, what they supersede out of them; the versions to publish, and the frames."""
        with self.record.stage("resolve"):
            leaving, coming = superseded(resolved), newcomers(resolved)
            # One row for each image in both: a pass over what was resolved instead of one for each question.
            moves = leaving.select(cols.BATCH).unionByName(coming.select(F.lit(None).cast("bigint").alias(cols.BATCH)))
            by_batch = {row[cols.BATCH]: row["count"] for row in moves.groupBy(cols.BATCH).count().collect()}
            expected, leaving_batches = by_batch.pop(None, 0), list(by_batch)
            arrived = arrivals(staged, resolved)
            counts = arrived.select(F.count("*").alias("images"), F.sum(KEPT_FRAMES).alias("frames")).first()
            images, frames = (counts["images"], counts["frames"] or 0) if counts else (0, 0)
            _obey_law(expected, images, "found among the parsed")
        self.held.check()
        tags_path, pixels_path = self.lake.path(schemas.TAGS), self.lake.path(schemas.PIXELS)
        if frames:
            with self.record.stage("pixels"):
                staged_frames = self.spark.read.schema(STAGED_FRAMES).parquet(self._at(f"frames-{number}"))
                rows = pixel_rows(staged_frames, arrived, pinned.batch).coalesce(math.ceil(frames / FRAMES_PER_FILE))
                pinned = replace(pinned, pixels=delta.append(rows, schemas.PIXELS, pixels_path))
        if images:
            with self.record.stage("tags"):
                rows = tag_rows(arrived, pinned.batch).coalesce(math.ceil(images / TAGS_PER_FILE))
                pinned = replace(pinned, tags=delta.append(rows, schemas.TAGS, tags_path))
            if self.parser.identity:
                with self.record.stage("identity"):
                    known = identity_rows(arrived, self.parser.pseudonyms.key_id)
                    identity.merge_identities(self.spark, self.lake, known)
        if leaving_batches:
            gone = leaving.select(cols.IMAGE_ID)
            with self.record.stage("remove pixels"):
                pinned = replace(pinned, pixels=delta.delete_images(self.spark, pixels_path, gone, leaving_batches))
            with self.record.stage("remove tags"):
                pinned = replace(pinned, tags=delta.delete_images(self.spark, tags_path, gone, leaving_batches))
        return pinned, frames

    def _part_with(self, resolved: DataFrame, before: Published, after: Published) -> None:
        """What IDENTITY says of images that have left, and of what they alone belonged to, goes when they are gone."""
        if (
            not delta.exists(self.spark, self.lake.path(schemas.IDENTITY))
            or (leaving := superseded(resolved)).isEmpty()
        ):
            return
        path = self.lake.path(schemas.TAGS)
        left = delta.read(self.spark, path, before.tags).join(F.broadcast(leaving), on=cols.IMAGE_ID, how="left_semi")
        identity.prune_identities(self.spark, self.lake, delta.read(self.spark, path, after.tags), left)

    def _at(self, name: str) -> str:
        return storage.join(self.staging, name)


def _archive(settings: Settings) -> str:
    if settings.ingest.archive is None:
        raise InputError("no archive named: give --archive URI, the folder or prefix that holds the .dcm objects")
    archive = storage.canonical(settings.ingest.archive)
    if not storage.is_native(archive):
        return archive
    found = ObjectStore(settings.storage).kind(archive)
    if found != "folder":
        problem = "is a file, not a folder" if found == "file" else "does not exist"
        raise InputError(f"archive {archive} {problem}: give the folder or prefix that holds the .dcm objects")
    return archive


def _open_tables(spark: SparkSession, lake: LakePaths, parser: Parser) -> tuple[Published, list[str]]:
    """Tables created where missing, brought back to what is published, and checked to belong to these settings."""
    pinned = publication.published(spark, lake)
    key_id, preprocessing = parser.pseudonyms.key_id, parser.preprocessing.version
    vocabulary = Vocabulary(parser.body_parts).version
    if pinned is None:
        return publication.publish_empty(spark, lake, key_id, preprocessing, vocabulary), []
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
    if pinned.vocabulary != vocabulary and pinned.batch:
        raise TableError(
            f"lake {lake.uri} was read with vocabulary {pinned.vocabulary or 'of an older version'}, now in force is "
            f"{vocabulary}: run `cbmir remap` first, which applies it to the tables"
        )
    mended = publication.roll_back(spark, lake, pinned)
    pinned = replace(pinned, vocabulary=vocabulary)
    for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES):
        evolved = delta.evolve(spark, table, lake.path(table), pinned.message() if table is schemas.SOURCES else "")
        if evolved is not None:
            versions: dict[str, Any] = {table.name: evolved}
            pinned = replace(pinned, **versions)
    return pinned, mended


def _obey_law(expected: int, found: int, step: str) -> None:
    """Each object has exactly one outcome; a count that does not match stops the job before it publishes."""
    if expected != found:
        raise TableError(f"{expected} objects, yet {found} were {step}: nothing more was published; run ingest again")


class _Counts(AccumulatorParam[Counter[str]]):
    def zero(self, value: Counter[str]) -> Counter[str]:
        return Counter()

    def addInPlace(self, value1: Counter[str], value2: Counter[str]) -> Counter[str]:
        value1.update(value2)
        return value1


@contextmanager
def _watch(context: SparkContext, total: int, progress: Progress | None) -> Iterator[Tally]:
    """Where tasks report what they have done, and a thread that passes it on while they work.

    A task that is tried again reports again: the figures are for people, the law counts rows.
    """
    done = context.accumulator(Counter[str](), _Counts())
    began = time.monotonic()
    ended = threading.Event()

    def tell() -> None:
        figures = Counter(done.value)
        objects, size = figures.pop("objects", 0), figures.pop("bytes", 0)
        if progress is not None and objects:
            rate = size / 2**20 / max(time.monotonic() - began, 1e-3)
            progress(min(objects, total), total, {"MB/s": round(rate, 1), **figures})

    def watch() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            tell()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield done.add
    finally:
        ended.set()
        watcher.join()
        tell()
