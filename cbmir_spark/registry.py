"""MLflow: the run that records a training, the models that come of it, and the aliases by which they are found.

MLflow is imported where it is used: training processes on executors have no need of it. Of all that a run holds,
only `cbmir/manifest.json` and `cbmir/weights.safetensors` are ever loaded again; neither can carry code. Everything
here runs on the driver.
"""

import contextlib
import logging
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbmir_spark import dataset, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import ConfigError, ModelError
from cbmir_spark.fitting import Curve, Figures
from cbmir_spark.model import Loaded, Manifest, Saved, load
from cbmir_spark.networks import Network
from cbmir_spark.ranking import K, RankingFigures

CANDIDATE, CHAMPION = "candidate", "champion"
MANIFEST_ARTIFACT = "cbmir/manifest.json"
WEIGHTS_ARTIFACT = "cbmir/weights.safetensors"
MODEL_ID_TAG = "model_id"
# What `runs` shows of the parameters and metrics of a run.
_SHOWN_PARAMETERS = ("preset", "epochs", "batch_size", "learning_rate", "processes", "snapshot", "classes")
_SHOWN_METRICS = (
    "train_loss",
    "test_accuracy",
    "test_macro_recall",
    "test_macro_f1",
    "validation_map",
    "validation_macro_map",
    "images_per_second",
    "waiting_share",
)


@dataclass(frozen=True)
class Incumbent:
    """The model that a new one is compared with."""

    version: str
    loaded: Loaded


@dataclass(frozen=True)
class Promotion:
    """Whether a new version became `candidate`, why, and what both reached (mAP) where that was measured."""

    taken: bool
    reason: str
    reached: float | None
    incumbent_reached: float | None


def resolve_model(uri: str, settings: Settings) -> tuple[str, bytes]:
    """The manifest (JSON) and the weights of `models:/name@alias`, `models:/name/3`, `runs:/id` or a folder.

    Runs on the driver; workers get the files by other means. Raises ModelError where there is no such model.
    """
    if not uri.startswith(("models:/", "runs:/")):
        folder = storage.canonical(uri)
        try:
            manifest, weights = (
                storage.read_bytes(storage.join(folder, Path(name).name), settings.storage)
                for name in (MANIFEST_ARTIFACT, WEIGHTS_ARTIFACT)
            )
        except OSError:
            raise ModelError(f"model {uri}: no manifest.json and weights.safetensors in that folder") from None
        return _text(manifest, uri), weights
    with existing_mlflow(uri, settings) as mlflow, TemporaryDirectory(prefix="cbmir-model-") as folder:
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient()
        try:
            run_id = uri.removeprefix("runs:/").strip("/") if uri.startswith("runs:/") else _version(client, uri).run_id
            manifest, weights = (
                Path(client.download_artifacts(run_id, name, folder)).read_bytes()
                for name in (MANIFEST_ARTIFACT, WEIGHTS_ARTIFACT)
            )
        except (MlflowException, OSError) as error:
            raise ModelError(f"model {uri} is not there: {_first_line(error)}; run `cbmir train` first") from None
    return _text(manifest, uri), weights


def move_alias(settings: Settings, alias: str, model_id: str) -> str | None:
    """Point an alias at the registered version that has this model id; the version, or None where none has it.

    A model that was taken from a folder need not be registered.
    """
    name = settings.mlflow.model_name
    with existing_mlflow(f"models:/{name}@{alias}", settings) as mlflow:
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
    place = tracking_of(settings, t.Lake.of(settings))
    if place.database is not None and not place.database.is_file():
        return None
    with mlflow_at(place) as mlflow, TemporaryDirectory(prefix="cbmir-evaluation-") as folder:
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


@dataclass(frozen=True)
class Tracking:
    """A tracking server, or a database with the folder that its artifacts go to.

    `variables` of the environment tell MLflow where that folder's object storage is; those of the user's go first.
    """

    uri: str
    artifacts: str | None
    database: Path | None
    variables: Mapping[str, str] = field(default_factory=dict)


