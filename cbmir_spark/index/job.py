"""TAGS ⋈ PIXELS + model → FEATURES: one vector for each frame, one Delta table for each model.

A model's files are put into the lake once, under a name that is their digest, and every Python worker loads them
once. Frames that the table lacks are embedded per task, looked over before anything is visible, and appended in one
commit. When the table then holds exactly the live frames, `champion` moves to the model.
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
from cbmir_spark.models.artifact import Manifest
from cbmir_spark.models.registry import CANDIDATE, CHAMPION, Registry

# Frames for one embedding task: minutes of work on a CPU, so that a lost task costs little.
FRAMES_PER_TASK = 2048
# Up to so many missing frames their keys and tags (some 400 bytes each) are sent to every task; beyond, Spark sorts.
MOST_BROADCAST = 200_000


@dataclass(frozen=True)
class Report:
    """What an index run did. `champion` is the registered version that the alias now names, None if it has none."""

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


def run(spark: SparkSession, settings: Settings) -> Report:
    """Bring a model's FEATURES up to the published frames, and make it the champion where a registry knows it.

    Run again it embeds nothing and commits nothing. Raises ModelError for a model of other preprocessing, TableError,
    before anything is visible, for vectors that cannot be searched, and Busy while another job writes FEATURES.
    """
    with open_for_writing(spark, settings, lease.INDEX) as lake:
        return _run(lake, settings)


def _run(lake: OpenLake, settings: Settings) -> Report:
    record = Record("index")
    spark, pinned = lake.spark, lake.versions
    with record.stage("model"):
        registry = Registry(settings.mlflow, lake.paths.uri, lake.store)
        uri = settings.index.model or registry.alias_uri(CANDIDATE)
        saved = registry.resolve(uri)
        manifest = saved.load().manifest
        if manifest.preprocessing != pinned.preprocessing:
            raise ModelError(
                f"model {manifest.model_id} was trained on pixels of preprocessing {manifest.preprocessing}, lake "
                f"{lake.paths.uri} holds {pinned.preprocessing}: train a model on this lake, or name one of its own"
            )
        folder = publish_model(lake, saved)
    before = _table(lake, manifest)
    path, after = before.path, before.version
    live = live_frames(lake.tags, lake.pixels)

    with record.stage("compare"):
        touched = _changed_batches(lake, path)
        seen_by = json.dumps({TAGS.name: pinned.tags, PIXELS.name: pinned.pixels})
        changes = (
            compare(_of(live, touched), _of(before.rows, touched))
            .where(F.col(STATE) != SAME)
            .persist(StorageLevel.MEMORY_AND_DISK)
        )
        # One row for each ingest batch or partition that changed: as many as there were nights, not frames.
        summary = changes.groupBy(STATE, cols.PIXELS_BATCH, *ROW_PARTITION).count().collect()
    batches = Counter[int]()
    emptied = Counter[tuple[str, str]]()
    for row in summary:
        if row[STATE] == MISSING:
            batches[row[cols.PIXELS_BATCH]] += row["count"]
        else:
            emptied[tuple(row[name] for name in ROW_PARTITION)] += row["count"]
    embedded, deleted = batches.total(), emptied.total()
    made = None
    if embedded:
        wanted = changes.where(F.col(STATE) == MISSING).select(*live.columns)
        with record.stage("embed"):
            made = _embedded(lake, settings.index, wanted, batches, folder).persist(StorageLevel.DISK_ONLY)
            looked = inspect(made, manifest.embedding_dim)
            if looked.faults or looked.rows != embedded:
                problem = looked.faults or f"{looked.rows} vectors came out"
                raise TableError(
                    f"model {manifest.model_id} embedded {embedded} frames: {problem}; nothing was written, "
                    "train the model again"
                )
    lake.check_leases()
    with record.stage("write"):
        # Deleted first: a reader in between finds a frame missing, never a frame with two vectors.
        if emptied:
            within = layout.predicate(emptied, delta.TARGET)
            after = delta.delete_rows(spark, FEATURES, path, stale_keys(changes), within, "" if embedded else seen_by)
        if made is not None:
            grouped = made.groupBy(cols.MODALITY, cols.BODY_PART).count().collect()
            counts = {(row[cols.MODALITY], row[cols.BODY_PART]): row["count"] for row in grouped}
            rows = spread(made, counts, settings.index.rows_per_file)
            after = delta.append(rows, FEATURES, path, seen_by, settings.index.rows_per_file)
            made.unpersist()
        written = before if after == before.version else TableVersion(spark, path, after)
        written = _compact(written, settings.index, seen_by)
    changes.unpersist()
    with record.stage("verify"):
        verify(_of(live, touched), _of(written.rows, touched), manifest, batches)
        places = sources_of(written.rows)
    champion = None
    if uri.startswith(("models:/", "runs:/")):
        champion = registry.move_alias(CHAMPION, manifest.model_id)
    sources = dict.fromkeys((cols.FROM_TAG, cols.FROM_PREDICTION, cols.FROM_NOTHING), 0)
    for (_, _, source), count in places.items():
        sources[source] += count
    report = Report(
        model_id=manifest.model_id,
        table=path,
        version=written.version,
        embedded=embedded,
        deleted=deleted,
        rows=sum(sources.values()),
        sources=sources,
        partitions=len({(modality, body_part) for modality, body_part, _ in places}),
        files=len(written.files),
        champion=champion,
        seconds=record.seconds,
    )
    record.write(
        spark,
        lake.paths,
        counts={"embedded": embedded, "deleted": deleted, "rows": report.rows},
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
    followed = json.loads(message)
    found = [
        delta.changed_batches(lake.table(table, followed[table.name]), lake.table(table, version))
        for table, version in ((TAGS, lake.versions.tags), (PIXELS, lake.versions.pixels))
    ]
    return None if None in found else frozenset().union(*(batches for batches in found if batches is not None))


def _of(rows: DataFrame, batches: Collection[int] | None) -> DataFrame:
    if batches is None:
        return rows
    return rows.where(F.col(cols.PIXELS_BATCH).isin(*batches) if batches else F.lit(False))


def _compact(table: TableVersion, settings: IndexSettings, message: str) -> TableVersion:
    """Rewrite partitions that many runs have cut into small files; the version that results."""
    files = Counter(layout.place_of(uri) for uri in table.files)
    if not any(count > settings.most_files for count in files.values()):
        return table
    rows = Counter[Place]()
    for (modality, body_part, _), count in sources_of(table.rows).items():
        rows[modality, body_part] += count
    needed = {place: math.ceil(rows[place] / settings.rows_per_file) for place in files}
    many = [place for place, count in files.items() if count > needed[place] + settings.most_files]
    if not many:
        return table
    counts = {place: rows[place] for place in many}
    spread_rows = spread(layout.scan(table.rows, many), counts, settings.rows_per_file)
    where = layout.predicate(many)
    version = delta.rearrange(spread_rows, FEATURES, table.path, where, message, settings.rows_per_file)
    return TableVersion(table.spark, table.path, version)


def _embedded(
    lake: OpenLake, settings: IndexSettings, wanted: DataFrame, batches: Mapping[int, int], folder: str
) -> DataFrame:
    """Rows of FEATURES for the wanted frames; lazy. Only the ingest batches that they are in are read."""
    count = sum(batches.values())
    keys = F.broadcast(wanted) if count <= MOST_BROADCAST else wanted
    frames = (
        lake.pixels.where(F.col(cols.BATCH).isin(*batches))
        .select(*KEY, cols.PIXELS_COLUMN)
        .join(keys, on=list(KEY), how="inner")
    )
    # PIXELS has few and large files: read as they lie, one core would embed while the others wait.
    cores = lake.spark.sparkContext.defaultParallelism
    tasks = max(math.ceil(count / FRAMES_PER_TASK), min(cores, math.ceil(count / settings.batch_size)))
    return embed(frames.repartition(tasks, *KEY), folder, lake.store, settings.batch_size, settings.min_probability)


def _with_lengths(manifest: Manifest) -> Table:
    """FEATURES with the lengths that this model's vectors have."""
    lengths = {
        "vector_length": f"size({cols.VECTOR}) = {manifest.embedding_dim}",
        "projection_length": f"size({cols.PROJECTION}) = {manifest.projection_dim}",
    }
    return replace(FEATURES, constraints={**FEATURES.constraints, **lengths})
