"""Scans of FEATURES' files, as tasks run them: shares of Parquet files in, the pairs that may be results out.

`bounds` reads projections alone and says which pairs of queries and rows cannot be ruled out; `measured` reads the
vectors of such rows; `scanned` reads every vector. A task reads its files itself: it needs single columns and single
row groups, and takes vectors from Parquet's pages to the matrix product without going through rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbmir_spark import arrays, kernel, storage
from cbmir_spark import bounds as bounds_room
from cbmir_spark import tables as t
from cbmir_spark.bounds import Bounds, Left, Points
from cbmir_spark.config import StorageSettings

# (modality, body_part)
Place = tuple[str, str]

# Columns of partitions are in no file.
SHOWN = tuple(
    f.name for f in t.RESULTS_HITS.schema if f.name not in (t.QUERY_ID, t.RANK, t.DISTANCE, t.MODALITY, t.BODY_PART)
)
# Rows whose projections are compared at a time.
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class DataFile:
    """A live Parquet file of FEATURES, by its number among those searched."""

    number: int
    uri: str
    place: Place
    bytes: int


@dataclass(frozen=True)
class Share:
    """Every `of`-th row group of a file, from `part` on."""

    file: DataFile
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class Wanted:
    """Pairs of queries and rows of one row group, with the lower bound of their squared distance.

    `limit` (Q,) is what the squared distance of a query's last hit does not exceed; all parts of a search share it.
    """

    file: DataFile
    row_group: int
    query: NDArray[np.int64]
    row: NDArray[np.int64]
    lower: NDArray[np.float64]
    limit: NDArray[np.float64]


@dataclass(frozen=True)
class Within:
    """What the rows that a query meets must have; None: anything. A row that does not say has nothing."""

    sex: str | None = None
    age_min: float | None = None
    age_max: float | None = None
    year_min: int | None = None
    year_max: int | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns that it looks at."""
        asked = {
            t.SEX: self.sex is not None,
            t.AGE_YEARS: self.age_min is not None or self.age_max is not None,
            t.YEAR: self.year_min is not None or self.year_max is not None,
        }
        return tuple(name for name, needed in asked.items() if needed)

    def bars(self, rows: pa.Table) -> NDArray[np.bool_]:
        """(n,) mask of the rows that are not within."""
        inside = np.ones(len(rows), dtype=bool)
        if self.sex is not None:
            inside &= np.array([value == self.sex for value in rows.column(t.SEX).to_pylist()], dtype=bool)
        for column, least, most in ((t.AGE_YEARS, self.age_min, self.age_max), (t.YEAR, self.year_min, self.year_max)):
            if least is None and most is None:
                continue
            # What is null becomes not-a-number, which is neither above nor below anything.
            values = rows.column(column).cast(pa.float64()).to_numpy()
            inside &= (values >= (-np.inf if least is None else least)) & (values <= (np.inf if most is None else most))
        return ~inside


ANYTHING = Within()


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
    storage: StorageSettings
    points: Points | None = None
    """The queries' projections, and how far those are from orthonormal, where the bound is to be tried."""
    defect: float = 0.0
    most_pairs: int = 0
    """Pairs that bounds may leave of a task's share: all tasks' come to the driver."""

    def columns(self) -> tuple[str, ...]:
        """What has to be read of a row to know which queries meet it."""
        needed = {name for within in self.within for name in within.columns()} | set(self.own)
        needed |= set() if self.group is None else {self.group}
        needed |= set() if self.imputed else {t.BODY_PART_SOURCE}
        return tuple(sorted(needed))


@dataclass(frozen=True)
class Read:
    """What a task read: rows, and bytes of column chunks as they are stored."""

    rows: int = 0
    bytes: int = 0

    def __add__(self, other: "Read") -> "Read":
        return Read(self.rows + other.rows, self.bytes + other.bytes)


@dataclass(frozen=True)
class Bounded:
    """What bounds left of a task's share: pairs whose `left.row` indexes `file`, `row_group` and `row`, (m,) each.

    `left` is None where the bound is of no use.
    """

    left: Left | None
    file: NDArray[np.int64]
    row_group: NDArray[np.int64]
    row: NDArray[np.int64]
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


