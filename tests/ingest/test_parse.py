"""Objects are read ahead of the one that is decoded: in order, each with what became of it, within bounds."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from cbmir_spark import storage
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore
from tests.conftest import MakeSettings


@pytest.fixture
def parser(make_settings: MakeSettings) -> parse.Parser:
    settings = make_settings("ingest.max_object_mb=40")
    preprocessing = parse.preprocessing_of(settings)
    return parse.Parser(ObjectStore(settings.storage), settings.ingest, preprocessing, {}, None)  # type: ignore[arg-type]


def listed(number: int, megabytes: float) -> dict[str, Any]:
    return {cols.URI: f"file:///{number}", cols.SIZE: int(megabytes * 2**20)}


def test_objects_are_read_ahead_in_order_within_bounds(parser: parse.Parser, monkeypatch: pytest.MonkeyPatch) -> None:
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
            assert len(waiting) <= parse.READ_AHEAD
            assert sum(objects[n][cols.SIZE] for n in waiting) <= parse.READ_AHEAD_BYTES
            yield each

    reasons = []
    with ThreadPoolExecutor(parse.READ_AHEAD) as readers:
        for each, fetched in parse._fetched(asked(), parser, readers):
            taken.append(int(each[cols.URI].rsplit("/", 1)[1]))
            reasons.append(fetched.row.get(cols.REASON))
            assert (fetched.content is None) == (cols.REASON in fetched.row)
            # The one that is decoded and those read ahead of it, no more.
            assert len(begun) <= len(taken) + parse.READ_AHEAD
    assert taken == list(range(len(sizes)))
    expected = {3: parse.GONE, 5: cols.UNREADABLE, 11: parse.TOO_LARGE}
    assert reasons == [expected.get(number) for number in range(len(sizes))]
    assert sorted(begun) == [number for number in range(len(sizes)) if number != 11]
