"""The record of a training run in MLflow: parameters, metrics, figures, data versions."""

import contextlib
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbmir_spark.config import DatasetSettings
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.reports.plots import confusion_figure, precision_recall_figure
from cbmir_spark.training.history import History
from cbmir_spark.training.manifest import SPLITS
from cbmir_spark.training.metrics import PRECISION_AT, ClassificationFigures, PrecisionRecall, RankingFigures
from cbmir_spark.training.task import TrainingTask


def parameters(
    task: TrainingTask, dataset: DatasetSettings, processes: int, versions: Mapping[str, int]
) -> dict[str, object]:
    """Name what a run was trained with and on, as MLflow's parameters."""
    snapshot = task.snapshot
    fitting = {name: value for name, value in asdict(task.fitting).items() if name != "class_weights"}
    return {
        "preset": task.preset,
        **fitting,
        "batch_size": task.batch_size,
        "processes": processes,
        **{f"dataset.{name}": value for name, value in dataset.model_dump().items()},
        "snapshot": snapshot.digest,
        "preprocessing": snapshot.preprocessing,
        "classes": len(snapshot.classes),
        **{f"images.{name}": snapshot.rows(name) for name in SPLITS},
        **{f"patients.{name}": snapshot.patients[name] for name in SPLITS},
        **{f"delta.{name}": version for name, version in versions.items()},
    }


def log_history(mlflow: Any, history: History) -> None:
    """Log the learning curve, and the step that the training was resumed at, if it was."""
    for point in history.curve:
        figures = {"step_loss": point.loss, "step_accuracy": point.accuracy, "step_rate": point.learning_rate}
        mlflow.log_metrics(figures, step=point.step)
    if history.resumed is not None:
        mlflow.set_tag("resumed_from_step", str(history.resumed))


def log_test(
    mlflow: Any,
    test: ClassificationFigures,
    confusion: NDArray[np.int64],
    curves: Sequence[PrecisionRecall | None],
    classes: Sequence[str],
) -> None:
    """Log the figures of the test split as metrics, and by class as JSON and pictures below `test/`."""
    mlflow.log_metrics(
        {
            "test_accuracy": test.accuracy,
            "test_macro_precision": test.macro_precision,
            "test_macro_recall": test.macro_recall,
            "test_macro_f1": test.macro_f1,
        }
    )
    present = {name: curve for name, curve in zip(classes, curves, strict=True) if curve is not None}
    averages = {name: curve.average_precision for name, curve in present.items()}
    points = {name: (curve.precision, curve.recall) for name, curve in present.items()}
    mlflow.log_dict(asdict(test), "test/per_class.json")
    mlflow.log_dict(averages, "test/average_precision.json")
    mlflow.log_figure(confusion_figure(confusion, classes), "test/confusion_matrix.png")
    mlflow.log_figure(precision_recall_figure(points, averages), "test/precision_recall.png")


def environment() -> dict[str, str]:
    """Name the versions of what a training depends on, as tags."""
    names = ("cbmir_spark", "torch", "numpy", "pyarrow", "petastorm", "pyspark", "delta-spark", "mlflow")
    found = {"version.python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"version.{name}"] = metadata.version(name)
    revision = _revision(Path(__file__).resolve())
    if revision is not None:
        # The tag that MLflow's pages show as a run's source version.
        found["mlflow.source.git.commit"] = revision
    return found


def _revision(module: Path) -> str | None:
    """Find the commit of the checkout that a module belongs to, with `-dirty` where files differ from it.

    None for an installed package and without git; then MLFLOW_RUN_CONTEXT may name it, as it does in the image.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(module.parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An environment may lie inside another project's checkout.
        git("ls-files", "--error-unmatch", module.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def log_inputs(mlflow: Any, lake: LakePaths, versions: Mapping[str, int], digest: str) -> None:
    """Log the Delta tables, and their versions, that the snapshot `digest` was made from as dataset inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

    for table in (schemas.TAGS, schemas.PIXELS):
        source = DeltaDatasetSource(path=lake.path(table), delta_table_version=versions[table.name])
        mlflow.log_input(MetaDataset(source, name=table.name, digest=digest), context="training")


def ranking_metrics(ranking: RankingFigures) -> dict[str, float]:
    """Name the figures as MLflow's metrics."""
    return {
        f"validation_precision_at_{PRECISION_AT}": ranking.precision,
        f"validation_macro_precision_at_{PRECISION_AT}": ranking.macro_precision,
        "validation_map": ranking.mean_average_precision,
        "validation_macro_map": ranking.macro_mean_average_precision,
    }
