"""Training: the loop, its processes, and the MLflow run that records it.

`fit` is a torch loop over loaders and knows neither Spark nor MLflow. `run` makes the snapshot, trains in this
process or through TorchDistributor, fits the projection, and registers the model under the alias `candidate`.

MLflow is imported where it is used: training processes on executors have no need of it. Of all that a run holds,
only `cbmir/manifest.json` and `cbmir/weights.safetensors` are ever loaded again; neither can carry code.
"""

import contextlib
import io
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbmir_spark import dataset, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import ConfigError, EnvironmentProblem, ModelError, TrainingError
from cbmir_spark.model import Manifest, Network, Projection, Saved, build, preset_of, save
from cbmir_spark.record import Record

CANDIDATE, CHAMPION = "candidate", "champion"
MANIFEST_ARTIFACT = "cbmir/manifest.json"
WEIGHTS_ARTIFACT = "cbmir/weights.safetensors"
MODEL_ID_TAG = "model_id"

# Steps of the first epochs are large where a few classes dominate; a longer gradient is cut to this length.
_GRADIENT_NORM = 5.0
_WARM_UP = 0.05
_MOMENTUM = 0.9
# Rows that the projection is fitted on. Snapshots are written shuffled, so the first rows are a fair sample.
_PROJECTION_ROWS = 20_000


class BatchSource(Protocol):
    """What `fit` reads: `dataset.Loader`, or anything with its steps and epochs."""

    rows: int
    steps: int

    def epoch(self, number: int) -> Generator[dataset.Batch, None, None]: ...


@dataclass(frozen=True)
class Loaders:
    """What one process trains on, and what it holds back to choose the best epoch by (None: the last one)."""

    train: BatchSource
    validation: BatchSource | None


@dataclass(frozen=True)
class Fitting:
    """How `fit` trains; plain values, so that they travel to other processes and into MLflow."""

    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    epochs: int
    class_weights: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch over all processes; `waiting` is the share of time spent waiting for batches."""

    number: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float
    waiting: float
    validation_loss: float | None
    validation_accuracy: float | None
    validation_macro_recall: float | None

    def metrics(self) -> dict[str, float]:
        """As MLflow metrics, with the names they have there."""
        values = {
            "train_loss": self.loss,
            "train_accuracy": self.accuracy,
            "learning_rate": self.learning_rate,
            "epoch_seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "waiting_share": self.waiting,
            "validation_loss": self.validation_loss,
            "validation_accuracy": self.validation_accuracy,
            "validation_macro_recall": self.validation_macro_recall,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class History:
    """Every epoch, and the number of the one whose weights the model now has."""

    epochs: tuple[Epoch, ...]
    kept: int


@dataclass(frozen=True)
class Figures:
    """Precision, recall, F1 and images of each class, and their means over the classes that have images."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    by_class: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class TrainingReport:
    """What a training run ended in; `test` is None where no patient was held back for it."""

    model_id: str
    model_uri: str
    run_id: str
    tracking_uri: str
    snapshot: str
    classes: int
    images: Mapping[str, int]
    patients: Mapping[str, int]
    lonely: tuple[str, ...]
    left_out: Mapping[str, int]
    history: History
    test: Figures | None
    versions: Mapping[str, int]
    seconds: Mapping[str, float]


def class_weights(images: Sequence[int]) -> tuple[float, ...]:
    """Weights of the loss, inverse to each class's images, with mean 1 over all images."""
    present = sum(n > 0 for n in images)
    total = sum(images)
    return tuple(total / (present * n) if n else 0.0 for n in images)


