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

from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index.embed import embed, spread
from cbmir_spark.index.open import MODEL_PROPERTY, PREPROCESSING_PROPERTY, check_table, publish_model, scan
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
from cbmir_spark.lake import delta, lease, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.models.artifact import Manifest
from cbmir_spark.models.registry import CANDIDATE, CHAMPION, Registry
from cbmir_spark.storage import ObjectStore

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
    lake = LakePaths.of(settings.lake)
    publication.require_published(spark, lake)
    with lease.hold(lake.vault, lease.INDEX, ObjectStore(settings.storage)) as held:
        return _run(spark, settings, lake, held)


def _run(spark: SparkSession, settings: Settings, lake: LakePaths, held: lease.Held) -> Report:
    record = Record.begin("index")
    pinned = publication.require_published(spark, lake)
    with record.stage("model"):
        registry = Registry(settings.mlflow, lake.uri, ObjectStore(settings.storage))
        uri = settings.index.model or registry.alias_uri(CANDIDATE)
        saved = registry.resolve(uri)
        manifest = saved.load().manifest
        if manifest.preprocessing != pinned.preprocessing:
            raise ModelError(
                f"model {manifest.model_id} was trained on pixels of preprocessing {manifest.preprocessing}, lake "
                f"{lake.uri} holds {pinned.preprocessing}: train a model on this lake, or name one of its own"
            )
        folder = publish_model(saved.weights, manifest, lake, ObjectStore(settings.storage))
    path = lake.features(manifest.model_id)
    made_by = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
    delta.ensure(spark, _table_of(manifest), path, made_by)
    check_table(spark, path, manifest)
    before = delta.version(spark, path)
    features = delta.read(spark, path, before)
    tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
    pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels)
    live = live_frames(tags, pixels)

    with record.stage("compare"):
        touched = _touched(spark, lake, pinned, path)
        seen_by = json.dumps({schemas.TAGS.name: pinned.tags, schemas.PIXELS.name: pinned.pixels})
        changes = (
            compare(_of(live, touched), _of(features, touched))
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
    after = before
    made = None
    if embedded:
        wanted = changes.where(F.col(STATE) == MISSING).select(*live.columns)
        with record.stage("embed"):
            made = _embedded(spark, settings, pixels, wanted, batches, folder).persist(StorageLevel.DISK_ONLY)
            looked = inspect(made, manifest.embedding_dim)
            if looked.faults or looked.rows != embedded:
                problem = looked.faults or f"{looked.rows} vectors came out"
                raise TableError(
                    f"model {manifest.model_id} embedded {embedded} frames: {problem}; nothing was written, "
                    "train the model again"
                )
    held.check()
    with record.stage("write"):
        # Deleted first: a reader in between finds a frame missing, never a frame with two vectors.
        if emptied:
            within = " OR ".join(
                f"(t.{cols.MODALITY} = '{m}' AND t.{cols.BODY_PART} = '{b}')" for m, b in sorted(emptied)
            )
            after = delta.delete_rows(spark, path, stale_keys(changes), within, "" if embedded else seen_by)
        if made is not None:
            grouped = made.groupBy(cols.MODALITY, cols.BODY_PART).count().collect()
            counts = {(row[cols.MODALITY], row[cols.BODY_PART]): row["count"] for row in grouped}
            rows = spread(made, counts, settings.index.rows_per_file)
            after = delta.append(rows, schemas.FEATURES, path, seen_by, settings.index.rows_per_file)
            made.unpersist()
        after = _compact(spark, settings, path, after, seen_by)
    changes.unpersist()
    with record.stage("verify"):
        features = delta.read(spark, path, after)
        verify(_of(live, touched), _of(features, touched), manifest, batches)
        places = sources_of(features)
    champion = None
    if uri.startswith(("models:/", "runs:/")):
        champion = registry.move_alias(CHAMPION, manifest.model_id)
    sources = dict.fromkeys((cols.FROM_TAG, cols.FROM_PREDICTION, cols.FROM_NOTHING), 0)
    for (_, _, source), count in places.items():
        sources[source] += count
    report = Report(
        model_id=manifest.model_id,
        table=path,
        version=after,
        embedded=embedded,
        deleted=deleted,
        rows=sum(sources.values()),
        sources=sources,
        partitions=len({(modality, body_part) for modality, body_part, _ in places}),
        files=len(features.inputFiles()),
        champion=champion,
        seconds=record.seconds,
    )
    record.write(
        spark,
        lake,
        counts={"embedded": embedded, "deleted": deleted, "rows": report.rows},
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={"features": after},
    )
    return report


def _touched(spark: SparkSession, lake: LakePaths, pinned: Published, path: str) -> frozenset[int] | None:
    """Ingest batches that are not as the index has seen them; None where that is not known, so that all are looked at.

    The index's commits carry the versions of TAGS and PIXELS that they followed.
    """
    told = delta.last_message(spark, path)
    if told is None:
        return None
    seen = json.loads(told)
    found = [
        delta.changed_batches(spark, lake.path(table), seen[table.name], version)
        for table, version in ((schemas.TAGS, pinned.tags), (schemas.PIXELS, pinned.pixels))
    ]
    return None if None in found else frozenset().union(*(batches for batches in found if batches is not None))


def _of(rows: DataFrame, batches: Collection[int] | None) -> DataFrame:
    if batches is None:
        return rows
    return rows.where(F.col(cols.PIXELS_BATCH).isin(*batches) if batches else F.lit(False))


def _compact(spark: SparkSession, settings: Settings, path: str, version: int, message: str) -> int:
    """Write partitions that nights have cut into many small files anew; the version that there then is."""
    files = Counter(publication.place_of(uri) for uri in delta.live_files(spark, path, version))
    if not any(count > settings.index.most_files for count in files.values()):
        return version
    features = delta.read(spark, path, version)
    rows = Counter[tuple[str, str]]()
    for (modality, body_part, _), count in sources_of(features).items():
        rows[modality, body_part] += count
    needed = {place: math.ceil(rows[place] / settings.index.rows_per_file) for place in files}
    many = [place for place, count in files.items() if count > needed[place] + settings.index.most_files]
    if not many:
        return version
    laid = spread(scan(features, many), {place: rows[place] for place in many}, settings.index.rows_per_file)
    where = " OR ".join(f"({cols.MODALITY} = '{m}' AND {cols.BODY_PART} = '{b}')" for m, b in sorted(many))
    return delta.rearrange(laid, schemas.FEATURES, path, where, message, settings.index.rows_per_file)


def _embedded(
    spark: SparkSession,
    settings: Settings,
    pixels: DataFrame,
    wanted: DataFrame,
    batches: Mapping[int, int],
    folder: str,
) -> DataFrame:
    """Rows of FEATURES for the wanted frames; lazy. Only the ingest batches that they are in are read."""
    count = sum(batches.values())
    keys = F.broadcast(wanted) if count <= MOST_BROADCAST else wanted
    frames = (
        pixels.where(F.col(cols.BATCH).isin(*batches))
        .select(*KEY, cols.PIXELS_COLUMN)
        .join(keys, on=list(KEY), how="inner")
    )
    # PIXELS has few and large files: read as they lie, one core would embed while the others wait.
    cores = spark.sparkContext.defaultParallelism
    tasks = max(math.ceil(count / FRAMES_PER_TASK), min(cores, math.ceil(count / settings.index.batch_size)))
    return embed(
        frames.repartition(tasks, *KEY),
        folder,
        ObjectStore(settings.storage),
        settings.index.batch_size,
        settings.index.min_probability,
    )


def _table_of(manifest: Manifest) -> schemas.Table:
    """FEATURES with the lengths that this model's vectors have."""
    lengths = {
        "vector_length": f"size({cols.VECTOR}) = {manifest.embedding_dim}",
        "projection_length": f"size({cols.PROJECTION}) = {manifest.projection_dim}",
    }
    return replace(schemas.FEATURES, constraints={**schemas.FEATURES.constraints, **lengths})
