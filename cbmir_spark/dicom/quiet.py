"""Silence pydicom while an object is parsed: it quotes the values of most real headers that it complains about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Every logger of pydicom: a filter on the first one does not see the records of those below it.
_LOGGERS = ("pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.encoders.base", "pydicom.pixels.utils")


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and the records of pydicom's loggers, within the block; restore both after it.

    Works at any level and with any handler of the caller's. Both are properties of the process: what other threads
    warn of or log through pydicom meanwhile is dropped too.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]

    # A filter of this block's own, not a level: blocks that overlap in time do not undo each other's.
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
