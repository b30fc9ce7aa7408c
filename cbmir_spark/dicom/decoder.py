"""Run `read_instance` in a child process that may die: a hostile file is lost alone, without the worker.

Native codecs crash, hang and panic, and small files ask for terabytes; no `except` catches a signal. So each Python
worker has one child (`python -m cbmir_spark.dicom.decoder`; a fork of a worker with threads would not be safe) with a
limit on its address space, a time limit for each file and no core dumps. Files and pictures travel through two pipes,
as a JSON header and raw bytes; nothing that the child sends is unpickled. Runs per task.
"""

import fcntl
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from io import FileIO
from types import TracebackType
from typing import Any, Self

import numpy as np

from cbmir_spark.dicom.gray import SIDE
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import Frame, Instance, NotAnImage, Reason, Rejected, read_instance
from cbmir_spark.dicom.tags import Tags
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.errors import EnvironmentProblem

START_SECONDS = 120.0  # for the interpreter and its imports, on a node whose disk is cold
FILES_PER_CHILD = 5_000  # codecs leak (GDCM 3.2.2 did); a new child costs less than a second
MAX_SHARE_AFTER_FILE = 0.75  # of the address space: a child that uses more after a file has leaked, and is replaced
MAX_HEADER_BYTES = 64 * 2**20  # of an answer: about 60 bytes for a frame

_EXHAUSTED = "past the decoder's memory"
_LENGTH = struct.Struct(">Q")
_FRAME_BYTES = SIDE * SIDE
_PIPE_BYTES = 2**20
# Variables that the interpreter and its libraries need: the child gets none of the worker's keys and credentials.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "LANG",
    "LC_ALL",
    "HOME",
    "TMPDIR",
    "PYTHONHOME",
    "VIRTUAL_ENV",
)


class Decoder:
    """A child process that reads instances, replaced whenever it dies; for one thread at a time."""

    def __init__(self, preprocessing: Preprocessing, vocabulary: Vocabulary, memory_mb: int, seconds: float) -> None:
        """Limit the child's address space to `memory_mb` and each file to `seconds`; `read` starts the child."""
        plain = {field.name: getattr(preprocessing, field.name) for field in fields(preprocessing)}
        self._setup = {
            "preprocessing": {**plain, "windows": {k: dict(v) for k, v in preprocessing.windows.items()}},
            "vocabulary": dict(vocabulary.extra),
            "memory_mb": memory_mb,
            "seconds": seconds,
        }
        self._seconds = seconds
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id; None before the first `read` and after `close`."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the child; the next `read` starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def read(self, content: bytes) -> Instance:
        """Read an object as `read_instance` does; CRASHED, TIMEOUT, TOO_LARGE and INTERNAL are further reasons.

        Raises NotAnImage or Rejected; EnvironmentProblem where no child can be started.
        """
        while True:
            if self._child is not None and self._child.files >= FILES_PER_CHILD:
                self.close()
            if self._child is None:
                self._child = _Child(self._setup)
            # A fresh child dies of this file; an older one may suffer from leaks and damage of earlier files.
            fresh = self._child.files == 0
            try:
                header, pixels = self._child.ask(content, self._seconds)
            except _Lost as lost:
                self.close()
                if lost.reason == Reason.CRASHED and not fresh:
                    continue
                raise Rejected(lost.reason) from None
            if header.get("exhausted"):
                self.close()
                if "rejected" in header and not fresh:
                    continue
            try:
                return _instance(header, pixels)
            except (KeyError, TypeError, ValueError):
                self.close()
                raise Rejected(Reason.CRASHED) from None


def _instance(header: Mapping[str, Any], pixels: bytes) -> Instance:
    if "not_an_image" in header:
        raise NotAnImage(Reason(header["not_an_image"]))
    if "rejected" in header:
        raise Rejected(Reason(header["rejected"]), str(header.get("detail", "")))
    pictures = np.frombuffer(pixels, dtype=np.uint8).reshape(-1, SIDE, SIDE)
    frames = tuple(
        Frame(int(frame["number"]), picture, float(frame["low"]), float(frame["high"]))
        for frame, picture in zip(header["frames"], pictures, strict=True)
    )
    return Instance(Tags(**header["tags"]), frames)


