"""The loop on one process and two, what MLflow holds afterwards, and how models are found again."""

import json
import math
import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from pyspark.sql import SparkSession

from cbmir_spark import config, dataset, model, storage, training
from cbmir_spark import tables as t
from cbmir_spark.config import Settings
from cbmir_spark.errors import ConfigError, ModelError, TrainingError
from cbmir_spark.training import Fitting, Loaders, TrainingReport
from tests.tiny_lake import Drawn, publish

PATIENTS, IMAGES_EACH = 4, 3


class InMemory:
    """Batches of two kinds of picture, bright and dark, in an order that only the epoch decides."""

    def __init__(self, rows: int = 16, size: int = 8) -> None:
        self.rows, self.steps, self.size = rows, rows // size, size
        noise = np.random.default_rng(5).integers(0, 40, (rows, 256, 256))
        self.targets = np.arange(rows) % 2
        self.pixels = (noise + 160 * self.targets[:, None, None]).astype(np.uint8)

    def epoch(self, number: int) -> Generator[dataset.Batch, None, None]:
        order = np.random.default_rng(number + 1).permutation(self.rows)
        for chosen in np.split(order, self.steps):
            yield torch.from_numpy(self.pixels[chosen]), torch.from_numpy(self.targets[chosen])


def fitting(**changes: object) -> Fitting:
    values = {
        "optimiser": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "epochs": 2,
        "class_weights": (1.0, 1.0),
        "seed": 1,
    }
    return Fitting(**{**values, **changes})


def small(seed: int = 1) -> model.Network:
    torch.manual_seed(seed)
    return model.build("alexnet-small", 2)


# The loop


def test_training_twice_with_one_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        network = small()
        training.fit(network, Loaders(InMemory(), None), fitting(seed=seed))
        return list(network.state_dict().values())

    first = weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(1), strict=True))
    # The seed decides dropout, so another one gives other weights from the same start.
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(2), strict=True))


def test_training_learns_and_leaves_the_callers_random_numbers_alone() -> None:
    network, source, told = small(), InMemory(), []
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    history = training.fit(network, Loaders(source, None), fitting(epochs=6), told.append)
    assert torch.equal(torch.rand(3), expected)
    assert list(history.epochs) == told and [epoch.number for epoch in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1].loss < 0.5 * told[0].loss and history.kept == 6
    _, confusion = training.confusion_of(network, source, torch.ones(2))
    assert confusion.tolist() == [[8, 0], [0, 8]]


def test_the_epoch_that_validates_best_is_kept() -> None:
    network, source = small(), InMemory()
    states, scores = [], []

    def remember(epoch: training.Epoch) -> None:
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        scores.append(epoch.validation_macro_recall)

    history = training.fit(network, Loaders(source, InMemory(rows=8)), fitting(epochs=4), remember)
    assert history.kept == 1 + scores.index(max(scores))
    kept = states[history.kept - 1]
    assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_the_learning_rate() -> None:
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch \d.*learning_rate \(it was 1e\+30\)"):
        training.fit(small(), Loaders(InMemory(), None), fitting(optimiser="sgd", learning_rate=1e30, epochs=3))


def test_class_weights_make_every_class_count_alike() -> None:
    images = [90, 9, 0, 1]
    weights = training.class_weights(images)
    assert [w * n for w, n in zip(weights, images, strict=True)] == pytest.approx([100 / 3, 100 / 3, 0.0, 100 / 3])


def test_figures_of_a_confusion_matrix_by_hand() -> None:
    found = training.figures(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["A", "B", "C"])
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.by_class["A"] == pytest.approx({"precision": 1.0, "recall": 0.75, "f1": 6 / 7, "images": 4})
    assert found.by_class["B"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "images": 2})
    # C has no image: it says nothing about the classifier.
    assert found.macro_recall == pytest.approx(0.875) and found.macro_precision == pytest.approx(5 / 6)
    assert found.macro_f1 == pytest.approx((6 / 7 + 0.8) / 2)


# The job


def images() -> list[Drawn]:
    return [
        Drawn(f"{modality}{part}{patient}-{number}", f"{modality}{part}{patient}", modality, part)
        for modality, part in (("CT", "CHEST"), ("CT", "HEAD"), ("MR", "HEAD"))
        for patient in range(PATIENTS)
        for number in range(IMAGES_EACH)
    ]


