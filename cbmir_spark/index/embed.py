"""Turn frames with pixels into rows of FEATURES, and lay these out in files. Runs in tasks."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index import arrays
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.index.load import load
from cbmir_spark.index.verify import FRAME_COLUMNS
from cbmir_spark.lake import columns as cols
from cbmir_spark.models import artifact
from cbmir_spark.models import embed as embedding
from cbmir_spark.models.weights import Loaded
from cbmir_spark.storage import ObjectStore

# Directions whose signs order the rows within a file: many, since within a class the first ones hardly differ.
_CELL_DIRECTIONS = 30


def embed(frames: DataFrame, folder: str, store: ObjectStore, batch_size: int, minimum: float) -> DataFrame:
    """Embed live frames: rows of FEATURES; lazy. Each Python worker loads the model once.

    `folder` holds the model (see `publish_model`). A missing body part is imputed if its probability is at least
    `minimum`.
    """

    def rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        loaded = load(folder, store)
        for batch in batches:
            for start in range(0, batch.num_rows, batch_size):
                yield feature_rows(batch.slice(start, batch_size), loaded, minimum)

    return frames.select(*FRAME_COLUMNS, cols.PIXELS_COLUMN).mapInArrow(rows, FEATURES.schema)


def spread(rows: DataFrame, counts: Mapping[tuple[str, str], int], rows_per_file: int) -> DataFrame:
    """Lay rows out for writing: one partition per task, big ones over several, similar rows next to each other.

    `counts` are rows by (modality, body_part); a partition gets as few files of at most `rows_per_file` as it needs.
    Within a file rows are sorted by predicted class and by the signs of their first coordinates, so that the rows near
    a query are in few row groups.
    """
    files = {place: math.ceil(count / rows_per_file) for place, count in counts.items()}
    many = {"/".join(place): number for place, number in files.items() if number > 1}
    share: Column = F.lit(1)
    if many:
        numbers = F.create_map(*[F.lit(value) for pair in many.items() for value in pair])
        share = F.coalesce(numbers[F.concat_ws("/", cols.MODALITY, cols.BODY_PART)], F.lit(1))
    # Hashing may put the rows of two files into one task; twice the tasks make that rarer, and empty ones cost nothing.
    return rows.repartition(
        2 * sum(files.values()), cols.MODALITY, cols.BODY_PART, F.pmod(F.xxhash64(cols.SERIES_ID), share)
    ).sortWithinPartitions(cols.MODALITY, cols.BODY_PART, cols.PREDICTED, _cell(), cols.IMAGE_ID, cols.FRAME)


def _cell() -> Column:
    """The signs of a row's first principal coordinates as bits of a number, the first the highest."""
    sides = [
        F.when(F.get(cols.PROJECTION, F.lit(number)) > 0, F.lit(2 ** (_CELL_DIRECTIONS - number))).otherwise(F.lit(0))
        for number in range(_CELL_DIRECTIONS)
    ]
    return reduce(add, sides)


def feature_rows(batch: pa.RecordBatch, loaded: Loaded, minimum: float) -> pa.RecordBatch:
    """Embed a batch of frames with pixels and tags: rows of FEATURES."""
    embedded = embedding.embed_batches(loaded, arrays.pixels_of(batch), batch.column(cols.MODALITY).to_pylist())
    projections, residuals = loaded.projection.apply(embedded.vectors)
    parts = body_parts(
        batch.column(cols.BODY_PART).to_pylist(), embedded.labels, embedded.probabilities.tolist(), minimum
    )
    made = {
        cols.VECTOR: arrays.vector_column(embedded.vectors),
        cols.PROJECTION: arrays.vector_column(projections),
        cols.RESIDUAL_NORM: pa.array(residuals),
        cols.PREDICTED: pa.array([label or UNKNOWN for label in embedded.labels]),
        cols.PROBABILITY: pa.array(embedded.probabilities),
        cols.BODY_PART: pa.array([part for part, _ in parts]),
        cols.BODY_PART_SOURCE: pa.array([source for _, source in parts]),
    }
    names = FEATURES.schema.names
    return pa.RecordBatch.from_arrays([made[n] if n in made else batch.column(n) for n in names], names=names)


def body_parts(
    tags: Sequence[str], labels: Sequence[str | None], probabilities: Sequence[float], minimum: float
) -> list[tuple[str, str]]:
    """Choose each row's body part and its source: the tag, else a prediction from `minimum` on, else unknown."""
    found = []
    for tag, label, probability in zip(tags, labels, probabilities, strict=True):
        if tag != UNKNOWN:
            found.append((tag, cols.FROM_TAG))
        elif label is not None and probability >= minimum:
            found.append((artifact.body_part_of(label), cols.FROM_PREDICTION))
        else:
            found.append((UNKNOWN, cols.FROM_NOTHING))
    return found
