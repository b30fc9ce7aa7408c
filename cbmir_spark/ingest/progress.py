"""Report the progress of an ingest while its tasks run."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context

from pyspark import AccumulatorParam, SparkContext

from cbmir_spark.ingest.parse import Tally

PROGRESS_SECONDS = 2.0

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called every few seconds with objects done, objects to do, and figures such as MB/s and objects by reason."""


class _Counts(AccumulatorParam[Counter[str]]):
    def zero(self, value: Counter[str]) -> Counter[str]:
        return Counter()

    def addInPlace(self, value1: Counter[str], value2: Counter[str]) -> Counter[str]:
        value1.update(value2)
        return value1


@contextmanager
def watch(context: SparkContext, total: int, progress: Progress | None) -> Iterator[Tally]:
    """Yield the function that tasks report to, and pass their reports on from a thread while the block runs.

    A task that is retried reports again: these figures are for people, the invariant of outcomes counts rows.
    """
    done = context.accumulator(Counter[str](), _Counts())
    began = time.monotonic()
    ended = threading.Event()

    def report() -> None:
        figures = Counter(done.value)
        objects, size = figures.pop("objects", 0), figures.pop("bytes", 0)
        if progress is not None and objects:
            rate = size / 2**20 / max(time.monotonic() - began, 1e-3)
            progress(min(objects, total), total, {"MB/s": round(rate, 1), **figures})

    def report_until_ended() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            report()

    # In this thread's context, so that what is logged there names the run.
    watcher = threading.Thread(target=copy_context().run, args=(report_until_ended,), daemon=True)
    watcher.start()
    try:
        yield done.add
    finally:
        ended.set()
        watcher.join()
        report()
