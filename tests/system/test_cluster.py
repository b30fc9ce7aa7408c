"""Every job on a real standalone cluster, by spark-submit, with the same results as `local[2]`.

Master and worker come from the installed pyspark, on loopback and on ports that the system chooses. Tables are read
back without Spark, so that nothing in the comparison runs on what is compared.
"""

import csv
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.lake import columns as cols
from cbmir_spark.synthetic import archive as synthetic_archive
from tests.support.cluster import SPARK_HOME, Cluster, environment
from tests.support.search_job import searched

pytestmark = [pytest.mark.timeout(600), pytest.mark.more]

REPO = Path(__file__).resolve().parents[2]
JOB_SECONDS = 240


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    key = folder / "pseudonym.key"
    key.write_text("a key for the cluster's tests only\n")
    archive = folder / "archive"
    settings = {
        "ingest": {"archive": str(archive)},
        "privacy": {"key_file": str(key)},
        "dataset": {"min_images": 4},
        "training": {"preset": "alexnet-small", "epochs": 1},
        "evaluation": {"prefilters": ["none", "tags"]},
        "spark": {
            "conf": {
                # Over so few rows, compiling a plan takes longer than running it.
                "spark.sql.codegen.wholeStage": False,
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
                "spark.sql.shuffle.partitions": 2,
                "spark.databricks.delta.snapshotPartitions": 2,
                "spark.sql.sources.parallelPartitionDiscovery.parallelism": 4,
            }
        },
    }
    file = folder / "site.yaml"
    file.write_text(yaml.safe_dump(settings))
    synthetic_archive.write_demo_archive(archive, images_per_class=6, seed=7)
    # What happens to pydicom's own files is the subject of other tests; here they would only cost time.
    shutil.rmtree(archive / "pydicom")
    return Site(archive, file, folder)


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


def by_local(spark: SparkSession, site: Site, job: str, **flags: str | Path) -> dict[str, Any]:
    """The same job in this process, in the suite's own `local[2]`, as its report would be printed."""
    given = [f"lake.uri={site.on_local}", *(f"{key.replace('__', '.')}={value}" for key, value in flags.items())]
    packages = {"train": "training", "retrieve": "retrieval", "evaluate": "evaluation"}
    room = importlib.import_module(f"cbmir_spark.{packages.get(job, job)}.job")
    report = room.run(spark, config.load(site.config, given, environ={}))
    printed: dict[str, Any] = json.loads(json.dumps(asdict(report), default=str))
    return printed


def rows(table: Path, *without: str) -> list[dict[str, Any]]:
    """Live rows of a Delta table in the order of their text, without the named columns."""
    read = DeltaTable(str(table)).to_pyarrow_table()
    found: list[dict[str, Any]] = read.drop(list(without)).to_pylist()
    return sorted(found, key=repr)


def digest(found: list[dict[str, Any]]) -> str:
    assert found
    return hashlib.sha256(repr(found).encode()).hexdigest()


@pytest.fixture(scope="module")
def ingested(cluster: Cluster, spark: SparkSession, site: Site) -> Site:
    submitted = by_spark_submit(cluster, site, "ingest", "--archive", site.archive)
    local = by_local(spark, site, "ingest")
    assert submitted["outcomes"] == local["outcomes"]
    return site


def test_ingest_gives_the_same_rows(ingested: Site) -> None:
    lakes = ingested.on_cluster, ingested.on_local
    for path, without in (("tags", [cols.BATCH]), ("pixels", [cols.BATCH]), ("vault/sources", [cols.BATCH])):
        submitted, local = (digest(rows(lake / path, *without)) for lake in lakes)
        assert submitted == local, path
    outcomes = {row[cols.OUTCOME] for row in rows(ingested.on_cluster / "vault" / "sources")}
    assert {cols.INGESTED, cols.DUPLICATE, cols.CONFLICT, cols.REJECTED, cols.NOT_AN_IMAGE} <= outcomes