def tracking_uri(settings: Settings) -> str:
    """Where runs are recorded. Raises ConfigError for an object-store lake without `mlflow.tracking_uri`."""
    return tracking_of(settings, t.Lake.of(settings)).uri


def tracking_of(settings: Settings, lake: t.Lake) -> Tracking:
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
        return Tracking(f"sqlite:///{database}", storage.join(folder, "artifacts"), database)
    if given.startswith(("http:", "https:", "databricks", "uc:")):
        return Tracking(given, None, None)
    # Without a server MLflow puts artifacts below whatever folder the job was started in.
    artifacts = storage.join(folder, "artifacts").replace("s3a://", "s3://", 1)
    return Tracking(given, artifacts, None, _object_storage(settings.storage) if artifacts.startswith("s3:") else {})


def _object_storage(files: StorageSettings) -> dict[str, str]:
    """What makes MLflow's own client talk to the server that ours talks to: by default it asks AWS, whatever we say."""
    variables = {
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path" if files.path_style else "virtual",
        "AWS_DEFAULT_REGION": files.region,
        # Many S3-compatible servers know nothing of the checksums that AWS would be sent unasked.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    return variables | ({"MLFLOW_S3_ENDPOINT_URL": files.endpoint} if files.endpoint else {})


@contextlib.contextmanager
def mlflow_at(place: Tracking) -> Iterator[Any]:
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
    added = {name: value for name, value in place.variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(before)
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def existing_mlflow(wanted: str, settings: Settings) -> Iterator[Any]:
    """As `mlflow_at`, but a lake that was never trained on is said to be so, and gets no empty database."""
    place = tracking_of(settings, t.Lake.of(settings))
    if place.database is not None and not place.database.is_file():
        raise ModelError(f"model {wanted} is not there: nothing was trained on this lake; run `cbmir train` first")
    with mlflow_at(place) as mlflow:
        yield mlflow


def experiment(mlflow: Any, settings: Settings, place: Tracking) -> str:
    name = settings.mlflow.experiment
    found = mlflow.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "active":
        return str(found.experiment_id)
    if found is not None:
        raise ConfigError(f"MLflow's experiment {name} was deleted: restore it, or set mlflow.experiment to another")
    return str(mlflow.create_experiment(name, artifact_location=place.artifacts))


def parameters(
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
    mlflow.log_figure(_confusion_figure(confusion, classes), "test/confusion_matrix.png")


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


def register(mlflow: Any, settings: Settings, run_id: str, model: Network, saved: Saved) -> str:
    """Log the two files and the served model, and register a version; its number."""
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
    return str(version.version)


def log_inputs(mlflow: Any, lake: t.Lake, versions: Mapping[str, int], digest: str) -> None:
    """Say which versions of which Delta tables the snapshot `digest` was made from, as MLflow's dataset inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

    for table in (t.TAGS, t.PIXELS):
        source = DeltaDatasetSource(path=lake.path(table), delta_table_version=versions[table.name])
        mlflow.log_input(MetaDataset(source, name=table.name, digest=digest), context="training")


@dataclass(frozen=True)
class Run:
    """One training run as `cbmir runs` shows it: what was asked for, what was reached, and what became of the model."""

    run_id: str
    started: str
    status: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    version: str | None
    model_id: str | None
    aliases: tuple[str, ...]
    promotion: str | None


def runs(settings: Settings, limit: int) -> list[Run]:
    """The newest training runs of the lake's experiment. Raises ModelError where nothing was trained yet."""
    name = settings.mlflow.model_name
    with existing_mlflow(f"models:/{name}", settings) as mlflow:
        client = mlflow.MlflowClient()
        place = client.get_experiment_by_name(settings.mlflow.experiment)
        if place is None:
            raise ModelError(f"MLflow has no experiment {settings.mlflow.experiment}: run `cbmir train` first")
        found = client.search_runs([place.experiment_id], order_by=["attributes.start_time DESC"], max_results=limit)
        versions = {version.run_id: version for version in client.search_model_versions(f"name = '{name}'")}
        aliases: dict[str, list[str]] = {}
        if versions:
            for alias, version in client.get_registered_model(name).aliases.items():
                aliases.setdefault(str(version), []).append(alias)
    rows = []
    for run in found:
        made = versions.get(run.info.run_id)
        rows.append(
            Run(
                run_id=run.info.run_id,
                started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
                status=run.info.status,
                parameters={key: run.data.params[key] for key in _SHOWN_PARAMETERS if key in run.data.params},
                metrics={key: run.data.metrics[key] for key in _SHOWN_METRICS if key in run.data.metrics},
                version=str(made.version) if made else None,
                model_id=made.tags.get(MODEL_ID_TAG) if made else None,
                aliases=tuple(sorted(aliases.get(str(made.version), ()))) if made else (),
                promotion=made.tags.get("promotion.reason") if made else None,
            )
        )
    return rows


def ranking_metrics(ranking: RankingFigures) -> dict[str, float]:
    """As MLflow metrics, with the names they have there."""
    return {
        f"validation_precision_at_{K}": ranking.precision,
        f"validation_macro_precision_at_{K}": ranking.macro_precision,
        "validation_map": ranking.mean_average_precision,
        "validation_macro_map": ranking.macro_mean_average_precision,
    }


def incumbent(settings: Settings) -> Incumbent | None:
    """The model that `candidate` points at; None where there is none, or where it cannot be loaded any more."""
    uri = f"models:/{settings.mlflow.model_name}@{CANDIDATE}"
    try:
        manifest, weights = resolve_model(uri, settings)
        loaded = load(weights, manifest)
    except ModelError:
        return None
    with existing_mlflow(uri, settings) as mlflow:
        version = mlflow.MlflowClient().get_model_version_by_alias(settings.mlflow.model_name, CANDIDATE)
    return Incumbent(str(version.version), loaded)


def promote(
    mlflow: Any,
    settings: Settings,
    version: str,
    challenger: RankingFigures | None,
    standing: Incumbent | None,
    reached: RankingFigures | None,
) -> Promotion:
    """Move `candidate` to a version unless its mAP is worse than the incumbent's on the same split; say so in its tags.

    Worse by more than `training.promotion_margin`, that is. Without figures of both there is nothing to compare.
    """
    margin = settings.training.promotion_margin
    ours = challenger.mean_average_precision if challenger else None
    theirs = reached.mean_average_precision if reached else None
    if challenger is None:
        reason = "no patient was held back for validation"
    elif standing is None:
        reason = "there is no candidate that could be loaded"
    elif theirs is None:
        reason = f"version {standing.version} takes pictures of another preprocessing"
    elif challenger.mean_average_precision < theirs - margin:
        reason = f"its mAP is worse than that of version {standing.version} by more than {margin}"
    else:
        reason = f"its mAP is not worse than that of version {standing.version} by more than {margin}"
    taken = ours is None or theirs is None or ours >= theirs - margin
    client, name = mlflow.MlflowClient(), settings.mlflow.model_name
    tags = {"promotion": "candidate" if taken else "refused", "promotion.reason": reason}
    tags |= {"promotion.margin": str(margin)}
    tags |= {"promotion.map": str(ours)} if ours is not None else {}
    if standing is not None and theirs is not None:
        tags |= {"promotion.incumbent": standing.version, "promotion.incumbent_map": str(theirs)}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    if taken:
        client.set_registered_model_alias(name, CANDIDATE, version)
    return Promotion(taken, reason, ours, theirs)


def _version_tags(manifest: Manifest) -> dict[str, str]:
    return {
        MODEL_ID_TAG: manifest.model_id,
        "preprocessing": manifest.preprocessing,
        "snapshot": manifest.snapshot,
        "weights_sha256": manifest.weights_sha256,
    }


def _text(manifest: bytes, uri: str) -> str:
    try:
        return manifest.decode()
    except UnicodeDecodeError:
        raise ModelError(f"model {uri}: its manifest.json is not text; export the model again") from None


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