def settings_for(folder: Path, *overrides: str) -> Settings:
    own = [f"lake.uri={folder / 'lake'}", "dataset.min_images=3", "training.epochs=2", "training.batch_size=8"]
    return config.load(overrides=[*own, *overrides], environ={})


@pytest.fixture(scope="module")
def trained(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, TrainingReport, list[training.Epoch], str]:
    """One training run on a tiny lake; tests look at what it left behind."""
    folder = tmp_path_factory.mktemp("trained")
    settings = settings_for(folder)
    publish(spark, settings, images())
    elsewhere = folder / "working"
    elsewhere.mkdir()
    before = Path.cwd()
    told: list[training.Epoch] = []
    os.chdir(elsewhere)
    try:
        report = training.run(spark, settings, told.append)
    finally:
        os.chdir(before)
    assert list(elsewhere.iterdir()) == [], "MLflow wrote into the working folder"
    return settings, report, told, f"sqlite:///{folder / 'lake' / 'mlflow' / 'mlflow.db'}"


Trained = tuple[Settings, TrainingReport, list[training.Epoch], str]


def test_run_reports_what_it_did(trained: Trained) -> None:
    _, report, told, tracking_uri = trained
    assert report.images == {"train": 27, "validation": 0, "test": 9} and report.classes == 3
    assert report.patients == {"train": 9, "validation": 0, "test": 3}
    assert list(report.history.epochs) == told and len(told) == 2
    assert report.test is not None and 0.0 <= report.test.macro_recall <= 1.0
    assert report.model_uri == "models:/cbmir/1" and report.tracking_uri == tracking_uri
    assert set(report.seconds) == {"snapshot", "fit", "projection", "test", "register"}


def test_mlflow_run_holds_parameters_metrics_data_versions_and_figures(trained: Trained, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings, report, told, tracking_uri = trained
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    lake = t.Lake.of(settings)
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
    losses = client.get_metric_history(report.run_id, "train_loss")
    assert [(m.step, m.value) for m in losses] == [(epoch.number, epoch.loss) for epoch in told]
    assert report.test is not None
    assert run.data.metrics["test_macro_recall"] == report.test.macro_recall
    by_class = json.loads(Path(client.download_artifacts(report.run_id, "test/per_class.json", tmp_path)).read_text())
    assert by_class["by_class"] == report.test.by_class
    picture = Path(client.download_artifacts(report.run_id, "test/confusion_matrix.png", tmp_path)).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_the_delta_versions_of_a_run_give_the_rows_it_learned_from(spark: SparkSession, trained: Trained) -> None:
    settings, report, _, _ = trained
    tags = t.read(spark, t.Lake.of(settings).path(t.TAGS), report.versions["tags"])
    assert tags.count() == sum(report.images.values()) == 3 * PATIENTS * IMAGES_EACH


def test_the_candidate_is_a_pickle_free_model_with_a_signature(trained: Trained, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.models import get_model_info

    settings, report, _, tracking_uri = trained
    client = MlflowClient(tracking_uri=tracking_uri)
    version = client.get_model_version_by_alias("cbmir", "candidate")
    assert version.run_id == report.run_id and version.tags["model_id"] == report.model_id
    with training._existing_mlflow("the candidate", settings):
        info = get_model_info("models:/cbmir@candidate")
    assert info.signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "uint8", "shape": (-1, 256, 256)}
    assert info.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 3)}
    assert info.saved_input_example_info is not None
    with training._existing_mlflow("the candidate", settings) as mlflow:
        folder = Path(mlflow.artifacts.download_artifacts("models:/cbmir@candidate", dst_path=str(tmp_path)))
    names = {path.name for path in folder.rglob("*")}
    assert "model.pt2" in names and not {name for name in names if name.endswith((".pkl", ".pth", ".pt"))}


def test_the_served_model_says_what_ours_says(trained: Trained) -> None:
    import mlflow

    settings, report, _, _ = trained
    loaded = model.load(*reversed(training.resolve_model(report.model_uri, settings)))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 256, 256), dtype=np.uint8)
    with training._existing_mlflow("the candidate", settings):
        served = mlflow.pyfunc.load_model(report.model_uri).predict(pixels)
    assert np.allclose(served, model.embed_batches(loaded, pixels).scores, atol=1e-5)