@pytest.fixture(scope="module")
def trained(cluster: Cluster, spark: SparkSession, ingested: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    return by_spark_submit(cluster, ingested, "train"), by_local(spark, ingested, "train")


def test_train_gives_the_same_model(trained: tuple[dict[str, Any], dict[str, Any]]) -> None:
    submitted, local = trained
    # The id ends in a digest of the weights: they agree to the last bit.
    for figure in ("model_id", "snapshot", "images", "patients", "test"):
        assert submitted[figure] == local[figure], figure
    assert submitted["images"]["test"] > 0


@pytest.fixture(scope="module")
def indexed(
    cluster: Cluster, spark: SparkSession, ingested: Site, trained: tuple[dict[str, Any], dict[str, Any]]
) -> Site:
    by_spark_submit(cluster, ingested, "index", "--model", "models:/cbmir@candidate")
    by_local(spark, ingested, "index", index__model="models:/cbmir@candidate")
    return ingested


def test_index_gives_the_same_vectors(indexed: Site, trained: tuple[dict[str, Any], dict[str, Any]]) -> None:
    model_id = trained[0]["model_id"]
    submitted, local = (
        rows(lake / "features" / model_id, cols.PIXELS_BATCH) for lake in (indexed.on_cluster, indexed.on_local)
    )
    # Projections come from matrix products over as many rows as a task happened to have.
    for one, other in zip(submitted, local, strict=True):
        np.testing.assert_allclose(one.pop(cols.PROJECTION), other.pop(cols.PROJECTION), rtol=1e-5, atol=1e-5)
        assert one.pop(cols.RESIDUAL_NORM) == pytest.approx(other.pop(cols.RESIDUAL_NORM), rel=1e-9)
    assert digest(submitted) == digest(local)
    images = {row[cols.IMAGE_ID] for row in submitted}
    shown = {row[cols.IMAGE_ID] for row in rows(indexed.on_cluster / "tags") if row[cols.KIND] == cols.IMAGE_KIND}
    assert images == shown


@pytest.fixture(scope="module")
def queries(indexed: Site) -> Path:
    """A query of each kind for each of some phantoms, and one that nobody can answer."""
    file = indexed.folder / "queries.csv"
    phantoms = sorted((indexed.archive / "phantoms").rglob("*.dcm"))
    images = [row[cols.IMAGE_ID] for row in rows(indexed.on_cluster / "tags") if row[cols.KIND] == cols.IMAGE_KIND]
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["query_id", "uri", "image_id", "sop_instance_uid"])
        for number, path in enumerate(phantoms[::10]):
            writer.writerow([f"uri-{number}", path, "", ""])
            writer.writerow([f"uid-{number}", "", "", pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID])
        for number, image in enumerate(images[::10]):
            writer.writerow([f"image-{number}", "", image, ""])
        writer.writerow(["nobody", "", "0" * 32, ""])
    return file


def in_order(folder: Path, *by: str) -> bytes:
    """Rows of a Parquet folder in the order of some columns, as the bytes of one Arrow batch."""
    read = pq.read_table(folder).sort_by([(column, "ascending") for column in by]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, read.schema) as stream:
        stream.write_table(read)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def test_retrieve_gives_the_same_hits(cluster: Cluster, spark: SparkSession, indexed: Site, queries: Path) -> None:
    submitted, local = indexed.folder / "submitted-answers", indexed.folder / "local-answers"
    flags = ("--queries", queries, "--k", "5", "--prefilter", "tags", "--out", submitted)
    by_spark_submit(cluster, indexed, "retrieve", *flags)
    by_local(spark, indexed, "retrieve", retrieval__queries=queries, retrieval__k="5", retrieval__out=local)
    assert in_order(submitted / "hits", cols.QUERY_ID, cols.RANK) == in_order(local / "hits", cols.QUERY_ID, cols.RANK)
    assert in_order(submitted / "statuses", cols.QUERY_ID) == in_order(local / "statuses", cols.QUERY_ID)

    asked = [row["query_id"] for row in csv.DictReader(queries.read_text().splitlines())]
    statuses = {row[cols.QUERY_ID]: row for row in pq.read_table(submitted / "statuses").to_pylist()}
    assert sorted(statuses) == sorted(asked)
    found = {query: status[cols.HITS] for query, status in statuses.items()}
    assert found.pop("nobody") == 0
    assert min(found.values()) > 0


def test_evaluate_gives_the_same_figures(cluster: Cluster, spark: SparkSession, indexed: Site) -> None:
    submitted = by_spark_submit(cluster, indexed, "evaluate", "--out", indexed.folder / "submitted-evaluation")
    local = by_local(spark, indexed, "evaluate", evaluation__out=indexed.folder / "local-evaluation")
    for figure in ("queries", "patients", "accuracy", "by_class", "retrieval"):
        assert submitted[figure] == local[figure], figure
    assert submitted["queries"] > 0


@pytest.mark.parametrize(
    ("seed", "asked"), [(21, 40), pytest.param(22, 1000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_random_queries_have_the_same_hits(
    cluster: Cluster, spark: SparkSession, tmp_path: Path, seed: int, asked: int
) -> None:
    """Of images in every mode and of series; test_search.py and test_volumes.py hold `local[2]` to brute force."""
    (tmp_path / "cluster").mkdir()
    arguments = [cluster.master, str(tmp_path / "cluster"), str(seed), str(asked)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.search_job", *arguments], env=environment(), cwd=REPO, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = json.loads((tmp_path / "cluster" / "found.json").read_text())
    assert found == searched(spark, tmp_path / "local", seed, asked)
    assert all(found.values())