def bounds(shares: Sequence[Share], job: Job) -> Bounded:
    """Which pairs of the job's queries and the rows of `shares` may be results, by their projections."""
    assert job.points is not None
    search = Bounds(job.points, job.k, job.defect, job.block_bytes, job.most_pairs)
    columns = (t.PROJECTION, t.RESIDUAL_NORM, *job.columns())
    read = Read()
    places: list[NDArray[np.int64]] = [np.empty((3, 0), dtype=np.int64)]
    for share in shares:
        with _opened(share.file, job.storage) as file:
            for row_groups in _portions(file, share, _ROWS_AT_ONCE):
                rows = file.read_row_groups(row_groups, columns, use_threads=False)
                read += Read(len(rows), _bytes(file, row_groups, columns))
                places.append(_places(file, share.file.number, row_groups))
                if not job.imputed:
                    kept = _not_imputed(rows)
                    rows, places[-1] = rows.filter(pa.array(kept)), places[-1][:, kept]
                search.add(
                    Points.of(arrays.matrix(rows.column(t.PROJECTION)), rows.column(t.RESIDUAL_NORM).to_numpy()),
                    _groups(rows, job.group),
                    job.lists[job.list_of[share.file.place]],
                    _hidden(rows, job),
                )
                if search.hopeless:
                    nothing = np.empty(0, dtype=np.int64)
                    return Bounded(None, nothing, nothing, nothing, search.candidates, read)
    left = search.left()
    file_numbers, groups, rows_of = np.concatenate(places, axis=1)[:, left.row]
    return Bounded(left, file_numbers, groups, rows_of, search.candidates, read)


def measured(wanted: Sequence[Wanted], job: Job) -> Found | None:
    """The pairs of `wanted` that may be results, by whole vectors; None where there are none.

    Row groups that hold the most promising pairs come first: what they give lowers the limits that others are held to,
    so that of many row groups few pairs are measured, and some are not read at all.
    """
    columns = (t.VECTOR, *SHOWN)
    squares_of = kernel.square_norms(job.vectors)
    limit = wanted[0].limit.copy()
    best: Left | None = None
    kept: list[pa.Table] = []
    seen = 0
    read = Read()
    with ExitStack() as stack:
        opened: dict[int, pq.ParquetFile] = {}
        for part in sorted(wanted, key=_promise):
            near = part.lower <= limit[part.query]
            if not near.any():
                continue
            if part.file.number not in opened:
                opened[part.file.number] = stack.enter_context(_opened(part.file, job.storage))
            file = opened[part.file.number]
            table = file.read_row_group(part.row_group, columns, use_threads=False)
            read += Read(len(table), _bytes(file, [part.row_group], columns))
            rows, row = np.unique(part.row[near], return_inverse=True)
            vectors = arrays.matrix(table.column(t.VECTOR), job.vectors.shape[1])[rows]
            shown = table.select(SHOWN).take(rows)
            pairs = kernel.contenders(job.vectors, squares_of, vectors, kernel.Pairs(part.query[near], row), limit)
            square = kernel.squares(job.vectors, vectors, pairs.query, pairs.row)
            group = _groups(shown, job.group)
            # Different squares may have the same root, and then the image's name decides.
            found = Left(
                pairs.query,
                seen + pairs.row,
                lower=square,
                upper=square * (1 + 2.0**-50),
                group=None if group is None else group[pairs.row],
            )
            best, kth = bounds_room.settle(found if best is None else bounds_room.join([best, found]), job.k)
            limit = np.minimum(limit, kth)
            kept.append(_placed(shown, part.file.place))
            seen += len(shown)
    if best is None:
        return None
    used, row = np.unique(best.row, return_inverse=True)
    nothing = np.zeros(len(job.k), dtype=np.int64)
    return Found(best.query, best.lower, row, pa.concat_tables(kept).take(used), nothing, read)


def _promise(part: Wanted) -> tuple[float, int, int]:
    """Sorts parts by how far their best pair lies below what is still possible, in a fixed order."""
    limit = part.limit[part.query]
    share = part.lower / np.where(limit > 0, limit, 1.0)
    return float(share.min()), part.file.number, part.row_group


