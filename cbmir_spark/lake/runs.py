"""What a job did: seconds by stage while it runs, one RUNS row at its end. Runs on the driver."""

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from cbmir_spark import __version__
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths


class Stages:
    """What stages took: `seconds` of wall-clock time by their names, in the order in which they first began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to those of the stage."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


class Record(Stages):
    """One run of a job: its name, its id (32 hexadecimal digits) and what its stages took."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.job = job
        self.run_id = uuid.uuid4().hex
        self.started = datetime.now(UTC)

    def write(
        self,
        spark: SparkSession,
        lake: LakePaths,
        *,
        counts: Mapping[str, int],
        versions_read: Mapping[str, int] | None = None,
        versions_written: Mapping[str, int] | None = None,
    ) -> None:
        """Append the RUNS row of a run that is done."""
        values = {
            cols.RUN_ID: self.run_id,
            cols.JOB: self.job,
            "started": self.started,
            "ended": datetime.now(UTC),
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
