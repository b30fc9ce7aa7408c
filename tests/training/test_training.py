"""The job: what it trains on, what MLflow holds afterwards, how models are found again, and what survives a kill."""

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import ConfigError, ModelError, TrainingError
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import embed as embedding
from cbmir_spark.models import registry, weights
from cbmir_spark.training import job as training_job
from cbmir_spark.training.history import Epoch
from cbmir_spark.training.job import TrainingReport
from cbmir_spark.training.manifest import MANIFEST
from tests.conftest import Cbmir
from tests.support import boundary
from tests.support.models import registry_of
from tests.support.processes import below
from tests.support.tiny_lake import publish
from tests.support.training import IMAGES_EACH, PATIENTS, images, settings_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, TrainingReport, list[Epoch], str]:
    """One training run on a tiny lake; tests look at what it left behind."""
    folder = tmp_path_factory.mktemp("trained")
    settings = settings_for(folder)
    publish(spark, settings, images())
    elsewhere = folder / "working"
    elsewhere.mkdir()
    before = Path.cwd()
    epochs: list[Epoch] = []
    os.chdir(elsewhere)
    try:
        report = training_job.run(spark, settings, epochs.append)
    finally:
        os.chdir(before)
    assert list(elsewhere.iterdir()) == [], "MLflow wrote into the working folder"
    return settings, report, epochs, f"sqlite:///{folder / 'lake' / 'mlflow' / 'mlflow.db'}"


Trained = tuple[Settings, TrainingReport, list[Epoch], str]


def test_run_reports_what_it_did(trained: Trained) -> None:
    _, report, epochs, tracking_uri = trained
    assert report.images == {"train": 27, "validation": 0, "test": 9} and report.classes == 3
    assert report.patients == {"train": 9, "validation": 0, "test": 3}
    assert list(report.history.epochs) == epochs and len(epochs) == 2
    assert report.test is not None and 0.0 <= report.test.macro_recall <= 1.0
    assert report.model_uri == "models:/cbmir/1" and report.tracking_uri == tracking_uri
    assert set(report.seconds) == {"snapshot", "fit", "projection", "test", "ranking", "register"}
    assert report.ranking is None and report.promotion.taken


def test_mlflow_run_holds_parameters_metrics_data_versions_and_figures(trained: Trained, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings, report, epochs, tracking_uri = trained
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    lake = LakePaths.of(settings.lake)
    assert run.info.artifact_uri.startswith(storage.join(lake.uri, "mlflow", "artifacts"))
    assert (
        run.data.params.items()
        >= {
            "preset": "alexnet-small",
            "epochs": "2",
            "batch_size": "8",
            "seed": "1",
            "dataset.label": "modality/body_part",
            "snapshot": report.snapshot,
            "preprocessing": "px1-test",
            "delta.tags": str(report.versions["tags"]),
            "delta.pixels": str(report.versions["pixels"]),
            "delta.sources": str(report.versions["sources"]),
        }.items()
    )
    inputs = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
    assert {name: json.loads(inputs[name].source)["delta_table_version"] for name in inputs} == {
        "tags": report.versions["tags"],
        "pixels": report.versions["pixels"],
    }
    assert {each.digest for each in inputs.values()} == {report.snapshot}
    losses = client.get_metric_history(report.run_id, "train_loss")
    assert [(m.step, m.value) for m in losses] == [(epoch.number, epoch.loss) for epoch in epochs]
    assert report.test is not None
    assert run.data.metrics["test_macro_recall"] == report.test.macro_recall
    by_class = json.loads(Path(client.download_artifacts(report.run_id, "test/per_class.json", tmp_path)).read_text())
    assert by_class["by_class"] == report.test.by_class
    picture = Path(client.download_artifacts(report.run_id, "test/confusion_matrix.png", tmp_path)).read_bytes()
    assert picture.startswith(b"\x89PNG")
    picture = Path(client.download_artifacts(report.run_id, "test/precision_recall.png", tmp_path)).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert run.data.tags["version.torch"] == torch.__version__.partition("+")[0]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run.data.tags["mlflow.source.git.commit"])


def test_the_delta_versions_of_a_run_give_the_rows_it_learned_from(spark: SparkSession, trained: Trained) -> None:
    settings, report, _, _ = trained
    tags = delta.read(spark, LakePaths.of(settings.lake).path(schemas.TAGS), report.versions["tags"])
    assert tags.count() == sum(report.images.values()) == 3 * PATIENTS * IMAGES_EACH