def fit(
    model: Network,
    loaders: Loaders,
    fitting: Fitting,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train the model in place, on the device it is on, together with the other processes of the group if any.

    The loss of a step is the class-weighted mean over the batches of all processes, whatever their sizes. With
    a validation source the weights of the epoch with the best macro recall are kept. On one CPU process the
    same seed gives the same weights. Raises TrainingError as soon as a loss is not a number.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = model.fc3.weight.device
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    weights = torch.tensor(fitting.class_weights, device=device)
    optimiser = _optimiser(model, fitting)
    total = loaders.train.steps * fitting.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    epochs: list[Epoch] = []
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(fitting.seed + rank)
        for number in range(fitting.epochs):
            started, waited = time.perf_counter(), 0.0
            sums = torch.zeros(4, dtype=torch.float64)
            rate = float(schedule.get_last_lr()[0])
            model.train()
            with contextlib.closing(loaders.train.epoch(number)) as batches:
                for _ in range(loaders.train.steps):
                    asked = time.perf_counter()
                    pixels, targets = next(batches)
                    waited += time.perf_counter() - asked
                    targets = targets.to(device)
                    logits = network(model.to_input(pixels.to(device)))
                    loss = nn.functional.cross_entropy(logits, targets, weights, reduction="sum")
                    step = _over_all(
                        loss.detach(),
                        weights[targets].sum(),
                        (logits.detach().argmax(1) == targets).sum(),
                        torch.tensor(len(targets), device=device),
                    )
                    if not math.isfinite(step[0]):
                        raise TrainingError(
                            f"the loss is {float(step[0])} in epoch {number + 1}: training diverged; lower "
                            f"training.learning_rate (it was {fitting.learning_rate})"
                        )
                    optimiser.zero_grad()
                    # DDP takes the mean of the processes' gradients; with this factor that is the gradient of
                    # the mean over all their rows.
                    (loss * (world / float(step[1]))).backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
                    optimiser.step()
                    schedule.step()
                    sums += step
            seconds = time.perf_counter() - started
            held = _validate(model, loaders.validation, weights) if loaders.validation else None
            epoch = Epoch(
                number=number + 1,
                loss=float(sums[0] / sums[1]),
                accuracy=float(sums[2] / sums[3]),
                learning_rate=rate,
                seconds=seconds,
                images_per_second=float(sums[3]) / seconds,
                waiting=waited / seconds,
                validation_loss=held[0] if held else None,
                validation_accuracy=held[1].accuracy if held else None,
                validation_macro_recall=held[1].macro_recall if held else None,
            )
            epochs.append(epoch)
            on_epoch(epoch)
            if held and (best is None or held[1].macro_recall > best[0]):
                state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                best = (held[1].macro_recall, number + 1, state)
    if best is not None:
        model.load_state_dict(best[2])
    model.eval()
    return History(tuple(epochs), best[1] if best else fitting.epochs)


def figures(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figures:
    """Figures of a (true, predicted) confusion matrix of counts; classes without images are left out of the means."""
    right = np.diag(confusion).astype(float)
    true, predicted = confusion.sum(axis=1).astype(float), confusion.sum(axis=0).astype(float)
    recall = np.divide(right, true, out=np.zeros_like(right), where=true > 0)
    precision = np.divide(right, predicted, out=np.zeros_like(right), where=predicted > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(right), where=both > 0)
    there = true > 0
    return Figures(
        accuracy=float(right.sum() / max(true.sum(), 1.0)),
        macro_precision=float(precision[there].mean()) if there.any() else 0.0,
        macro_recall=float(recall[there].mean()) if there.any() else 0.0,
        macro_f1=float(f1[there].mean()) if there.any() else 0.0,
        by_class={
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "images": int(true[i]),
            }
            for i, name in enumerate(classes)
        },
    )


def confusion_of(model: Network, source: BatchSource, weights: torch.Tensor) -> tuple[float, NDArray[np.int64]]:
    """The weighted loss and the (true, predicted) counts over this process's share of a source."""
    classes = model.fc3.out_features
    device = model.fc3.weight.device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.inference_mode(), contextlib.closing(source.epoch(0)) as batches:
        for pixels, targets in batches:
            targets = targets.to(device)
            logits = model(model.to_input(pixels.to(device)))
            sums[0] += nn.functional.cross_entropy(logits, targets, weights, reduction="sum")
            sums[1] += weights[targets].sum()
            counts += torch.bincount(targets * classes + logits.argmax(1), minlength=classes * classes)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1]) if sums[1] > 0 else math.nan
    return loss, counts.cpu().numpy().reshape(classes, classes)


