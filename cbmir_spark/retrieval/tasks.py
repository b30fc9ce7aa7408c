"""What a task of a search does: shares of FEATURES' files in, pairs of queries and rows that may be hits out.

`bound` reads projections alone and returns the pairs that it cannot rule out; `measure` reads the vectors of such
pairs; `scan` reads every vector. A task reads its files without Spark: it needs single columns and single row groups,
and takes vectors from Parquet's pages to the matrix product without building rows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.index.layout import Place
from cbmir_spark.index.vector_files import DataFile, OpenFiles, Read, VectorFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.retrieval import bounds, kernel
from cbmir_spark.retrieval.bounds import Bounds, Candidates, Points
from cbmir_spark.retrieval.query import HitFilter
from cbmir_spark.storage import ObjectStore

# (3, n) int32: file number, row group and row within it, for each of n rows of FEATURES.
Locations = NDArray[np.int32]

# Files do not store partition columns.
HIT_COLUMNS = tuple(
    f.name
    for f in schemas.RESULTS_HITS.schema
    if f.name not in (cols.QUERY_ID, cols.RANK, cols.DISTANCE, cols.MODALITY, cols.BODY_PART)
)
# Rows whose projections are compared at a time. The first block is small: it shows whether bounds help at all.
_ROWS_AT_ONCE = 8_192
_ROWS_AT_FIRST = 2_048
# The first turn measures so many times k pairs of a query, each further one so many times more.
_FIRST_TURNS, _MORE_TURNS = 2, 3


@dataclass(frozen=True)
class Share:
    """Every `of`-th row group of a file, from `part` on."""

    file: DataFile
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class MeasureInputs:
    """All candidate pairs of some queries, sorted by query and lower bound, and where their rows are.

    query, row, lower, group: (m,) per pair; a row by its number in `locations`, a file by its number in `files`.
    limit: (Q,) an upper bound of the squared distance of each query's last hit.
    """

    query: NDArray[np.signedinteger[Any]]
    row: NDArray[np.signedinteger[Any]]
    lower: NDArray[np.floating[Any]]
    group: bounds.Codes | None
    locations: Locations
    files: Mapping[int, DataFile]
    limit: NDArray[np.float64]


@dataclass(frozen=True)
class SearchInputs:
    """What the driver broadcasts to every task of a search: the queries, and which of them search which rows.

    vectors: (Q, D) float32; k: (Q,) hits per query. `list_of` maps a partition to the number in `lists` of the queries
    that search it. `exclusions` lists, by column and value, the queries whose hits must not have that value there.
    `filters` are the queries' hit filters, filter_of: (Q,) the one of each query; empty where no query has one. `group`
    is the column whose values a hit list holds at most once each (None: every row may be a hit).
    """

    vectors: NDArray[np.float32]
    k: NDArray[np.int64]
    list_of: Mapping[Place, int]
    lists: tuple[NDArray[np.int64], ...]
    exclusions: Mapping[str, Mapping[str, Sequence[int]]]
    filters: tuple[HitFilter, ...]
    filter_of: NDArray[np.int64]
    group: str | None
    imputed: bool
    cosine: bool
    block_bytes: int
    store: ObjectStore
    points: Points | None = None
    """The queries' projections; None where bounds are not used."""
    defect: float = 0.0
    """How far the projection is from orthonormal, see bounds.py."""
    most_pairs: int = 0
    """Candidate pairs that one task may return, since the driver collects those of all tasks."""

    def columns(self) -> tuple[str, ...]:
        """Name the columns that decide which queries a row is compared with."""
        needed = {name for each in self.filters for name in each.columns()} | set(self.exclusions)
        needed |= set() if self.group is None else {self.group}
        needed |= set() if self.imputed else {cols.BODY_PART_SOURCE}
        return tuple(sorted(needed))


@dataclass(frozen=True)
class Bounded:
    """Candidate pairs of a task's share; their rows are numbers in `locations`. candidates: (Q,) rows compared."""

    remaining: Candidates
    locations: Locations
    candidates: NDArray[np.int64]
    read: Read


