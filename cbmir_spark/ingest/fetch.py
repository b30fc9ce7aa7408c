"""Read objects from storage ahead of the one that is being decoded. Runs in threads of a task; no Spark."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from cbmir_spark import storage
from cbmir_spark.dicom.reasons import Reason
from cbmir_spark.ingest.listing import CONTENT, NOT_A_FILE
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore, StoredObject

# Objects and bytes that a task reads ahead of the one that it decodes: storage answers late, and a core need not wait.
READ_AHEAD, READ_AHEAD_BYTES = 4, 64 * 2**20


@dataclass(frozen=True)
class Fetched:
    """The content of an object with its SHA-256, or the outcome and reason of one that could not be read.

    `found` describes exactly the bytes of `content`; None where the content came with the listing.
    """

    content: bytes | None = None
    digest: str | None = None
    found: StoredObject | None = None
    outcome: str = ""
    reason: str | None = None


def fetch(uri: str, size: int, store: ObjectStore, max_bytes: int, content: bytes | None = None) -> Fetched:
    """Read an object, unless its `content` is given; nothing past `max_bytes` is read. `size` is the listing's."""
    if content is not None:
        if len(content) != size:
            return Fetched(outcome=cols.VANISHED, reason=cols.REPLACED)
        return Fetched(content, hashlib.sha256(content).hexdigest())
    if size == NOT_A_FILE:
        return Fetched(outcome=cols.NOT_AN_IMAGE, reason=cols.NOT_A_FILE)
    if size > max_bytes:
        return Fetched(outcome=cols.REJECTED, reason=Reason.TOO_LARGE.value)
    try:
        content, found = store.read(uri)
    except FileNotFoundError:
        return Fetched(outcome=cols.VANISHED, reason=cols.GONE)
    except storage.Replaced:
        return Fetched(outcome=cols.VANISHED, reason=cols.REPLACED)
    except OSError:
        return Fetched(outcome=cols.REJECTED, reason=cols.UNREADABLE)
    return Fetched(content, hashlib.sha256(content).hexdigest(), found)


def fetch_ahead(
    objects: Iterable[dict[str, Any]], store: ObjectStore, max_bytes: int, readers: Executor
) -> Iterator[tuple[dict[str, Any], Fetched]]:
    """Yield each listed row (uri, size, …) in turn with what was read; the next ones are read meanwhile.

    Rows that bring their bytes in CONTENT are returned without them.
    """
    ahead: deque[tuple[dict[str, Any], Future[Fetched]]] = deque()
    size = 0

    def first() -> tuple[dict[str, Any], Fetched]:
        listed, reading = ahead.popleft()
        return listed, reading.result()

    for listed in objects:
        content = listed.pop(CONTENT, None)
        ahead.append((listed, readers.submit(fetch, listed[cols.URI], listed[cols.SIZE], store, max_bytes, content)))
        size += listed[cols.SIZE]
        while ahead and (len(ahead) > READ_AHEAD or size > READ_AHEAD_BYTES):
            size -= ahead[0][0][cols.SIZE]
            yield first()
    while ahead:
        yield first()
