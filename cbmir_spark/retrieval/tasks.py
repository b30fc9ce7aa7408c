"""Scans of FEATURES' files, as tasks run them: shares of Parquet files in, the pairs that may be results out.

`bounded` reads projections alone and says which pairs of queries and rows cannot be ruled out; `measured` reads the
vectors of such rows; `scanned` reads every vector. A task reads its files itself: it needs single columns and single
row groups, and takes vectors from Parquet's pages to the matrix product without going through rows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.index.vector_files import DataFile, OpenFiles, Place, Read, VectorFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.retrieval import bounds, kernel
from cbmir_spark.retrieval.bounds import Bounds, Left, Points
from cbmir_spark.retrieval.query import Within
from cbmir_spark.storage import ObjectStore

# (3, n) the number of its file, the row group there and the row in that of each of n rows of FEATURES.
Places = NDArray[np.int32]

# Columns of partitions are in no file.
SHOWN = tuple(
    f.name
    for f in schemas.RESULTS_HITS.schema
    if f.name not in (cols.QUERY_ID, cols.RANK, cols.DISTANCE, cols.MODALITY, cols.BODY_PART)
)
# Rows whose projections are compared at a time; with the first ones a task sees whether bounds are of any use.
_ROWS_AT_ONCE = 8_192
_ROWS_AT_FIRST = 2_048
# The pairs of a query that are measured first, in times k, and how many times more each further turn has.
_FIRST_TURNS, _MORE_TURNS = 2, 3


@dataclass(frozen=True)
class Share:
    """Every `of`-th row group of a file, from `part` on."""

    file: DataFile
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class Wanted:
    """All pairs that bounds left of some queries, sorted by query and promise, and where their rows are.

    query, row, lower, group: (m,) of each pair; a row by its number in `places`, a file by its number in `files`.
    limit: (Q,) what the squared distance of a query's last hit does not exceed.
    """

    query: NDArray[np.signedinteger[Any]]
    row: NDArray[np.signedinteger[Any]]
    lower: NDArray[np.floating[Any]]
    group: bounds.Codes | None
    places: Places
    files: Mapping[int, DataFile]
    limit: NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """What every task of a search is sent, once for each worker: the queries, and which of them meet which rows.

    vectors: (Q, D) float32; k: (Q,) hits that each takes. `list_of` gives for each partition the number in `lists` of
    the queries that meet it. `own` gives by column, and by the value that hits must not have there, the queries that
    say so. `within` are the bounds that queries set to rows, `within_of` (Q,) says whose they are; empty where no query
    sets any. `group` is the column of which a hit list holds each value once (None: every row may be a hit).
    """

    vectors: NDArray[np.float32]
    k: NDArray[np.int64]
    list_of: Mapping[Place, int]
    lists: tuple[NDArray[np.int64], ...]
    own: Mapping[str, Mapping[str, Sequence[int]]]
    within: tuple[Within, ...]
    within_of: NDArray[np.int64]
    group: str | None
    imputed: bool
    cosine: bool
    block_bytes: int
    store: ObjectStore
    points: Points | None = None
    """The queries' projections, and how far those are from orthonormal, where the bound is to be tried."""
    defect: float = 0.0
    most_pairs: int = 0
    """Pairs that bounds may leave of a task's share: all tasks' come to the driver."""

    def columns(self) -> tuple[str, ...]:
        """What has to be read of a row to know which queries meet it."""
        needed = {name for within in self.within for name in within.columns()} | set(self.own)
        needed |= set() if self.group is None else {self.group}
        needed |= set() if self.imputed else {cols.BODY_PART_SOURCE}
        return tuple(sorted(needed))


@dataclass(frozen=True)
class Bounded:
    """What bounds left of a task's share: pairs, whose rows are numbers in `places`."""

    left: Left
    places: Places
    candidates: NDArray[np.int64]
    read: Read


@dataclass(frozen=True)
class Found:
    """Pairs that may be results of a task's share: query, squared distance, and the row of `rows` (SHOWN columns and
    partitions)."""

    query: NDArray[np.int64]
    square: NDArray[np.float64]
    row: NDArray[np.int64]
    rows: pa.Table
    candidates: NDArray[np.int64]
    read: Read


# --- tasks ---