def run(
    spark: SparkSession, settings: Settings, on_epoch: Callable[[Epoch], None] = lambda epoch: None
) -> TrainingReport:
    """Snapshot → training → projection → MLflow run, registered under the alias `candidate`.

    Everything runs on the driver except the snapshot's writing and, with `training.processes` above 1, the
    training itself. Raises TrainingError, ModelError or ConfigError naming the cause.
    """
    record = Record("train")
    lake = t.Lake.of(settings)
    preset = preset_of(settings.training.preset)
    place = _tracking_of(settings, lake)
    pinned = t.require_published(spark, lake)
    with record.stage("snapshot"):
        snapshot = dataset.snapshot(spark, lake, pinned, settings.dataset, settings.storage, settings.privacy.burned_in)
    fitting = Fitting(
        optimiser=preset.optimiser,
        learning_rate=settings.training.learning_rate or preset.learning_rate,
        weight_decay=preset.weight_decay,
        epochs=settings.training.epochs or preset.epochs,
        class_weights=class_weights([snapshot.images[dataset.TRAIN].get(name, 0) for name in snapshot.classes]),
        seed=settings.training.seed,
    )
    job: dict[str, Any] = {
        "snapshot": snapshot.to_json(),
        "uri": snapshot.uri,
        "storage": settings.storage.model_dump(),
        "preset": preset.name,
        "fitting": asdict(fitting),
        "batch_size": settings.training.batch_size or preset.batch_size,
        "data_seed": settings.dataset.seed,
        "processes": settings.training.processes,
        "use_gpu": settings.training.use_gpu,
    }
    versions = {"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels}
    with _mlflow_at(place) as mlflow, mlflow.start_run(experiment_id=_experiment(mlflow, settings, place)) as active:
        run_id: str = active.info.run_id
        mlflow.log_params(_parameters(settings, snapshot, job, versions))
        mlflow.set_tags({"snapshot": snapshot.digest, "lake": lake.uri})

        def log_epoch(epoch: Epoch) -> None:
            mlflow.log_metrics(epoch.metrics(), step=epoch.number)
            on_epoch(epoch)

        with record.stage("fit"):
            model, history = _fit_in(spark, job, log_epoch)
        with record.stage("projection"):
            projection = Projection.fit(_train_features(model, snapshot, job))
        saved = save(
            model,
            projection,
            label=snapshot.label,
            classes=snapshot.classes,
            possible=snapshot.possible,
            preprocessing=snapshot.preprocessing,
            snapshot=snapshot.digest,
        )
        test = None
        with record.stage("test"):
            if snapshot.rows(dataset.TEST):
                source = _loader(snapshot, dataset.TEST, job, shuffle=False)
                _, confusion = confusion_of(model, source, torch.tensor(fitting.class_weights))
                test = figures(confusion, snapshot.classes)
                _log_test(mlflow, test, confusion, snapshot.classes)
        with record.stage("register"):
            version = _register(mlflow, settings, run_id, model, saved)
        mlflow.log_metrics({f"{stage}_seconds": value for stage, value in record.seconds.items()})
    record.write(
        spark,
        lake,
        counts={**{name: snapshot.rows(name) for name in dataset.SPLITS}, "epochs": len(history.epochs)},
        versions_read=versions,
    )
    return TrainingReport(
        model_id=saved.manifest.model_id,
        model_uri=f"models:/{settings.mlflow.model_name}/{version}",
        run_id=run_id,
        tracking_uri=place.uri,
        snapshot=snapshot.digest,
        classes=len(snapshot.classes),
        images={name: snapshot.rows(name) for name in dataset.SPLITS},
        patients=snapshot.patients,
        lonely=snapshot.lonely,
        left_out=snapshot.left_out,
        history=history,
        test=test,
        versions=versions,
        seconds=record.seconds,
    )


def resolve_model(uri: str, settings: Settings) -> tuple[str, bytes]:
    """The manifest (JSON) and the weights of `models:/name@alias`, `models:/name/3`, `runs:/id` or a folder.

    Runs on the driver; workers get the files by other means. Raises ModelError where there is no such model.
    """
    if not uri.startswith(("models:/", "runs:/")):
        folder = storage.canonical(uri)
        try:
            return (
                storage.read_bytes(storage.join(folder, Path(MANIFEST_ARTIFACT).name), settings.storage).decode(),
                storage.read_bytes(storage.join(folder, Path(WEIGHTS_ARTIFACT).name), settings.storage),
            )
        except (OSError, UnicodeDecodeError):
            raise ModelError(f"model {uri}: no manifest.json and weights.safetensors in that folder") from None
    with _existing_mlflow(uri, settings) as mlflow, TemporaryDirectory(prefix="cbmir-model-") as folder:
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient()
        try:
            run_id = uri.removeprefix("runs:/").strip("/") if uri.startswith("runs:/") else _version(client, uri).run_id
            files = [
                Path(client.download_artifacts(run_id, name, folder)).read_bytes()
                for name in (MANIFEST_ARTIFACT, WEIGHTS_ARTIFACT)
            ]
        except (MlflowException, OSError) as error:
            raise ModelError(f"model {uri} is not there: {_first_line(error)}; run `cbmir train` first") from None
    return files[0].decode(), files[1]


def move_alias(settings: Settings, alias: str, model_id: str) -> str | None:
    """Point an alias at the registered version that has this model id; the version, or None where none has it.

    A model that was taken from a folder need not be registered.
    """
    name = settings.mlflow.model_name
    with _existing_mlflow(f"models:/{name}@{alias}", settings) as mlflow:
        client = mlflow.MlflowClient()
        found = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if version.tags.get(MODEL_ID_TAG) == model_id
        ]
        if not found:
            return None
        newest = max(found, key=lambda version: int(version.version))
        client.set_registered_model_alias(name, alias, newest.version)
        return str(newest.version)


