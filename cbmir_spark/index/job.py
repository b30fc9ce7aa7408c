"""TAGS ⋈ PIXELS + model → FEATURES: one vector for each frame, one Delta table for each model.

A model's files are written into the lake once, in a folder named by their digest, and each Python worker loads them
once. Frames that the table lacks are embedded in tasks, checked before anything is visible, and appended in one commit.
When the table holds exactly the live frames, `champion` moves to the model.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.config import IndexSettings, Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index import layout
from cbmir_spark.index.embed import embed, spread
from cbmir_spark.index.layout import FEATURES, Place
from cbmir_spark.index.open import MODEL_PROPERTY, PREPROCESSING_PROPERTY, check_table, publish_model
from cbmir_spark.index.verify import (
    FRAME_COLUMNS,
    KEY,
    MISSING,
    ROW_PARTITION,
    SAME,
    STATE,
    compare,
    inspect,
    live_frames,
    sources_of,
    stale_keys,
    verify,
)
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, lease
from cbmir_spark.lake.delta import TableVersion
from cbmir_spark.lake.open import OpenLake, open_for_writing
from cbmir_spark.lake.runs import Record
from cbmir_spark.lake.schemas import PIXELS, TAGS, Table
from cbmir_spark.models import weights
from cbmir_spark.models.artifact import Manifest
from cbmir_spark.models.registry import CANDIDATE, CHAMPION, Registry

# Frames per embedding task: minutes of work on a CPU, so that a lost task costs little.
FRAMES_PER_TASK = 2048
# Keys and tags of so many missing frames (about 400 bytes each) are broadcast; for more, Spark sorts.
MOST_BROADCAST = 200_000


@dataclass(frozen=True)
class Report:
    """The outcome of an index run. `champion` is the registered version that the alias now names, None if none."""

    model_id: str
    table: str
    version: int
    embedded: int
    deleted: int
    rows: int
    sources: Mapping[str, int]
    partitions: int
    files: int
    champion: str | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Changes:
    """Frames and rows that differ, as `compare` describes them; counts of missing frames by ingest batch and of stale
    rows by partition.
    """

    frames: DataFrame
    missing: Counter[int]
    stale: Counter[Place]


def run(spark: SparkSession, settings: Settings) -> Report:
    """Update a model's FEATURES to the published frames, and make a registered model the champion.

    A second run embeds and commits nothing. Raises ModelError for a model of other preprocessing, TableError, before
    anything is visible, for vectors that cannot be searched, and Busy while another job writes FEATURES.
    """
    with open_for_writing(spark, settings, lease.INDEX) as lake:
        return _run(lake, settings)


def _run(lake: OpenLake, settings: Settings) -> Report:
    record = Record.begin("index")
    pinned = lake.versions
    with record.stage("model"):
        registry = Registry(settings.mlflow, lake.paths.uri, lake.store)
        uri = settings.index.model or registry.alias_uri(CANDIDATE)
        saved = registry.resolve(uri)
        manifest = weights.load(saved).manifest
        if manifest.preprocessing != pinned.preprocessing:
            raise ModelError(
                f"model {manifest.model_id} was trained on pixels of preprocessing {manifest.preprocessing}, lake "
                f"{lake.paths.uri} holds {pinned.preprocessing}: train a model on this lake, or name one that was"
            )
        folder = publish_model(lake, saved)
    table = _table(lake, manifest)
    live = live_frames(lake.tags, lake.pixels)
    with record.stage("compare"):
        batches = _changed_batches(lake, table.path)
        changes = _changes(_of(live, batches), _of(table.rows, batches))
    rows = None
    if changes.missing:
        with record.stage("embed"):
            rows = _embedded(lake, settings.index, changes, folder).persist(StorageLevel.DISK_ONLY)
            _check_vectors(rows, manifest, changes.missing.total())
    lake.check_leases()
    with record.stage("write"):
        followed = json.dumps({TAGS.name: pinned.tags, PIXELS.name: pinned.pixels})
        written = _compact(_write(table, changes, rows, settings.index, followed), settings.index, followed)
    changes.frames.unpersist()
    if rows is not None:
        rows.unpersist()
    with record.stage("verify"):
        verify(_of(live, batches), _of(written.rows, batches), manifest, changes.missing)
        counted = sources_of(written.rows)
    champion = None
    if uri.startswith(("models:/", "runs:/")):
        champion = registry.move_alias(CHAMPION, manifest.model_id)
    sources = dict.fromkeys((cols.FROM_TAG, cols.FROM_PREDICTION, cols.FROM_NOTHING), 0)
    for (_, _, source), count in counted.items():
        sources[source] += count
    report = Report(
        model_id=manifest.model_id,
        table=table.path,
        version=written.version,
        embedded=changes.missing.total(),
        deleted=changes.stale.total(),
        rows=sum(sources.values()),
        sources=sources,
        partitions=len({(modality, body_part) for modality, body_part, _ in counted}),
        files=len(written.files),
        champion=champion,
        seconds=record.seconds,
    )
    record.write(
        lake.spark,
        lake.paths,
        counts={"embedded": report.embedded, "deleted": report.deleted, "rows": report.rows},
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={"features": written.version},
    )
    return report


def _table(lake: OpenLake, manifest: Manifest) -> TableVersion:
    """Look up the model's FEATURES, created where there is no table yet."""
    path = lake.paths.features(manifest.model_id)
    found = delta.latest(lake.spark, path)
    if found is None:
        made_by = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
        delta.ensure(lake.spark, _with_lengths(manifest), path, made_by)
        return TableVersion(lake.spark, path, delta.version(lake.spark, path))
    check_table(path, found, manifest)
    return TableVersion(lake.spark, path, found.version)