def bounded(shares: Sequence[Share], job: Job) -> Bounded | Found:
    """Which pairs of the job's queries and the rows of `shares` may be results, by their projections.

    Where bounds rule out too little the vectors are compared instead; the first rows mostly tell.
    """
    assert job.points is not None
    search = Bounds(job.points, job.k, job.defect, job.block_bytes, job.most_pairs)
    directions = job.points.values.shape[1] - 1
    taken = 0
    places: list[Places] = [np.empty((3, 0), dtype=np.int32)]
    for share in shares:
        with VectorFile(share.file, job.store) as file:
            for row_groups in file.portions(share.part, share.of, _ROWS_AT_ONCE, 0 if taken else _ROWS_AT_FIRST):
                rows = file.table(row_groups, (cols.RESIDUAL_NORM, *job.columns()))
                coordinates = file.vectors(cols.PROJECTION, row_groups, directions)
                places.append(places_of(file, share.file.number, row_groups))
                if not job.imputed:
                    kept = not_imputed(rows)
                    rows, coordinates = rows.filter(pa.array(kept)), coordinates[kept]
                    places[-1] = places[-1][:, kept]
                grouped = _groups(rows, job.group)
                search.add(
                    Points.of(coordinates, rows.column(cols.RESIDUAL_NORM).to_numpy()),
                    None if grouped is None else bounds.codes(grouped),
                    job.lists[job.list_of[share.file.place]],
                    hidden(rows, job),
                )
                if search.hopeless:
                    found = scanned(shares, job)
                    return replace(found, read=found.read + Read(bytes=taken + file.read.bytes))
            taken += file.read.bytes
    left = search.left()
    rows_left, row = renumbered(left.row, search.rows_seen)
    found_at = np.concatenate(places, axis=1)[:, rows_left]
    return Bounded(replace(left, row=row).packed(), found_at, search.candidates, Read(bytes=taken))


