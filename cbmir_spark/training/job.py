"""Training: snapshot → loop, here or in several processes → projection → a registered model.

The loop is in `loop`, its distribution in `distribute`, what MLflow records in `run_log`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyspark.sql import SparkSession

from cbmir_spark.config import Choice, DatasetSettings, Settings, TrainingSettings
from cbmir_spark.errors import ConfigError
from cbmir_spark.lake.open import OpenLake, check_roots, locate, open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.runs import Record
from cbmir_spark.models import weights
from cbmir_spark.models.artifact import Saved
from cbmir_spark.models.networks import Network
from cbmir_spark.models.presets import PRESETS, Preset, preset_of
from cbmir_spark.models.projection import Projection
from cbmir_spark.models.promotion import Incumbent, Promotion
from cbmir_spark.models.registry import Registry
from cbmir_spark.training import run_log
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.distribute import fit_distributed
from cbmir_spark.training.history import Epoch, History
from cbmir_spark.training.loop import class_weights, confusion_of
from cbmir_spark.training.manifest import SPLITS, TEST, TRAIN, VALIDATION, Snapshot
from cbmir_spark.training.metrics import (
    ClassificationFigures,
    RankingFigures,
    classification_figures,
    precision_recall,
    ranking_figures,
)
from cbmir_spark.training.snapshot import write_snapshot
from cbmir_spark.training.task import TrainingTask, features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingReport:
    """The outcome of a training run.

    `images` and `patients` count by split. `test` is None without test patients, `ranking` (validation images ranked
    against train images) without validation patients. `versions` are those of the Delta tables that were read.
    """

    model_id: str
    model_uri: str
    run_id: str
    tracking_uri: str
    snapshot: str
    classes: int
    images: Mapping[str, int]
    patients: Mapping[str, int]
    single_patient_classes: tuple[str, ...]
    left_out: Mapping[str, int]
    history: History
    test: ClassificationFigures | None
    ranking: RankingFigures | None
    promotion: Promotion
    versions: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Sections:
    """The settings that a training depends on, beside its lake."""

    dataset: DatasetSettings
    training: TrainingSettings
    burned_in: Choice

    @classmethod
    def of(cls, settings: Settings) -> "Sections":
        return cls(settings.dataset, settings.training, settings.privacy.burned_in)


def run(
    spark: SparkSession, settings: Settings, on_epoch: Callable[[Epoch], None] = lambda epoch: None
) -> TrainingReport:
    """Train a network on the published frames, and register it under the alias `candidate`.

    Everything runs on the driver except the snapshot's writing and, with `training.processes` above 1, the training
    itself. A training that was stopped is resumed from its last checkpoint where its settings are the same. Raises
    TableError for a lake without images, and TrainingError, ModelError or ConfigError naming the cause.
    """
    lake = open_lake(spark, settings)
    registry = Registry(settings.mlflow, lake.paths.uri, lake.store)
    return _train(lake, registry, Sections.of(settings), on_epoch)


def check(settings: Settings) -> None:
    """Check the preset, the lake's place and the tracking server before Spark starts; raises as `run` does."""
    paths, store = locate(settings)
    check_roots(paths, store)
    if settings.training.preset not in PRESETS:
        raise ConfigError(f"training.preset must be one of {', '.join(PRESETS)}, not {settings.training.preset!r}")
    _ = Registry(settings.mlflow, paths.uri, store).tracking


def sweep(
    spark: SparkSession, variants: Sequence[Settings], name: str, on_run: Callable[[int], None] = lambda done: None
) -> list[TrainingReport]:
    """Train with each of the settings, one after the other, as runs nested in one MLflow run called `name`.

    All of them read the same published versions; each passes the gate for `candidate` by itself. Raises ConfigError
    where they differ in lake, storage or MLflow.
    """
    first = variants[0]
    _check_one_lake(variants, name)
    lake = open_lake(spark, first)
    registry = Registry(first.mlflow, lake.paths.uri, lake.store)
    reports = []
    with (
        registry.connect() as mlflow,
        mlflow.start_run(experiment_id=registry.experiment(), run_name=name),
    ):
        mlflow.log_params({"trainings": len(variants)})
        for settings in variants:
            reports.append(_train(lake, registry, Sections.of(settings), lambda epoch: None))
            on_run(len(reports))
    return reports


def _check_one_lake(variants: Sequence[Settings], name: str) -> None:
    if len({LakePaths.of(settings.lake) for settings in variants}) > 1:
        raise ConfigError(f"sweep {name}: lake.uri differs between its trainings; give one sweep for each lake")
    for section in ("storage", "mlflow"):
        if any(getattr(settings, section) != getattr(variants[0], section) for settings in variants):
            raise ConfigError(f"sweep {name}: {section} differs between its trainings; give one sweep for each")


