"""Ctrl-C during a call to Java: a KeyboardInterrupt, after which Spark can still be stopped."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt where SIGINT arrives in the block, whatever this thread waits for.

    PySpark's own handler calls Java to cancel the jobs. Where it interrupts another such call, that fails with an error
    of py4j instead. Does nothing in other threads, which Python's signals do not reach, and where SIGINT is ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    logging.root.addFilter(_is_no_interrupt)
    try:
        yield
    finally:
        logging.root.removeFilter(_is_no_interrupt)
        signal.signal(signal.SIGINT, before)


@contextmanager
def keep_handler() -> Iterator[None]:
    """Restore the handler of `as_keyboard_interrupt`, if the block runs in one, after Spark has replaced it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if before is _interrupt and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, before)


def _is_no_interrupt(record: logging.LogRecord) -> bool:
    """False for the traceback that py4j logs of each KeyboardInterrupt."""
    return not str(record.msg).startswith("KeyboardInterrupt while sending")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # Commands that have not begun to work with Spark do without its import.
    pyspark: Any = sys.modules.get("pyspark")
    gateway = pyspark and pyspark.SparkContext._gateway
    connection = gateway and gateway._gateway_client.get_thread_connection()
    if connection:
        # The answer to the interrupted call would be taken for that to the next one, which is to stop Spark.
        connection.close()
    raise KeyboardInterrupt