def measured(wanted: Wanted, job: Job) -> Found:
    """The hits of the queries of `wanted`, by whole vectors.

    Of each query the most promising pairs come first: what they give lowers its limit, and few of the others are below
    it then. All pairs of a query are in one task, so that its limit is as low as it can be.

    Memory: a block of vectors and the distances of the task's queries to them, together at most `block_bytes`, and the
    pairs.
    """
    order = np.lexsort(wanted.places[::-1])
    places, number = wanted.places[:, order], np.argsort(order)
    left = Left(wanted.query, number[wanted.row], wanted.lower, wanted.lower, wanted.group)
    limit = wanted.limit.copy()
    squares_of = kernel.square_norms(job.vectors)
    begins = np.flatnonzero(np.diff(left.query, prepend=-1))
    # A product of matrices is made in two arrays, one of which is added to the other.
    height = max(1, job.block_bytes // (job.vectors[:1].nbytes + 8 * len(begins)))
    # How many times k pairs of the same query promise more.
    turn = np.arange(len(left.query)) - np.repeat(begins, np.diff(begins, append=len(left.query)))
    turn //= job.k[left.query]
    best = left.take(np.empty(0, dtype=np.int64))
    with OpenFiles(wanted.files, job.store) as files:
        first, last = 0, _FIRST_TURNS
        while first <= turn.max(initial=-1):
            due = (turn >= first) & (turn < last) & (left.lower <= limit[left.query])
            for pairs in _blocks_of(left.row, np.flatnonzero(due), height):
                rows, row = np.unique(left.row[pairs], return_inverse=True)
                vectors = _vectors(files, places[:, rows], job.vectors.shape[1])
                of = kernel.Pairs(left.query[pairs], row)
                near = kernel.contenders(job.vectors, squares_of, vectors, of, limit)
                square = kernel.squares(job.vectors, vectors, of.query[near], of.row[near])
                # Different squares may have the same root, and then the image's name decides.
                found = replace(left.take(pairs[near]), lower=square, upper=square * (1 + 2.0**-50))
                best, kth = bounds.settle(bounds.join([best, found]), job.k)
                limit = np.minimum(limit, kth)
            first, last = last, last * _MORE_TURNS
        told, row = shown(files, places[:, best.row])
        read = files.read
    return Found(best.query.astype(np.int64), best.lower, row, told, np.zeros(len(job.k), dtype=np.int64), read)


def _blocks_of(row: NDArray[np.int64], pairs: NDArray[np.int64], height: int) -> Iterator[NDArray[np.int64]]:
    """Pairs in the order of their rows, in blocks of at most so many rows; no row is in two blocks."""
    pairs = pairs[np.argsort(row[pairs], kind="stable")]
    number = np.cumsum(np.diff(row[pairs], prepend=-1) != 0) - 1
    edges = np.searchsorted(number, np.arange(0, number[-1] + 1 if len(number) else 0, height))
    yield from (pairs[start:end] for start, end in itertools.pairwise([*edges, len(pairs)]))


def _vectors(files: OpenFiles, places: Places, dimension: int) -> NDArray[np.float32]:
    """(n, D) the vectors of n different rows, which are in the order of their places."""
    vectors = np.empty((places.shape[1], dimension), dtype=np.float32)
    file, row_group, row = places
    numbers, begins = np.unique(file, return_index=True)
    for number, start, end in zip(numbers, begins, [*begins[1:], len(file)], strict=True):
        files[number].some_vectors(cols.VECTOR, row_group[start:end], row[start:end], vectors[start:end])
    return vectors


def shown(files: OpenFiles, places: Places) -> tuple[pa.Table, NDArray[np.int64]]:
    """SHOWN columns and partitions of n rows, each row once, and which one is each of the n; places: (3, n)."""
    file, row_group, row = places.astype(np.int64)
    tables = []
    found = np.empty(len(file), dtype=np.int64)
    seen = 0
    for number in np.unique(file):
        here = np.flatnonzero(file == number)
        row_groups, group = np.unique(row_group[here], return_inverse=True)
        starts = np.cumsum([0, *(files[number].rows_of(int(each)) for each in row_groups[:-1])])
        taken, place = np.unique(starts[group] + row[here], return_inverse=True)
        rows = files[number].table([int(each) for each in row_groups], SHOWN).take(taken)
        tables.append(placed(rows, files[number].place))
        found[here] = seen + place
        seen += len(taken)
    return pa.concat_tables(tables), found


def renumbered(row: NDArray[Any], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `count` rows occur in m pairs, sorted, and (m,) which one of those is each pair's."""
    occurs = np.zeros(count, dtype=bool)
    occurs[row] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[row]


def scanned(shares: Sequence[Share], job: Job) -> Found:
    """The nearest groups of each of the job's queries among the rows of `shares`.

    Memory: a block of vectors, or one row group, and a matrix of distances, together at most `block_bytes`, and Σk rows
    without vectors.
    """
    search = kernel.Search(job.vectors, job.k, job.block_bytes // 2, job.cosine)
    numbers = np.empty(0, dtype=np.int64)
    kept: pa.Table | None = None
    read = Read()
    for share in shares:
        for vectors, rows, took in _blocks(share, job):
            read += took
            if not job.imputed:
                known = not_imputed(rows)
                vectors, rows = vectors[known], rows.filter(pa.array(known))
            before = search.rows_seen
            asked = job.lists[job.list_of[share.file.place]]
            search.add(vectors, keys_of(rows, job.group), asked, hidden(rows, job))
            # Rows that can no longer be results are dropped.
            new = placed(rows.select(SHOWN), share.file.place)
            numbers = np.concatenate([numbers, np.arange(before, search.rows_seen)])
            kept = new if kept is None else pa.concat_tables([kept, new])
            places = np.searchsorted(numbers, search.rows)
            numbers, kept = numbers[places], kept.take(places)
    nearest = search.results()
    row = np.searchsorted(numbers, nearest.row)
    rows = pa.table({}) if kept is None else kept.combine_chunks()
    return Found(nearest.query, nearest.square, row, rows, search.candidates, read)


def _blocks(share: Share, job: Job) -> Iterator[tuple[NDArray[np.float32], pa.Table, Read]]:
    """Vectors of a share's rows, (n, D) float32, the other columns that are needed, and what was read for them.

    The array is used again for the next block.
    """
    columns = tuple(dict.fromkeys((*SHOWN, *job.columns())))
    dimension = job.vectors.shape[1]
    buffer = np.empty((0, dimension), dtype=np.float32)
    # The kernel puts groups side by side in a copy, and makes vectors one long in float64.
    height = max(1, job.block_bytes // 2 // ((24 if job.cosine else 8) * dimension))
    with VectorFile(share.file, job.store) as file:
        for row_groups in file.portions(share.part, share.of, height):
            before = file.read
            count = sum(file.rows_of(number) for number in row_groups)
            if len(buffer) < count:
                buffer = np.empty((count, dimension), dtype=np.float32)
            vectors = file.vectors(cols.VECTOR, row_groups, dimension, buffer)
            yield vectors, file.table(row_groups, columns), file.read - before


# --- rows ---


def keys_of(rows: pa.Table, group: str | None) -> kernel.Keys:
    """What identifies rows and groups them, as the kernel takes it."""
    images = np.array(rows.column(cols.IMAGE_ID).to_pylist(), dtype=np.bytes_)
    return kernel.Keys(images, rows.column(cols.FRAME).to_numpy().astype(np.int64), _groups(rows, group))


def _groups(rows: pa.Table, group: str | None) -> NDArray[np.bytes_] | None:
    return None if group is None else np.array(rows.column(group).to_pylist(), dtype=np.bytes_)


def hidden(rows: pa.Table, job: Job) -> kernel.Hidden | None:
    """Which of the rows some queries must not meet."""
    pairs = {
        (query, row)
        for column, of_value in job.own.items()
        for row, value in enumerate(rows.column(column).to_pylist())
        for query in of_value.get(value, ())
    }
    if not pairs and not job.within:
        return None
    found = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    paired = kernel.Pairs(found[:, 0], found[:, 1])
    if not job.within:
        return kernel.Hidden(paired)
    return kernel.Hidden(paired, np.stack([within.bars(rows) for within in job.within]), job.within_of)


def not_imputed(rows: pa.Table) -> NDArray[np.bool_]:
    return np.array(
        [source != cols.FROM_PREDICTION for source in rows.column(cols.BODY_PART_SOURCE).to_pylist()], dtype=bool
    )


def placed(rows: pa.Table, place: Place) -> pa.Table:
    for name, value in zip((cols.MODALITY, cols.BODY_PART), place, strict=True):
        rows = rows.append_column(name, pa.repeat(value, len(rows)))
    return rows


def places_of(file: VectorFile, number: int, row_groups: Sequence[int]) -> Places:
    """(3, n) file, row group and row within it of each row."""
    counts = [file.rows_of(group) for group in row_groups]
    return np.stack(
        [
            np.full(sum(counts), number, dtype=np.int32),
            np.repeat(np.asarray(row_groups, dtype=np.int32), counts),
            np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        ]
    )