class _Lost(Exception):
    """The child died or must be ended; `reason` applies to its file."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class _Child:
    """The process and its pipes; it starts at once and gets its settings before its first file."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # One thread for each child: Spark already runs one worker for each core.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.files = 0
        self._ready = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cbmir_spark.dicom.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            problem = f"cannot start the process that decodes images: {error.strerror}: run fewer tasks at a time"
            raise EnvironmentProblem(problem) from None
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._in, self._out):
            os.set_blocking(pipe, False)
            with suppress(OSError):  # the system may refuse; larger pipes are only faster
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._setup = json.dumps(setup).encode()

    def ask(self, content: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Send one file; return the JSON header and the pixels of all frames. Raises _Lost."""
        if not self._ready:
            self._wait_until_ready()
        self.files += 1
        return self._exchange(content, time.monotonic() + seconds)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout, self._process.stderr)):
            with suppress(OSError):
                pipe.close()

    def _wait_until_ready(self) -> None:
        try:
            self._exchange(self._setup, time.monotonic() + START_SECONDS)
        except _Lost:
            self._process.kill()
            printed = self._process.stderr.read().decode("utf-8", "replace") if self._process.stderr else ""
            last = printed.strip().splitlines()[-1] if printed.strip() else f"exit code {self._process.wait()}"
            problem = f"cannot start the process that decodes images: {last}: check this machine with `cbmir doctor`"
            raise EnvironmentProblem(problem) from None
        if self._process.stderr:
            self._process.stderr.close()
        self._ready = True

    def _exchange(self, message: bytes, deadline: float) -> tuple[dict[str, Any], bytes]:
        """Send a message and receive the answer at once: the child may answer, or die, before it has read it all."""
        out = [memoryview(_LENGTH.pack(len(message))), memoryview(message)]
        answer = bytearray()
        wanted = _LENGTH.size
        header: dict[str, Any] | None = None
        while True:
            while len(answer) >= wanted:
                if header is not None:
                    return header, bytes(answer)
                if wanted == _LENGTH.size:
                    (length,) = _LENGTH.unpack(answer)
                    if not 0 < length <= MAX_HEADER_BYTES:
                        raise _Lost(Reason.CRASHED)
                    wanted += length
                    continue
                try:
                    header = dict(json.loads(answer[_LENGTH.size :]))
                    wanted = len(header.get("frames", ())) * _FRAME_BYTES
                except (ValueError, TypeError):
                    raise _Lost(Reason.CRASHED) from None
                answer = bytearray()
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Lost(Reason.TIMEOUT)
            readable, writable, _ = select.select([self._out], [self._in] if out else [], [], left)
            if writable:
                out = self._send(out)
            if readable:
                part = os.read(self._out, min(wanted - len(answer), _PIPE_BYTES))
                if not part:
                    raise _Lost(Reason.CRASHED)
                answer += part

    def _send(self, out: list[memoryview]) -> list[memoryview]:
        try:
            sent = os.write(self._in, out[0][:_PIPE_BYTES])
        except BlockingIOError:
            return out
        except BrokenPipeError:
            return []  # an answer, or the end of file, is still to be read
        return [rest for rest in (out[0][sent:], *out[1:]) if len(rest)]


# --- in the child ---


def main() -> None:
    """Run the child: read the settings, then answer files until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = FileIO(os.dup(0), "rb"), FileIO(os.dup(1), "wb")
    setup = json.loads(_receive(source))
    settings = setup["preprocessing"]
    settings["windows"] = {m: {p: tuple(w) for p, w in parts.items()} for m, parts in settings["windows"].items()}
    preprocessing = Preprocessing(**{**settings, "percentiles": tuple(settings["percentiles"])})
    vocabulary = Vocabulary(setup["vocabulary"])
    limit = setup["memory_mb"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Codecs write to the standard streams: `source` and `sink` are copies of the pipes.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _answer(sink, {}, ())
    # The parent's clock decides; the alarm ends a child whose parent died while a codec hangs.
    alarm_seconds = math.ceil(setup["seconds"]) + 5
    while True:
        try:
            content = _receive(source)
        except EOFError:
            return
        except MemoryError:
            _answer(sink, {"rejected": Reason.TOO_LARGE, "detail": _EXHAUSTED, "exhausted": True}, ())
            return
        signal.alarm(alarm_seconds)
        header, frames = _read(content, preprocessing, vocabulary)
        del content
        signal.alarm(0)
        # Codecs report a failed allocation as any error; little room left shows that memory was the cause.
        if _address_space() > MAX_SHARE_AFTER_FILE * resource.getrlimit(resource.RLIMIT_AS)[0]:
            header["exhausted"] = True
        _answer(sink, header, frames)
        if header.get("exhausted"):
            return


def _read(
    content: bytearray, preprocessing: Preprocessing, vocabulary: Vocabulary
) -> tuple[dict[str, Any], tuple[Frame, ...]]:
    try:
        instance = read_instance(content, preprocessing, vocabulary)
    except NotAnImage as error:
        return {"not_an_image": error.reason}, ()
    except Rejected as error:
        return {"rejected": error.reason, "detail": error.detail}, ()
    except MemoryError:
        return {"rejected": Reason.TOO_LARGE, "detail": _EXHAUSTED, "exhausted": True}, ()
    except RecursionError:
        return {"rejected": Reason.TOO_LARGE, "detail": "sequences nested too deep"}, ()
    except Exception as error:
        return {"rejected": Reason.INTERNAL, "detail": _location(error)}, ()
    except BaseException:
        return {"rejected": Reason.CRASHED}, ()
    frames = [{"number": f.number, "low": f.low, "high": f.high} for f in instance.frames]
    return {"tags": vars(instance.tags), "frames": frames}, instance.frames


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _location(error: Exception) -> str:
    """Describe an error by its type and line alone: its message may quote the file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {os.path.basename(last.filename)}:{last.lineno}"


def _receive(source: FileIO) -> bytearray:
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    return _exactly(source, length)


def _exactly(source: FileIO, length: int) -> bytearray:
    buffer = bytearray(length)
    at = 0
    while at < length:
        got = source.readinto(memoryview(buffer)[at:])
        if not got:
            raise EOFError
        at += got
    return buffer


def _answer(sink: FileIO, header: Mapping[str, Any], frames: Iterable[Frame]) -> None:
    text = json.dumps(header).encode()
    for part in (_LENGTH.pack(len(text)) + text, *(frame.pixels.tobytes() for frame in frames)):
        left = memoryview(part)
        while len(left):
            left = left[sink.write(left) :]


if __name__ == "__main__":
    main()
