"""Silence pydicom while an object is parsed: its warnings and log records quote the values of real headers."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Every logger of pydicom: a filter on a logger does not apply to the records of its children.
_LOGGERS = ("pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.encoders.base", "pydicom.pixels.utils")


@contextmanager
def quiet() -> Iterator[None]:
    """Drop all warnings and pydicom's log records within the block, whatever levels and handlers the caller has set.

    Warnings and loggers belong to the process: the block silences other threads too. Enter it from one thread at a
    time, or a block that ends may restore warnings while another one still parses.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]

    # A filter, not a level: a child logger with a level of its own ignores its parent's.
    def drop(record: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
