"""Leases: one job at a time writes to the tables of a lake. Runs on the driver; no Spark.

Two drivers that append to one Delta table in object storage can lose each other's commits, so a job acquires a lease
before it writes, and checks it before each commit.

Below `file:` a lease is a lock on a file, which the kernel releases when its process ends, however it ends. Below
`s3a:` it is an object that is written only on condition that nobody else wrote it: its holder renews it. It is free
once it was not renewed for a minute by the storage's clock, or at once if its holder is known to have died on this
very machine. A holder that was suspended for longer finds out at its next check.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cbmir_spark import storage
from cbmir_spark.errors import Busy, EnvironmentProblem
from cbmir_spark.storage import ObjectStore

logger = logging.getLogger(__name__)

SECONDS = 60.0
FOLDER = "leases"
# TABLES covers SOURCES, TAGS and PIXELS; INDEX covers FEATURES.
TABLES, INDEX = "tables", "index"
# The clocks of the storage, in an object's time and in an answer's header, may differ by so much.
_CLOCK_SECONDS = 2.0
_RENEWALS_PER_LEASE = 4
# Attempts, while others acquire and release the lease in between.
_TRIES = 5


class Lease(ABC):
    """A lease that this process has acquired."""

    @abstractmethod
    def check(self) -> None:
        """Raise Busy if another job has taken the lease over; call it right before a commit.

        Below `s3a:` this renews the lease, and raises StorageError if that fails.
        """


@dataclass(frozen=True)
class _Holder:
    """The content of a lease; `host` is for people, `system` identifies the kernel and its table of processes."""

    host: str
    system: str
    pid: int
    started: str
    since: str
    seconds: float
    token: str
    renewals: int = 0
    released: bool = False

    @classmethod
    def this_process(cls, seconds: float) -> "_Holder":
        return cls(
            host=socket.gethostname(),
            system=_system(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            token=secrets.token_hex(16),
        )

    @classmethod
    def from_json(cls, content: bytes) -> "_Holder | None":
        """Parse the content of a lease, None if it is malformed."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool:
        """True if the holder ran on this very system and has ended; False if that cannot be known from here."""
        if not self.system or self.system != _system():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        started = _started(self.pid)
        return started is not None and started != self.started


@contextmanager
def acquire(vault: str, name: str, store: ObjectStore, seconds: float = SECONDS) -> Iterator[Lease]:
    """Acquire the lease `name` of a vault (canonical URI), and release it at the end of the block.

    Raises Busy, naming process, host and time, if another job has it. A lease below `s3a:` expires `seconds` after its
    last renewal. A process that is forked inside the block must end before it.
    """
    if storage.is_local(vault):
        folder = os.path.join(storage.local_path(vault), FOLDER)
        with _locked(folder, name) as lease:
            yield lease
        return
    uri = storage.join(vault, FOLDER, f"{name}.json")
    _check_conditions(vault, store)
    renewed = _take(uri, name, store, seconds)
    renewed.start()
    try:
        yield renewed
    finally:
        renewed.release()


@dataclass(frozen=True)
class _FileLease(Lease):
    path: str
    descriptor: int
    name: str

    def check(self) -> None:
        if not _is_at(self.path, self.descriptor):
            raise Busy(f"the lock file of lease {self.name} was deleted from the vault during this job: run it again")


