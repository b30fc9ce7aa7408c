"""Record a run: seconds by stage while the job runs, one row of RUNS at its end. Runs on the driver."""

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from cbmir_spark import __version__, log
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths

logger = logging.getLogger(__name__)


class Stages:
    """Durations of stages: `seconds` of wall-clock time by name, in the order in which they first began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to those of the stage, and log where it begins and ends."""
        began = time.monotonic()
        with log.scope(stage=name):
            logger.info("stage started")
            try:
                yield
            except BaseException as error:
                logger.info("stage failed", extra={"error": type(error).__name__})
                raise
            else:
                logger.info("stage ended", extra={"seconds": round(time.monotonic() - began, 3)})
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


class Record(Stages):
    """One run of a job: its name, its id (32 hexadecimal digits) and the durations of its stages."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.job = job
        self.run_id = uuid.uuid4().hex
        self.started = datetime.now(UTC)

    @classmethod
    def begin(cls, job: str) -> "Record":
        """Record a run from now on. What this thread logs carries its id, until the run or `log.scope` ends."""
        record = cls(job)
        log.bind(run_id=record.run_id, job=job)
        logger.info("run started")
        return record

    def write(
        self,
        spark: SparkSession,
        lake: LakePaths,
        *,
        counts: Mapping[str, int],
        versions_read: Mapping[str, int] | None = None,
        versions_written: Mapping[str, int] | None = None,
    ) -> None:
        """Append the row of a run that succeeded."""
        ended = datetime.now(UTC)
        values = {
            cols.RUN_ID: self.run_id,
            cols.JOB: self.job,
            "started": self.started,
            "ended": ended,
            cols.OUTCOME: "done",
            "counts": dict(counts),
            "seconds": dict(self.seconds),
            "versions_read": dict(versions_read or {}),
            "versions_written": dict(versions_written or {}),
            "software": __version__,
        }
        path = lake.path(schemas.RUNS)
        delta.ensure(spark, schemas.RUNS, path)
        row = tuple(values[field.name] for field in schemas.RUNS.schema)
        delta.append(spark.createDataFrame([row], schemas.RUNS.schema), schemas.RUNS, path)
        seconds = round((ended - self.started).total_seconds(), 3)
        logger.info("run ended", extra={"counts": dict(counts), "seconds": seconds})
        log.bind(run_id=None, job=None)
