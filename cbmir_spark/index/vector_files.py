"""Read Parquet files of FEATURES in tasks: single columns, single row groups, and vectors by their offset.

FEATURES is written (see layout.py) so that the vectors of a row group are contiguous in its file, uncompressed, at the
end of one page (Parquet format, "Data Pages": levels come first, then values as in memory). Such a vector is read by
its offset, without decoding. Files that other software wrote or rewrote are decoded by Arrow instead.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbmir_spark import storage
from cbmir_spark.index import arrays
from cbmir_spark.index.byte_sources import Local, Remote, Source, file_system
from cbmir_spark.index.layout import Place
from cbmir_spark.index.parquet_pages import HEADER_BYTES, as_in_memory, first_byte, page_values
from cbmir_spark.storage import ObjectStore

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
# Open files per task; each takes two descriptors.
OPEN_FILES = 128


@dataclass(frozen=True)
class DataFile:
    """A live Parquet file of FEATURES, with its number among the searched ones and its size in bytes."""

    number: int
    uri: str
    place: Place
    bytes: int


@dataclass(frozen=True)
class Read:
    """Vectors and stored bytes that were read."""

    vectors: int = 0
    bytes: int = 0

    def __add__(self, other: "Read") -> "Read":
        return Read(self.vectors + other.vectors, self.bytes + other.bytes)

    def __sub__(self, other: "Read") -> "Read":
        return Read(self.vectors - other.vectors, self.bytes - other.bytes)


class VectorFile:
    """An open file. `read` counts what was read from it."""

    def __init__(self, file: DataFile, store: ObjectStore) -> None:
        self.place = file.place
        self._source: Source
        if storage.is_local(file.uri):
            path = storage.local_path(file.uri)
            self._source = Local(path)
            self._file = pq.ParquetFile(path, memory_map=True)
        else:
            path = file.uri.removeprefix("s3a://")
            self._source = Remote(path, file_system(store))
            self._file = pq.ParquetFile(path, filesystem=file_system(store), pre_buffer=True)
        self._values_of: dict[str, Numbers | None] = {}
        names = [self._file.metadata.schema.column(n).path.partition(".")[0] for n in range(len(self._file.schema))]
        self._number_of = {name: number for number, name in enumerate(names)}
        self.read = Read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._source.close()

    def batches(self, part: int, of: int, rows: int, first: int = 0) -> Iterator[list[int]]:
        """Iterate over every `of`-th row group from `part` on, in batches of at most `rows` rows.

        A larger row group comes alone. The first batch has at most `first` rows, if given.
        """
        batch: list[int] = []
        total, limit = 0, first or rows
        for number in range(part, self._file.num_row_groups, of):
            count = self.rows_of(number)
            if batch and total + count > limit:
                yield batch
                batch, total, limit = [], 0, rows
            batch.append(number)
            total += count
        if batch:
            yield batch

    def rows_of(self, row_group: int) -> int:
        """The number of rows of a row group."""
        return int(self._file.metadata.row_group(row_group).num_rows)

    def table(self, row_groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Read columns of some row groups."""
        numbers = [self._number_of[name] for name in columns]
        groups = [self._file.metadata.row_group(group) for group in row_groups]
        chunks = [group.column(number) for group in groups for number in numbers]
        sizes = [int(chunk.total_compressed_size) for chunk in chunks]
        self.read += Read(bytes=sum(sizes))
        self._source.prefetch(sorted(zip(map(first_byte, chunks), sizes, strict=True)))
        return self._file.read_row_groups(row_groups, columns, use_threads=False)

    def vectors(self, column: str, row_groups: Sequence[int], dimension: int, out: Floats | None = None) -> Floats:
        """Read the (n, D) vectors of some row groups, into the first rows of `out` if given."""
        counts = [self.rows_of(number) for number in row_groups]
        self.read += Read(sum(counts))
        made = np.empty((sum(counts), dimension), np.float32) if out is None else out[: sum(counts)]
        starts = [int(start) for start in np.cumsum([0, *counts[:-1]])]
        values = self._values(column, dimension)
        if values is not None:
            size = 4 * dimension
            ranges = [(int(values[number]), count * size) for number, count in zip(row_groups, counts, strict=True)]
            self._fill(ranges, made.reshape(-1).view(np.uint8), [start * size for start in starts])
            return made
        for number, start, count in zip(row_groups, starts, counts, strict=True):
            # One at a time, so that decoded values stay in the processor's cache.
            decoded = self.table([number], [column]).column(column)
            made[start : start + count] = arrays.matrix(decoded, dimension)
        return made

    def some_vectors(
        self,
        column: str,
        row_group: NDArray[np.signedinteger[Any]],
        row: NDArray[np.signedinteger[Any]],
        out: Floats,
    ) -> None:
        """Read the vectors of n different rows, each named by row group and row in it, into (n, D) `out`."""
        self.read += Read(len(row))
        dimension = out.shape[1]
        values = self._values(column, dimension)
        if values is not None:
            size = 4 * dimension
            ranges = [(int(offset), size) for offset in values[row_group] + row.astype(np.int64) * size]
            self._fill(ranges, out.reshape(-1).view(np.uint8), [size * number for number in range(len(row))])
            return
        for number in np.unique(row_group):
            here = np.flatnonzero(row_group == number)
            decoded = self.table([int(number)], [column]).column(column)
            out[here] = arrays.matrix(decoded, dimension)[row[here]]

    def _fill(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        before = self._source.requested
        self._source.copy(ranges, out, places)
        self.read += Read(bytes=self._source.requested - before)

    def _values(self, column: str, dimension: int) -> Numbers | None:
        """The offsets in the file of each row group's vectors; None where they are not contiguous.

        FEATURES' constraints give all vectors one length. A writer ends a page by its size, so if the biggest chunk is
        one page, all are.
        """
        if column not in self._values_of:
            groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
            chunks = [group.column(self._number_of[column]) for group in groups]
            sizes = [4 * dimension * group.num_rows for group in groups]
            plain = all(as_in_memory(chunk, size // 4) for chunk, size in zip(chunks, sizes, strict=True))
            if plain and chunks and self._is_one_page(max(chunks, key=lambda each: each.total_compressed_size)):
                ends = [chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks]
                self._values_of[column] = np.array(ends, np.int64) - np.array(sizes, np.int64)
            else:
                self._values_of[column] = None
        return self._values_of[column]

    def _is_one_page(self, chunk: pq.ColumnChunkMetaData) -> bool:
        header = np.empty(min(HEADER_BYTES, chunk.total_compressed_size), np.uint8)
        self._source.copy([(chunk.data_page_offset, len(header))], header, [0])
        return page_values(header.tobytes()) == int(chunk.num_values)


class OpenFiles:
    """Files by their number, opened on first use; a few are open at a time. `read` counts what was read from all."""

    def __init__(self, files: Mapping[int, DataFile], store: ObjectStore) -> None:
        self._files = files
        self._store = store
        self._open: OrderedDict[int, VectorFile] = OrderedDict()
        self._read = Read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._open:
            self._close_oldest()

    def __getitem__(self, number: int) -> VectorFile:
        """The open file; using other files may close it."""
        if number not in self._open:
            if len(self._open) == OPEN_FILES:
                self._close_oldest()
            self._open[number] = VectorFile(self._files[number], self._store)
        self._open.move_to_end(number)
        return self._open[number]

    @property
    def read(self) -> Read:
        return sum((file.read for file in self._open.values()), self._read)

    def _close_oldest(self) -> None:
        _, file = self._open.popitem(last=False)
        self._read += file.read
        file.__exit__(None, None, None)