@contextmanager
def _locked(folder: str, name: str) -> Iterator[Lease]:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(name, _Holder.from_json(os.pread(descriptor, 65536, 0))) from None
            if not _is_at(path, descriptor):
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _Holder.this_process(0.0).to_json(), 0)
            yield _FileLease(path, descriptor, name)
            return
        finally:
            # The file stays: if it were deleted, one job could lock the old file and another one the new.
            os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    """True if an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class _ObjectLease(Lease):
    """A lease below `s3a:`, renewed several times per its length by a thread."""

    def __init__(self, uri: str, name: str, store: ObjectStore, holder: _Holder, etag: str) -> None:
        self._uri, self._name, self._store = uri, name, store
        self._holder, self._etag = holder, etag
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._lost: Busy | None = None
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._renew_until_released,), name=f"lease {name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        self._write(released=False)

    def release(self) -> None:
        """Release the lease; if that fails, it expires."""
        self._released.set()
        with suppress(OSError, Busy):
            self._write(released=True)
        self._thread.join()

    def _renew_until_released(self) -> None:
        while not self._released.wait(self._holder.seconds / _RENEWALS_PER_LEASE):
            try:
                self._write(released=False)
            except OSError as error:
                logger.warning("lease not renewed", extra={"lease": self._name, "error": type(error).__name__})
                continue
            except Busy:
                return

    def _write(self, released: bool) -> None:
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._released.is_set() and not released:
                return
            following = replace(self._holder, renewals=self._holder.renewals + 1, released=released)
            # If the answer is lost, the next attempt must recognise this content as its own.
            self._holder = following
            etag = self._store.replace_if_match(self._uri, following.to_json(), self._etag)
            if etag is None:
                etag = self._recovered()
            if etag is None:
                self._lost = self._taken_over()
                logger.error("lease lost", extra={"lease": self._name})
                raise self._lost
            self._etag = etag

    def _recovered(self) -> str | None:
        """The new ETag, if the object is ours after all: an earlier write succeeded, and its answer was lost."""
        try:
            content, found = self._store.read(self._uri)
        except FileNotFoundError:
            return None
        there = _Holder.from_json(content)
        if there is None or there.token != self._holder.token or found.etag is None:
            return None
        return self._store.replace_if_match(self._uri, self._holder.to_json(), found.etag)

    def _taken_over(self) -> Busy:
        try:
            holder = _Holder.from_json(self._store.read_bytes(self._uri))
        except FileNotFoundError:
            holder = None
        return Busy(
            f"lease {self._name} of this lake expired while this job was suspended, and {_described(holder)} has it "
            "now: nothing more was committed; run this again when that job is done"
        )


def _take(uri: str, name: str, store: ObjectStore, seconds: float) -> _ObjectLease:
    holder = _Holder.this_process(seconds)
    for _ in range(_TRIES):
        try:
            content, found = store.read(uri)
            before = _Holder.from_json(content)
            if not _is_free(uri, before, store):
                raise _busy(name, before)
            etag = store.replace_if_match(uri, holder.to_json(), str(found.etag))
        except FileNotFoundError:
            etag = store.create_if_absent(uri, holder.to_json())
        if etag is not None:
            return _ObjectLease(uri, name, store, holder, etag)
    raise Busy(f"lease {name} of this lake is in use by one job after the other: try again later")


def _is_free(uri: str, holder: _Holder | None, store: ObjectStore) -> bool:
    if holder is not None and (holder.released or holder.is_dead()):
        return True
    seconds = SECONDS if holder is None else holder.seconds
    return store.seconds_old(uri) > seconds + _CLOCK_SECONDS


def _check_conditions(vault: str, store: ObjectStore) -> None:
    """Refuse a server that ignores conditions on writes: two jobs would both believe that they have the lease."""
    probe = storage.join(vault, FOLDER, "probe")
    store.write_bytes(probe, b"there")
    found = store.find(probe)
    if store.create_if_absent(probe, b"must not be written") is not None or found is None or not found.etag:
        raise EnvironmentProblem(
            f"the server of vault {vault} ignores conditional writes (If-None-Match) or gives no ETags, without which "
            "two jobs could write to one lake: use a server that supports both, or a vault below file:"
        )


def _busy(name: str, holder: _Holder | None) -> Busy:
    return Busy(f"lease {name} of this lake is held by {_described(holder)}: wait for that job, or stop it")


def _described(holder: _Holder | None) -> str:
    if holder is None:
        return "another job"
    return f"process {holder.pid} on host {holder.host} since {holder.since}"


def _system() -> str:
    """Identify this boot of this kernel and its table of process ids; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot, since process ids are reused. Empty if it has ended.

    None if unknown.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started
