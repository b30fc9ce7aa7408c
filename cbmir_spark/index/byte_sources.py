"""Read byte ranges of a stored file, several at a time and ahead of use. Runs in tasks."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs
from numpy.typing import NDArray

from cbmir_spark.errors import TableError
from cbmir_spark.storage import ObjectStore
from cbmir_spark.storage.s3 import CONNECT_SECONDS, READ_SECONDS

# Ranges of an object with a smaller gap become one request, up to a maximum length.
_GAP_BYTES = 2**16
_REQUEST_BYTES = 2**22
# Requests that a task has in flight: object storage answers each in tens of milliseconds.
_REQUESTS = 16


class Source(Protocol):
    requested: int
    """Bytes requested so far."""

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch sorted ranges (offset, size) ahead of their use, if the source can."""

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        """Copy the bytes of ranges (offset, size), which do not overlap, to their places in `out`."""

    def close(self) -> None: ...


class Local:
    """A local file. It is read, not mapped: touched pages of a map would count as the task's memory.

    Prefetching advises the kernel of the ranges, which it then fetches at once and without anything else. Without the
    advice it fetches one vector after the other, each with megabytes of unneeded read-ahead.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.requested = 0

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        # posix_fadvise exists on Linux only.
        if sys.platform == "linux":
            for offset, size in merge(ranges):
                os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        target = out.data
        self.prefetch(sorted(ranges))
        for (offset, size), place in zip(ranges, places, strict=True):
            filled = 0
            while filled < size:
                got = os.preadv(self._file, [target[place + filled : place + size]], offset + filled)
                if not got:
                    raise TableError(
                        f"a file of the index is cut short at byte {offset + filled}: remove the table and index again"
                    )
                filled += got
            self.requested += size

    def close(self) -> None:
        os.close(self._file)


class Remote:
    """An object in object storage; several ranges are fetched at a time."""

    def __init__(self, path: str, files: pa.fs.FileSystem) -> None:
        self._object = files.open_input_file(path)
        self.requested = 0

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def copy(self, ranges: Sequence[tuple[int, int]], out: NDArray[np.uint8], places: Sequence[int]) -> None:
        order = sorted(range(len(ranges)), key=lambda number: ranges[number])
        requests = merge([ranges[number] for number in order])
        numbers = iter(order)
        number = next(numbers, None)
        # Ranges in flight, with their gaps, take memory beside `out`.
        for start in range(0, len(requests), _REQUESTS):
            some = requests[start : start + _REQUESTS]
            for (begin, length), content in zip(some, _pool().map(self._fetched, some), strict=True):
                self.requested += length
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
    """The threads of this process for requests; a process runs one task at a time."""
    return ThreadPoolExecutor(_REQUESTS)


def merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge sorted ranges (offset, size) that are near each other into requests."""
    requests: list[tuple[int, int]] = []
    for offset, size in ranges:
        if requests:
            start, length = requests[-1]
            if offset - (start + length) <= _GAP_BYTES and offset + size - start <= _REQUEST_BYTES:
                requests[-1] = (start, max(length, offset + size - start))
                continue
        requests.append((offset, size))
    return requests


@lru_cache(maxsize=4)
def file_system(store: ObjectStore) -> pa.fs.FileSystem:
    """Build Arrow's file system for object storage, with the credentials of the machine that runs the task."""
    settings = store.settings
    if settings.endpoint and not settings.path_style:
        # Arrow's client puts the bucket into the path if an endpoint is set.
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
