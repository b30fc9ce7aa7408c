"""A driver that kills itself: `python -m tests.support.killed_job SPEC`, a process group of its own, ended by SIGKILL.

SPEC is JSON: `overrides` of the settings, and `stage`, `when` (enter or leave) and `nth` of the stage of the run at
which the whole group dies, the JVM with it. Without `stage` it runs until somebody else kills it.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cbmir_spark import config
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake.runs import Record
from cbmir_spark.spark import session


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def armed(spec: dict[str, Any]) -> Any:
    plain = Record.stage
    seen = {"times": 0}

    @contextmanager
    def stage(self: Record, name: str) -> Iterator[None]:
        here = name == spec["stage"]
        seen["times"] += here
        if here and spec["when"] == "enter" and seen["times"] == spec["nth"]:
            die()
        with plain(self, name):
            yield
        if here and spec["when"] == "leave" and seen["times"] == spec["nth"]:
            die()

    return stage


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec.get("stage"):
        Record.stage = armed(spec)  # type: ignore[method-assign]
    settings = config.load(overrides=spec["overrides"], environ={})
    spark = session.build(settings, "ingest")

    def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
        sys.stderr.write(f"{done} of {total}\n")

    ingest_job.run(spark, settings, progress)
    spark.stop()


if __name__ == "__main__":
    main()