def _changed_batches(lake: OpenLake, path: str) -> frozenset[int] | None:
    """Ingest batches that changed since the index was last written; None where that is unknown.

    The index's commits carry the versions of TAGS and PIXELS that they followed.
    """
    message = delta.last_message(lake.spark, path)
    if message is None:
        return None
    followed = json.loads(message.text)
    found = [
        delta.changed_batches(lake.table(table, followed[table.name]), lake.table(table, version))
        for table, version in ((TAGS, lake.versions.tags), (PIXELS, lake.versions.pixels))
    ]
    return None if None in found else frozenset().union(*(batches for batches in found if batches is not None))


def _of(rows: DataFrame, batches: Collection[int] | None) -> DataFrame:
    if batches is None:
        return rows
    return rows.where(F.col(cols.PIXELS_BATCH).isin(*batches) if batches else F.lit(False))


def _changes(live: DataFrame, features: DataFrame) -> Changes:
    """Compare and count. The driver gets one row per ingest batch or partition: as many as there were nights."""
    frames = compare(live, features).where(F.col(STATE) != SAME).persist(StorageLevel.MEMORY_AND_DISK)
    missing, stale = Counter[int](), Counter[Place]()
    for row in frames.groupBy(STATE, cols.PIXELS_BATCH, *ROW_PARTITION).count().collect():
        if row[STATE] == MISSING:
            missing[row[cols.PIXELS_BATCH]] += row["count"]
        else:
            modality, body_part = (row[name] for name in ROW_PARTITION)
            stale[modality, body_part] += row["count"]
    return Changes(frames, missing, stale)


def _embedded(lake: OpenLake, settings: IndexSettings, changes: Changes, folder: str) -> DataFrame:
    """Rows of FEATURES for the missing frames; lazy. Of PIXELS only their ingest batches are read."""
    count = changes.missing.total()
    missing = changes.frames.where(F.col(STATE) == MISSING).select(*FRAME_COLUMNS)
    keys = F.broadcast(missing) if count <= MOST_BROADCAST else missing
    frames = (
        lake.pixels.where(F.col(cols.BATCH).isin(*changes.missing))
        .select(*KEY, cols.PIXELS_COLUMN)
        .join(keys, on=list(KEY), how="inner")
    )
    # PIXELS has few and large files: read as they are, one core would embed while the others wait.
    cores = lake.spark.sparkContext.defaultParallelism
    tasks = max(math.ceil(count / FRAMES_PER_TASK), min(cores, math.ceil(count / settings.batch_size)))
    frames = frames.repartition(tasks, *KEY)
    return embed(frames, folder, lake.store, settings.batch_size, settings.min_probability)


def _check_vectors(rows: DataFrame, manifest: Manifest, expected: int) -> None:
    """Raise TableError unless there are as many vectors as expected and each can be searched."""
    inspected = inspect(rows, manifest.embedding_dim)
    if inspected.faults or inspected.rows != expected:
        problem = inspected.faults or f"{inspected.rows} vectors came out"
        raise TableError(
            f"model {manifest.model_id} embedded {expected} frames: {problem}; nothing was written, "
            "train the model again"
        )


def _write(
    table: TableVersion, changes: Changes, rows: DataFrame | None, settings: IndexSettings, message: str
) -> TableVersion:
    """Delete stale rows, then append new ones: a reader in between may miss a frame, but never finds two vectors."""
    version = table.version
    if changes.stale:
        within = layout.predicate(changes.stale, delta.TARGET)
        keys = stale_keys(changes.frames)
        # The message belongs to the last commit, after which the index is up to date.
        version = delta.delete_rows(
            table.spark, FEATURES, table.path, keys, within, "" if rows is not None else message
        )
    if rows is not None:
        grouped = rows.groupBy(cols.MODALITY, cols.BODY_PART).count().collect()
        counts = {(row[cols.MODALITY], row[cols.BODY_PART]): row["count"] for row in grouped}
        laid_out = spread(rows, counts, settings.rows_per_file)
        version = delta.append(laid_out, FEATURES, table.path, message, settings.rows_per_file)
    return table if version == table.version else TableVersion(table.spark, table.path, version)


def _compact(table: TableVersion, settings: IndexSettings, message: str) -> TableVersion:
    """Rewrite partitions that many runs have cut into small files; the version that results."""
    files = Counter(layout.place_of(uri) for uri in table.files)
    if not any(count > settings.max_extra_files for count in files.values()):
        return table
    rows = Counter[Place]()
    for (modality, body_part, _), count in sources_of(table.rows).items():
        rows[modality, body_part] += count
    needed = {place: math.ceil(rows[place] / settings.rows_per_file) for place in files}
    many = [place for place, count in files.items() if count > needed[place] + settings.max_extra_files]
    if not many:
        return table
    counts = {place: rows[place] for place in many}
    spread_rows = spread(layout.scan(table.rows, many), counts, settings.rows_per_file)
    where = layout.predicate(many)
    version = delta.rearrange(spread_rows, FEATURES, table.path, where, message, settings.rows_per_file)
    return TableVersion(table.spark, table.path, version)


def _with_lengths(manifest: Manifest) -> Table:
    """FEATURES with the lengths that this model's vectors have."""
    lengths = {
        "vector_length": f"size({cols.VECTOR}) = {manifest.embedding_dim}",
        "projection_length": f"size({cols.PROJECTION}) = {manifest.projection_dim}",
    }
    return replace(FEATURES, constraints={**FEATURES.constraints, **lengths})