@dataclass(frozen=True)
class Found:
    """Measured pairs of a task's share that may be hits.

    query, square, row: (m,) per pair; a row by its number in `rows`, which has HIT_COLUMNS and the partition columns.
    candidates: (Q,) rows that each query was compared with.
    """

    query: NDArray[np.int64]
    square: NDArray[np.float64]
    row: NDArray[np.int64]
    rows: pa.Table
    candidates: NDArray[np.int64]
    read: Read


# --- tasks ---


def bound(shares: Sequence[Share], inputs: SearchInputs) -> Bounded | Found:
    """Find the pairs of queries and rows of `shares` that may be hits, by their projections.

    Where bounds rule out too little, scans the vectors instead; the first rows mostly show it.
    """
    assert inputs.points is not None
    search = Bounds(inputs.points, inputs.k, inputs.defect, inputs.block_bytes, inputs.most_pairs)
    directions = inputs.points.values.shape[1] - 1
    taken = 0
    locations: list[Locations] = [np.empty((3, 0), dtype=np.int32)]
    for share in shares:
        with VectorFile(share.file, inputs.store) as file:
            for row_groups in file.batches(share.part, share.of, _ROWS_AT_ONCE, 0 if taken else _ROWS_AT_FIRST):
                rows = file.table(row_groups, (cols.RESIDUAL_NORM, *inputs.columns()))
                coordinates = file.vectors(cols.PROJECTION, row_groups, directions)
                locations.append(locations_of(file, share.file.number, row_groups))
                if not inputs.imputed:
                    tagged = not_imputed(rows)
                    rows, coordinates = rows.filter(pa.array(tagged)), coordinates[tagged]
                    locations[-1] = locations[-1][:, tagged]
                grouped = _groups(rows, inputs.group)
                search.add(
                    Points.of(coordinates, rows.column(cols.RESIDUAL_NORM).to_numpy()),
                    None if grouped is None else bounds.codes(grouped),
                    inputs.lists[inputs.list_of[share.file.place]],
                    excluded_pairs(rows, inputs),
                )
                if search.ineffective:
                    found = scan(shares, inputs)
                    return replace(found, read=found.read + Read(bytes=taken + file.read.bytes))
            taken += file.read.bytes
    remaining = search.remaining()
    rows_remaining, row = renumber(remaining.row, search.rows_seen)
    found_at = np.concatenate(locations, axis=1)[:, rows_remaining]
    return Bounded(replace(remaining, row=row).packed(), found_at, search.candidates, Read(bytes=taken))


