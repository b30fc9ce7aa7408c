"""Models that somebody has put a pickle into: what loads models for the index refuses them, and runs none of it."""

import dataclasses
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.api import Lake
from cbmir_spark.cli import command
from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError
from cbmir_spark.index import job as index_job
from cbmir_spark.models import registry, weights
from cbmir_spark.models.artifact import Saved
from tests.conftest import Cbmir
from tests.support.models import registry_of, save_model
from tests.support.tiny_lake import Drawn, publish

pytestmark = pytest.mark.slow

IMAGES = [Drawn("a", "p", "CT", "CHEST"), Drawn("b", "q", "MR", "BRAIN")]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, bait: Path) -> None:
        self.bait = bait

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.bait),)


def by_torch(bait: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": Hostile(bait)}, buffer)
    return buffer.getvalue()


def by_pickle(bait: Path) -> bytes:
    return pickle.dumps(Hostile(bait))


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("attacked")
    settings = config.load(overrides=[f"lake.uri={folder / 'lake'}", "index.min_probability=0.0"], environ={})
    publish(spark, settings, IMAGES)
    return settings


@pytest.fixture
def index(spark: SparkSession, lake: Settings, cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cbmir index` on that lake, over the tests' session."""

    monkeypatch.setattr(command, "lake_for", lambda settings: Lake(settings, spark))
    return lambda *arguments: cbmir("index", "--lake", lake.lake.uri, *arguments)


def test_the_bait_is_a_real_one(tmp_path: Path) -> None:
    for make, load in (
        (by_torch, lambda content: torch.load(io.BytesIO(content), weights_only=False)),
        (by_pickle, pickle.loads),
    ):
        bait = tmp_path / make.__name__
        load(make(bait))
        assert bait.exists()


@pytest.mark.parametrize("make", [by_torch, by_pickle])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weights", "the weights have SHA-256"),
        # Whoever can put weights there can also write their digest into the manifest.
        ("weights and digest", "the weights file is not one that cbmir wrote"),
        ("manifest", "its manifest.json is not text"),
    ],
)
def test_a_pickle_in_a_model_s_folder_is_refused_and_not_run(
    lake: Settings, index: Any, tmp_path: Path, make: Any, where: str, message: str
) -> None:
    folder, bait = tmp_path / "model", tmp_path / "ran"
    saved = save_model(folder)
    content = make(bait)
    (folder / ("manifest.json" if where == "manifest" else "weights.safetensors")).write_bytes(content)
    if where == "weights and digest":
        digest = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(dataclasses.replace(saved.manifest, weights_sha256=digest).to_json())
    with pytest.raises(ModelError, match=message):
        weights.load(registry_of(lake).resolve(str(folder)))
    status, out, err = index("--set", f"index.model={folder}")
    assert (status, out, err.count("\n")) == (1, "", 1) and message in err
    assert not bait.exists()


@pytest.fixture(scope="module")
def registered(lake: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Saved, Path, list[Path]]:
    """A registered candidate; the folders of its run's files and of what MLflow serves of it."""
    saved = save_model(tmp_path_factory.mktemp("registered") / "model")
    models = registry_of(lake)
    with models.connect() as mlflow, mlflow.start_run(experiment_id=models.experiment()) as run:
        version = models.register(run.info.run_id, weights.load(saved).model, saved)
        mlflow.MlflowClient().set_registered_model_alias("cbmir", registry.CANDIDATE, version)
    assert models.tracking.database is not None
    files = models.tracking.database.parent / "artifacts"
    return saved, next(files.rglob("cbmir")), [next(files.rglob("cbmir")).parent, next(files.rglob("MLmodel")).parent]


def test_pickles_beside_a_registered_model_are_never_loaded(
    spark: SparkSession, lake: Settings, registered: tuple[Saved, Path, list[Path]], tmp_path: Path
) -> None:
    """Where MLflow's loaders look: `mlflow.pytorch` for data/model.pth, `mlflow.pyfunc` for python_model.pkl."""
    saved, files, places = registered
    for number, folder in enumerate([*places, places[0] / "model", files]):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for name in ("python_model.pkl", "model.pkl", "data/model.pth", "data/pickle_module_info.txt"):
            (folder / name).write_bytes(by_torch(tmp_path / f"ran {number} {Path(name).name}"))
    report = index_job.run(spark, lake)
    assert report.model_id == saved.manifest.model_id and report.rows == len(IMAGES) and report.champion == "1"
    assert registry_of(lake).incumbent() is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [by_torch, by_pickle])
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_a_pickle_among_the_files_of_a_registered_model_is_refused_and_not_run(
    lake: Settings, index: Any, registered: tuple[Saved, Path, list[Path]], tmp_path: Path, make: Any, name: str
) -> None:
    _, folder, _ = registered
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(make(tmp_path / "ran"))
    try:
        status, out, err = index()
        # Nor does it keep the next training from replacing it.
        assert registry_of(lake).incumbent() is None
    finally:
        (folder / name).write_bytes(before)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert "again" in err
    assert not (tmp_path / "ran").exists()
