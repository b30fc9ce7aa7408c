"""Publish one parsed batch of an ingest: PIXELS and TAGS first, then SOURCES, whose commit makes all three visible.

`reconcile` works out which rows arrive and which leave. Runs on the driver; each step is a Spark job.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from cbmir_spark.ingest.batch import Parsed
from cbmir_spark.ingest.compare import UNCHANGED
from cbmir_spark.ingest.parse import FRAME_COUNT, STAGED_FRAMES, Parser
from cbmir_spark.ingest.plan import Plan, Staging, check_counts
from cbmir_spark.ingest.reconcile import (
    KNOWN,
    TALLY,
    arrivals,
    identity_rows,
    newcomers,
    pixel_rows,
    resolve,
    same_as_before,
    source_rows,
    superseded,
    tag_rows,
)
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, publication, schemas
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record

# Frames in one file of PIXELS: 128 MB before compression.
FRAMES_PER_FILE = 2048
TAGS_PER_FILE = 200_000


@dataclass(frozen=True)
class Batch:
    """One published batch: the objects that were new or changed by outcome, and the reasons of those left out.

    `unchanged` objects were written again with the bytes that they had.
    """

    published: Published
    outcomes: Mapping[str, int]
    unchanged: int
    reasons: Mapping[str, int]
    frames: int


def publish_batch(
    lake: OpenLake, before: Published, plan: Plan, parsed: Parsed, parser: Parser, staging: Staging, record: Record
) -> Batch:
    """Resolve a parsed batch against the versions published `before`, and publish it as the next batch.

    Readers see nothing of it before the commit of SOURCES. Raises TableError where an object has no outcome, Busy where
    another job has taken the lease.
    """
    batch = before.batch + 1
    with record.stage("resolve"):
        sources = lake.table(schemas.SOURCES, before.sources).rows
        same = _same(lake, before, parsed, staging) if plan.marked else None
        resolve(parsed.staged, sources, plan.work, parsed.number, same).write.parquet(staging.resolved(parsed.number))
        resolved = lake.spark.read.parquet(staging.resolved(parsed.number))
        work = plan.batch(parsed.number)
        rows = source_rows(parsed.staged, resolved, work, parser.pseudonyms.key_id, batch)
        counted = rows.groupBy(TALLY, cols.REASON, KNOWN).count().collect()
        outcomes, reasons = _count(counted)
        check_counts(parsed.read, outcomes.total(), "given an outcome")
    pinned, frames = _write(lake, parsed, resolved, replace(before, batch=batch), parser, staging, record)
    with record.stage("publish"):
        lake.check_leases()
        only_new = not any(row[KNOWN] for row in counted)
        published = publication.publish(lake.spark, lake.paths, rows.drop(TALLY, KNOWN), pinned, only_new)
    with record.stage("identity"):
        _prune_identities(lake, resolved, before, published)
    unchanged = outcomes.pop(UNCHANGED, 0)
    return Batch(published, outcomes, unchanged, reasons, frames)


def _same(lake: OpenLake, before: Published, parsed: Parsed, staging: Staging) -> DataFrame | None:
    """Objects of the batch that give the rows which are published already, lazy; None if the batch has no frames."""
    if lake.store.kind(staging.frames(parsed.number)) != "folder":
        return None
    frames = lake.spark.read.schema(STAGED_FRAMES).parquet(staging.frames(parsed.number))
    tags, pixels = lake.table(schemas.TAGS, before.tags).rows, lake.table(schemas.PIXELS, before.pixels).rows
    return same_as_before(parsed.staged, frames, tags, pixels)


def _count(rows: Sequence[Row]) -> tuple[Counter[str], Counter[str]]:
    """Objects by outcome, and by reason, of rows (tally, reason, known, count)."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for row in rows:
        if row[TALLY] is not None:
            outcomes[row[TALLY]] += row["count"]
            if row[cols.REASON] is not None:
                reasons[row[cols.REASON]] += row["count"]
    return outcomes, reasons


def _write(
    lake: OpenLake,
    parsed: Parsed,
    resolved: DataFrame,
    pinned: Published,
    parser: Parser,
    staging: Staging,
    record: Record,
) -> tuple[Published, int]:
    """Append arrivals to PIXELS and TAGS and delete what they supersede; the versions to publish, and the frames."""
    spark, paths = lake.spark, lake.paths
    with record.stage("resolve"):
        leaving, coming = superseded(resolved), newcomers(resolved)
        # One row for each image in both: a pass over what was resolved instead of one for each question.
        moves = leaving.select(cols.BATCH).unionByName(coming.select(F.lit(None).cast("bigint").alias(cols.BATCH)))
        by_batch = {row[cols.BATCH]: row["count"] for row in moves.groupBy(cols.BATCH).count().collect()}
        expected, leaving_batches = by_batch.pop(None, 0), list(by_batch)
        arrived = arrivals(parsed.staged, resolved)
        counts = arrived.select(F.count("*").alias("images"), F.sum(FRAME_COUNT).alias("frames")).first()
        images, frames = (counts["images"], counts["frames"] or 0) if counts else (0, 0)
        check_counts(expected, images, "found among the parsed")
    lake.check_leases()
    tags_path, pixels_path = paths.path(schemas.TAGS), paths.path(schemas.PIXELS)
    if frames:
        with record.stage("pixels"):
            staged_frames = spark.read.schema(STAGED_FRAMES).parquet(staging.frames(parsed.number))
            rows = pixel_rows(staged_frames, arrived, pinned.batch).coalesce(math.ceil(frames / FRAMES_PER_FILE))
            pinned = replace(pinned, pixels=delta.append(rows, schemas.PIXELS, pixels_path))
    if images:
        with record.stage("tags"):
            rows = tag_rows(arrived, pinned.batch).coalesce(math.ceil(images / TAGS_PER_FILE))
            pinned = replace(pinned, tags=delta.append(rows, schemas.TAGS, tags_path))
        if parser.identity:
            with record.stage("identity"):
                identity.merge_identities(spark, paths, identity_rows(arrived, parser.pseudonyms.key_id))
    if leaving_batches:
        images_leaving = leaving.select(cols.IMAGE_ID)
        with record.stage("remove pixels"):
            pinned = replace(pinned, pixels=delta.delete_images(spark, pixels_path, images_leaving, leaving_batches))
        with record.stage("remove tags"):
            pinned = replace(pinned, tags=delta.delete_images(spark, tags_path, images_leaving, leaving_batches))
    return pinned, frames


def _prune_identities(lake: OpenLake, resolved: DataFrame, before: Published, after: Published) -> None:
    """Remove from IDENTITY the images that have left, and what they alone belonged to."""
    if not delta.exists(lake.spark, lake.paths.path(schemas.IDENTITY)) or (leaving := superseded(resolved)).isEmpty():
        return
    left = lake.table(schemas.TAGS, before.tags).rows.join(F.broadcast(leaving), on=cols.IMAGE_ID, how="left_semi")
    identity.prune_identities(lake.spark, lake.paths, lake.table(schemas.TAGS, after.tags).rows, left)
