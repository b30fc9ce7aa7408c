"""Separate driver processes, and a real standalone cluster for them on loopback."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
START_SECONDS = 60

# Settings of a driver that lives for seconds beside the suite's session.
DRIVER_OPTIONS = [
    "spark.master=local[2]",
    "spark.driver_memory=2g",
    "spark.conf.spark.driver.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC",
    "spark.conf.spark.sql.codegen.wholeStage=false",
    "spark.conf.spark.sql.codegen.factoryMode=NO_CODEGEN",
    "spark.conf.spark.sql.shuffle.partitions=2",
    "spark.conf.spark.databricks.delta.snapshotPartitions=2",
]


class Cluster(NamedTuple):
    """The URL of the master, and the folder for event logs."""

    master: str
    events: Path


def environment(**more: str) -> dict[str, str]:
    """The environment of a driver: this one without settings, and with `more`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CBMIR_", "SPARK_", "PYSPARK_"))}
    return {
        **clean,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        # These JVMs live for seconds: the optimising compiler would take more time than it could give back.
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC",
        **more,
    }


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Run a master and a worker of two cores while the block runs."""
    events = folder / "events"
    events.mkdir()
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, ready: str, *arguments: str) -> re.Match[str]:
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            started.append(
                subprocess.Popen(
                    [SPARK_HOME / "bin" / "spark-class", *arguments],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment(SPARK_DAEMON_MEMORY="512m", SPARK_LOCAL_DIRS=str(folder / "local")),
                )
            )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and started[-1].poll() is None:
            if found := re.search(ready, log.read_text(errors="replace")):
                return found
            time.sleep(0.2)
        raise AssertionError(f"the {name} did not start:\n{log.read_text(errors='replace')[-3000:]}")

    common = ("--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
    try:
        master = start(
            "master", r"Starting Spark master at (spark://127\.0\.0\.1:\d+)",
            "org.apache.spark.deploy.master.Master", *common,
        )[1]  # fmt: skip
        start(
            "worker", r"Successfully registered with master",
            "org.apache.spark.deploy.worker.Worker", *common,
            "--cores", "2", "--memory", "3g", "--work-dir", str(folder / "work"), master,
        )  # fmt: skip
        yield Cluster(master, events)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