def measure(pairs: MeasureInputs, inputs: SearchInputs) -> Found:
    """Find the hits among candidate pairs, by whole vectors.

    The most promising pairs of each query come first: their distances lower the query's limit, which then rules out
    most of the others. One task measures all pairs of a query, so that the limit is as low as possible.

    Memory: a block of vectors and the distances of the task's queries to them, together at most `block_bytes`, and the
    pairs.
    """
    order = np.lexsort(pairs.locations[::-1])
    locations, number = pairs.locations[:, order], np.argsort(order)
    remaining = Candidates(pairs.query, number[pairs.row], pairs.lower, pairs.lower, pairs.group)
    limit = pairs.limit.copy()
    squares_of = kernel.square_norms(inputs.vectors)
    begins = np.flatnonzero(np.diff(remaining.query, prepend=-1))
    # A matrix product takes two arrays, one of which is added to the other.
    height = max(1, inputs.block_bytes // (inputs.vectors[:1].nbytes + 8 * len(begins)))
    # The turn of a pair: how many times k pairs of its query are more promising.
    turn = np.arange(len(remaining.query)) - np.repeat(begins, np.diff(begins, append=len(remaining.query)))
    turn //= inputs.k[remaining.query]
    best = remaining.take(np.empty(0, dtype=np.int64))
    with OpenFiles(pairs.files, inputs.store) as files:
        first, last = 0, _FIRST_TURNS
        while first <= turn.max(initial=-1):
            due = (turn >= first) & (turn < last) & (remaining.lower <= limit[remaining.query])
            for block in _blocks_of(remaining.row, np.flatnonzero(due), height):
                rows, row = np.unique(remaining.row[block], return_inverse=True)
                vectors = _vectors(files, locations[:, rows], inputs.vectors.shape[1])
                of = kernel.Pairs(remaining.query[block], row)
                near = kernel.contenders(inputs.vectors, squares_of, vectors, of, limit)
                square = kernel.squares(inputs.vectors, vectors, of.query[near], of.row[near])
                # Different squares may have the same root, and then the image's name decides.
                found = replace(remaining.take(block[near]), lower=square, upper=square * (1 + 2.0**-50))
                best, kth = bounds.prune(bounds.concatenate([best, found]), inputs.k)
                limit = np.minimum(limit, kth)
            first, last = last, last * _MORE_TURNS
        rows_of_hits, row = hit_rows(files, locations[:, best.row])
        read = files.read
    square = np.asarray(best.lower, np.float64)
    return Found(best.query.astype(np.int64), square, row, rows_of_hits, np.zeros(len(inputs.k), dtype=np.int64), read)


def _blocks_of(row: NDArray[np.int64], pairs: NDArray[np.int64], height: int) -> Iterator[NDArray[np.int64]]:
    """Cut pairs, in the order of their rows, into blocks of at most `height` rows; no row is in two blocks."""
    pairs = pairs[np.argsort(row[pairs], kind="stable")]
    number = np.cumsum(np.diff(row[pairs], prepend=-1) != 0) - 1
    edges = np.searchsorted(number, np.arange(0, number[-1] + 1 if len(number) else 0, height))
    yield from (pairs[start:end] for start, end in itertools.pairwise([*edges, len(pairs)]))


def _vectors(files: OpenFiles, locations: Locations, dimension: int) -> NDArray[np.float32]:
    """Read (n, D) vectors of n different rows, which are in the order of their locations."""
    vectors = np.empty((locations.shape[1], dimension), dtype=np.float32)
    file, row_group, row = locations
    numbers, begins = np.unique(file, return_index=True)
    for number, start, end in zip(numbers, begins, [*begins[1:], len(file)], strict=True):
        files[number].some_vectors(cols.VECTOR, row_group[start:end], row[start:end], vectors[start:end])
    return vectors


def hit_rows(files: OpenFiles, locations: Locations) -> tuple[pa.Table, NDArray[np.int64]]:
    """Read HIT_COLUMNS and partitions of n rows, each row once, and (n,) the number of each in that table."""
    file, row_group, row = locations.astype(np.int64)
    tables = []
    found = np.empty(len(file), dtype=np.int64)
    seen = 0
    for number in np.unique(file):
        here = np.flatnonzero(file == number)
        row_groups, group = np.unique(row_group[here], return_inverse=True)
        starts = np.cumsum([0, *(files[number].rows_of(int(each)) for each in row_groups[:-1])])
        taken, place = np.unique(starts[group] + row[here], return_inverse=True)
        rows = files[number].table([int(each) for each in row_groups], HIT_COLUMNS).take(taken)
        tables.append(with_partition(rows, files[number].place))
        found[here] = seen + place
        seen += len(taken)
    return pa.concat_tables(tables), found


def renumber(row: NDArray[Any], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which of `count` rows occur in m pairs, sorted, and (m,) the position of each pair's row among them."""
    occurs = np.zeros(count, dtype=bool)
    occurs[row] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[row]


def scan(shares: Sequence[Share], inputs: SearchInputs) -> Found:
    """Find the nearest groups of each query among the rows of `shares`, by every vector.

    Memory: a block of vectors, or one row group, and a matrix of distances, together at most `block_bytes`, and Σk rows
    without vectors.
    """
    search = kernel.Search(inputs.vectors, inputs.k, inputs.block_bytes // 2, inputs.cosine)
    numbers = np.empty(0, dtype=np.int64)
    contenders: pa.Table | None = None
    read = Read()
    for share in shares:
        for vectors, rows, took in _blocks(share, inputs):
            read += took
            if not inputs.imputed:
                known = not_imputed(rows)
                vectors, rows = vectors[known], rows.filter(pa.array(known))
            before = search.rows_seen
            asked = inputs.lists[inputs.list_of[share.file.place]]
            search.add(vectors, keys_of(rows, inputs.group), asked, excluded_pairs(rows, inputs))
            # Drop rows that can no longer be hits.
            new = with_partition(rows.select(HIT_COLUMNS), share.file.place)
            numbers = np.concatenate([numbers, np.arange(before, search.rows_seen)])
            contenders = new if contenders is None else pa.concat_tables([contenders, new])
            positions = np.searchsorted(numbers, search.rows)
            numbers, contenders = numbers[positions], contenders.take(positions)
    nearest = search.results()
    row = np.searchsorted(numbers, nearest.row)
    rows = pa.table({}) if contenders is None else contenders.combine_chunks()
    return Found(nearest.query, nearest.square, row, rows, search.candidates, read)


def _blocks(share: Share, inputs: SearchInputs) -> Iterator[tuple[NDArray[np.float32], pa.Table, Read]]:
    """Read a share's rows in blocks: vectors, (n, D) float32, the other needed columns, and what was read.

    The array is reused for the next block.
    """
    columns = tuple(dict.fromkeys((*HIT_COLUMNS, *inputs.columns())))
    dimension = inputs.vectors.shape[1]
    buffer = np.empty((0, dimension), dtype=np.float32)
    # The kernel copies rows to put groups side by side, and L2-normalises in float64.
    height = max(1, inputs.block_bytes // 2 // ((24 if inputs.cosine else 8) * dimension))
    with VectorFile(share.file, inputs.store) as file:
        for row_groups in file.batches(share.part, share.of, height):
            before = file.read
            count = sum(file.rows_of(number) for number in row_groups)
            if len(buffer) < count:
                buffer = np.empty((count, dimension), dtype=np.float32)
            vectors = file.vectors(cols.VECTOR, row_groups, dimension, buffer)
            yield vectors, file.table(row_groups, columns), file.read - before


# --- rows ---


def keys_of(rows: pa.Table, group: str | None) -> kernel.Keys:
    """Build the kernel's keys of rows: what identifies and groups them."""
    images = np.array(rows.column(cols.IMAGE_ID).to_pylist(), dtype=np.bytes_)
    return kernel.Keys(images, rows.column(cols.FRAME).to_numpy().astype(np.int64), _groups(rows, group))


def _groups(rows: pa.Table, group: str | None) -> NDArray[np.bytes_] | None:
    return None if group is None else np.array(rows.column(group).to_pylist(), dtype=np.bytes_)


def excluded_pairs(rows: pa.Table, inputs: SearchInputs) -> kernel.ExcludedPairs | None:
    """Find the rows that some queries exclude; None where there is nothing to exclude."""
    pairs = {
        (query, row)
        for column, of_value in inputs.exclusions.items()
        for row, value in enumerate(rows.column(column).to_pylist())
        for query in of_value.get(value, ())
    }
    if not pairs and not inputs.filters:
        return None
    found = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    paired = kernel.Pairs(found[:, 0], found[:, 1])
    if not inputs.filters:
        return kernel.ExcludedPairs(paired)
    rejected = np.stack([each.rejects(rows) for each in inputs.filters])
    return kernel.ExcludedPairs(paired, rejected, inputs.filter_of)


def not_imputed(rows: pa.Table) -> NDArray[np.bool_]:
    return np.array(
        [source != cols.FROM_PREDICTION for source in rows.column(cols.BODY_PART_SOURCE).to_pylist()], dtype=bool
    )


def with_partition(rows: pa.Table, place: Place) -> pa.Table:
    for name, value in zip((cols.MODALITY, cols.BODY_PART), place, strict=True):
        rows = rows.append_column(name, pa.repeat(value, len(rows)))
    return rows


def locations_of(file: VectorFile, number: int, row_groups: Sequence[int]) -> Locations:
    """Return the (3, n) locations of the rows of some row groups."""
    counts = [file.rows_of(group) for group in row_groups]
    return np.stack(
        [
            np.full(sum(counts), number, dtype=np.int32),
            np.repeat(np.asarray(row_groups, dtype=np.int32), counts),
            np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        ]
    )
