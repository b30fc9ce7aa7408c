"""Ingest an archive: every object gets exactly one outcome in SOURCES, every image its rows in TAGS and PIXELS.

`plan` lists the archive, compares it with SOURCES by URI, size, time and ETag, and divides what is new or changed into
batches; `batch` reads and parses one batch into staged Parquet files; `publish` reconciles it with what is known and
publishes it, each batch by itself. `progress` reports meanwhile. This module opens the lake, checks that it belongs to
the settings, and runs these steps.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import IngestSettings, Settings
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.ingest.batch import parse_batch
from cbmir_spark.ingest.compare import UNCHANGED
from cbmir_spark.ingest.parse import Parser, preprocessing_of
from cbmir_spark.ingest.plan import Staging, check_counts, make_plan
from cbmir_spark.ingest.progress import Progress, watch
from cbmir_spark.ingest.publish import publish_batch
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, lease, pseudonyms, publication, schemas
from cbmir_spark.lake.open import OpenLake, check_roots, locate, open_for_writing
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.storage import ObjectStore

logger = logging.getLogger(__name__)

DEFERRED = "deferred"


@dataclass(frozen=True)
class Report:
    """Outcomes of one run. Invariant: listed = unchanged + deferred + the sum of `outcomes`.

    `outcomes` and `reasons` count the objects that were new or changed; one that was written again with the bytes that
    it had is unchanged. `deleted` objects left the archive, `deferred` ones are left to the next run. `rolled_back`
    names the tables in which an interrupted run had left unpublished rows.
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
    rolled_back: tuple[str, ...]

    @property
    def read(self) -> int:
        """Objects that were new or changed."""
        return sum(self.outcomes.values())


def run(spark: SparkSession, settings: Settings, progress: Progress | None = None) -> Report:
    """Ingest what is new in `ingest.archive`; a second run over the same archive writes nothing but its RUNS row.

    Raises InputError for an archive that does not exist, EnvironmentProblem where storage fails, TableError for a lake
    made with another key, other pixel settings or another vocabulary, Busy while another job writes to the lake.
    """
    record = Record.begin("ingest")
    paths, store = locate(settings)
    archive = _check_archive(settings.ingest, paths, store)
    preprocessing = preprocessing_of(settings.pixels)
    with open_for_writing(spark, settings, lease.TABLES, may_be_new=True) as lake:
        if lake.published is None:
            names = pseudonyms.create(settings.privacy, paths.vault_folder)
            lake = replace(lake, pseudonyms=replace(names, patients=pseudonyms.patient_rule(settings.privacy)))
        parser = Parser(
            lake.store,
            settings.ingest,
            preprocessing,
            settings.vocabulary.body_parts,
            lake.names,
            identity.tombstones(spark, lake.paths),
            settings.privacy.identity,
        )
        if parser.pseudonyms.patients is not pseudonyms.patient_rule(settings.privacy):
            logger.warning("the lake identifies patients by another rule than the settings: run `cbmir upgrade`")
        with record.stage("open"):
            published, rolled_back = _prepare_tables(lake, parser)
        lake.store.delete_folder(paths.staging)
        lake.store.delete(paths.unlisted)
        try:
            report = _ingest(lake, published, archive, parser, record, progress)
        finally:
            lake.store.delete_folder(paths.staging)
        report = replace(report, rolled_back=rolled_back)
        _write_run(lake, published, report, record)
    return report


