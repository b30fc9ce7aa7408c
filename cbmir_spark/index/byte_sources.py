"""Byte ranges of a stored file, read in parallel and ahead of use."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.errors import TableError
from cbmir_spark.storage import ObjectStore
from cbmir_spark.storage.s3 import CONNECT_SECONDS, READ_SECONDS

# Ranges of an object this near to each other are one request, and one request is at most so long.
_HOLE_BYTES = 2**16
_REQUEST_BYTES = 2**22
# Requests that one task has under way: object storage answers each in tens of milliseconds.
_REQUESTS = 16


class Source(Protocol):
    sent: int
    """Bytes that were asked for so far."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say that sorted ranges (offset, size) will be read soon."""

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        """Put the bytes of ranges (offset, size), which do not overlap, at their places in `out`."""

    def close(self) -> None: ...


class Local:
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


class Remote:
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
def file_system(store: ObjectStore) -> pa.fs.FileSystem:
    """Object storage as Arrow reads it, with the credentials of wherever the task runs."""
    settings = store.settings
    if settings.endpoint and not settings.path_style:
        # Arrow's own client puts the bucket into the path wherever it is told an endpoint.
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(store.file_system(ahead=False)))
    scheme, _, host = (settings.endpoint or "").partition("://")
    return pa.fs.S3FileSystem(
        region=settings.region,
        scheme=scheme or "https",
        endpoint_override=host or None,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=settings.attempts),
    )
