"""What a task of a search does: FEATURES batches in, its k best of each query out. numpy and pyarrow; no torch.

A module of its own, because a Python worker imports what its task's code refers to, and one that scans vectors has no
use for the half gigabyte that embedding them takes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import Broadcast
from pyspark.sql.types import DoubleType, LongType, StringType, StructField, StructType

from cbmir_spark import arrays, kernel
from cbmir_spark import tables as t

Place = tuple[str, str]
"""A partition of FEATURES: (modality, body_part)."""

# Rows of partial results in one Arrow batch.
_ROWS_OUT = 8192

_SHOWN = [f for f in t.RESULTS_HITS.schema if f.name not in (t.QUERY_ID, t.RANK, t.DISTANCE)]
PARTIAL = StructType(
    [
        StructField(t.QUERY_ID, StringType(), False),
        StructField(t.DISTANCE, DoubleType(), False),
        *_SHOWN,
        StructField(t.CANDIDATES, LongType(), False),
    ]
)
COLUMNS = (t.VECTOR, *[f.name for f in _SHOWN])


@dataclass(frozen=True)
class Job:
    """What every task of a search is sent, once for each worker: the queries, and which of them meet which rows.

    vectors: (Q, D) float32. `list_of` gives for each partition the number of its list of queries in `lists`: partitions
    that the same queries meet share one, and may share a block. `own` gives the queries by the value of the column
    `exclude` that their hits must not have.
    """

    query_ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    list_of: Mapping[Place, int]
    lists: tuple[NDArray[np.int64], ...]
    exclude: str | None
    own: Mapping[str, Sequence[int]]
    group: str | None
    k: int
    block_bytes: int


def of(broadcast: "Broadcast[Job]") -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function that each task maps over its batches."""

    def find(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return partial_results(batches, broadcast.value)

    return find


def partial_results(batches: Iterable[pa.RecordBatch], job: Job) -> Iterator[pa.RecordBatch]:
    """FEATURES batches → the k best groups of each query among them, as rows of `PARTIAL`. No Spark.

    Half of `block_bytes` is for a block of vectors, half for its distances to a tile of queries: Spark's batches of
    256 rows are gathered first, since small matrix products are slow ones. The rows that may still be hits are kept
    without their vectors, and of a query's rows in the output the first carries its number of candidates.
    """
    found = kernel.Search(job.vectors, job.k, job.block_bytes // 2)
    height = max(1, job.block_bytes // 2 // (4 * job.vectors.shape[1]))
    numbers = np.empty(0, dtype=np.int64)
    kept: pa.Table | None = None
    for number, vectors, rows in _blocks(batches, job, height):
        before = found.rows_seen
        found.add(vectors, _keys(rows, job), job.lists[number], _excluded(rows, job))
        numbers = np.concatenate([numbers, np.arange(before, found.rows_seen)])
        kept = rows if kept is None else pa.concat_tables([kept, rows])
        places = np.searchsorted(numbers, found.rows)
        numbers, kept = numbers[places], kept.take(places)
    if kept is None:
        return
    nearest = found.results()
    first = np.diff(nearest.query, prepend=-1) != 0
    candidates = np.where(first, found.candidates[nearest.query], 0)
    hits = kept.take(np.searchsorted(numbers, nearest.row))
    columns = {name: hits.column(name) for name in hits.column_names} | {
        t.QUERY_ID: pa.array([job.query_ids[number] for number in nearest.query], pa.string()),
        t.DISTANCE: pa.array(nearest.distance),
        t.CANDIDATES: pa.array(candidates),
    }
    yield from pa.table([columns[name] for name in PARTIAL.names], PARTIAL.names).to_batches(_ROWS_OUT)


def _blocks(
    batches: Iterable[pa.RecordBatch], job: Job, height: int
) -> Iterator[tuple[int, NDArray[np.float32], pa.Table]]:
    """Batches gathered into blocks of at most `height` rows that the same list of queries meets.

    Yields the list's number, (n, D) vectors, valid until the next block, and the rows' other columns.
    """
    dimension = job.vectors.shape[1]
    buffer = np.empty((height, dimension), dtype=np.float32)
    filled, current = 0, -1
    rows: list[pa.RecordBatch] = []
    for batch in batches:
        vectors = arrays.vectors_of(batch, dimension)
        others = batch.select([f.name for f in _SHOWN])
        places = zip(batch.column(t.MODALITY).to_pylist(), batch.column(t.BODY_PART).to_pylist(), strict=True)
        start = 0
        for number, run in groupby(job.list_of[place] for place in places):
            stop = start + sum(1 for _ in run)
            if number != current and filled:
                yield current, buffer[:filled], pa.Table.from_batches(rows)
                filled, rows = 0, []
            current = number
            while start < stop:
                taken = min(stop - start, height - filled)
                buffer[filled : filled + taken] = vectors[start : start + taken]
                # Taken, not sliced: a slice keeps the whole batch in memory, vectors and all.
                rows.append(others.take(pa.array(np.arange(start, start + taken))))
                filled, start = filled + taken, start + taken
                if filled == height:
                    yield current, buffer, pa.Table.from_batches(rows)
                    filled, rows = 0, []
    if filled:
        yield current, buffer[:filled], pa.Table.from_batches(rows)


def _keys(rows: pa.Table, job: Job) -> kernel.Keys:
    return kernel.Keys(
        np.array(rows.column(t.IMAGE_ID).to_pylist(), dtype=np.bytes_),
        rows.column(t.FRAME).to_numpy().astype(np.int64),
        None if job.group is None else np.array(rows.column(job.group).to_pylist(), dtype=np.bytes_),
    )


def _excluded(rows: pa.Table, job: Job) -> kernel.Pairs | None:
    if job.exclude is None or not job.own:
        return None
    pairs = [
        (query, row)
        for row, value in enumerate(rows.column(job.exclude).to_pylist())
        for query in job.own.get(value, ())
    ]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return kernel.Pairs(found[:, 0], found[:, 1])
