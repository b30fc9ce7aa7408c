"""MLflow: the run that records a training, the models that come of it, and the aliases by which they are found.

MLflow is imported where it is used: training processes on executors have no need of it. Of all that a run holds,
only `cbmir/manifest.json` and `cbmir/weights.safetensors` are ever loaded again; neither can carry code. Everything
here runs on the driver.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models.artifact import Loaded, Manifest, Saved, load
from cbmir_spark.models.networks import Network
from cbmir_spark.models.tracking import existing_mlflow, mlflow_at, tracking_of
from cbmir_spark.storage import ObjectStore

CANDIDATE, CHAMPION = "candidate", "champion"
MANIFEST_ARTIFACT = "cbmir/manifest.json"
WEIGHTS_ARTIFACT = "cbmir/weights.safetensors"
MODEL_ID_TAG = "model_id"


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
                ObjectStore(settings.storage).read_bytes(storage.join(folder, Path(name).name))
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
    place = tracking_of(settings, LakePaths.of(settings.lake))
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
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, cols.SIDE, cols.SIDE))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(saved.manifest.classes)))]),
            ),
            # Two rows: torch.export takes a side of length one for a constant.
            input_example=np.zeros((2, cols.SIDE, cols.SIDE), dtype=np.uint8),
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
    ours: float | None,
    standing: Incumbent | None,
    theirs: float | None,
) -> Promotion:
    """Move `candidate` to a version unless its mAP is worse than the incumbent's on the same split; say so in its tags.

    Worse by more than `training.promotion_margin`, that is. Without figures of both there is nothing to compare.
    """
    margin = settings.training.promotion_margin
    if ours is None:
        reason = "no patient was held back for validation"
    elif standing is None:
        reason = "there is no candidate that could be loaded"
    elif theirs is None:
        reason = f"version {standing.version} takes pictures of another preprocessing"
    elif ours < theirs - margin:
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
