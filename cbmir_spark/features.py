"""TAGS ⋈ PIXELS + model → FEATURES: one vector for each frame, one Delta table for each model.

A model's files are put into the lake once, under a name that is their digest, and every Python worker loads them
once. Frames that the table lacks are embedded per task, looked over before anything is visible, and appended in one
commit. When the table then holds exactly the live frames, `champion` moves to the model.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import add, or_

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import LongType, StructField, StructType

from cbmir_spark import arrays, lease, model, registry, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.model import Loaded, Manifest, Projection
from cbmir_spark.record import Record
from cbmir_spark.vector_files import Place
from cbmir_spark.vocabulary import UNKNOWN

WEIGHTS, MANIFEST = _FILES = "weights.safetensors", "manifest.json"
# Properties of a FEATURES table: what made it, so that a table in another place is known for what it is.
MODEL_PROPERTY, PREPROCESSING_PROPERTY = "cbmir.model", "cbmir.preprocessing"

# Frames for one embedding task: minutes of work on a CPU, so that a lost task costs little.
FRAMES_PER_TASK = 2048
# Up to so many missing frames their keys and tags (some 400 bytes each) are sent to every task; beyond, Spark sorts.
MOST_BROADCAST = 200_000
# Directions whose signs lay rows out within a file: many, since within a class the first ones hardly differ.
_CELL_DIRECTIONS = 30

_KEY = (t.IMAGE_ID, t.FRAME)
_OF_TAGS = (t.SERIES_ID, t.STUDY_ID, t.PATIENT_ID, t.SEX, t.AGE_YEARS, t.YEAR, t.MODALITY, t.BODY_PART)
# A frame's row is the same as long as these are: an image read again may have other tags with the same pixels.
_SAME = (t.IMAGE_ID, t.FRAME, t.PIXEL_DIGEST, t.PIXELS_BATCH)

STATE, COPIES = "state", "copies"
SAME, MISSING, STALE = "same", "missing", "stale"

_ROW_PARTITION = (f"row_{t.MODALITY}", f"row_{t.BODY_PART}")

_INSPECTED = StructType(
    [StructField(name, LongType(), False) for name in ("rows", "wrong_dimension", "not_finite", "zero")]
)


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


@dataclass(frozen=True)
class Checked:
    """An index that holds what it should: its model, version, rows and files."""

    model_id: str
    version: int
    rows: int
    files: int


@dataclass(frozen=True)
class Index:
    """A model's FEATURES at one version, so that all that is asked of it is answered by the same rows."""

    manifest: Manifest
    folder: str
    path: str
    version: int
    rows: DataFrame
    projection: Projection


