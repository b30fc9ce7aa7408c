"""What MLflow records of a training run."""

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

from cbmir_spark.config import Settings
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.reports.plots import small_confusion_figure
from cbmir_spark.training.manifest import SPLITS, Snapshot
from cbmir_spark.training.metrics import Curve, Figures, K, RankingFigures


def parameters(
    settings: Settings, snapshot: Snapshot, job: Mapping[str, Any], versions: Mapping[str, int]
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
        **{f"images.{name}": snapshot.rows(name) for name in SPLITS},
        **{f"patients.{name}": snapshot.patients[name] for name in SPLITS},
        **{f"delta.{name}": version for name, version in versions.items()},
    }


def log_test(mlflow: Any, test: Figures, confusion: NDArray[np.int64], classes: Sequence[str]) -> None:
    mlflow.log_metrics(
        {
            "test_accuracy": test.accuracy,
            "test_macro_precision": test.macro_precision,
            "test_macro_recall": test.macro_recall,
            "test_macro_f1": test.macro_f1,
        }
    )
    mlflow.log_dict(asdict(test), "test/per_class.json")
    mlflow.log_figure(small_confusion_figure(confusion, classes), "test/confusion_matrix.png")


def log_curves(mlflow: Any, curves: Sequence[Curve | None], classes: Sequence[str]) -> None:
    """Precision over recall of each class that has test pictures, as one figure and as figures of merit."""
    from matplotlib.figure import Figure

    there = [(name, curve) for name, curve in zip(classes, curves, strict=True) if curve is not None]
    mlflow.log_dict({name: curve.average_precision for name, curve in there}, "test/average_precision.json")
    columns = min(4, max(1, len(there)))
    rows = -(-len(there) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * max(rows, 1)), layout="constrained")
    for place, (name, curve) in enumerate(there, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.step(np.append(0.0, curve.recall), np.append(curve.precision[0], curve.precision), where="pre")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
        axes.set_title(f"{name}  {curve.average_precision:.3f}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.supxlabel("recall", fontsize=8)
    figure.supylabel("precision", fontsize=8)
    mlflow.log_figure(figure, "test/precision_recall.png")


def environment() -> dict[str, str]:
    """Versions of what a training depends on, as tags."""
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
    """The commit of the checkout that a module is part of, with `-dirty` where files differ from it.

    None for an installed package and without git: then MLflow's own MLFLOW_RUN_CONTEXT may name it, as the image does.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(module.parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An environment may lie inside of somebody else's checkout.
        git("ls-files", "--error-unmatch", module.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def log_inputs(mlflow: Any, lake: LakePaths, versions: Mapping[str, int], digest: str) -> None:
    """Say which versions of which Delta tables the snapshot `digest` was made from, as MLflow's dataset inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

    for table in (schemas.TAGS, schemas.PIXELS):
        source = DeltaDatasetSource(path=lake.path(table), delta_table_version=versions[table.name])
        mlflow.log_input(MetaDataset(source, name=table.name, digest=digest), context="training")


def ranking_metrics(ranking: RankingFigures) -> dict[str, float]:
    """As MLflow metrics, with the names they have there."""
    return {
        f"validation_precision_at_{K}": ranking.precision,
        f"validation_macro_precision_at_{K}": ranking.macro_precision,
        "validation_map": ranking.mean_average_precision,
        "validation_macro_map": ranking.macro_mean_average_precision,
    }