def test_a_model_is_found_by_alias_version_run_and_folder(trained: Trained, tmp_path: Path) -> None:
    settings, report, _, _ = trained
    manifest, weights = training.resolve_model("models:/cbmir@candidate", settings)
    loaded = model.load(weights, manifest)
    assert loaded.manifest.model_id == report.model_id and loaded.manifest.preprocessing == "px1-test"
    assert loaded.manifest.classes == ("CT/CHEST", "CT/HEAD", "MR/HEAD")
    assert loaded.manifest.possible == {"CT": ("CT/CHEST", "CT/HEAD"), "MR": ("MR/HEAD",)}
    assert loaded.manifest.snapshot == report.snapshot
    assert loaded.projection.directions.shape == (32, loaded.manifest.embedding_dim)
    assert loaded.projection.defect < 1e-12
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "weights.safetensors").write_bytes(weights)
    for uri in (report.model_uri, f"runs:/{report.run_id}", str(tmp_path)):
        assert training.resolve_model(uri, settings) == (manifest, weights)


def test_an_alias_moves_to_the_version_with_that_model(trained: Trained) -> None:
    settings, report, _, _ = trained
    with pytest.raises(ModelError, match=r"models:/cbmir@champion is not there.*cbmir train"):
        training.resolve_model("models:/cbmir@champion", settings)
    assert training.move_alias(settings, training.CHAMPION, report.model_id) == "1"
    assert training.resolve_model("models:/cbmir@champion", settings)[0] != ""
    assert training.move_alias(settings, training.CHAMPION, "alexnet-0") is None


def test_models_that_are_not_there_are_named_and_nothing_is_made(trained: Trained, tmp_path: Path) -> None:
    settings, _, _, _ = trained
    for uri in ("models:/cbmir/7", "models:/other@candidate", "runs:/0123456789abcdef0123456789abcdef"):
        with pytest.raises(ModelError, match=f"model {uri} is not there"):
            training.resolve_model(uri, settings)
    with pytest.raises(ModelError, match="give it as models:/name@alias"):
        training.resolve_model("models:/cbmir", settings)
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        training.resolve_model(str(tmp_path), settings)
    fresh = settings_for(tmp_path)
    with pytest.raises(ModelError, match="nothing was trained on this lake"):
        training.resolve_model("models:/cbmir@candidate", fresh)
    assert not (tmp_path / "lake").exists()


def test_an_object_store_lake_needs_a_tracking_server() -> None:
    settings = config.load(overrides=["lake.uri=s3a://bucket/lake"], environ={})
    lake = t.Lake(uri="s3a://bucket/lake", vault="s3a://vault")
    with pytest.raises(ConfigError, match=r"mlflow\.tracking_uri is not set.*s3a://bucket/lake"):
        training._tracking_of(settings, lake)
    told = settings.mlflow.model_copy(update={"tracking_uri": "http://127.0.0.1:5000"})
    assert training._tracking_of(settings.model_copy(update={"mlflow": told}), lake).uri == "http://127.0.0.1:5000"


# pyspark does not close the pipe on which it reads what torchrun prints.
leaves_pipe = pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.BufferedReader:ResourceWarning")


@leaves_pipe
def test_two_processes_train_one_model(
    spark: SparkSession, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through TorchDistributor, each process on its own row groups, gradients averaged over gloo."""
    settings, report, _, _ = trained
    two = settings.model_copy(update={"training": settings.training.model_copy(update={"processes": 2})})
    second = training.run(spark, two)
    assert second.snapshot == report.snapshot and second.model_uri == "models:/cbmir/2"
    assert second.model_id != report.model_id
    assert [epoch.number for epoch in second.history.epochs] == [1, 2]
    assert all(math.isfinite(epoch.loss) for epoch in second.history.epochs)
    loaded = model.load(*reversed(training.resolve_model("models:/cbmir@candidate", two)))
    assert loaded.manifest.model_id == second.model_id
    assert training.move_alias(two, training.CHAMPION, report.model_id) == "1"
    assert capfd.readouterr().out == ""


@leaves_pipe
def test_a_process_that_fails_names_its_cause(spark: SparkSession, trained: Trained) -> None:
    settings, _, _, _ = trained
    diverging = settings.training.model_copy(update={"processes": 2, "learning_rate": 1e30, "epochs": 3})
    with pytest.raises(TrainingError, match=r"a training process failed: the loss is (nan|inf)"):
        training.run(spark, settings.model_copy(update={"training": diverging}))
