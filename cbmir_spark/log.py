"""Standard logging, silent unless somebody configures it: lines for people, or JSON lines for machines.

Each module logs through `logging.getLogger(__name__)`. Messages are constant and values go into `extra`, under the
names of FIELDS alone: so no tag value, identifier or name of an archive's object can slip into a log.
"""

import json as jsonlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

ROOT = "cbmir_spark"

# What a line may carry beside time, level, logger and message.
FIELDS = (
    "run_id",
    "job",
    "stage",
    "batch",
    "epoch",
    "lease",
    "table",
    "alias",
    "version",
    "step",
    "done",
    "total",
    "counts",
    "figures",
    "seconds",
    "error",
    "status",
)

_NONE: Mapping[str, Any] = MappingProxyType({})
_context: ContextVar[Mapping[str, Any]] = ContextVar("cbmir_spark.log", default=_NONE)


@contextmanager
def scope(**fields: Any) -> Iterator[None]:
    """Add fields to every line that this thread logs in the block, and end what `bind` adds in it."""
    before = _context.get()
    _context.set({**before, **fields})
    try:
        yield
    finally:
        # Not by a token, which is refused where a generator entered the block in one thread and leaves it in another.
        _context.set(before)


def bind(**fields: Any) -> None:
    """Add fields to every line that this thread logs until the enclosing `scope` ends; None takes a field away."""
    _context.set({**_context.get(), **fields})


@contextmanager
def job(name: str) -> Iterator[None]:
    """Mark what is logged in the block as that of a job, and log by the class of its error if it fails."""
    with scope(job=name):
        try:
            yield
        except BaseException as error:
            logging.getLogger(__name__).info("job failed", extra={"error": type(error).__name__})
            raise


def configure(*, json: bool = False, level: int | str | None = None) -> None:
    """Log to stderr: one JSON object per line, or text for people. Replaces what an earlier call configured.

    `level` is WARNING by default for people, who see progress and results anyway, and INFO for JSON.
    """
    logger = logging.getLogger(ROOT)
    for handler in [each for each in logger.handlers if isinstance(each, _Stderr)]:
        logger.removeHandler(handler)
    handler = _Stderr()
    handler.setFormatter(JsonLines() if json else Text())
    logger.addHandler(handler)
    # MLflow gives the root logger a handler, which would write each line again.
    logger.propagate = False
    logger.setLevel(level if level is not None else logging.INFO if json else logging.WARNING)


def is_json() -> bool:
    """Whether `configure` chose JSON lines, beside which nothing else belongs on stderr."""
    handlers = logging.getLogger(ROOT).handlers
    return any(isinstance(each, _Stderr) and isinstance(each.formatter, JsonLines) for each in handlers)


def failed(message: str, status: int) -> None:
    """Log the line that a command ends in; unlike other messages it says what its user named, such as a file."""
    logging.getLogger(__name__).error(message, extra={"status": status})


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is by then: a progress bar on the terminal puts its own in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonLines(logging.Formatter):
    """One JSON object per line: time (ISO 8601, UTC), level, logger, message and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: _finite(value) for name, value in fields_of(record).items()},
        }
        return jsonlib.dumps(line, default=str)


class Text(logging.Formatter):
    """One line for people: time of day, job and stage, message, then the other fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        place = "/".join(str(fields[name]) for name in ("job", "stage") if name in fields) or record.name
        shown = [_shown(name, value) for name, value in fields.items() if name not in ("run_id", "job", "stage")]
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        return f"{time} {record.levelname.lower()} {place}: {', '.join([record.getMessage(), *shown])}"


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a line: those of its scope, then its own. Of an exception only its class is logged."""
    fields = {**_context.get(), **{name: vars(record)[name] for name in FIELDS if name in vars(record)}}
    if record.exc_info and record.exc_info[0] is not None:
        fields["error"] = record.exc_info[0].__name__
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(_shown(key, each) for key, each in value.items())
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