@dataclass(frozen=True)
class Inspection:
    """Counts of rows, and of those whose vector must not be searched."""

    rows: int
    wrong_dimension: int
    not_finite: int
    zero: int

    @property
    def faults(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        found = {
            "of another dimension": self.wrong_dimension,
            "with NaN or infinite values": self.not_finite,
            "of zeros alone": self.zero,
        }
        return ", ".join(f"{count} {words}" for words, count in found.items() if count)


# --- transforms ---


def live_frames(tags: DataFrame, pixels: DataFrame) -> DataFrame:
    """Frames that belong in an index, without their pixels: keys, digest, batch and what FEATURES takes from TAGS."""
    images = tags.where(F.col(t.KIND) == t.IMAGE_KIND).select(t.IMAGE_ID, F.col(t.BATCH), *_OF_TAGS)
    frames = pixels.select(*_KEY, t.PIXEL_DIGEST, t.BATCH)
    return frames.join(images, on=[t.IMAGE_ID, t.BATCH], how="inner").select(
        *_KEY, t.PIXEL_DIGEST, F.col(t.BATCH).alias(t.PIXELS_BATCH), *_OF_TAGS
    )


def compare(live: DataFrame, features: DataFrame) -> DataFrame:
    """Live frames against rows: live_frames' columns, `state`, `copies`, and body part and source of the row.

    `state` is SAME, MISSING (no row, or one made of other pixels or of another reading of the image) or STALE (a row
    without its frame). `copies` counts the rows of a key: more than one is an error.
    """
    of_row = (t.MODALITY, t.BODY_PART, t.BODY_PART_SOURCE)
    rows = features.groupBy(*_SAME).agg(
        F.count("*").alias(COPIES), *[F.first(name).alias(f"row_{name}") for name in of_row]
    )
    state = F.when(F.col(COPIES).isNull(), MISSING).when(F.col(t.SERIES_ID).isNull(), STALE).otherwise(SAME)
    return live.join(rows, on=list(_SAME), how="full_outer").withColumn(STATE, state)


def stale_keys(changes: DataFrame) -> DataFrame:
    """What names the rows to delete, partition first."""
    row_modality, row_body_part = (F.col(name) for name in _ROW_PARTITION)
    return changes.where(F.col(STATE) == STALE).select(
        row_modality.alias(t.MODALITY), row_body_part.alias(t.BODY_PART), *_SAME
    )


def embed(frames: DataFrame, folder: str, files: StorageSettings, batch_size: int, minimum: float) -> DataFrame:
    """Live frames with their pixels → rows of FEATURES. Per task; the model is loaded once for each Python worker.

    `folder` holds the model (see `publish_model`); a body part is imputed from probability `minimum` on.
    """

    def rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        loaded = load(folder, files)
        for batch in batches:
            for start in range(0, batch.num_rows, batch_size):
                yield feature_rows(batch.slice(start, batch_size), loaded, minimum)

    columns = (*_KEY, t.PIXEL_DIGEST, t.PIXELS_BATCH, *_OF_TAGS, t.PIXELS_COLUMN)
    return frames.select(*columns).mapInArrow(rows, t.FEATURES.schema)


def spread(rows: DataFrame, counts: Mapping[tuple[str, str], int], rows_per_file: int) -> DataFrame:
    """Rows laid out for writing: partitions apart, big ones over several tasks, what is alike side by side in a file.

    `counts` are rows by (modality, body_part); a partition gets as few files of at most `rows_per_file` as it needs.
    Within a file rows lie by predicted class and by the signs of their first coordinates, so that the rows which may be
    near a query lie in few row groups.
    """
    files = {place: math.ceil(count / rows_per_file) for place, count in counts.items()}
    many = {"/".join(place): number for place, number in files.items() if number > 1}
    share: Column = F.lit(1)
    if many:
        numbers = F.create_map(*[F.lit(value) for pair in many.items() for value in pair])
        share = F.coalesce(numbers[F.concat_ws("/", t.MODALITY, t.BODY_PART)], F.lit(1))
    # Hashing may put two files' rows into one task; twice the tasks make that rarer, and empty ones cost nothing.
    return rows.repartition(
        2 * sum(files.values()), t.MODALITY, t.BODY_PART, F.pmod(F.xxhash64(t.SERIES_ID), share)
    ).sortWithinPartitions(t.MODALITY, t.BODY_PART, t.PREDICTED, _cell(), t.IMAGE_ID, t.FRAME)


def _cell() -> Column:
    """On which side of each of the first principal directions a row lies, the first one weighing most."""
    sides = [
        F.when(F.get(t.PROJECTION, F.lit(number)) > 0, F.lit(2 ** (_CELL_DIRECTIONS - number))).otherwise(F.lit(0))
        for number in range(_CELL_DIRECTIONS)
    ]
    return reduce(add, sides)


def inspect(rows: DataFrame, dimension: int) -> Inspection:
    """Look at every vector and residual of `rows`: one pass, in tasks; the driver gets four numbers from each."""

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.zeros(4, dtype=np.int64)
        for batch in batches:
            total += faults(batch, dimension)
        yield pa.RecordBatch.from_arrays([pa.array([n]) for n in total], names=_INSPECTED.names)

    counted = rows.select(t.VECTOR, t.RESIDUAL_NORM).mapInArrow(count, _INSPECTED)
    sums = counted.agg(*[F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in _INSPECTED.names]).collect()[0]
    return Inspection(**sums.asDict())


# --- Arrow batches; per task ---


def feature_rows(batch: pa.RecordBatch, loaded: Loaded, minimum: float) -> pa.RecordBatch:
    """Frames with pixels and tags → rows of FEATURES."""
    embedded = model.embed_batches(loaded, arrays.pixels_of(batch), batch.column(t.MODALITY).to_pylist())
    projections, residuals = loaded.projection.apply(embedded.vectors)
    parts = body_parts(batch.column(t.BODY_PART).to_pylist(), embedded.labels, embedded.probabilities.tolist(), minimum)
    made = {
        t.VECTOR: arrays.vector_column(embedded.vectors),
        t.PROJECTION: arrays.vector_column(projections),
        t.RESIDUAL_NORM: pa.array(residuals),
        t.PREDICTED: pa.array([label or UNKNOWN for label in embedded.labels]),
        t.PROBABILITY: pa.array(embedded.probabilities),
        t.BODY_PART: pa.array([part for part, _ in parts]),
        t.BODY_PART_SOURCE: pa.array([source for _, source in parts]),
    }
    names = t.FEATURES.schema.names
    return pa.RecordBatch.from_arrays([made[n] if n in made else batch.column(n) for n in names], names=names)


def body_parts(
    tags: Sequence[str], labels: Sequence[str | None], probabilities: Sequence[float], minimum: float
) -> list[tuple[str, str]]:
    """Each row's body part and where it is from: its tag, else a sure prediction, else nowhere."""
    found = []
    for tag, label, probability in zip(tags, labels, probabilities, strict=True):
        if tag != UNKNOWN:
            found.append((tag, t.FROM_TAG))
        elif label is not None and probability >= minimum:
            found.append((model.body_part_of(label), t.FROM_PREDICTION))
        else:
            found.append((UNKNOWN, t.FROM_NOTHING))
    return found


def faults(batch: pa.RecordBatch, dimension: int) -> NDArray[np.int64]:
    """(4,) counts of a batch: its rows, and those of another dimension, with non-finite values, of zeros alone."""
    column = batch.column(t.VECTOR)
    sound = np.diff(column.offsets.to_numpy()) == dimension
    counts = np.array([len(sound), (~sound).sum(), 0, 0], dtype=np.int64)
    if sound.any():
        kept = batch if sound.all() else batch.filter(pa.array(sound))
        vectors = arrays.vectors_of(kept, dimension)
        residuals = kept.column(t.RESIDUAL_NORM).to_numpy()
        counts[2] = (~(np.isfinite(vectors).all(axis=1) & np.isfinite(residuals))).sum()
        counts[3] = (~vectors.any(axis=1)).sum()
    return counts


# --- the model, as workers see it ---


def publish_model(weights: bytes, manifest: Manifest, lake: t.Lake, files: StorageSettings) -> str:
    """Put a model's files where every worker can read them, once; their folder. The manifest comes last."""
    folder = lake.models(manifest.model_id)
    target = storage.join(folder, MANIFEST)
    if storage.kind(target, files) != "file":
        storage.write_bytes(storage.join(folder, WEIGHTS), weights, files)
        storage.write_bytes(target, manifest.to_json().encode(), files)
    elif storage.read_bytes(target, files).decode() != manifest.to_json():
        raise ModelError(f"{folder} holds another manifest under the name {manifest.model_id}: remove that folder")
    return folder


@lru_cache(maxsize=1)
def load(folder: str, files: StorageSettings) -> Loaded:
    """The model of a folder. A Python worker keeps it for its later tasks; the folder's name tells it by its digest."""
    weights = storage.read_bytes(storage.join(folder, WEIGHTS), files)
    return model.load(weights, storage.read_bytes(storage.join(folder, MANIFEST), files))


# --- runs ---


def open_index(spark: SparkSession, settings: Settings) -> Index:
    """The index that is searched: `retrieval.model`'s, or that of the registry's champion.

    Raises ModelError where there is no such model or the table is another model's, TableError where it has none.
    """
    uri = settings.retrieval.model or _alias(settings, registry.CHAMPION)
    try:
        text, weights = registry.resolve_model(uri, settings)
    except ModelError as error:
        if settings.retrieval.model is not None:
            raise
        raise ModelError(f"no index is ready to be searched: run `cbmir train`, then `cbmir index` ({error})") from None
    manifest = Manifest.from_json(text)
    _check_weights(weights, manifest)
    projection = model.projection_of(weights)
    lake = t.Lake.of(settings)
    path = lake.features(manifest.model_id)
    if not t.exists(spark, path):
        raise TableError(f"model {manifest.model_id} has no index in {lake.uri}: run `cbmir index --model {uri}`")
    check_table(spark, path, manifest)
    version = t.version(spark, path)
    folder = publish_model(weights, manifest, lake, settings.storage)
    return Index(manifest, folder, path, version, t.read(spark, path, version), projection)


def scan(rows: DataFrame, places: Iterable[Place]) -> DataFrame:
    """The rows of some partitions: an explicit filter on partition columns, which is what prunes files."""
    parts: dict[str, list[str]] = {}
    for modality, body_part in sorted(places):
        parts.setdefault(modality, []).append(body_part)
    conditions = [(F.col(t.MODALITY) == m) & F.col(t.BODY_PART).isin(*found) for m, found in parts.items()]
    return rows.where(reduce(or_, conditions) if conditions else F.lit(False))


def check_table(spark: SparkSession, path: str, manifest: Manifest) -> None:
    """Raises ModelError, naming both, where a FEATURES table was made by another model or from other pixels."""
    made = t.properties(spark, path)
    expected = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
    for name, value in expected.items():
        if made.get(name) != value:
            raise ModelError(
                f"the index at {path} has {name} {made.get(name)}, the model has {value}: vectors of two models "
                "cannot be compared; name the model that made it, or run `cbmir index` for this one"
            )


def live_files(spark: SparkSession, settings: Settings) -> tuple[str, list[str]]:
    """The folder of the searched index, and the URIs of its live Parquet files."""
    index = open_index(spark, settings)
    return index.path, t.live_files(spark, index.path, index.version)


def run(spark: SparkSession, settings: Settings) -> Report:
    """Bring a model's FEATURES up to the published frames, and make it the champion where a registry knows it.

    Run again it embeds nothing and commits nothing. Raises ModelError for a model of other preprocessing, TableError,
    before anything is visible, for vectors that cannot be searched, and Busy while another job writes FEATURES.
    """
    lake = t.Lake.of(settings)
    t.require_published(spark, lake)
    with lease.hold(lake.vault, lease.INDEX, settings.storage) as held:
        return _run(spark, settings, lake, held)


def _run(spark: SparkSession, settings: Settings, lake: t.Lake, held: lease.Held) -> Report:
    record = Record("index")
    pinned = t.require_published(spark, lake)
    with record.stage("model"):
        uri = settings.index.model or _alias(settings, registry.CANDIDATE)
        text, weights = registry.resolve_model(uri, settings)
        manifest = model.load(weights, text).manifest
        if manifest.preprocessing != pinned.preprocessing:
            raise ModelError(
                f"model {manifest.model_id} was trained on pixels of preprocessing {manifest.preprocessing}, lake "
                f"{lake.uri} holds {pinned.preprocessing}: train a model on this lake, or name one of its own"
            )
        folder = publish_model(weights, manifest, lake, settings.storage)
    path = lake.features(manifest.model_id)
    made_by = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
    t.ensure(spark, _table_of(manifest), path, made_by)
    check_table(spark, path, manifest)
    before = t.version(spark, path)
    features = t.read(spark, path, before)
    tags = t.read(spark, lake.path(t.TAGS), pinned.tags)
    pixels = t.read(spark, lake.path(t.PIXELS), pinned.pixels)
    live = live_frames(tags, pixels)

    with record.stage("compare"):
        touched = _touched(spark, lake, pinned, path)
        seen_by = json.dumps({t.TAGS.name: pinned.tags, t.PIXELS.name: pinned.pixels})
        changes = (
            compare(_of(live, touched), _of(features, touched))
            .where(F.col(STATE) != SAME)
            .persist(StorageLevel.MEMORY_AND_DISK)
        )
        # One row for each ingest batch or partition that changed: as many as there were nights, not frames.
        summary = changes.groupBy(STATE, t.PIXELS_BATCH, *_ROW_PARTITION).count().collect()
    batches = Counter[int]()
    emptied = Counter[tuple[str, str]]()
    for row in summary:
        if row[STATE] == MISSING:
            batches[row[t.PIXELS_BATCH]] += row["count"]
        else:
            emptied[tuple(row[name] for name in _ROW_PARTITION)] += row["count"]
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
            within = " OR ".join(f"(t.{t.MODALITY} = '{m}' AND t.{t.BODY_PART} = '{b}')" for m, b in sorted(emptied))
            after = t.delete_rows(spark, path, stale_keys(changes), within, "" if embedded else seen_by)
        if made is not None:
            grouped = made.groupBy(t.MODALITY, t.BODY_PART).count().collect()
            counts = {(row[t.MODALITY], row[t.BODY_PART]): row["count"] for row in grouped}
            rows = spread(made, counts, settings.index.rows_per_file)
            after = t.append(rows, t.FEATURES, path, seen_by, settings.index.rows_per_file)
            made.unpersist()
        after = _compact(spark, settings, path, after, seen_by)
    changes.unpersist()
    with record.stage("verify"):
        features = t.read(spark, path, after)
        verify(_of(live, touched), _of(features, touched), manifest, batches)
        places = sources_of(features)
    champion = None
    if uri.startswith(("models:/", "runs:/")):
        champion = registry.move_alias(settings, registry.CHAMPION, manifest.model_id)
    sources = dict.fromkeys((t.FROM_TAG, t.FROM_PREDICTION, t.FROM_NOTHING), 0)
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


def check(spark: SparkSession, settings: Settings) -> Checked:
    """Compare the whole searched index with the published frames, and look at every vector of it.

    Raises TableError where a frame is missing, a row has no frame or comes twice, or a vector cannot be searched; and
    ModelError where the table, or the model's files that workers read, are not the model's.
    """
    lake = t.Lake.of(settings)
    pinned = t.require_published(spark, lake)
    index = open_index(spark, settings)
    published = model.load(*(storage.read_bytes(storage.join(index.folder, n), settings.storage) for n in _FILES))
    if published.manifest != index.manifest:
        raise ModelError(f"{index.folder} holds another model than the registry: remove that folder")
    tags = t.read(spark, lake.path(t.TAGS), pinned.tags)
    pixels = t.read(spark, lake.path(t.PIXELS), pinned.pixels)
    verify(live_frames(tags, pixels), index.rows, index.manifest)
    sources = sources_of(index.rows)
    files = t.live_files(spark, index.path, index.version)
    return Checked(index.manifest.model_id, index.version, sum(sources.values()), len(files))


def verify(live: DataFrame, features: DataFrame, manifest: Manifest, batches: Collection[int] | None = None) -> None:
    """Whether FEATURES holds each live frame once, and the vectors of `batches` (None: all) as they may be searched.

    Raises TableError with the counts. Vectors of other batches were looked at when they were written.
    """
    counted = compare(live, features).groupBy(STATE).agg(F.count("*").alias("keys"), F.sum(COPIES).alias("rows"))
    found = {row[STATE]: (row["keys"], row["rows"]) for row in counted.collect()}
    keys = {state: found.get(state, (0, 0))[0] for state in (SAME, MISSING, STALE)}
    twice = (found.get(SAME, (0, 0))[1] or 0) - keys[SAME]
    if twice or keys[MISSING] or keys[STALE]:
        raise TableError(
            f"the index of {manifest.model_id} lacks {keys[MISSING]} frames, holds {keys[STALE]} rows without a frame "
            f"and {twice} rows twice: run `cbmir index` again, or remove the table and index anew"
        )
    looked = features if batches is None else features.where(F.col(t.PIXELS_BATCH).isin(*batches))
    if (batches is None or batches) and (problem := inspect(looked, manifest.embedding_dim).faults):
        raise TableError(f"the index of {manifest.model_id} holds vectors that cannot be searched: {problem}")


def sources_of(features: DataFrame) -> dict[tuple[str, str, str], int]:
    """Rows by (modality, body_part, body_part_source)."""
    of = (t.MODALITY, t.BODY_PART, t.BODY_PART_SOURCE)
    return {(row[of[0]], row[of[1]], row[of[2]]): row["count"] for row in features.groupBy(*of).count().collect()}


def _touched(spark: SparkSession, lake: t.Lake, pinned: t.Published, path: str) -> frozenset[int] | None:
    """Ingest batches that are not as the index has seen them; None where that is not known, so that all are looked at.

    The index's commits carry the versions of TAGS and PIXELS that they followed.
    """
    told = t.last_message(spark, path)
    if told is None:
        return None
    seen = json.loads(told)
    found = [
        t.changed_batches(spark, lake.path(table), seen[table.name], version)
        for table, version in ((t.TAGS, pinned.tags), (t.PIXELS, pinned.pixels))
    ]
    return None if None in found else frozenset().union(*(batches for batches in found if batches is not None))


def _of(rows: DataFrame, batches: Collection[int] | None) -> DataFrame:
    if batches is None:
        return rows
    return rows.where(F.col(t.PIXELS_BATCH).isin(*batches) if batches else F.lit(False))


def _compact(spark: SparkSession, settings: Settings, path: str, version: int, message: str) -> int:
    """Write partitions that nights have cut into many small files anew; the version that there then is."""
    files = Counter(t.place_of(uri) for uri in t.live_files(spark, path, version))
    if not any(count > settings.index.most_files for count in files.values()):
        return version
    features = t.read(spark, path, version)
    rows = Counter[tuple[str, str]]()
    for (modality, body_part, _), count in sources_of(features).items():
        rows[modality, body_part] += count
    needed = {place: math.ceil(rows[place] / settings.index.rows_per_file) for place in files}
    many = [place for place, count in files.items() if count > needed[place] + settings.index.most_files]
    if not many:
        return version
    laid = spread(scan(features, many), {place: rows[place] for place in many}, settings.index.rows_per_file)
    where = " OR ".join(f"({t.MODALITY} = '{m}' AND {t.BODY_PART} = '{b}')" for m, b in sorted(many))
    return t.rearrange(laid, t.FEATURES, path, where, message, settings.index.rows_per_file)


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
        pixels.where(F.col(t.BATCH).isin(*batches))
        .select(*_KEY, t.PIXELS_COLUMN)
        .join(keys, on=list(_KEY), how="inner")
    )
    # PIXELS has few and large files: read as they lie, one core would embed while the others wait.
    cores = spark.sparkContext.defaultParallelism
    tasks = max(math.ceil(count / FRAMES_PER_TASK), min(cores, math.ceil(count / settings.index.batch_size)))
    return embed(
        frames.repartition(tasks, *_KEY),
        folder,
        settings.storage,
        settings.index.batch_size,
        settings.index.min_probability,
    )


def _table_of(manifest: Manifest) -> t.Table:
    """FEATURES with the lengths that this model's vectors have."""
    lengths = {
        "vector_length": f"size({t.VECTOR}) = {manifest.embedding_dim}",
        "projection_length": f"size({t.PROJECTION}) = {manifest.projection_dim}",
    }
    return replace(t.FEATURES, constraints={**t.FEATURES.constraints, **lengths})


def _check_weights(weights: bytes, manifest: Manifest) -> None:
    digest = hashlib.sha256(weights).hexdigest()
    if digest != manifest.weights_sha256:
        raise ModelError(
            f"the weights have SHA-256 {digest}, their manifest says {manifest.weights_sha256}; fetch the model again"
        )


def _alias(settings: Settings, alias: str) -> str:
    return f"models:/{settings.mlflow.model_name}@{alias}"
