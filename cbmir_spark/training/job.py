"""Training: snapshot → loop, here or in several processes → projection → a registered model.

`run` makes the snapshot, trains in this process or through TorchDistributor, fits the projection, and registers the
model under the alias `candidate`. The loop itself is in `fitting`, what MLflow records in `registry`.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import ConfigError, EnvironmentProblem, TrainingError
from cbmir_spark.lake import publication
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.runs import Record
from cbmir_spark.models.artifact import save
from cbmir_spark.models.networks import Network, build, preset_of
from cbmir_spark.models.projection import Projection
from cbmir_spark.models.promotion import Incumbent, Promotion
from cbmir_spark.models.registry import Registry
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import checkpoints, loader, run_log
from cbmir_spark.training import snapshot as snapshots
from cbmir_spark.training.allocator import memory_kept
from cbmir_spark.training.loop import Epoch, Fitting, History, Loaders, Point, class_weights, confusion_of, fit
from cbmir_spark.training.manifest import SPLITS, TEST, TRAIN, VALIDATION, Snapshot
from cbmir_spark.training.metrics import Figures, RankingFigures, figures, precision_recall, rank

# Rows that the projection is fitted on, and pictures are ranked among. Snapshots are written shuffled, so the first
# rows are a fair sample.
_FEATURE_ROWS = 20_000


@dataclass(frozen=True)
class TrainingReport:
    """What a training run ended in.

    `test` is None where no patient was held back for it, `ranking` (validation against train pictures) likewise.
    """

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
    ranking: RankingFigures | None
    promotion: Promotion
    versions: Mapping[str, int]
    seconds: Mapping[str, float]


def run(
    spark: SparkSession, settings: Settings, on_epoch: Callable[[Epoch], None] = lambda epoch: None
) -> TrainingReport:
    """Snapshot → training → projection → MLflow run, registered under the alias `candidate`.

    Everything runs on the driver except the snapshot's writing and, with `training.processes` above 1, the
    training itself. Raises TrainingError, ModelError or ConfigError naming the cause.
    """
    record = Record.begin("train")
    lake = LakePaths.of(settings.lake)
    preset = preset_of(settings.training.preset)
    recipe = preset.recipe
    registry = Registry(settings.mlflow, lake.uri, ObjectStore(settings.storage))
    tracking = registry.tracking
    pinned = publication.require_published(spark, lake)
    with record.stage("snapshot"):
        snapshot = snapshots.snapshot(
            spark, lake, pinned, settings.dataset, ObjectStore(settings.storage), settings.privacy.burned_in
        )
    fitting = Fitting(
        optimiser=recipe.optimiser,
        learning_rate=settings.training.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        epochs=settings.training.epochs or recipe.epochs,
        updates=None if settings.training.epochs else recipe.updates,
        schedule=recipe.schedule,
        momentum=recipe.momentum,
        clip=recipe.clip,
        augment=recipe.augment,
        precision=settings.training.precision,
        compile=settings.training.compile,
        class_weights=class_weights([snapshot.images[TRAIN].get(name, 0) for name in snapshot.classes]),
        seed=settings.training.seed,
    )
    job: dict[str, Any] = {
        "snapshot": snapshot.to_json(),
        "uri": snapshot.uri,
        "storage": settings.storage.model_dump(),
        "preset": preset.name,
        "fitting": asdict(fitting),
        "batch_size": settings.training.batch_size or recipe.batch_size,
        "data_seed": settings.dataset.seed,
        "processes": settings.training.processes,
        "use_gpu": settings.training.use_gpu,
        "attempts": settings.training.attempts,
        "checkpoint_steps": settings.training.checkpoint_steps,
    }
    job["checkpoints"] = storage.join(lake.checkpoints, _same_course(job))
    versions = {"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels}
    with (
        registry.connect() as mlflow,
        mlflow.start_run(
            experiment_id=registry.experiment(),
            nested=mlflow.active_run() is not None,
            # Processors, memory and, where there are any, GPUs of the driver's machine.
            log_system_metrics=True,
        ) as active,
    ):
        run_id: str = active.info.run_id
        mlflow.log_params(run_log.parameters(settings, snapshot, job, versions))
        mlflow.set_tags({"snapshot": snapshot.digest, "lake": lake.uri, **run_log.environment()})
        run_log.log_inputs(mlflow, lake, versions, snapshot.digest)

        def log_epoch(epoch: Epoch) -> None:
            mlflow.log_metrics(epoch.metrics(), step=epoch.number)
            on_epoch(epoch)

        with record.stage("fit"):
            model, history = _fit_in(spark, job, log_epoch)
        for point in history.curve:
            figures_now = {"step_loss": point.loss, "step_accuracy": point.accuracy, "step_rate": point.learning_rate}
            mlflow.log_metrics(figures_now, step=point.step)
        with record.stage("projection"):
            gallery, gallery_labels = _features(model, snapshot, TRAIN, job)
            projection = Projection.fit([gallery])
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
            if snapshot.rows(TEST):
                source = _loader(snapshot, TEST, job, shuffle=False)
                _, confusion = confusion_of(model, source, torch.tensor(fitting.class_weights))
                test = figures(confusion, snapshot.classes)
                run_log.log_test(mlflow, test, confusion, snapshot.classes)
                vectors, targets = _features(model, snapshot, TEST, job)
                with torch.inference_mode():
                    scores = torch.softmax(model.classify(torch.from_numpy(vectors)), dim=1).numpy()
                run_log.log_curves(mlflow, precision_recall(scores, targets), snapshot.classes)
        with record.stage("ranking"):
            ranking = incumbent = None
            if snapshot.rows(VALIDATION):
                ranking = rank(*_features(model, snapshot, VALIDATION, job), gallery, gallery_labels)
                mlflow.log_metrics(run_log.ranking_metrics(ranking))
                incumbent = registry.incumbent()
            standing = _ranked_anew(incumbent, snapshot, job) if incumbent is not None else None
        with record.stage("register"):
            version = registry.register(run_id, model, saved)
            promotion = registry.promote(
                version, _map_of(ranking), incumbent, _map_of(standing), settings.training.promotion_margin
            )
        if history.resumed is not None:
            mlflow.set_tag("resumed_from_step", str(history.resumed))
        mlflow.log_metrics({f"{stage}_seconds": value for stage, value in record.seconds.items()})
    _checkpoints(job).clear()
    record.write(
        spark,
        lake,
        counts={**{name: snapshot.rows(name) for name in SPLITS}, "epochs": len(history.epochs)},
        versions_read=versions,
    )
    return TrainingReport(
        model_id=saved.manifest.model_id,
        model_uri=f"models:/{settings.mlflow.model_name}/{version}",
        run_id=run_id,
        tracking_uri=tracking.uri,
        snapshot=snapshot.digest,
        classes=len(snapshot.classes),
        images={name: snapshot.rows(name) for name in SPLITS},
        patients=snapshot.patients,
        lonely=snapshot.lonely,
        left_out=snapshot.left_out,
        history=history,
        test=test,
        ranking=ranking,
        promotion=promotion,
        versions=versions,
        seconds=record.seconds,
    )


def sweep(
    spark: SparkSession, variants: Sequence[Settings], name: str, on_run: Callable[[int], None] = lambda done: None
) -> list[TrainingReport]:
    """Train with each of the settings, one after the other, as runs nested in one MLflow run called `name`.

    Each passes the gate for `candidate` by itself. Raises ConfigError where they are not of one lake.
    """
    first = variants[0]
    if len({LakePaths.of(settings.lake) for settings in variants}) > 1:
        raise ConfigError(f"sweep {name}: lake.uri differs between its trainings; give one sweep for each lake")
    registry = Registry(first.mlflow, LakePaths.of(first.lake).uri, ObjectStore(first.storage))
    reports = []
    with (
        registry.connect() as mlflow,
        mlflow.start_run(experiment_id=registry.experiment(), run_name=name),
    ):
        mlflow.log_params({"trainings": len(variants)})
        for settings in variants:
            reports.append(run(spark, settings))
            on_run(len(reports))
    return reports


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
    """Train in this process, or in as many as the job says; the model is on the CPU in the end.

    A cluster's GPUs are its executors': there a single process, too, goes where they are.
    """
    local = (spark.sparkContext.master or "").startswith("local")
    if job["processes"] == 1 and (local or not job["use_gpu"]):
        model, history = _fit_here(job, _device(job), 0, 1, on_epoch)
        return model.cpu(), history
    wanted = "spark.driver.resource.gpu.amount" if local else "spark.task.resource.gpu.amount"
    if job["use_gpu"] and not spark.conf.get(wanted, None):
        raise ConfigError(
            f"training.use_gpu is true, but {wanted} is not set, so Spark gives no GPU to a training process: see "
            "GPUs in deploy/README.md"
        )
    from pyspark.ml.torch.distributor import TorchDistributor

    # It tells each start and end on the terminal.
    logging.getLogger("TorchDistributor").setLevel(logging.WARNING)
    distributor = TorchDistributor(job["processes"], local_mode=local, use_gpu=job["use_gpu"])
    threads = max(1, (os.cpu_count() or 1) // job["processes"]) if local else None
    result: Any = None
    for attempt in range(job["attempts"]):
        # It prints whatever its processes print, and says only there why one of them failed.
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                result = distributor.run(train_process, {**job, "threads": threads})
            break
        except RuntimeError as error:
            cause, ours = _cause(printed.getvalue() + str(error))
            # What we refuse would be refused again; a process that died may live the next time.
            if ours or attempt + 1 == job["attempts"]:
                raise TrainingError(cause) from error
    model = build(job["preset"], len(job["fitting"]["class_weights"]))
    model.load_state_dict(safetensors.torch.load(result["weights"]))
    epochs = tuple(Epoch(**epoch) for epoch in result["history"]["epochs"])
    for epoch in epochs:
        on_epoch(epoch)
    return model.eval(), History(
        epochs,
        result["history"]["kept"],
        tuple(Point(**point) for point in result["history"]["curve"]),
        result["history"]["resumed"],
    )


def _same_course(job: Mapping[str, Any]) -> str:
    """A name for all trainings that take the same steps, so that one may go on from the checkpoints of another."""
    said = [job[name] for name in ("snapshot", "preset", "fitting", "batch_size", "data_seed")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _checkpoints(job: Mapping[str, Any]) -> checkpoints.Folder:
    return checkpoints.Folder(
        job["checkpoints"], ObjectStore(StorageSettings(**job["storage"])), job["checkpoint_steps"] or 0
    )


def _fit_here(
    job: Mapping[str, Any], device: torch.device, rank: int, world: int, on_epoch: Callable[[Epoch], None]
) -> tuple[Network, History]:
    snapshot = Snapshot.from_json(job["snapshot"], job["uri"])
    fitting = Fitting(**{**job["fitting"], "class_weights": tuple(job["fitting"]["class_weights"])})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fitting.seed)
        model = build(job["preset"], len(snapshot.classes)).to(device)
    validation = None
    if snapshot.rows(VALIDATION):
        validation = _loader(snapshot, VALIDATION, job, shuffle=False, rank=rank, world=world)
    loaders = Loaders(_loader(snapshot, TRAIN, job, rank=rank, world=world), validation)
    with memory_kept():
        return model, fit(model, loaders, fitting, on_epoch, _checkpoints(job) if job["checkpoint_steps"] else None)


def _loader(
    snapshot: Snapshot,
    split: str,
    job: Mapping[str, Any],
    *,
    shuffle: bool = True,
    rank: int = 0,
    world: int = 1,
) -> loader.Loader:
    return loader.Loader(
        snapshot,
        split,
        ObjectStore(StorageSettings(**job["storage"])),
        batch_size=job["batch_size"],
        seed=job["data_seed"],
        shuffle=shuffle,
        rank=rank,
        world=world,
    )


def _features(
    model: Network, snapshot: Snapshot, split: str, job: Mapping[str, Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors and class numbers of a split, of its first rows where it has more than a process should hold."""
    model.eval()
    vectors: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    seen = 0
    with contextlib.closing(_loader(snapshot, split, job, shuffle=False).epoch(0)) as batches:
        for pixels, targets in batches:
            with torch.inference_mode():
                vectors.append(model.embed(model.to_input(pixels)).numpy())
            labels.append(targets.numpy())
            seen += len(pixels)
            if seen >= _FEATURE_ROWS:
                break
    return np.concatenate(vectors), np.concatenate(labels)


