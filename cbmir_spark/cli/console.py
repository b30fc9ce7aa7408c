"""The terminal: progress on stderr, JSON on stdout, and text that cannot steer it."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cbmir_spark import log

logger = logging.getLogger(__name__)

out = Console()
err = Console(stderr=True)

Move = Callable[[int, int, Mapping[str, Any]], None]


@contextmanager
def progress(what: str, quiet: bool, every: float = 0.0) -> Iterator[Move]:
    """Show progress: a bar on a terminal, lines in a log, nothing beside JSON; both with the remaining time.

    Lines are at least `every` seconds apart, except the last. If the log is JSON they are lines of that.
    """
    began = time.monotonic()
    if quiet or log.is_json() or not err.is_terminal:
        printed, last = -every, -1

        def line(done: int, total: int, figures: Mapping[str, Any]) -> None:
            nonlocal printed, last
            passed = time.monotonic() - began
            if passed - printed < every and (done < total or done == last):
                return
            printed, last = passed, done
            if log.is_json():
                logger.info("progress", extra={"done": done, "total": total, "figures": dict(figures)})
            elif not quiet:
                left = f", {duration(passed / done * (total - done))} left" if 0 < done < total else ""
                err.print(f"{done} of {total} {what}{left}: {detail(figures)}", soft_wrap=True, highlight=False)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rest = (TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, *rest, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None, detail="")

        def move(done: int, total: int, figures: Mapping[str, Any]) -> None:
            bar.update(task, completed=done, total=total, detail=detail(figures))

        yield move


@contextmanager
def steps(names: Iterable[str], quiet: bool) -> Iterator[Callable[[str, int, int, Mapping[str, Any]], None]]:
    """Show progress of a job of several steps, one bar per step."""
    if quiet or log.is_json() or not err.is_terminal:

        def line(step: str, done: int, total: int, figures: Mapping[str, Any]) -> None:
            if log.is_json():
                logger.info("progress", extra={"step": step, "done": done, "total": total, "figures": dict(figures)})
            elif not quiet:
                of = f" {done} of {total}" if total else ""
                err.print(f"{step}{of} {detail(figures)}".rstrip(), soft_wrap=True, highlight=False)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=err, transient=True) as bar:
        tasks = {name: bar.add_task(name, total=None, detail="", start=False) for name in names}
        order = list(tasks)

        def move(step: str, done: int, total: int, figures: Mapping[str, Any]) -> None:
            for earlier in order[: order.index(step)]:
                bar.update(tasks[earlier], total=1, completed=1)
            bar.start_task(tasks[step])
            bar.update(tasks[step], completed=done, total=total or None, detail=detail(figures))

        yield move


def duration(seconds: float) -> str:
    """Format an estimate: `40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def detail(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def print_json(report: Any) -> None:
    """Print a dataclass, or a list or mapping of plain values, as one JSON object."""
    sys.stdout.write(json.dumps(_plain_values(report), default=str) + "\n")


def _plain_values(report: Any) -> Any:
    if is_dataclass(report) and not isinstance(report, type):
        return asdict(report)
    return [_plain_values(each) for each in report] if isinstance(report, list) else report


def plain(text: str) -> str:
    """Escape rich markup and replace control characters in text that may come from outside."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text).replace("[", "\\[")
