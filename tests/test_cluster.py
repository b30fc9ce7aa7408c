"""Every job on a real standalone cluster, by spark-submit, with the same results as `local[2]` by `cbmir`.

Master and worker come from the installed pyspark, on loopback and on ports that the system chooses. Tables are read
back without Spark, so that nothing in the comparison runs on what is compared.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset as ds
import pyspark
import pytest
import yaml
from deltalake import DeltaTable

from cbmir_spark import synthesis
from cbmir_spark import tables as t

pytestmark = pytest.mark.timeout(600)

REPO = Path(__file__).resolve().parent.parent
SPARK_HOME = Path(pyspark.__file__).parent
CBMIR = Path(sysconfig.get_path("scripts")) / "cbmir"
START_SECONDS = 60
JOB_SECONDS = 240
QUERIES = 6


class Cluster(NamedTuple):
    master: str
    events: Path


@dataclass(frozen=True)
class Site:
    """One archive, one key and one settings file, which both ways of running share."""

    archive: Path
    config: Path
    folder: Path

    @property
    def on_cluster(self) -> Path:
        return self.folder / "cluster-lake"

    @property
    def on_local(self) -> Path:
        return self.folder / "local-lake"


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CBMIR_", "SPARK_", "PYSPARK_"))}
    return {
        **clean,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        **more,
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    key = folder / "pseudonym.key"
    key.write_text("a key for the cluster's tests only\n")
    settings = {
        "privacy": {"key_file": str(key)},
        "dataset": {"min_images": 4},
        "training": {"preset": "alexnet-small", "epochs": 1},
        "spark": {
            "conf": {
                "spark.sql.shuffle.partitions": 2,
                "spark.databricks.delta.snapshotPartitions": 2,
                "spark.sql.sources.parallelPartitionDiscovery.parallelism": 4,
            }
        },
    }
    config = folder / "site.yaml"
    config.write_text(yaml.safe_dump(settings))
    archive = folder / "archive"
    synthesis.write_demo_archive(archive, images_per_class=6, seed=7)
    # What happens to pydicom's own files is the subject of other tests; here they would only cost time.
    shutil.rmtree(archive / "pydicom")
    return Site(archive, config, folder)


def finish(command: Sequence[str | Path], env: dict[str, str], cwd: Path) -> dict[str, Any]:
    """The JSON object that a job prints; anything else on its standard output fails the test."""
    done = subprocess.run(
        [str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=JOB_SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def by_spark_submit(cluster: Cluster, site: Site, job: str, *flags: str | Path) -> dict[str, Any]:
    """`spark-submit jobs/<job>.py …`, and proof that executors of the cluster did the work."""
    before = set(cluster.events.iterdir())
    options = (
        "--driver-memory", "2g",
        "--executor-memory", "2g",
        "--conf", "spark.driver.host=127.0.0.1",
        "--conf", "spark.driver.bindAddress=127.0.0.1",
        "--conf", "spark.ui.enabled=false",
        "--conf", "spark.eventLog.enabled=true",
        "--conf", f"spark.eventLog.dir={cluster.events.as_uri()}",
        "--conf", "spark.eventLog.rolling.enabled=false",
        "--conf", "spark.eventLog.compress=false",
    )  # fmt: skip
    given = ("--config", site.config, "--lake", site.on_cluster, "--json", *flags)
    if job in ("ingest", "train"):
        command = [SPARK_HOME / "bin" / "spark-submit", "--master", cluster.master, *options]
        command += [REPO / "jobs" / f"{job}.py", *given]
    else:
        command = [REPO / "deploy" / "submit.sh", cluster.master, job, *given, "--", *options]
    printed = finish(command, environment(PYTHON=sys.executable), site.folder)
    (log,) = set(cluster.events.iterdir()) - before
    events = [json.loads(line) for line in log.read_text().splitlines()]
    properties = next(e for e in events if e["Event"] == "SparkListenerEnvironmentUpdate")["Spark Properties"]
    assert properties["spark.master"] == cluster.master
    ran = {e["Task Info"]["Executor ID"] for e in events if e["Event"] == "SparkListenerTaskEnd"}
    assert ran
    assert "driver" not in ran
    # What the log and the UI show of a job must not hold the key that pseudonyms are made with.
    assert "a key for the cluster's tests only" not in log.read_text()
    return printed


def by_cbmir(site: Site, job: str, *flags: str | Path) -> dict[str, Any]:
    command = [CBMIR, job, "--config", site.config, "--set", "spark.master=local[2]", "--lake", site.on_local]
    return finish([*command, "--json", *flags], environment(), site.folder)


def rows(table: Path, *without: str) -> list[dict[str, Any]]:
    """Live rows of a Delta table in the order of their text, without the named columns."""
    # deltalake's own readers of partitioned tables want a newer pyarrow than petastorm allows.
    read = ds.dataset(DeltaTable(str(table)).file_uris(), partitioning="hive").to_table()
    found: list[dict[str, Any]] = read.drop(list(without)).to_pylist()
    return sorted(found, key=repr)


def digest(found: list[dict[str, Any]]) -> str:
    assert found
    return hashlib.sha256(repr(found).encode()).hexdigest()


@pytest.fixture(scope="module")
def ingested(cluster: Cluster, site: Site) -> Site:
    submitted = by_spark_submit(cluster, site, "ingest", "--archive", site.archive)
    local = by_cbmir(site, "ingest", "--archive", site.archive)
    assert submitted["outcomes"] == local["outcomes"]
    return site


def test_ingest_gives_the_same_rows(ingested: Site) -> None:
    lakes = ingested.on_cluster, ingested.on_local
    for path, without in (("tags", [t.BATCH]), ("pixels", [t.BATCH]), ("vault/sources", [t.BATCH])):
        submitted, local = (digest(rows(lake / path, *without)) for lake in lakes)
        assert submitted == local, path
    outcomes = {row[t.OUTCOME] for row in rows(ingested.on_cluster / "vault" / "sources")}
    assert {t.INGESTED, t.DUPLICATE, t.CONFLICT, t.REJECTED, t.NOT_AN_IMAGE} <= outcomes
