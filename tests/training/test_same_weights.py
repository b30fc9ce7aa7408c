"""One course of training ends in one set of weights: from disk or object storage, undisturbed or killed on the way."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.config import Settings
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import registry
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import job as training_job
from cbmir_spark.training.job import TrainingReport
from tests.support import s3_server
from tests.support.cluster import DRIVER_OPTIONS, environment
from tests.support.models import registry_of
from tests.support.s3_server import S3Server
from tests.support.tiny_lake import publish
from tests.support.training import images

pytestmark = [pytest.mark.timeout(900), pytest.mark.more]

# Small row groups, so that an epoch has five steps rather than one.
HOW = ("dataset.min_images=3", "dataset.validation_fraction=0.25", "dataset.rows_per_group=2", "training.batch_size=8")
STEPS = 5
EPOCHS = 2
LONG = 14
JOB_SECONDS = 300


@pytest.fixture(scope="module")
def overrides(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What leads to a published lake in a folder."""
    found = [*HOW, f"training.epochs={EPOCHS}", f"lake.uri={tmp_path_factory.mktemp('disk') / 'lake'}"]
    publish(spark, config.load(overrides=found, environ={}), images(each=8))
    return found


@pytest.fixture(scope="module")
def from_disk(spark: SparkSession, overrides: list[str]) -> TrainingReport:
    """From the lake's folder, at one go."""
    report = training_job.run(spark, config.load(overrides=overrides, environ={}))
    assert report.history.curve[-1].step == STEPS * EPOCHS
    return report


@pytest.fixture
def in_a_bucket(
    s3: S3Server, spark: SparkSession, overrides: list[str], from_disk: TrainingReport, tmp_path: Path
) -> Settings:
    """The tables of the same lake as objects, and MLflow's database elsewhere: there is no server of MLflow's here."""
    s3.bucket("training")
    s3_server.reach(spark, "training", s3.endpoint)
    place = ["lake.uri=s3a://training/lake", f"storage.endpoint={s3.endpoint}"]
    place += [f"mlflow.tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    settings = config.load(overrides=[*overrides, *place], environ={})
    folder = Path(storage.local_path(LakePaths.of(config.load(overrides=overrides, environ={}).lake).uri))
    for table in ("vault/sources", "tags", "pixels"):
        for file in (folder / table).rglob("*"):
            if file.is_file() and file.suffix != ".crc":
                uri = storage.join(settings.lake.uri, file.relative_to(folder).as_posix())
                ObjectStore(settings.storage).write_bytes(uri, file.read_bytes())
    return settings


def is_the_same(report: TrainingReport, expected: TrainingReport) -> bool:
    """Whether two trainings took the same steps to the same weights; a model's id is the digest of its weights."""

    def course(of: TrainingReport) -> object:
        losses = [(epoch.loss, epoch.validation_loss) for epoch in of.history.epochs]
        return of.snapshot, of.images, of.history.curve, of.history.best_epoch, losses, of.test, of.ranking

    assert course(report) == course(expected)
    return report.model_id == expected.model_id


def test_training_from_object_storage_is_training_from_disk(
    spark: SparkSession, overrides: list[str], in_a_bucket: Settings, from_disk: TrainingReport
) -> None:
    assert is_the_same(training_job.run(spark, in_a_bucket), from_disk)
    # Both files of the model come back from where MLflow put them.
    candidate = f"models:/cbmir@{registry.CANDIDATE}"
    assert registry_of(in_a_bucket).resolve(candidate) == registry_of(
        config.load(overrides=overrides, environ={})
    ).resolve(candidate)
    lake = LakePaths.of(in_a_bucket.lake)
    left = {each.uri.removeprefix(lake.uri + "/") for each in ObjectStore(in_a_bucket.storage).list_objects(lake.uri)}
    assert any(name.startswith(f"snapshots/{from_disk.snapshot}/train/") for name in left)
    assert any(name.startswith("mlflow/artifacts/") and name.endswith("/cbmir/weights.safetensors") for name in left)
    assert not any(name.startswith("training/") for name in left), "a training that ended leaves no checkpoint"


# Killed


def start(overrides: Sequence[str], output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`cbmir train` in a new process group, JVM and all."""
    command = [sys.executable, "-m", "cbmir_spark", "train", "--json"]
    command += [f"--set={each}" for each in (*overrides, "training.checkpoint_steps=1", *DRIVER_OPTIONS)]
    return subprocess.Popen(
        command, env=environment(), stdout=output, stderr=subprocess.DEVNULL, start_new_session=True
    )


def newest_step(overrides: Sequence[str]) -> int:
    """The step of the newest checkpoint below the lake, 0 where there is none."""
    folder = Path(storage.local_path(LakePaths.of(config.load(overrides=overrides, environ={}).lake).uri)) / "training"
    return max((int(file.name.partition("-")[0]) for file in folder.rglob("*.safetensors")), default=0)


def kill_within_the_fit(overrides: Sequence[str], further: int, later: float) -> int:
    """Start the job and kill it some seconds after it took so many steps; the step that the next one resumes at."""
    before = newest_step(overrides)
    job = start(overrides)
    try:
        while newest_step(overrides) < before + further:
            assert job.poll() is None, "the job ended before it could be killed"
            time.sleep(0.005)
        time.sleep(later)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        status = job.wait()
    assert status == -signal.SIGKILL, "the job ended before it could be killed"
    return newest_step(overrides)


def test_a_job_that_was_killed_resumes_to_the_same_weights(
    spark: SparkSession, overrides: list[str], from_disk: TrainingReport
) -> None:
    at = kill_within_the_fit(overrides, further=3, later=0.0)
    assert 3 <= at < STEPS * EPOCHS
    report = training_job.run(spark, config.load(overrides=[*overrides, "training.checkpoint_steps=1"], environ={}))
    assert report.history.resumed == at
    assert is_the_same(report, from_disk)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_at_random_steps_end_in_the_same_weights(
    spark: SparkSession, overrides: list[str], seed: int
) -> None:
    """The seed decides how many steps each job takes and when in the next one it dies."""
    how = [*overrides, f"training.epochs={LONG}", f"training.seed={seed}"]
    whole = training_job.run(spark, config.load(overrides=how, environ={}))
    assert whole.history.curve[-1].step == STEPS * LONG
    draws = random.Random(seed)
    killed = [kill_within_the_fit(how, draws.randint(1, 4), draws.uniform(0.0, 0.3)) for _ in range(10)]
    assert killed == sorted(set(killed)) and killed[-1] < STEPS * LONG, killed
    last = start(how, subprocess.PIPE)
    printed, _ = last.communicate(timeout=JOB_SECONDS)
    report = json.loads(printed)
    assert report["history"]["resumed"] == killed[-1]
    assert report["history"]["curve"][-1]["loss"] == whole.history.curve[-1].loss
    assert report["model_id"] == whole.model_id