def log_evaluation(
    settings: Settings, model_id: str, metrics: Mapping[str, float], files: Mapping[str, bytes]
) -> str | None:
    """Add an evaluation's figures and files (below `evaluation/`) to the run that trained a model; the run's id.

    None where no registered version has this model id: a model that was taken from a folder has no run.
    """
    place = _tracking_of(settings, t.Lake.of(settings))
    if place.database is not None and not place.database.is_file():
        return None
    with _mlflow_at(place) as mlflow, TemporaryDirectory(prefix="cbmir-evaluation-") as folder:
        client = mlflow.MlflowClient()
        run_id = next(
            (
                str(version.run_id)
                for version in client.search_model_versions(f"name = '{settings.mlflow.model_name}'")
                if version.tags.get(MODEL_ID_TAG) == model_id and version.run_id
            ),
            None,
        )
        if run_id is None:
            return None
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        for name, content in files.items():
            path = Path(folder) / name
            path.write_bytes(content)
            client.log_artifact(run_id, str(path), "evaluation")
    return run_id


def train_process(job: Mapping[str, Any]) -> dict[str, Any]:
    """One of several training processes, started by TorchDistributor; the first one's result is returned.

    Takes and gives plain values and bytes. Runs on an executor, or beside the driver with a local master.
    """
    device = _device(job)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        model, history = _fit_here(job, device, dist.get_rank(), dist.get_world_size(), lambda epoch: None)
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        return {"weights": safetensors.torch.save(state), "history": asdict(history)}
    finally:
        dist.destroy_process_group()


