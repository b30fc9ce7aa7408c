"""Parquet files of FEATURES as tasks read them: single columns, single row groups, and vectors by their place.

FEATURES is written so that the vectors of a row group lie side by side in its file, uncompressed, at the end of one
page (Parquet format, "Data Pages": levels come first, then values as they are in memory). There a vector is read by its
offset, and nothing is decoded. Files that others have written or rewritten are decoded by Arrow instead.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbmir_spark import arrays, storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import TableError

# (modality, body_part)
Place = tuple[str, str]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

# Ranges of an object this near to each other are one request, and one request is at most so long.
_HOLE_BYTES = 2**16
_REQUEST_BYTES = 2**22
# Files that a task holds open; each takes two descriptors.
_OPEN_FILES = 128
# Requests that one task has under way: object storage answers each in tens of milliseconds.
_REQUESTS = 16
# A page's header, as far as the number of its values: five 32-bit numbers of at most six bytes each, and a byte.
_HEADER_BYTES = 64
# Thrift's types in the compact protocol.
_INT, _STRUCT = 5, 12


@dataclass(frozen=True)
class DataFile:
    """A live Parquet file of FEATURES, by its number among those searched."""

    number: int
    uri: str
    place: Place
    bytes: int


@dataclass(frozen=True)
class Read:
    """What was read: vectors, and bytes of the file."""

    vectors: int = 0
    bytes: int = 0

    def __add__(self, other: "Read") -> "Read":
        return Read(self.vectors + other.vectors, self.bytes + other.bytes)

    def __sub__(self, other: "Read") -> "Read":
        return Read(self.vectors - other.vectors, self.bytes - other.bytes)


class VectorFile:
    """An open file. `read` counts the vectors and the bytes that were taken from it."""

    def __init__(self, file: DataFile, files: StorageSettings) -> None:
        self.place = file.place
        self._source: _Source
        if storage.is_local(file.uri):
            path = storage.local_path(file.uri)
            self._source = _Local(path)
            self._file = pq.ParquetFile(path, memory_map=True)
        else:
            path = file.uri.removeprefix("s3a://")
            self._source = _Remote(path, _file_system(files))
            self._file = pq.ParquetFile(path, filesystem=_file_system(files), pre_buffer=True)
        self._values_of: dict[str, Numbers | None] = {}
        names = [self._file.metadata.schema.column(n).path.partition(".")[0] for n in range(len(self._file.schema))]
        self._number_of = {name: number for number, name in enumerate(names)}
        self.read = Read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._source.close()

    def portions(self, part: int, of: int, rows: int, first: int = 0) -> Iterator[list[int]]:
        """Every `of`-th row group from `part` on, as many at a time as have so many rows.

        At most: a row group of more comes alone. The first portion has at most `first` rows, where that is given.
        """
        portion: list[int] = []
        held, most = 0, first or rows
        for number in range(part, self._file.num_row_groups, of):
            count = self.rows_of(number)
            if portion and held + count > most:
                yield portion
                portion, held, most = [], 0, rows
            portion.append(number)
            held += count
        if portion:
            yield portion

    def rows_of(self, row_group: int) -> int:
        return int(self._file.metadata.row_group(row_group).num_rows)

    def table(self, row_groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Columns of all rows of some row groups."""
        numbers = [self._number_of[name] for name in columns]
        groups = [self._file.metadata.row_group(group) for group in row_groups]
        chunks = [group.column(number) for group in groups for number in numbers]
        sizes = [int(chunk.total_compressed_size) for chunk in chunks]
        self.read += Read(bytes=sum(sizes))
        self._source.announce(sorted(zip(map(_begin, chunks), sizes, strict=True)))
        return self._file.read_row_groups(row_groups, columns, use_threads=False)

    def vectors(self, column: str, row_groups: Sequence[int], dimension: int, out: Floats | None = None) -> Floats:
        """(n, D) the vectors of all rows of some row groups, in `out` where one is given that is high enough."""
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
            # One at a time, so that what is decoded stays in the processor's cache.
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
        """Put the vectors of n different rows, each by its row group and its number there, into (n, D) `out`."""
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
        before = self._source.sent
        self._source.copy(ranges, out, places)
        self.read += Read(bytes=self._source.sent - before)

    def _values(self, column: str, dimension: int) -> Numbers | None:
        """Where in the file the vectors of each row group begin; None where they do not lie there side by side.

        FEATURES' constraints say that all are of one length. A writer ends a page by its size, so that what holds for
        the biggest chunk holds for all.
        """
        if column not in self._values_of:
            groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
            chunks = [group.column(self._number_of[column]) for group in groups]
            sizes = [4 * dimension * group.num_rows for group in groups]
            plain = all(_as_in_memory(chunk, size // 4) for chunk, size in zip(chunks, sizes, strict=True))
            if plain and chunks and self._is_one_page(max(chunks, key=lambda each: each.total_compressed_size)):
                ends = [chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks]
                self._values_of[column] = np.array(ends, np.int64) - np.array(sizes, np.int64)
            else:
                self._values_of[column] = None
        return self._values_of[column]

    def _is_one_page(self, chunk: pq.ColumnChunkMetaData) -> bool:
        header = np.empty(min(_HEADER_BYTES, chunk.total_compressed_size), np.uint8)
        self._source.copy([(chunk.data_page_offset, len(header))], header, [0])
        return page_values(header.tobytes()) == int(chunk.num_values)


class OpenFiles:
    """Files by their number, opened when they are wanted; a few at a time. `read` counts what was taken from all."""

    def __init__(self, files: Mapping[int, DataFile], storage_settings: StorageSettings) -> None:
        self._files = files
        self._storage = storage_settings
        self._open: OrderedDict[int, VectorFile] = OrderedDict()
        self._read = Read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._open:
            self._close_oldest()

    def __getitem__(self, number: int) -> VectorFile:
        """The open file; it may be closed when others have been asked for."""
        if number not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._close_oldest()
            self._open[number] = VectorFile(self._files[number], self._storage)
        self._open.move_to_end(number)
        return self._open[number]

    @property
    def read(self) -> Read:
        return sum((file.read for file in self._open.values()), self._read)

    def _close_oldest(self) -> None:
        _, file = self._open.popitem(last=False)
        self._read += file.read
        file.__exit__(None, None, None)


def _begin(chunk: pq.ColumnChunkMetaData) -> int:
    """Where in its file a chunk begins: with its dictionary, where it has one."""
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


def _as_in_memory(chunk: pq.ColumnChunkMetaData, values: int) -> bool:
    """Whether a chunk holds just so many numbers, as they are in memory."""
    told = chunk.statistics
    return (
        chunk.physical_type == "FLOAT"
        and chunk.compression == "UNCOMPRESSED"
        and set(chunk.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}
        and not chunk.has_dictionary_page
        and chunk.num_values == values
        and told is not None
        and told.has_null_count
        and told.null_count == 0
    )


def page_values(header: bytes) -> int | None:
    """How many values the uncompressed data page has that a header begins; None where it begins something else.

    A header is a Thrift struct in the compact protocol (Parquet format, "Metadata", PageHeader): type, uncompressed and
    compressed size, perhaps a checksum, and the header of a data page, field 5, or of one of version 2, field 8, which
    itself begins with the number of values.
    """
    place = 0

    def number() -> int:
        """A zigzag number, seven bits a byte."""
        nonlocal place
        value = shift = 0
        while True:
            byte = header[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return (value >> 1) ^ -(value & 1)

    found: dict[int, int] = {}
    field = 0
    try:
        while True:
            step, kind = header[place] >> 4, header[place] & 0x0F
            place += 1
            field += step
            if kind == _STRUCT and field in (5, 8) and header[place] == 0x10 | _INT:
                place += 1
                same = found.get(2) == found.get(3)
                return number() if same and found.get(1) == {5: 0, 8: 3}[field] else None
            if kind != _INT or not step:
                return None
            found[field] = number()
    except IndexError:
        return None


# --- bytes of a file ---


class _Source(Protocol):
    sent: int
    """Bytes that were asked for so far."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say that sorted ranges (offset, size) will be read soon."""

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        """Put the bytes of ranges (offset, size), which do not overlap, at their places in `out`."""

    def close(self) -> None: ...


class _Local:
    """A local file. It is read and not mapped: what was seen of a map counts as the task's memory.

    The kernel is told beforehand what will be read: it then fetches all of it at once from the disk, and nothing else.
    Left to itself it waits for each vector, and reads megabytes ahead that nobody asks for.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.sent = 0

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        # Not every system has this call.
        if sys.platform == "linux":
            for offset, size in merged(ranges):
                os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        target = out.data
        self.announce(sorted(ranges))
        for (offset, size), place in zip(ranges, places, strict=True):
            filled = 0
            while filled < size:
                got = os.preadv(self._file, [target[place + filled : place + size]], offset + filled)
                if not got:
                    raise TableError(f"a file of the index ends at {offset + filled}, before its last row")
                filled += got
            self.sent += size

    def close(self) -> None:
        os.close(self._file)


class _Remote:
    """An object, of which several ranges are fetched at a time."""

    def __init__(self, path: str, files: pa.fs.FileSystem) -> None:
        self._object = files.open_input_file(path)
        self.sent = 0

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        order = sorted(range(len(ranges)), key=lambda number: ranges[number])
        requests = merged([ranges[number] for number in order])
        numbers = iter(order)
        number = next(numbers, None)
        # What is under way is beside `out`, holes included.
        for start in range(0, len(requests), _REQUESTS):
            some = requests[start : start + _REQUESTS]
            for (begin, length), content in zip(some, _pool().map(self._fetched, some), strict=True):
                self.sent += length
                whole = np.frombuffer(content, np.uint8)
                while number is not None and sum(ranges[number]) <= begin + length:
                    offset, size = ranges[number]
                    out[places[number] : places[number] + size] = whole[offset - begin : offset - begin + size]
                    number = next(numbers, None)

    def _fetched(self, request: tuple[int, int]) -> bytes:
        begin, length = request
        content: bytes = self._object.read_at(length, begin)
        return content

    def close(self) -> None:
        self._object.close()


@cache
def _pool() -> ThreadPoolExecutor:
    """A process's own threads for requests; a process runs one task at a time."""
    return ThreadPoolExecutor(_REQUESTS)


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges (offset, size) as requests, in which near ones are together."""
    requests: list[tuple[int, int]] = []
    for offset, size in ranges:
        if requests:
            start, length = requests[-1]
            if offset - (start + length) <= _HOLE_BYTES and offset + size - start <= _REQUEST_BYTES:
                requests[-1] = (start, max(length, offset + size - start))
                continue
        requests.append((offset, size))
    return requests


@lru_cache(maxsize=4)
def _file_system(files: StorageSettings) -> pa.fs.FileSystem:
    """Object storage as Arrow reads it, with the credentials of wherever the task runs."""
    if files.endpoint and not files.path_style:
        # Arrow's own client puts the bucket into the path wherever it is told an endpoint.
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(storage.file_system(files, ahead=False)))
    scheme, _, host = (files.endpoint or "").partition("://")
    return pa.fs.S3FileSystem(
        region=files.region,
        scheme=scheme or "https",
        endpoint_override=host or None,
        connect_timeout=storage.CONNECT_SECONDS,
        request_timeout=storage.READ_SECONDS,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=files.attempts),
    )