def _ingest(
    lake: OpenLake, published: Published, archive: str, parser: Parser, record: Record, progress: Progress | None
) -> Report:
    """Plan, parse and publish batch after batch, until there are no more or a limit of the settings is reached."""
    limits, staging = parser.limits, Staging(lake.paths.staging)
    began = time.monotonic()
    sources = lake.table(schemas.SOURCES, published.sources).rows
    plan = make_plan(lake, archive, sources, limits, staging, record)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    unchanged, frames, done = plan.unchanged, 0, 0
    with watch(lake.spark.sparkContext, plan.to_read, progress) as tally:
        for number in plan.batches:
            late = limits.max_minutes is not None and time.monotonic() - began > 60 * limits.max_minutes
            if done and (late or done == limits.max_batches):
                break
            with record.stage("parse"):
                parsed = parse_batch(lake.spark, archive, plan.batch(number), number, parser, staging, tally)
            batch = publish_batch(lake, published, plan, parsed, parser, staging, record)
            published = batch.published
            outcomes.update(batch.outcomes)
            reasons.update(batch.reasons)
            unchanged += batch.unchanged
            frames += batch.frames
            done += 1
            logger.info("batch published", extra={"batch": published.batch, "counts": dict(batch.outcomes)})
    deferred = plan.deferred(done)
    check_counts(plan.listed, unchanged + deferred + outcomes.total(), "given an outcome")
    return Report(
        archive=archive,
        listed=plan.listed,
        unchanged=unchanged,
        deferred=deferred,
        outcomes=dict(outcomes),
        reasons=dict(reasons),
        deleted=plan.missing,
        frames=frames,
        batches=done,
        seconds=record.seconds,
        published=published,
        rolled_back=(),
    )


def check(settings: Settings) -> None:
    """Check the archive and the lake's place before Spark starts; raises InputError as `run` does."""
    paths, store = locate(settings)
    check_roots(paths, store)
    _check_archive(settings.ingest, paths, store)


def _check_archive(settings: IngestSettings, paths: LakePaths, store: ObjectStore) -> str:
    """The archive's canonical URI. Raises InputError where it is not a folder or prefix beside the lake."""
    if settings.archive is None:
        raise InputError("no archive named: give --archive URI, the folder or prefix that holds the .dcm objects")
    archive = storage.canonical(settings.archive)
    if storage.is_native(archive) and (found := store.kind(archive)) != "folder":
        problem = "is a file, not a folder" if found == "file" else "does not exist"
        raise InputError(f"archive {archive} {problem}: give the folder or prefix that holds the .dcm objects")
    if storage.is_below(paths.uri, archive) or paths.uri == archive:
        raise InputError(f"lake {paths.uri} is inside archive {archive}: give a lake elsewhere, with --lake")
    return archive


def _prepare_tables(lake: OpenLake, parser: Parser) -> tuple[Published, tuple[str, ...]]:
    """Create missing tables, or roll back and evolve those of a lake that belongs to these settings.

    The versions to start from, and the names of the tables that were rolled back.
    """
    spark, paths, pinned = lake.spark, lake.paths, lake.published
    preprocessing, vocabulary = parser.preprocessing.version, Vocabulary(parser.body_parts).version
    if pinned is None:
        key_id, patients = lake.names.key_id, lake.names.patients
        return publication.publish_empty(spark, paths, key_id, preprocessing, vocabulary, patients), ()
    if pinned.preprocessing != preprocessing:
        raise TableError(
            f"lake {paths.uri} holds pixels of preprocessing {pinned.preprocessing}, the `pixels` settings give "
            f"{preprocessing}: put the settings back, or ingest into another lake"
        )
    if pinned.vocabulary != vocabulary and pinned.batch:
        raise TableError(
            f"lake {paths.uri} was made with vocabulary {pinned.vocabulary or 'of an older version'}, the settings "
            f"give {vocabulary}: run `cbmir remap` first to apply it"
        )
    rolled_back = publication.roll_back(spark, paths, pinned)
    pinned = replace(pinned, vocabulary=vocabulary)
    for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES):
        opened = lake.table(table, getattr(pinned, table.name))
        evolved = delta.evolve(opened, table, pinned.message() if table is schemas.SOURCES else "")
        if evolved is not None:
            versions: dict[str, Any] = {table.name: evolved}
            pinned = replace(pinned, **versions)
    return pinned, tuple(rolled_back)


def _write_run(lake: OpenLake, before: Published, report: Report, record: Record) -> None:
    after = report.published
    record.write(
        lake.spark,
        lake.paths,
        counts={"listed": report.listed, UNCHANGED: report.unchanged, DEFERRED: report.deferred}
        | {"frames": report.frames, cols.DELETED: report.deleted, **report.outcomes},
        versions_read={"sources": before.sources, "tags": before.tags, "pixels": before.pixels},
        versions_written={"sources": after.sources, "tags": after.tags, "pixels": after.pixels},
    )
