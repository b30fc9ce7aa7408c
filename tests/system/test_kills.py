"""Ingest killed with SIGKILL: the driver at each named step and at random moments, Python workers, executors.

After a run that is not killed the live rows are those of an undisturbed lake, and readers meanwhile saw only versions
that belong together. `make soak` runs every step and moment by itself; the suite chains a few of them.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from deltalake import DeltaTable
from pydicom.data import get_testdata_file
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from tests.support.cluster import DRIVER_OPTIONS, SPARK_HOME, Cluster, environment
from tests.support.processes import below

pytestmark = [pytest.mark.timeout(900), pytest.mark.more]

OBJECTS = 320
OF_A_BATCH = 60
DRIVER_SECONDS = 180
NIGHT = 1_760_000_000

# Stages of a run in the order in which they come; what a second night removes makes it pass them all.
STEPS = [
    ("open", "leave"),
    ("list", "leave"),
    ("compare", "leave"),
    ("parse", "leave"),
    ("resolve", "leave"),
    ("pixels", "leave"),
    ("tags", "leave"),
    ("identity", "leave"),
    ("remove pixels", "leave"),
    ("remove tags", "leave"),
    ("publish", "enter"),
    ("publish", "leave"),
]
# Between two tables, between TAGS and SOURCES, and right after: where a torn state could be seen.
CHAIN = [("pixels", "leave"), ("remove pixels", "leave"), ("publish", "enter"), ("publish", "leave")]


class Site(NamedTuple):
    """An archive in its second night, lakes as the first night left them, and what an undisturbed second makes."""

    folder: Path
    archive: Path
    after_first: Path
    expected: dict[str, str]

    def overrides(self, lake: Path) -> list[str]:
        return [
            f"ingest.archive={self.archive}",
            f"lake.uri={lake}",
            f"privacy.key_file={self.folder / 'key'}",
            "privacy.identity=true",
            f"ingest.max_files_per_batch={OF_A_BATCH}",
            "ingest.files_per_task=16",
        ]

    def lake(self, name: str) -> Path:
        """Copy the lake of the first night."""
        lake = self.folder / name
        shutil.copytree(self.after_first, lake)
        return lake


def write(archive: Path, number: int, content: bytes, second: int) -> None:
    path = archive / f"{number % 7}" / f"{number}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (NIGHT + second,) * 2)


def first_night(archive: Path, template: bytes, uid: bytes) -> None:
    """Images, and among them duplicates, conflicts and files that are none."""
    for number in range(OBJECTS):
        if number % 20 == 19:
            write(archive, number, template[:2000], 0)
            continue
        image = number - 1 if number % 10 in (4, 6, 8) else number
        content = template.replace(uid, as_uid(image, uid))
        if number % 10 == 8:
            content = content[:-2] + bytes([7, number % 251])
        write(archive, number, content, number)


def second_night(archive: Path, template: bytes, uid: bytes) -> None:
    """A third of the objects is new, changed or deleted; winners with survivors are among the deleted."""
    for number in range(0, OBJECTS, 8):
        (archive / f"{number % 7}" / f"{number}.dcm").unlink()
    for number in range(3, OBJECTS, 10):
        changed = template.replace(uid, as_uid(number, uid))[:-2] + b"\x01\x02"
        write(archive, number, changed, 5_000 + number)
    for number in range(OBJECTS, OBJECTS + 80):
        write(archive, number, template.replace(uid, as_uid(number, uid)), 6_000)


def as_uid(number: int, like: bytes) -> bytes:
    """A valid UID of the same length."""
    return b"1.2.3." + str(10 ** (len(like) - 7) + number).encode()


def digests(lake: Path) -> dict[str, str]:
    """One digest for each table: its live rows at the published versions, sorted, without what depends on the run."""
    found = {}
    for name, rows in published_rows(lake).items():
        text = "\n".join(sorted(repr({k: v for k, v in row.items() if k != cols.BATCH}) for row in rows))
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def published_rows(lake: Path) -> dict[str, list[dict[str, Any]]]:
    """Live rows of the three tables at the versions that the newest commit of SOURCES pins, read without Spark."""
    at, pinned = next(each for each in commits(lake / "vault" / "sources") if each[1])
    versions = {"vault/sources": at, "tags": pinned["tags"], "pixels": pinned["pixels"]}
    found = {}
    for path, version in versions.items():
        found[path] = DeltaTable(str(lake / path), version=version).to_pyarrow_table().to_pylist()
    return found


def commits(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Versions, newest first, and what their commits say of themselves, {} where that is nothing.

    From the files of the log: delta-rs counts its history down from a version that it finds out at another moment.
    """
    for file in sorted((table / "_delta_log").glob("*.json"), reverse=True):
        infos = [json.loads(line).get("commitInfo") for line in file.read_text().splitlines()]
        message = next((info["userMetadata"] for info in infos if info and "userMetadata" in info), "{}")
        yield int(file.stem), json.loads(message)


