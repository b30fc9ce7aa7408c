"""Compare FEATURES with the published frames, and check its vectors. Counting runs in tasks."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import LongType, StructField, StructType

from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index import arrays
from cbmir_spark.index.open import open_index, read_model
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import open_lake
from cbmir_spark.models.artifact import Manifest
from cbmir_spark.models.registry import Registry

KEY = (cols.IMAGE_ID, cols.FRAME)
OF_TAGS = (
    cols.SERIES_ID,
    cols.STUDY_ID,
    cols.PATIENT_ID,
    cols.SEX,
    cols.AGE_YEARS,
    cols.YEAR,
    cols.MODALITY,
    cols.BODY_PART,
)
# What embedding a frame needs to know of it beside its pixels.
FRAME_COLUMNS = (*KEY, cols.PIXEL_DIGEST, cols.PIXELS_BATCH, *OF_TAGS)
# A row is up to date if these agree with the frame: an image read again may have other tags and the same pixels.
_SAME = (cols.IMAGE_ID, cols.FRAME, cols.PIXEL_DIGEST, cols.PIXELS_BATCH)

STATE, COPIES = "state", "copies"
SAME, MISSING, STALE = "same", "missing", "stale"

ROW_PARTITION = (f"row_{cols.MODALITY}", f"row_{cols.BODY_PART}")

_INSPECTED = StructType(
    [StructField(name, LongType(), False) for name in ("rows", "wrong_dimension", "not_finite", "zero")]
)


@dataclass(frozen=True)
class Checked:
    """An index without faults: its model, version, and numbers of rows and files."""

    model_id: str
    version: int
    rows: int
    files: int


@dataclass(frozen=True)
class Inspection:
    """Numbers of rows, and of those whose vector must not be searched."""

    rows: int
    wrong_dimension: int
    not_finite: int
    zero: int

    @property
    def faults(self) -> str:
        """The faults in words, empty if there are none."""
        found = {
            "of another dimension": self.wrong_dimension,
            "with NaN or infinite values": self.not_finite,
            "all zero": self.zero,
        }
        return ", ".join(f"{count} {words}" for words, count in found.items() if count)


def live_frames(tags: DataFrame, pixels: DataFrame) -> DataFrame:
    """Select the frames that belong in an index: keys, digest, batch and what FEATURES takes from TAGS; no pixels."""
    images = tags.where(F.col(cols.KIND) == cols.IMAGE_KIND).select(cols.IMAGE_ID, F.col(cols.BATCH), *OF_TAGS)
    frames = pixels.select(*KEY, cols.PIXEL_DIGEST, cols.BATCH)
    joined = frames.join(images, on=[cols.IMAGE_ID, cols.BATCH], how="inner")
    return joined.withColumnRenamed(cols.BATCH, cols.PIXELS_BATCH).select(*FRAME_COLUMNS)


def compare(live: DataFrame, features: DataFrame) -> DataFrame:
    """Compare live frames with rows of FEATURES; adds `state`, `copies`, and partition and source of the row.

    `state` is SAME, MISSING (no row, or one of other pixels or of an earlier reading of the image) or STALE (a row
    without its frame). `copies` counts the rows of a key: more than one is an error.
    """
    of_row = (cols.MODALITY, cols.BODY_PART, cols.BODY_PART_SOURCE)
    rows = features.groupBy(*_SAME).agg(
        F.count("*").alias(COPIES), *[F.first(name).alias(f"row_{name}") for name in of_row]
    )
    state = F.when(F.col(COPIES).isNull(), MISSING).when(F.col(cols.SERIES_ID).isNull(), STALE).otherwise(SAME)
    return live.join(rows, on=list(_SAME), how="full_outer").withColumn(STATE, state)


def stale_keys(changes: DataFrame) -> DataFrame:
    """Select what identifies the rows to delete, partition columns first."""
    row_modality, row_body_part = (F.col(name) for name in ROW_PARTITION)
    return changes.where(F.col(STATE) == STALE).select(
        row_modality.alias(cols.MODALITY), row_body_part.alias(cols.BODY_PART), *_SAME
    )


def inspect(rows: DataFrame, dimension: int) -> Inspection:
    """Check every vector and residual of `rows`: one pass, in tasks; the driver gets four numbers from each batch."""

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.zeros(4, dtype=np.int64)
        for batch in batches:
            total += faults(batch, dimension)
        yield pa.RecordBatch.from_arrays([pa.array([n]) for n in total], names=_INSPECTED.names)

    counted = rows.select(cols.VECTOR, cols.RESIDUAL_NORM).mapInArrow(count, _INSPECTED)
    sums = counted.agg(*[F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in _INSPECTED.names]).collect()[0]
    return Inspection(**sums.asDict())


def faults(batch: pa.RecordBatch, dimension: int) -> NDArray[np.int64]:
    """Count the rows of a batch, and those of another dimension, with non-finite values, and all zero: (4,) int64."""
    column = batch.column(cols.VECTOR)
    right = np.diff(column.offsets.to_numpy()) == dimension
    counts = np.array([len(right), (~right).sum(), 0, 0], dtype=np.int64)
    if right.any():
        rows = batch if right.all() else batch.filter(pa.array(right))
        vectors = arrays.vectors_of(rows, dimension)
        residuals = rows.column(cols.RESIDUAL_NORM).to_numpy()
        counts[2] = (~(np.isfinite(vectors).all(axis=1) & np.isfinite(residuals))).sum()
        counts[3] = (~vectors.any(axis=1)).sum()
    return counts


def run(spark: SparkSession, settings: Settings) -> Checked:
    """Compare the whole searched index with the published frames, and check every vector.

    Raises TableError if a frame is missing, a row has no frame or occurs twice, or a vector cannot be searched;
    ModelError if the table, or the model's files that workers read, are another model's.
    """
    lake = open_lake(spark, settings)
    frames = live_frames(lake.tags, lake.pixels)
    registry = Registry(settings.mlflow, lake.paths.uri, lake.store)
    index = open_index(lake, registry, settings.retrieval.model)
    published = read_model(index.folder, lake.store)
    published.check()
    if published.manifest != index.manifest:
        raise ModelError(
            f"{index.folder} holds another model than the registry: delete that folder; it is written again"
        )
    verify(frames, index.rows, index.manifest)
    rows = sum(sources_of(index.rows).values())
    return Checked(index.manifest.model_id, index.version, rows, len(index.files))


def verify(live: DataFrame, features: DataFrame, manifest: Manifest, batches: Collection[int] | None = None) -> None:
    """Raise TableError unless FEATURES holds each live frame once, and each vector of `batches` can be searched.

    None checks the vectors of all batches; those of other batches were checked when they were written.
    """
    counted = compare(live, features).groupBy(STATE).agg(F.count("*").alias("keys"), F.sum(COPIES).alias("rows"))
    found = {row[STATE]: (row["keys"], row["rows"]) for row in counted.collect()}
    keys = {state: found.get(state, (0, 0))[0] for state in (SAME, MISSING, STALE)}
    twice = (found.get(SAME, (0, 0))[1] or 0) - keys[SAME]
    if twice or keys[MISSING] or keys[STALE]:
        raise TableError(
            f"the index of {manifest.model_id} lacks {keys[MISSING]} frames, has {keys[STALE]} rows without a frame "
            f"and {twice} duplicate rows: run `cbmir index`; if that does not help, remove the table and index again"
        )
    checked = features if batches is None else features.where(F.col(cols.PIXELS_BATCH).isin(*batches))
    if (batches is None or batches) and (problem := inspect(checked, manifest.embedding_dim).faults):
        raise TableError(
            f"the index of {manifest.model_id} holds vectors that cannot be searched ({problem}): train the model again"
        )


def sources_of(features: DataFrame) -> dict[tuple[str, str, str], int]:
    """Count rows by (modality, body_part, body_part_source)."""
    of = (cols.MODALITY, cols.BODY_PART, cols.BODY_PART_SOURCE)
    return {(row[of[0]], row[of[1]], row[of[2]]): row["count"] for row in features.groupBy(*of).count().collect()}
