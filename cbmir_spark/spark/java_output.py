"""What the JVM prints: passed on to stderr line by line, without a line that tells users nothing."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT, _STDERR = 1, 2
# Spark asks for this module at every start, and no option silences the JVM's warning about it.
_NOISE = b"WARNING: Using incubator modules: jdk.incubator.vector"


@contextmanager
def to_stderr() -> Iterator[None]:
    """Let a process that is started in the block print to this one's stderr only, both of its outputs.

    Its standard output stays free for results: Delta, for example, prints what VACUUM deleted. Lines pass through a
    thread of this process for as long as the other one lives.
    """
    reading, writing = os.pipe()
    saved = os.dup(_STDOUT), os.dup(_STDERR)
    threading.Thread(target=_pass_on, args=(reading, os.dup(_STDERR)), daemon=True).start()
    try:
        os.dup2(writing, _STDOUT)
        os.dup2(writing, _STDERR)
        yield
    finally:
        for descriptor, target in zip(saved, (_STDOUT, _STDERR), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.close(writing)


def _pass_on(reading: int, target: int) -> None:
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            if line.rstrip() != _NOISE:
                try:
                    os.write(target, line)
                except OSError:
                    return