def _fit_in(spark: SparkSession, job: Mapping[str, Any], on_epoch: Callable[[Epoch], None]) -> tuple[Network, History]:
    """Train in this process, or in as many as the job says; the model is on the CPU in the end."""
    if job["processes"] == 1:
        model, history = _fit_here(job, _device(job), 0, 1, on_epoch)
        return model.cpu(), history
    from pyspark.ml.torch.distributor import TorchDistributor

    local = (spark.sparkContext.master or "").startswith("local")
    # It tells each start and end on the terminal.
    logging.getLogger("TorchDistributor").setLevel(logging.WARNING)
    distributor = TorchDistributor(job["processes"], local_mode=local, use_gpu=job["use_gpu"])
    threads = max(1, (os.cpu_count() or 1) // job["processes"]) if local else None
    # It prints whatever its processes print, and says only there why one of them failed.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result: Any = distributor.run(train_process, {**job, "threads": threads})
    except RuntimeError as error:
        raise TrainingError(_cause(printed.getvalue() + str(error))) from error
    model = build(job["preset"], len(job["fitting"]["class_weights"]))
    model.load_state_dict(safetensors.torch.load(result["weights"]))
    epochs = tuple(Epoch(**epoch) for epoch in result["history"]["epochs"])
    for epoch in epochs:
        on_epoch(epoch)
    return model.eval(), History(epochs, result["history"]["kept"])


def _fit_here(
    job: Mapping[str, Any], device: torch.device, rank: int, world: int, on_epoch: Callable[[Epoch], None]
) -> tuple[Network, History]:
    snapshot = dataset.Snapshot.from_json(job["snapshot"], job["uri"])
    fitting = Fitting(**{**job["fitting"], "class_weights": tuple(job["fitting"]["class_weights"])})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fitting.seed)
        model = build(job["preset"], len(snapshot.classes)).to(device)
    validation = None
    if snapshot.rows(dataset.VALIDATION):
        validation = _loader(snapshot, dataset.VALIDATION, job, shuffle=False, rank=rank, world=world)
    loaders = Loaders(_loader(snapshot, dataset.TRAIN, job, rank=rank, world=world), validation)
    return model, fit(model, loaders, fitting, on_epoch)


