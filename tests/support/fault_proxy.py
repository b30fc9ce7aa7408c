"""A proxy between a client and an S3 server that forwards requests byte by byte, and misbehaves where it is told to.

What is signed passes untouched, the Host header as it was sent. Faults are chosen by rules: the first rule that
answers a request decides it. One thread serves one connection; requests and replies are held whole, so objects in
tests are small.
"""

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from types import TracebackType
from urllib.parse import unquote

_CRLF = b"\r\n"
_ANSWER = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


@dataclass(frozen=True)
class Request:
    """A request as it came: `target` undecoded, `head` from the request line to the empty line, `nth` time seen."""

    method: str
    target: str
    head: bytes
    body: bytes
    nth: int

    @property
    def path(self) -> str:
        """`/bucket/key`, decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.target


@dataclass(frozen=True)
class Answer:
    """Reply with an error of S3's, or with a success that never was, and forward nothing."""

    status: int
    code: str


@dataclass(frozen=True)
class DropReply:
    """Forward, wait for the server's reply, and close the connection instead of passing it on."""


@dataclass(frozen=True)
class CutReply:
    """Pass on the head of the server's reply and this many bytes of its body, then close the connection."""

    body_bytes: int


@dataclass(frozen=True)
class Stall:
    """Say nothing for so many seconds, then forward."""

    seconds: float


@dataclass(frozen=True)
class Reset:
    """Reset the connection and forward nothing."""


@dataclass(frozen=True)
class Before:
    """Call something, then forward."""

    call: Callable[[], object]


Fault = Answer | DropReply | CutReply | Stall | Reset | Before
Rule = Callable[[Request], Fault | None]


def share(fraction: float, seed: int, fault: Fault) -> Rule:
    """A fault for a fraction of all requests, chosen by a hash of seed and request: the same ones in any order."""

    def rule(request: Request) -> Fault | None:
        drawn = hashlib.sha256(f"{seed} {request.method} {request.target} {request.nth}".encode()).digest()
        return fault if int.from_bytes(drawn[:8], "big") < fraction * 2**64 else None

    return rule


def each(method: str, pattern: str, fault: Fault, times: int | None = 1) -> Rule:
    """A fault the first `times` (None: every time) that each path matching a regular expression is asked for."""
    looked_for = re.compile(pattern)

    def rule(request: Request) -> Fault | None:
        meant = request.method == method and not request.is_listing and looked_for.search(request.path)
        return fault if meant and (times is None or request.nth <= times) else None

    return rule


def listings(fault: Fault) -> Rule:
    """A fault for every request that lists objects."""
    return lambda request: fault if request.is_listing else None


class FaultProxy:
    """The proxy, started on a free port of 127.0.0.1 and stopped as a context manager."""

    def __init__(self, host: str, port: int, rules: Sequence[Rule] = ()) -> None:
        self.rules = list(rules)
        self.seen: list[tuple[Request, Fault | None]] = []
        self._upstream = (host, port)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def faults(self) -> list[tuple[Request, Fault]]:
        """The requests that met a fault, in the order in which they came."""
        with self._lock:
            return [(request, fault) for request, fault in self.seen if fault is not None]

    def __enter__(self) -> "FaultProxy":
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as incoming:
                while (request := self._receive(client, incoming)) is not None:
                    fault = self._decide(request)
                    if isinstance(fault, Answer):
                        client.sendall(_refusal(request, fault))
                        continue
                    if isinstance(fault, Reset):
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    if isinstance(fault, Stall):
                        time.sleep(fault.seconds)
                    if isinstance(fault, Before):
                        fault.call()
                    with socket.create_connection(self._upstream) as upstream, upstream.makefile("rb") as coming:
                        upstream.sendall(request.head + request.body)
                        head, body = _reply(coming, request.method)
                    if isinstance(fault, DropReply):
                        return
                    if isinstance(fault, CutReply):
                        client.sendall(head + body[: fault.body_bytes])
                        return
                    client.sendall(head + body)
                    if re.search(rb"(?im)^connection:\s*close", head):
                        return
        except (OSError, ValueError):
            pass  # Either side went away: the other one sees its connection closed.
        finally:
            with self._lock:
                self._connections.discard(client)

    def _receive(self, client: socket.socket, incoming: BufferedReader) -> Request | None:
        head = _head(incoming)
        if not head:
            return None
        if re.search(rb"(?im)^expect:\s*100-continue", head):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _body(incoming, head)
        method, target, _ = head.split(_CRLF, 1)[0].decode("latin-1").split(" ")
        with self._lock:
            self._counts[method, target] += 1
            return Request(method, target, head, body, self._counts[method, target])

    def _decide(self, request: Request) -> Fault | None:
        with self._lock:
            fault = next((fault for rule in self.rules if (fault := rule(request)) is not None), None)
            self.seen.append((request, fault))
        return fault


def _refusal(request: Request, answer: Answer) -> bytes:
    body = b"" if request.method == "HEAD" or answer.status < 300 else _ANSWER.format(code=answer.code).encode()
    lines = [f"HTTP/1.1 {answer.status} {answer.code}", f"Content-Length: {len(body)}"]
    lines += ['ETag: "0123456789abcdef"'] if answer.status < 300 else ["Content-Type: application/xml"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _reply(coming: BufferedReader, method: str) -> tuple[bytes, bytes]:
    """The server's final head and body; what it says in between (100 Continue) has been said already."""
    while True:
        head = _head(coming)
        status = int(head.split(b" ", 2)[1])
        if status >= 200:
            break
    if method == "HEAD" or status in (204, 304):
        return head, b""
    if not re.search(rb"(?im)^(content-length|transfer-encoding):", head):
        return head, coming.read()
    return head, _body(coming, head)


def _head(stream: BufferedReader) -> bytes:
    lines = []
    while (line := stream.readline()) not in (_CRLF, b""):
        lines.append(line)
    return b"".join([*lines, _CRLF]) if lines else b""


def _body(stream: BufferedReader, head: bytes) -> bytes:
    """The body as it is on the wire, chunks with their sizes included."""
    if re.search(rb"(?im)^transfer-encoding:\s*chunked", head):
        parts = []
        while True:
            line = stream.readline()
            chunk = stream.read(int(line.split(b";")[0], 16) + 2)
            parts += [line, chunk]
            if chunk == _CRLF:
                return b"".join(parts)
    length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
    return stream.read(int(length[1])) if length else b""
