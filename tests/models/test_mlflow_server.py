"""Training beside a real MLflow server: everything is there for its client, and the alias follows the gate."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import Busy
from cbmir_spark.index import job as index_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, lease, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import registry
from cbmir_spark.training import job as training_job
from cbmir_spark.training.job import TrainingReport
from tests.support import mlflow_server
from tests.support.cluster import DRIVER_OPTIONS, environment
from tests.support.models import open_index, registry_of
from tests.support.tiny_lake import Drawn, publish
from tests.support.training import images, settings_for

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server.serve(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


@pytest.fixture(scope="module")
def two(
    spark: SparkSession, server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, list[TrainingReport]]:
    """Two trainings of one lake that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("served")
    settings = settings_for(folder, f"mlflow.tracking_uri={server}", "dataset.validation_fraction=0.25")
    publish(spark, settings, images())
    reports = []
    for rate in (1e-3, 1e-4):
        reports.append(training_job.run(spark, settings.override({"training.learning_rate": rate})))
    return settings, reports


def test_two_runs_are_compared_by_the_client(server: str, two: tuple[Settings, list[TrainingReport]]) -> None:
    from mlflow import MlflowClient

    settings, reports = two
    client = MlflowClient(tracking_uri=server)
    for report, rate in zip(reports, ("0.001", "0.0001"), strict=True):
        run = client.get_run(report.run_id)
        assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == rate
        assert report.test is not None and report.ranking is not None
        assert run.data.metrics["test_macro_recall"] == report.test.macro_recall
        assert run.data.metrics["validation_map"] == report.ranking.mean_average_precision
        assert len(client.get_metric_history(report.run_id, "train_loss")) == 2
        sources = {each.dataset.name: json.loads(each.dataset.source) for each in run.inputs.dataset_inputs}
        assert sources["tags"] == {
            "path": LakePaths.of(settings.lake).path(schemas.TAGS),
            "delta_table_version": report.versions["tags"],
        }
        files = {file.path for name in ("test", "cbmir") for file in client.list_artifacts(report.run_id, name)}
        assert files == {
            "test/per_class.json",
            "test/confusion_matrix.png",
            "test/average_precision.json",
            "test/precision_recall.png",
            "cbmir/manifest.json",
            "cbmir/weights.safetensors",
        }
    shown = {run.run_id: run for run in registry_of(settings).runs(10)}
    assert [shown[report.run_id].version for report in reports] == ["1", "2"]


def test_the_alias_stays_for_a_worse_model_and_moves_for_a_better_one(
    server: str, two: tuple[Settings, list[TrainingReport]]
) -> None:
    from mlflow import MlflowClient

    settings, _ = two
    client = MlflowClient(tracking_uri=server)
    client.set_registered_model_alias("cbmir", registry.CANDIDATE, "1")
    standing = registry_of(settings).incumbent()
    assert standing is not None and standing.version == "1"
    for reached, holder in ((0.5, "1"), (0.95, "2")):
        registry_of(settings).promote("2", reached, standing, 0.9, settings.training.promotion_margin)
        assert str(client.get_model_version_by_alias("cbmir", registry.CANDIDATE).version) == holder


def test_index_makes_the_candidate_champion(
    spark: SparkSession, server: str, two: tuple[Settings, list[TrainingReport]]
) -> None:
    from mlflow import MlflowClient

    settings, _ = two
    indexed = index_job.run(spark, settings)
    client = MlflowClient(tracking_uri=server)
    champion = client.get_model_version_by_alias("cbmir", registry.CHAMPION)
    candidate = client.get_model_version_by_alias("cbmir", registry.CANDIDATE)
    assert champion.version == candidate.version and champion.tags["model_id"] == indexed.model_id


# Two index jobs at once


def grow(spark: SparkSession, settings: Settings, batch: int) -> None:
    """Give the index something to do for a while."""
    parts = (("CT", "CHEST"), ("MR", "HEAD"))
    publish(spark, settings, [Drawn(f"new {batch} {n}", "new", *parts[n % 2], frames=20) for n in range(6)], batch)


def start_index(settings: Settings) -> subprocess.Popen[str]:
    given = [f"lake.uri={settings.lake.uri}", f"mlflow.tracking_uri={settings.mlflow.tracking_uri}", *DRIVER_OPTIONS]
    command = [sys.executable, "-m", "cbmir_spark", "index", "--json", *(f"--set={each}" for each in given)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_one_index(spark: SparkSession, server: str, settings: Settings) -> None:
    """One champion, on the candidate's version, and each live frame once in its index."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    candidate = client.get_model_version_by_alias("cbmir", registry.CANDIDATE)
    assert client.get_registered_model("cbmir").aliases == {
        registry.CANDIDATE: candidate.version,
        registry.CHAMPION: candidate.version,
    }
    lake = LakePaths.of(settings.lake)
    frames = delta.read(spark, lake.path(schemas.PIXELS), publication.require_published(spark, lake).pixels)
    rows = open_index(spark, settings).rows
    keys = [cols.IMAGE_ID, cols.FRAME]
    assert sorted(map(tuple, rows.select(keys).collect())) == sorted(map(tuple, frames.select(keys).collect()))


BUSY = r"lease index of this lake is held by process \d+ on host .+: wait for that job, or end it"


def test_an_index_job_beside_another_one_is_told_to_wait(
    spark: SparkSession, server: str, two: tuple[Settings, list[TrainingReport]]
) -> None:
    settings, _ = two
    grow(spark, settings, batch=2)
    job = start_index(settings)
    lock = Path(storage.local_path(LakePaths.of(settings.lake).vault)) / lease.FOLDER / f"{lease.INDEX}.lock"
    while f'"pid": {job.pid}' not in (lock.read_text() if lock.exists() else ""):
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    with pytest.raises(Busy, match=BUSY) as refused:
        index_job.run(spark, settings)
    assert f"process {job.pid} " in str(refused.value) and refused.value.exit_code == 75
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert json.loads(out)["embedded"] == 120
    assert_one_index(spark, server, settings)
    again = index_job.run(spark, settings)
    assert (again.embedded, again.deleted) == (0, 0) and again.champion == json.loads(out)["champion"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_index_jobs_at_once_leave_one_index_and_one_champion(
    spark: SparkSession, server: str, two: tuple[Settings, list[TrainingReport]], seed: int
) -> None:
    settings, _ = two
    grow(spark, settings, batch=10 + seed)
    draws = random.Random(seed)
    jobs = []
    for _ in range(3):
        jobs.append(start_index(settings))
        time.sleep(draws.uniform(0.0, 2.0))
    ended = [(job.communicate(timeout=600), job.returncode) for job in jobs]
    for (out, err), status in ended:
        last = err.strip().splitlines()[-1:]
        assert status == 0 or (status == Busy.exit_code and not out and re.search(BUSY, last[0])), err
    assert 0 in [status for _, status in ended]
    assert_one_index(spark, server, settings)