def test_the_candidate_is_a_pickle_free_model_with_a_signature(trained: Trained, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.models import get_model_info

    settings, report, _, tracking_uri = trained
    client = MlflowClient(tracking_uri=tracking_uri)
    version = client.get_model_version_by_alias("cbmir", "candidate")
    assert version.run_id == report.run_id and version.tags["model_id"] == report.model_id
    with registry_of(settings).connect():
        info = get_model_info("models:/cbmir@candidate")
    assert info.signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "uint8", "shape": (-1, 256, 256)}
    assert info.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 3)}
    assert info.saved_input_example_info is not None
    with registry_of(settings).connect() as mlflow:
        folder = Path(mlflow.artifacts.download_artifacts("models:/cbmir@candidate", dst_path=str(tmp_path)))
    names = {path.name for path in folder.rglob("*")}
    assert "model.pt2" in names and not {name for name in names if name.endswith((".pkl", ".pth", ".pt"))}


def test_the_served_model_gives_the_scores_of_ours(trained: Trained) -> None:
    import mlflow

    settings, report, _, _ = trained
    loaded = weights.load(registry_of(settings).resolve(report.model_uri))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 256, 256), dtype=np.uint8)
    with registry_of(settings).connect():
        served = mlflow.pyfunc.load_model(report.model_uri).predict(pixels)
    assert np.allclose(served, embedding.embed_batches(loaded, pixels).scores, atol=1e-5)


def test_a_model_is_found_by_alias_version_run_and_folder(trained: Trained, tmp_path: Path) -> None:
    settings, report, _, _ = trained
    saved = registry_of(settings).resolve("models:/cbmir@candidate")
    loaded = weights.load(saved)
    assert loaded.manifest.model_id == report.model_id and loaded.manifest.preprocessing == "px1-test"
    assert loaded.manifest.classes == ("CT/CHEST", "CT/HEAD", "MR/HEAD")
    assert loaded.manifest.possible == {"CT": ("CT/CHEST", "CT/HEAD"), "MR": ("MR/HEAD",)}
    assert loaded.manifest.snapshot == report.snapshot
    assert loaded.projection.directions.shape == (128, loaded.manifest.embedding_dim)
    assert loaded.projection.defect < 1e-12
    (tmp_path / "manifest.json").write_text(saved.manifest.to_json())
    (tmp_path / "weights.safetensors").write_bytes(saved.weights)
    for uri in (report.model_uri, f"runs:/{report.run_id}", str(tmp_path)):
        assert registry_of(settings).resolve(uri) == saved


def test_an_alias_moves_to_the_version_with_that_model(trained: Trained) -> None:
    settings, report, _, _ = trained
    with pytest.raises(ModelError, match=r"models:/cbmir@champion is not there.*cbmir train"):
        registry_of(settings).resolve("models:/cbmir@champion")
    assert registry_of(settings).move_alias(registry.CHAMPION, report.model_id) == "1"
    assert registry_of(settings).resolve("models:/cbmir@champion") == registry_of(settings).resolve(report.model_uri)
    assert registry_of(settings).move_alias(registry.CHAMPION, "alexnet-0") is None


def test_models_that_are_not_there_are_named_and_nothing_is_made(trained: Trained, tmp_path: Path) -> None:
    settings, _, _, _ = trained
    for uri in ("models:/cbmir/7", "models:/other@candidate", "runs:/0123456789abcdef0123456789abcdef"):
        with pytest.raises(ModelError, match=f"model {uri} is not there"):
            registry_of(settings).resolve(uri)
    with pytest.raises(ModelError, match="give it as models:/name@alias"):
        registry_of(settings).resolve("models:/cbmir")
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        registry_of(settings).resolve(str(tmp_path))
    fresh = settings_for(tmp_path)
    with pytest.raises(ModelError, match="nothing was trained on this lake"):
        registry_of(fresh).resolve("models:/cbmir@candidate")
    assert not (tmp_path / "lake").exists()


def test_an_object_store_lake_needs_a_tracking_server() -> None:
    settings = config.load(overrides=["lake.uri=s3a://bucket/lake"], environ={})
    with pytest.raises(ConfigError, match=r"mlflow\.tracking_uri is not set.*s3a://bucket/lake"):
        _ = registry_of(settings).tracking
    served = settings.override({"mlflow.tracking_uri": "http://127.0.0.1:5000"})
    assert registry_of(served).tracking.uri == "http://127.0.0.1:5000"