def _loader(
    snapshot: dataset.Snapshot,
    split: str,
    job: Mapping[str, Any],
    *,
    shuffle: bool = True,
    rank: int = 0,
    world: int = 1,
) -> dataset.Loader:
    return dataset.Loader(
        snapshot,
        split,
        StorageSettings(**job["storage"]),
        # The setting is the size over all processes, so that it means the same for any number of them.
        batch_size=max(1, job["batch_size"] // world),
        seed=job["data_seed"],
        shuffle=shuffle,
        rank=rank,
        world=world,
    )


def _train_features(
    model: Network, snapshot: dataset.Snapshot, job: Mapping[str, Any]
) -> Iterator[NDArray[np.float32]]:
    model.eval()
    seen = 0
    with contextlib.closing(_loader(snapshot, dataset.TRAIN, job, shuffle=False).epoch(0)) as batches:
        for pixels, _ in batches:
            with torch.inference_mode():
                yield model.embed(model.to_input(pixels)).numpy()
            seen += len(pixels)
            if seen >= _PROJECTION_ROWS:
                return


def _device(job: Mapping[str, Any]) -> torch.device:
    if not job["use_gpu"]:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblem("training.use_gpu is true, but torch finds no GPU here; set it to false")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _optimiser(model: nn.Module, fitting: Fitting) -> torch.optim.Optimizer:
    if fitting.optimiser == "sgd":
        return torch.optim.SGD(
            model.parameters(), fitting.learning_rate, momentum=_MOMENTUM, weight_decay=fitting.weight_decay
        )
    return torch.optim.AdamW(model.parameters(), fitting.learning_rate, weight_decay=fitting.weight_decay)


def _rate(step: int, total: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _over_all(*values: torch.Tensor) -> torch.Tensor:
    """The values summed over all processes, as float64 on the CPU."""
    stacked = torch.stack([value.to(torch.float64) for value in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return stacked.cpu()


def _validate(model: Network, source: BatchSource, weights: torch.Tensor) -> tuple[float, Figures]:
    loss, confusion = confusion_of(model, source, weights)
    return loss, figures(confusion, [str(number) for number in range(len(confusion))])


def _cause(text: str) -> str:
    """The one line that says why a training process ended, out of everything that TorchDistributor gives back."""
    own = re.findall(r"cbmir_spark\.errors\.\w+: (.+)", text)
    errors = re.findall(r"^(?:\[rank\d+\]:\s*)?(\w[\w.]*(?:Error|Exception): .+)$", text, flags=re.MULTILINE)
    lines = text.strip().splitlines() or ["no output"]
    return f"a training process failed: {(own or errors or lines)[-1].strip()}"


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 3)


# MLflow


@dataclass(frozen=True)
class _Tracking:
    """A tracking server, or a database file with the folder that its artifacts go to."""

    uri: str
    artifacts: str | None
    database: Path | None


def tracking_uri(settings: Settings) -> str:
    """Where runs are recorded. Raises ConfigError for an object-store lake without `mlflow.tracking_uri`."""
    return _tracking_of(settings, t.Lake.of(settings)).uri


def _tracking_of(settings: Settings, lake: t.Lake) -> _Tracking:
    """Where runs are recorded. Raises ConfigError for an object-store lake without `mlflow.tracking_uri`."""
    folder = storage.join(lake.uri, "mlflow")
    given = settings.mlflow.tracking_uri
    if given is None:
        if not lake.is_local:
            raise ConfigError(
                f"mlflow.tracking_uri is not set, and lake {lake.uri} is no place for MLflow's database: "
                "set it to the URI of a tracking server"
            )
        database = Path(storage.local_path(folder)) / "mlflow.db"
        return _Tracking(f"sqlite:///{database}", storage.join(folder, "artifacts"), database)
    if given.startswith(("http:", "https:", "databricks", "uc:")):
        return _Tracking(given, None, None)
    # Without a server MLflow puts artifacts below whatever folder the job was started in.
    return _Tracking(given, storage.join(folder, "artifacts").replace("s3a://", "s3://", 1), None)


@contextlib.contextmanager
def _mlflow_at(place: _Tracking) -> Iterator[Any]:
    """MLflow, quiet, pointed at `place` and afterwards back at what it pointed at before."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("DO_NOT_TRACK", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        # No git on the machine is no fault of the run.
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        # MLflow's import warns of its own type hints.
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.pyfunc
        import mlflow.pytorch

    # The schema's migrations and each registered version are told line by line otherwise.
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if place.database is not None:
        place.database.parent.mkdir(parents=True, exist_ok=True)
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(place.uri)
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(before)


@contextlib.contextmanager
def _existing_mlflow(wanted: str, settings: Settings) -> Iterator[Any]:
    """As `_mlflow_at`, but a lake that was never trained on is said to be so, and gets no empty database."""
    place = _tracking_of(settings, t.Lake.of(settings))
    if place.database is not None and not place.database.is_file():
        raise ModelError(f"model {wanted} is not there: nothing was trained on this lake; run `cbmir train` first")
    with _mlflow_at(place) as mlflow:
        yield mlflow


def _experiment(mlflow: Any, settings: Settings, place: _Tracking) -> str:
    name = settings.mlflow.experiment
    found = mlflow.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "active":
        return str(found.experiment_id)
    if found is not None:
        raise ConfigError(f"MLflow's experiment {name} was deleted: restore it, or set mlflow.experiment to another")
    return str(mlflow.create_experiment(name, artifact_location=place.artifacts))


def _parameters(
    settings: Settings, snapshot: dataset.Snapshot, job: Mapping[str, Any], versions: Mapping[str, int]
) -> dict[str, Any]:
    fitting = {name: value for name, value in job["fitting"].items() if name != "class_weights"}
    return {
        "preset": job["preset"],
        **fitting,
        "batch_size": job["batch_size"],
        "processes": job["processes"],
        **{f"dataset.{name}": value for name, value in settings.dataset.model_dump().items()},
        "snapshot": snapshot.digest,
        "preprocessing": snapshot.preprocessing,
        "classes": len(snapshot.classes),
        **{f"images.{name}": snapshot.rows(name) for name in dataset.SPLITS},
        **{f"patients.{name}": snapshot.patients[name] for name in dataset.SPLITS},
        **{f"delta.{name}": version for name, version in versions.items()},
    }


def _log_test(mlflow: Any, test: Figures, confusion: NDArray[np.int64], classes: Sequence[str]) -> None:
    mlflow.log_metrics(
        {
            "test_accuracy": test.accuracy,
            "test_macro_precision": test.macro_precision,
            "test_macro_recall": test.macro_recall,
            "test_macro_f1": test.macro_f1,
        }
    )
    mlflow.log_dict(asdict(test), "test/per_class.json")
    mlflow.log_figure(_confusion_figure(confusion, classes), "test/confusion_matrix.png")


def _confusion_figure(confusion: NDArray[np.int64], classes: Sequence[str]) -> Any:
    # The object interface: pyplot would look for a display and keep every figure alive.
    from matplotlib.figure import Figure

    side = max(4.0, 0.35 * len(classes) + 2.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=6, color=colour)
    axes.set(xlabel="predicted", ylabel="true", title="Test patients")
    return figure


class _Served(nn.Module):
    """What MLflow users load: uint8 (N, 256, 256) pixels in, (N, classes) probabilities out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(self.network.to_input(pixels)), dim=1)


def _register(mlflow: Any, settings: Settings, run_id: str, model: Network, saved: Saved) -> str:
    """Log the two files and the served model, register a version, move `candidate` to it; the version."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    client = mlflow.MlflowClient()
    with TemporaryDirectory(prefix="cbmir-model-") as folder:
        for name, content in (
            (MANIFEST_ARTIFACT, saved.manifest.to_json().encode()),
            (WEIGHTS_ARTIFACT, saved.weights),
        ):
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            client.log_artifact(run_id, str(path), Path(name).parent.as_posix())
    with warnings.catch_warnings():
        # torch reads the program back from memory that it may not write to, and says so.
        warnings.simplefilter("ignore", UserWarning)
        logged = mlflow.pytorch.log_model(
            _Served(model).eval(),
            name="model",
            serialization_format="pt2",
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, t.SIDE, t.SIDE))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(saved.manifest.classes)))]),
            ),
            # Two rows: torch.export takes a side of length one for a constant.
            input_example=np.zeros((2, t.SIDE, t.SIDE), dtype=np.uint8),
            # Named here, because MLflow otherwise starts another Python to find out.
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
        )
    name = settings.mlflow.model_name
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="Networks that embed images for retrieval by content")
    version = client.create_model_version(
        name, source=logged.model_uri, run_id=run_id, model_id=logged.model_id, tags=_version_tags(saved.manifest)
    )
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    return str(version.version)


def _version_tags(manifest: Manifest) -> dict[str, str]:
    return {
        MODEL_ID_TAG: manifest.model_id,
        "preprocessing": manifest.preprocessing,
        "snapshot": manifest.snapshot,
        "weights_sha256": manifest.weights_sha256,
    }


def _version(client: Any, uri: str) -> Any:
    name = uri.removeprefix("models:/").strip("/")
    if "@" in name:
        return client.get_model_version_by_alias(*name.split("@", 1))
    model, _, version = name.partition("/")
    if not version.isdigit():
        raise ModelError(f"model {uri}: give it as models:/name@alias or models:/name/version")
    return client.get_model_version(model, version)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