def scanned(shares: Sequence[Share], job: Job) -> Found | None:
    """The nearest groups of each of the job's queries among the rows of `shares`; None where those are none.

    Memory: a block of vectors and a matrix of distances, together at most `block_bytes`, and Σk rows without vectors.
    """
    search = kernel.Search(job.vectors, job.k, job.block_bytes // 2, job.cosine)
    numbers = np.empty(0, dtype=np.int64)
    kept: pa.Table | None = None
    read = Read()
    for share in shares:
        for vectors, rows, took in _blocks(share, job):
            read += took
            if not job.imputed:
                known = _not_imputed(rows)
                vectors, rows = vectors[known], rows.filter(pa.array(known))
            before = search.rows_seen
            asked = job.lists[job.list_of[share.file.place]]
            search.add(vectors, keys_of(rows, job.group), asked, _hidden(rows, job))
            # Rows that can no longer be results are dropped.
            shown = _placed(rows.select(SHOWN), share.file.place)
            numbers = np.concatenate([numbers, np.arange(before, search.rows_seen)])
            kept = shown if kept is None else pa.concat_tables([kept, shown])
            places = np.searchsorted(numbers, search.rows)
            numbers, kept = numbers[places], kept.take(places)
    if kept is None:
        return None
    nearest = search.results()
    row = np.searchsorted(numbers, nearest.row)
    return Found(nearest.query, nearest.square, row, kept.combine_chunks(), search.candidates, read)


def _blocks(share: Share, job: Job) -> Iterator[tuple[NDArray[np.float32], pa.Table, Read]]:
    """Vectors of a share's rows, (n, D) float32, and the other columns that are needed.

    The vectors of a row group are decoded while they fit the processor's cache and then put side by side: decoding many
    row groups at once takes twice the time. The array is used again for the next block.
    """
    columns = tuple(dict.fromkeys((*SHOWN, *job.columns())))
    dimension = job.vectors.shape[1]
    height = max(1, job.block_bytes // 2 // (4 * dimension))
    with _opened(share.file, job.storage) as file:
        buffer = np.empty((0, dimension), dtype=np.float32)
        for row_groups in _portions(file, share, height):
            count = sum(file.metadata.row_group(number).num_rows for number in row_groups)
            if len(buffer) < count:
                buffer = np.empty((count, dimension), dtype=np.float32)
            parts = []
            filled = 0
            for number in row_groups:
                table = file.read_row_group(number, (t.VECTOR, *columns), use_threads=False)
                buffer[filled : filled + len(table)] = arrays.matrix(table.column(t.VECTOR), dimension)
                parts.append(table.select(columns))
                filled += len(table)
            took = Read(count, _bytes(file, row_groups, (t.VECTOR, *columns)))
            yield buffer[:count], pa.concat_tables(parts), took


# --- rows ---


def keys_of(rows: pa.Table, group: str | None) -> kernel.Keys:
    """What identifies rows and groups them, as the kernel takes it."""
    images = np.array(rows.column(t.IMAGE_ID).to_pylist(), dtype=np.bytes_)
    return kernel.Keys(images, rows.column(t.FRAME).to_numpy().astype(np.int64), _groups(rows, group))


def _groups(rows: pa.Table, group: str | None) -> NDArray[np.bytes_] | None:
    return None if group is None else np.array(rows.column(group).to_pylist(), dtype=np.bytes_)


def _hidden(rows: pa.Table, job: Job) -> kernel.Hidden | None:
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


def _not_imputed(rows: pa.Table) -> NDArray[np.bool_]:
    return np.array([source != t.FROM_PREDICTION for source in rows.column(t.BODY_PART_SOURCE).to_pylist()], dtype=bool)


def _placed(rows: pa.Table, place: Place) -> pa.Table:
    for name, value in zip((t.MODALITY, t.BODY_PART), place, strict=True):
        rows = rows.append_column(name, pa.repeat(value, len(rows)))
    return rows


# --- files ---


@lru_cache(maxsize=4)
def _file_system(files: StorageSettings) -> pa.fs.FileSystem:
    """Object storage as Arrow reads it, with the credentials of wherever the task runs."""
    if files.endpoint and not files.path_style:
        # Arrow's own client puts the bucket into the path wherever it is told an endpoint.
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(storage.file_system(files)))
    scheme, _, host = (files.endpoint or "").partition("://")
    return pa.fs.S3FileSystem(
        region=files.region,
        scheme=scheme or "https",
        endpoint_override=host or None,
        connect_timeout=storage.CONNECT_SECONDS,
        request_timeout=storage.READ_SECONDS,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=files.attempts),
    )


def _opened(file: DataFile, files: StorageSettings) -> pq.ParquetFile:
    if storage.is_local(file.uri):
        return pq.ParquetFile(storage.local_path(file.uri), memory_map=True)
    return pq.ParquetFile(file.uri.removeprefix("s3a://"), filesystem=_file_system(files), pre_buffer=True)


def _portions(file: pq.ParquetFile, share: Share, rows: int) -> Iterator[list[int]]:
    """The share's row groups, as many at a time as have about so many rows."""
    portion: list[int] = []
    held = 0
    for number in range(share.part, file.num_row_groups, share.of):
        count = file.metadata.row_group(number).num_rows
        if portion and held + count > rows:
            yield portion
            portion, held = [], 0
        portion.append(number)
        held += count
    if portion:
        yield portion


def _places(file: pq.ParquetFile, number: int, row_groups: Sequence[int]) -> NDArray[np.int64]:
    """(3, n) file, row group and row within it of each row."""
    counts = [file.metadata.row_group(group).num_rows for group in row_groups]
    return np.stack(
        [
            np.full(sum(counts), number, dtype=np.int64),
            np.repeat(np.asarray(row_groups, dtype=np.int64), counts),
            np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
        ]
    )


def _bytes(file: pq.ParquetFile, row_groups: Sequence[int], columns: Sequence[str]) -> int:
    """Stored bytes of some columns of some row groups."""
    wanted = set(columns)
    schema = file.metadata.schema
    chosen = [n for n in range(len(schema)) if schema.column(n).path.partition(".")[0] in wanted]
    return sum(
        file.metadata.row_group(group).column(number).total_compressed_size for group in row_groups for number in chosen
    )