# pyspark does not close the pipe on which it reads what torchrun prints.
leaves_pipe = pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.BufferedReader:ResourceWarning")


@leaves_pipe
def test_two_processes_train_one_model(
    spark: SparkSession, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through TorchDistributor, each process on its shards: the steps that one process takes, but for rounding."""
    settings, report, _, _ = trained
    two = settings.override({"training.processes": 2})
    second = training_job.run(spark, two)
    assert second.snapshot == report.snapshot and second.model_uri == "models:/cbmir/2"
    assert second.model_id != report.model_id
    assert [epoch.number for epoch in second.history.epochs] == [1, 2]
    alone = [epoch.loss for epoch in report.history.epochs]
    assert [epoch.loss for epoch in second.history.epochs] == pytest.approx(alone, rel=0.02)
    loaded = weights.load(registry_of(two).resolve("models:/cbmir@candidate"))
    assert loaded.manifest.model_id == second.model_id
    assert registry_of(two).move_alias(registry.CHAMPION, report.model_id) == "1"
    assert capfd.readouterr().out == ""


@leaves_pipe
def test_a_process_that_fails_names_its_cause(spark: SparkSession, trained: Trained) -> None:
    settings, _, _, _ = trained
    diverging = settings.override({"training": {"processes": 2, "learning_rate": 1e30, "epochs": 3}})
    with pytest.raises(TrainingError, match=r"a training process failed: the loss is (nan|inf)"):
        training_job.run(spark, diverging)


# Several trainings at once


def test_a_sweep_is_one_run_with_a_run_for_each_training(spark: SparkSession, trained: Trained) -> None:
    from mlflow import MlflowClient

    settings, report, _, tracking_uri = trained
    rates = (1e-3, 1e-4)
    variants = [settings.override({"training.learning_rate": rate}) for rate in rates]
    counted: list[int] = []
    with boundary.counted() as asked:
        reports = training_job.sweep(spark, variants, "rates.yaml", counted.append)
    # The lake is opened once for all of them, and each training finds its snapshot's manifest.
    lake = LakePaths.of(settings.lake)
    assert asked.opened == {(lake.path(each), report.versions[each.name]): 1 for each in (schemas.TAGS, schemas.PIXELS)}
    assert asked.histories == {lake.path(schemas.SOURCES): 1}
    assert asked.objects["read_bytes", storage.join(lake.snapshot(report.snapshot), MANIFEST)] == len(variants)
    assert counted == [1, 2] and reports[0].model_id == report.model_id != reports[1].model_id
    client = MlflowClient(tracking_uri=tracking_uri)
    children = [client.get_run(each.run_id).data for each in reports]
    (parent,) = {child.tags["mlflow.parentRunId"] for child in children}
    assert client.get_run(parent).info.run_name == "rates.yaml"
    assert [child.params["learning_rate"] for child in children] == [str(rate) for rate in rates]
    elsewhere = settings.override({"lake.uri": "/nowhere"})
    with pytest.raises(ConfigError, match=r"lake\.uri differs"):
        training_job.sweep(spark, [settings, elsewhere], "both", counted.append)
    other = settings.override({"mlflow.model_name": "other"})
    with pytest.raises(ConfigError, match="mlflow differs"):
        training_job.sweep(spark, [settings, other], "both", counted.append)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- training.epochz: 3", "epochz"),
        ("training.epochs: 3", "give a list"),
        ("- 3", "give a list"),
        ("[]", "give a list"),
        ("- {", "not valid YAML"),
        (None, "No such file"),
    ],
)
def test_a_sweep_that_cannot_be_read_trains_nothing(
    tmp_path: Path, cbmir: Cbmir, text: str | None, message: str
) -> None:
    file = tmp_path / "sweep.yaml"
    if text is not None:
        file.write_text(text)
    status, _, printed = cbmir("train", "--sweep", str(file), "--lake", str(tmp_path / "lake"))
    assert status != 0 and message in printed and len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "lake").exists()


# Stopped and resumed


class Killed(Exception):
    """What ends a run in the middle, between two epochs."""


def test_a_run_that_was_stopped_resumes_and_ends_in_the_same_model(spark: SparkSession, trained: Trained) -> None:
    settings, report, _, tracking_uri = trained
    often = settings.override({"training.checkpoint_steps": 1})
    checkpoints = Path(storage.local_path(LakePaths.of(settings.lake).checkpoints))
    assert not any(checkpoints.rglob("*.safetensors")), "a training that ended leaves no checkpoint"

    def die(epoch: Epoch) -> None:
        raise Killed

    with pytest.raises(Killed):
        training_job.run(spark, often, die)
    assert any(checkpoints.rglob("*.safetensors"))
    epochs: list[Epoch] = []
    again = training_job.run(spark, often, epochs.append)
    assert again.model_id == report.model_id
    assert [epoch.loss for epoch in epochs] == [epoch.loss for epoch in report.history.epochs]
    from mlflow import MlflowClient

    tags = MlflowClient(tracking_uri=tracking_uri).get_run(again.run_id).data.tags
    assert tags["resumed_from_step"] == str(again.history.resumed) != "0"
    assert not any(checkpoints.rglob("*.safetensors"))


def test_runs_are_compared_in_the_terminal(trained: Trained, cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, report, _, _ = trained
    monkeypatch.setenv("COLUMNS", "160")
    folder = storage.local_path(LakePaths.of(settings.lake).uri)
    status, printed, _ = cbmir("runs", "--lake", folder, "--json")
    found = {run["run_id"]: run for run in json.loads(printed)}[report.run_id]
    assert status == 0 and found["model_id"] == report.model_id and found["parameters"]["preset"] == "alexnet-small"
    assert report.test is not None and found["metrics"]["test_macro_recall"] == report.test.macro_recall
    assert report.run_id[:8] in cbmir("runs", "--lake", folder)[1]
    status, _, printed = cbmir("runs", "--lake", f"{folder}-nowhere")
    assert status == 1 and "nothing was trained on this lake" in printed


@leaves_pipe
def test_a_process_that_was_killed_is_started_again_from_the_checkpoint(spark: SparkSession, trained: Trained) -> None:
    settings, _, _, _ = trained
    how = {"processes": 2, "checkpoint_steps": 1, "epochs": 4, "seed": 7}
    two = settings.override({"training": how})
    checkpoints = Path(storage.local_path(LakePaths.of(settings.lake).checkpoints))
    killed: list[int] = []

    def kill() -> None:
        while not any(checkpoints.rglob("*.safetensors")):
            time.sleep(0.02)
        # The launcher that watches them has both names on its command line.
        launchers = below(os.getpid(), "torch.distributed.run")
        victim = random.choice([each for each in below(os.getpid(), "train.py") if each not in launchers])
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = training_job.run(spark, two)
    killer.join(timeout=10)
    assert killed and report.history.resumed is not None
    assert [epoch.number for epoch in report.history.epochs] == [1, 2, 3, 4]


# The gate


def test_a_new_model_is_ranked_beside_the_candidate_on_one_split(spark: SparkSession, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = settings_for(tmp_path, "dataset.validation_fraction=0.25")
    publish(spark, settings, images())
    first = training_job.run(spark, settings)
    assert first.ranking is not None and 0.0 < first.ranking.mean_average_precision <= 1.0
    assert first.promotion.taken and first.promotion.incumbent_reached is None
    again = training_job.run(spark, settings)
    assert again.model_id == first.model_id and again.ranking == first.ranking
    assert again.promotion.incumbent_reached == again.promotion.reached == first.ranking.mean_average_precision
    client = MlflowClient(tracking_uri=first.tracking_uri)
    assert client.get_run(first.run_id).data.metrics["validation_map"] == first.ranking.mean_average_precision

    standing = registry_of(settings).incumbent()
    assert standing is not None and standing.version == "2"
    for challenger, taken in ((0.80, False), (0.895, True), (0.91, True)):
        client.set_registered_model_alias("cbmir", registry.CANDIDATE, "2")
        found = registry_of(settings).promote("1", challenger, standing, 0.9, settings.training.promotion_margin)
        assert found.taken == taken
        tags = client.get_model_version("cbmir", "1").tags
        assert tags["promotion"] == ("candidate" if taken else "refused")
        assert (tags["promotion.map"], tags["promotion.incumbent_map"]) == (str(challenger), "0.9")
        holder = client.get_model_version_by_alias("cbmir", registry.CANDIDATE)
        assert str(holder.version) == ("1" if taken else "2")