def _train(lake: OpenLake, registry: Registry, sections: Sections, on_epoch: Callable[[Epoch], None]) -> TrainingReport:
    record = Record.begin("train")
    # Both are checked before anything is written.
    preset, tracking = preset_of(sections.training.preset), registry.tracking
    published = lake.versions
    versions = {"sources": published.sources, "tags": published.tags, "pixels": published.pixels}
    with record.stage("snapshot"):
        snapshot = write_snapshot(lake, sections.dataset, sections.burned_in)
    task = _task(lake, snapshot, sections, preset)
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
        mlflow.log_params(run_log.parameters(task, sections.dataset, sections.training.processes, versions))
        mlflow.set_tags({"snapshot": snapshot.digest, "lake": lake.paths.uri, **run_log.environment()})
        run_log.log_inputs(mlflow, lake.paths, versions, snapshot.digest)

        def log_epoch(epoch: Epoch) -> None:
            logger.info("epoch ended", extra={"epoch": epoch.number, "figures": epoch.metrics()})
            mlflow.log_metrics(epoch.metrics(), step=epoch.number)
            on_epoch(epoch)

        with record.stage("fit"):
            model, history = fit_distributed(lake.spark, task, sections.training, log_epoch)
        run_log.log_history(mlflow, history)
        with record.stage("projection"):
            gallery = features(task, model, TRAIN)
            saved = _saved(model, Projection.fit([gallery[0]]), snapshot)
        with record.stage("test"):
            test = _test(mlflow, task, model) if snapshot.rows(TEST) else None
        with record.stage("ranking"):
            ranking = incumbent = incumbent_map = None
            if snapshot.rows(VALIDATION):
                ranking = ranking_figures(*features(task, model, VALIDATION), *gallery)
                mlflow.log_metrics(run_log.ranking_metrics(ranking))
                incumbent = registry.incumbent()
                incumbent_map = _incumbent_map(task, incumbent)
        with record.stage("register"):
            version = registry.register(run_id, model, saved)
            reached = ranking.mean_average_precision if ranking else None
            margin = sections.training.promotion_margin
            promotion = registry.promote(version, reached, incumbent, incumbent_map, margin)
        mlflow.log_metrics({f"{stage}_seconds": value for stage, value in record.seconds.items()})
    task.checkpoints.clear()
    record.write(
        lake.spark,
        lake.paths,
        counts={**{name: snapshot.rows(name) for name in SPLITS}, "epochs": len(history.epochs)},
        versions_read=versions,
    )
    return TrainingReport(
        model_id=saved.manifest.model_id,
        model_uri=f"models:/{registry.name}/{version}",
        run_id=run_id,
        tracking_uri=tracking.uri,
        snapshot=snapshot.digest,
        classes=len(snapshot.classes),
        images={name: snapshot.rows(name) for name in SPLITS},
        patients=snapshot.patients,
        single_patient_classes=snapshot.single_patient_classes,
        left_out=snapshot.left_out,
        history=history,
        test=test,
        ranking=ranking,
        promotion=promotion,
        versions=versions,
        seconds=record.seconds,
    )


def _task(lake: OpenLake, snapshot: Snapshot, sections: Sections, preset: Preset) -> TrainingTask:
    """Fill the preset's recipe in with what the settings override."""
    settings, recipe = sections.training, preset.recipe
    fitting = Fitting(
        optimiser=recipe.optimiser,
        learning_rate=settings.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        epochs=settings.epochs or recipe.epochs,
        updates=None if settings.epochs else recipe.updates,
        schedule=recipe.schedule,
        momentum=recipe.momentum,
        clip=recipe.clip,
        augment=recipe.augment,
        precision=settings.precision,
        compile=settings.compile,
        class_weights=class_weights([snapshot.images[TRAIN].get(name, 0) for name in snapshot.classes]),
        seed=settings.seed,
    )
    return TrainingTask(
        snapshot=snapshot,
        store=lake.store,
        preset=preset.name,
        fitting=fitting,
        batch_size=settings.batch_size or recipe.batch_size,
        data_seed=sections.dataset.seed,
        use_gpu=settings.use_gpu,
        checkpoints_root=lake.paths.checkpoints,
        checkpoint_steps=settings.checkpoint_steps,
    )


def _saved(model: Network, projection: Projection, snapshot: Snapshot) -> Saved:
    return weights.save(
        model,
        projection,
        label=snapshot.label,
        classes=snapshot.classes,
        possible=snapshot.possible,
        preprocessing=snapshot.preprocessing,
        snapshot=snapshot.digest,
    )


def _test(mlflow: Any, task: TrainingTask, model: Network) -> ClassificationFigures:
    """Classify the test split and log the figures."""
    classes = task.snapshot.classes
    _, confusion = confusion_of(model, task.loader(TEST, shuffle=False), torch.tensor(task.fitting.class_weights))
    found = classification_figures(confusion, classes)
    vectors, targets = features(task, model, TEST)
    with torch.inference_mode():
        scores = torch.softmax(model.classify(torch.from_numpy(vectors)), dim=1).numpy()
    run_log.log_test(mlflow, found, confusion, precision_recall(scores, targets), classes)
    return found


def _incumbent_map(task: TrainingTask, incumbent: Incumbent | None) -> float | None:
    """Rank this very split with the incumbent; None where it takes pictures of another preprocessing."""
    if incumbent is None or incumbent.loaded.manifest.preprocessing != task.snapshot.preprocessing:
        return None
    model = incumbent.loaded.model
    figures = ranking_figures(*features(task, model, VALIDATION), *features(task, model, TRAIN))
    return figures.mean_average_precision
