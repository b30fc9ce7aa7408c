"""Objects are read ahead of the one that is decoded: in order, each with its outcome, within bounds."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from cbmir_spark import config, storage
from cbmir_spark.dicom.reasons import Reason
from cbmir_spark.ingest import fetch
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore

MAX_BYTES = 40 * 2**20


def listed(number: int, megabytes: float) -> dict[str, Any]:
    return {cols.URI: f"file:///{number}", cols.SIZE: int(megabytes * 2**20)}


def test_objects_are_read_ahead_in_order_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def read(_: ObjectStore, uri: str) -> tuple[bytes, storage.StoredObject]:
        number = int(uri.rsplit("/", 1)[1])
        with lock:
            begun.append(number)
        if number == 3:
            raise FileNotFoundError
        if number == 5:
            raise OSError
        return b"x", storage.StoredObject(uri, 1, datetime(2026, 1, 1, tzinfo=UTC))

    monkeypatch.setattr(ObjectStore, "read", read)
    sizes = [1.0, 1, 1, 1, 1, 1, 1, 1, 30, 30, 30, 41, 1]
    objects = [listed(number, size) for number, size in enumerate(sizes)]
    taken: list[int] = []

    def asked() -> Iterator[dict[str, Any]]:
        for number, each in enumerate(objects):
            waiting = range(len(taken), number)
            assert len(waiting) <= fetch.READ_AHEAD
            assert sum(objects[n][cols.SIZE] for n in waiting) <= fetch.READ_AHEAD_BYTES
            yield each

    reasons = []
    store = ObjectStore(config.load(environ={}).storage)
    with ThreadPoolExecutor(fetch.READ_AHEAD) as readers:
        for each, fetched in fetch.fetch_ahead(asked(), store, MAX_BYTES, readers):
            taken.append(int(each[cols.URI].rsplit("/", 1)[1]))
            reasons.append(fetched.reason)
            assert (fetched.content is None) == (fetched.reason is not None)
            # The one that is decoded and those read ahead of it, no more.
            assert len(begun) <= len(taken) + fetch.READ_AHEAD
    assert taken == list(range(len(sizes)))
    expected = {3: cols.GONE, 5: cols.UNREADABLE, 11: Reason.TOO_LARGE}
    assert reasons == [expected.get(number) for number in range(len(sizes))]
    assert sorted(begun) == [number for number in range(len(sizes)) if number != 11]