def _ranked_anew(incumbent: Incumbent, snapshot: Snapshot, job: Mapping[str, Any]) -> RankingFigures | None:
    """What the incumbent reaches on this very split; None where it takes pictures of another preprocessing."""
    loaded = incumbent.loaded
    if loaded.manifest.preprocessing != snapshot.preprocessing:
        return None
    queries = _features(loaded.model, snapshot, VALIDATION, job)
    return rank(*queries, *_features(loaded.model, snapshot, TRAIN, job))


def _device(job: Mapping[str, Any]) -> torch.device:
    """The CPU, or the GPU of this process: TorchDistributor makes only those of its Spark task visible to it."""
    if not job["use_gpu"]:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"training.use_gpu is true, but torch finds no GPU on {platform.node()}; set it to false, or run "
            "`nvidia-smi` and `cbmir doctor` there to see what is missing"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _cause(text: str) -> tuple[str, bool]:
    """The one line that says why a training process ended, of all TorchDistributor gives back; whether it is ours."""
    own = re.findall(r"cbmir_spark\.errors\.\w+: (.+)", text)
    errors = re.findall(r"^(?:\[rank\d+\]:\s*)?(\w[\w.]*(?:Error|Exception): .+)$", text, flags=re.MULTILINE)
    lines = text.strip().splitlines() or ["no output"]
    return f"a training process failed: {(own or errors or lines)[-1].strip()}", bool(own)


def _map_of(ranking: RankingFigures | None) -> float | None:
    return None if ranking is None else ranking.mean_average_precision