def torn(lake: Path) -> str:
    """Describe what does not belong together in the published versions; "" where everything does."""
    rows = published_rows(lake)
    images = {row[cols.IMAGE_ID] for row in rows["vault/sources"] if row[cols.OUTCOME] == cols.INGESTED}
    of_tags = [row[cols.IMAGE_ID] for row in rows["tags"]]
    of_pixels = [row[cols.IMAGE_ID] for row in rows["pixels"]]
    if len(of_tags) != len(set(of_tags)) or len(of_pixels) != len(set(of_pixels)):
        return "an image has rows twice"
    if set(of_tags) != images or set(of_pixels) != images:
        return f"SOURCES has {len(images)} images, TAGS {len(of_tags)}, PIXELS {len(of_pixels)}"
    batches = {
        row[cols.IMAGE_ID]: row[cols.BATCH] for row in rows["vault/sources"] if row[cols.OUTCOME] == cols.INGESTED
    }
    if any(batches[row[cols.IMAGE_ID]] != row[cols.BATCH] for row in rows["tags"]):
        return "an image is in another batch than in SOURCES"
    return ""


@contextlib.contextmanager
def a_reader(lake: Path) -> Iterator[list[str]]:
    """Reads what is published over and over; the list holds one verdict for each time."""
    verdicts: list[str] = []
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.5):
            try:
                verdicts.append(torn(lake))
            except Exception as error:
                verdicts.append(f"not readable: {error}")

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield verdicts
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def site(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("kills")
    template = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
    uid = b"1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322"
    assert template.count(uid) == 2
    (folder / "key").write_text("a key for the tests of kills only\n")
    at = Site(folder, folder / "archive", folder / "first", {})
    first_night(at.archive, template, uid)
    ingest_job.run(spark, config.load(overrides=at.overrides(at.after_first), environ={}))
    second_night(at.archive, template, uid)
    undisturbed = at.lake("undisturbed")
    report = ingest_job.run(spark, config.load(overrides=at.overrides(undisturbed), environ={}))
    assert report.batches > 1
    assert min(report.deleted, report.outcomes[cols.INGESTED]) > 0
    outcomes = {row[cols.OUTCOME] for row in published_rows(undisturbed)["vault/sources"]}
    assert {cols.DUPLICATE, cols.CONFLICT, cols.REJECTED, cols.DELETED} <= outcomes
    assert torn(undisturbed) == ""
    at.expected.update(digests(undisturbed))
    assert at.expected != digests(at.after_first)
    return at


def start(site: Site, lake: Path, **kill: object) -> subprocess.Popen[bytes]:
    spec = {"overrides": site.overrides(lake) + DRIVER_OPTIONS, **kill}
    command = [sys.executable, "-m", "tests.support.killed_job", json.dumps(spec)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def killed_at(site: Site, lake: Path, step: str, when: str, nth: int) -> None:
    driver = start(site, lake, stage=step, when=when, nth=nth)
    assert driver.wait(DRIVER_SECONDS) == -signal.SIGKILL, f"the run ended before {step}"


def heal(spark: SparkSession, site: Site, lake: Path) -> ingest_job.Report:
    return ingest_job.run(spark, config.load(overrides=site.overrides(lake), environ={}))


def test_a_driver_killed_again_and_again_converges(spark: SparkSession, site: Site) -> None:
    lake = site.lake("chain")
    with a_reader(lake) as verdicts:
        for step, when in CHAIN:
            killed_at(site, lake, step, when, nth=1)
        report = heal(spark, site, lake)
    assert report.read > 0
    assert digests(lake) == site.expected
    assert len(verdicts) > 5
    assert set(verdicts) == {""}


def test_the_reader_would_see_a_torn_state(site: Site) -> None:
    lake = site.lake("torn")
    newest, _ = next(commits(lake / "vault" / "sources"))
    log = lake / "vault" / "sources" / "_delta_log" / f"{newest:020}.json"
    text = log.read_text()
    other = DeltaTable(str(lake / "tags")).version() - 1
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if "commitInfo" in line:
            line["commitInfo"]["userMetadata"] = json.dumps(
                json.loads(line["commitInfo"]["userMetadata"]) | {"tags": other}
            )
    log.write_text("\n".join(json.dumps(line) for line in lines))
    assert torn(lake)


@pytest.mark.soak
@pytest.mark.parametrize(("step", "when"), STEPS)
def test_a_driver_killed_at_a_step(spark: SparkSession, site: Site, step: str, when: str) -> None:
    lake = site.lake(f"{step}-{when}".replace(" ", "-"))
    with a_reader(lake) as verdicts:
        # The second time, where a batch is published already, except for what comes once in a run.
        once = step in ("open", "list", "compare") or step.startswith("remove")
        killed_at(site, lake, step, when, nth=1 if once else 2)
        heal(spark, site, lake)
    assert digests(lake) == site.expected
    assert set(verdicts) == {""}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_driver_killed_at_a_random_moment(spark: SparkSession, site: Site, seed: int) -> None:
    lake = site.lake(f"random-{seed}")
    with a_reader(lake) as verdicts:
        driver = start(site, lake)
        # From the first listing to some time after the last commit, on a machine of two cores.
        time.sleep(random.Random(seed).uniform(8, 60))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        heal(spark, site, lake)
    assert digests(lake) == site.expected
    assert set(verdicts) == {""}


def victims(kind: str) -> list[int]:
    """The cluster's executors, or their Python workers, once a decoder runs below: then frames are being staged."""
    executors = below(os.getpid(), "CoarseGrainedExecutorBackend")
    if not any(below(executor, "cbmir_spark.dicom.decoder") for executor in executors):
        return []
    if kind == "executor":
        return executors
    return [pid for executor in executors for pid in below(executor, "cbmir_spark.spark.python_workers")]


def run_while_killing(cluster: Cluster, site: Site, lake: Path, kills: Sequence[str]) -> list[str]:
    """The job on the cluster, while its executors or their Python workers are killed one after the other."""
    overrides = [f"--set={o}" for o in site.overrides(lake)]
    command = [
        SPARK_HOME / "bin" / "spark-submit", "--master", cluster.master,
        "--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.driver.bindAddress=127.0.0.1",
        "--conf", "spark.executor.memory=1g", "--conf", "spark.task.maxFailures=8",
        "--conf", "spark.stage.maxConsecutiveAttempts=12",
        "--conf", "spark.sql.shuffle.partitions=2", "--conf", "spark.databricks.delta.snapshotPartitions=2",
        Path(__file__).resolve().parents[2] / "jobs" / "ingest.py", *overrides, "--json",
    ]  # fmt: skip
    job = subprocess.Popen([str(part) for part in command], env=environment(PYTHON=sys.executable),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    done: list[str] = []

    def kill() -> None:
        for kind in kills:
            while job.poll() is None and not (found := victims(kind)):
                time.sleep(0.05)
            if job.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(found), signal.SIGKILL)
                    done.append(kind)
            time.sleep(3)

    killer = threading.Thread(target=kill)
    killer.start()
    _, errors = job.communicate(timeout=DRIVER_SECONDS * 2)
    killer.join()
    assert job.returncode == 0, errors.decode()[-4000:]
    return done


@pytest.mark.parametrize(
    "kills",
    [
        ["worker", "executor"],
        *[pytest.param([kind] * 5, marks=pytest.mark.soak) for kind in ("worker", "executor")],
    ],
    ids=["suite", "workers", "executors"],
)
def test_workers_and_executors_may_die(
    cluster: Cluster, site: Site, kills: list[str], request: pytest.FixtureRequest
) -> None:
    lake = site.lake(f"cluster-{request.node.callspec.id}")
    with a_reader(lake) as verdicts:
        done = run_while_killing(cluster, site, lake, kills)
    assert done
    assert digests(lake) == site.expected
    assert set(verdicts) == {""}
