"""MLflow's registry: the models of a lake, the runs that made them, and the aliases by which they are found.

MLflow is imported where it is used, since training processes on executors do without it; so is torch, which only
`register` and `incumbent` need. Of all that a run holds, only
`cbmir/manifest.json` and `cbmir/weights.safetensors` are ever loaded again; neither can carry code. Everything here
runs on the driver.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cbmir_spark import storage
from cbmir_spark.config import MlflowSettings
from cbmir_spark.errors import ConfigError, ModelError
from cbmir_spark.models.artifact import MANIFEST_FILE, WEIGHTS_FILE, Saved
from cbmir_spark.models.promotion import Incumbent, Promotion, decide
from cbmir_spark.models.tracking import Tracking
from cbmir_spark.storage import ObjectStore

if TYPE_CHECKING:
    from cbmir_spark.models.networks import Network

logger = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"

# Artifacts of a training run.
_FOLDER = "cbmir"
_EVALUATION = "evaluation"
_MODEL_ID_TAG = "model_id"
# Parameters and metrics of a run that `runs` shows.
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
class Run:
    """One training run as `cbmir runs` shows it: its settings, its figures, and the state of its model."""

    run_id: str
    started: str
    status: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    version: str | None
    model_id: str | None
    aliases: tuple[str, ...]
    promotion: str | None


@dataclass(frozen=True)
class Registry:
    """The registered models of one lake. Constructing one does no I/O; each method connects by itself.

    `lake_uri` is canonical; MLflow's database lies below it unless the settings name a tracking server.
    """

    settings: MlflowSettings
    lake_uri: str
    store: ObjectStore

    @property
    def name(self) -> str:
        """The name of the registered model."""
        return self.settings.model_name

    @property
    def tracking(self) -> Tracking:
        """Where MLflow records. Raises ConfigError for an object-store lake without `mlflow.tracking_uri`."""
        return Tracking.of(self.settings, self.store.settings, self.lake_uri)

    def connect(self) -> AbstractContextManager[Any]:
        """Import MLflow and point it at this registry for the duration of the block."""
        return self.tracking.connect()

    def alias_uri(self, alias: str) -> str:
        """Name the version that an alias points at."""
        return f"models:/{self.name}@{alias}"

    def resolve(self, uri: str) -> Saved:
        """Fetch the model of `models:/name@alias`, `models:/name/3`, `runs:/id` or a folder.

        Raises ModelError where there is no such model, or its weights are not those of its manifest.
        """
        if not uri.startswith(("models:/", "runs:/")):
            folder = storage.canonical(uri)
            try:
                manifest, weights = (
                    self.store.read_bytes(storage.join(folder, name)) for name in (MANIFEST_FILE, WEIGHTS_FILE)
                )
            except OSError:
                raise ModelError(f"model {uri}: no {MANIFEST_FILE} and {WEIGHTS_FILE} in that folder") from None
            return Saved.of(weights, _text(manifest, uri))
        with self._existing(uri) as mlflow, TemporaryDirectory(prefix="cbmir-model-") as temporary:
            from mlflow.exceptions import MlflowException

            client = mlflow.MlflowClient()
            try:
                if uri.startswith("runs:/"):
                    run_id = uri.removeprefix("runs:/").strip("/")
                else:
                    run_id = _version(client, uri).run_id
                manifest, weights = (
                    Path(client.download_artifacts(run_id, f"{_FOLDER}/{name}", temporary)).read_bytes()
                    for name in (MANIFEST_FILE, WEIGHTS_FILE)
                )
            except (MlflowException, OSError) as error:
                raise ModelError(f"model {uri} is not there: {_first_line(error)}; run `cbmir train` first") from None
        return Saved.of(weights, _text(manifest, uri))

    def move_alias(self, alias: str, model_id: str) -> str | None:
        """Point an alias at the newest version with this model id; that version, or None where there is none.

        A model that came from a folder need not be registered.
        """
        with self._existing(self.alias_uri(alias)) as mlflow:
            client = mlflow.MlflowClient()
            found = self._versions(client, model_id)
            if not found:
                return None
            newest = max(found, key=lambda version: int(version.version))
            client.set_registered_model_alias(self.name, alias, newest.version)
            logger.info("alias moved", extra={"alias": alias, "version": str(newest.version)})
            return str(newest.version)

    def log_evaluation(self, model_id: str, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> str | None:
        """Add an evaluation's figures and files (below `evaluation/`) to the run that trained a model; the run's id.

        None where no registered version has this model id: a model that came from a folder has no run.
        """
        if self.tracking.is_new:
            return None
        with self.connect() as mlflow:
            client = mlflow.MlflowClient()
            run_id = next((str(each.run_id) for each in self._versions(client, model_id) if each.run_id), None)
            if run_id is None:
                return None
            for name, value in metrics.items():
                client.log_metric(run_id, name, value)
            _log_files(client, run_id, files, _EVALUATION)
        return run_id

    def experiment(self) -> str:
        """Find the experiment's id, or create it. Raises ConfigError where somebody has deleted it."""
        name, tracking = self.settings.experiment, self.tracking
        with tracking.connect() as mlflow:
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                return str(mlflow.create_experiment(name, artifact_location=tracking.artifacts))
            if found.lifecycle_stage != "active":
                raise ConfigError(
                    f"MLflow's experiment {name} was deleted: restore it, or set mlflow.experiment to another"
                )
            return str(found.experiment_id)

    def register(self, run_id: str, model: "Network", saved: Saved) -> str:
        """Log the two files and the served model to the active run, and register a version; its number."""
        from mlflow.exceptions import MlflowException

        from cbmir_spark.models.served import log_served

        with self.connect() as mlflow:
            client = mlflow.MlflowClient()
            files = {MANIFEST_FILE: saved.manifest.to_json().encode(), WEIGHTS_FILE: saved.weights}
            _log_files(client, run_id, files, _FOLDER)
            logged = log_served(model, saved.manifest.classes)
            try:
                client.get_registered_model(self.name)
            except MlflowException:
                description = "Networks that embed images for retrieval by content"
                client.create_registered_model(self.name, description=description)
            manifest = saved.manifest
            version = client.create_model_version(
                self.name,
                source=logged.model_uri,
                run_id=run_id,
                model_id=logged.model_id,
                tags={
                    _MODEL_ID_TAG: manifest.model_id,
                    "preprocessing": manifest.preprocessing,
                    "snapshot": manifest.snapshot,
                    "weights_sha256": manifest.weights_sha256,
                },
            )
        return str(version.version)

    def incumbent(self) -> Incumbent | None:
        """Load the model that `candidate` points at; None where there is none, or where it no longer loads."""
        from cbmir_spark.models import weights

        uri = self.alias_uri(CANDIDATE)
        try:
            loaded = weights.load(self.resolve(uri))
        except ModelError:
            return None
        with self._existing(uri) as mlflow:
            version = mlflow.MlflowClient().get_model_version_by_alias(self.name, CANDIDATE)
        return Incumbent(str(version.version), loaded)

    def promote(
        self,
        version: str,
        reached: float | None,
        incumbent: Incumbent | None,
        incumbent_reached: float | None,
        margin: float,
    ) -> Promotion:
        """Move `candidate` to a version unless its mAP is worse than the incumbent's by more than `margin`.

        Both mAPs are of the same split; without either of them there is nothing to compare, and the alias moves. The
        decision and its reason go into the version's tags.
        """
        promotion = decide(reached, incumbent, incumbent_reached, margin)
        tags = {
            "promotion": "candidate" if promotion.taken else "refused",
            "promotion.reason": promotion.reason,
            "promotion.margin": str(margin),
        }
        if reached is not None:
            tags["promotion.map"] = str(reached)
        if incumbent is not None and incumbent_reached is not None:
            tags |= {"promotion.incumbent": incumbent.version, "promotion.incumbent_map": str(incumbent_reached)}
        with self.connect() as mlflow:
            client = mlflow.MlflowClient()
            for key, value in tags.items():
                client.set_model_version_tag(self.name, version, key, value)
            if promotion.taken:
                client.set_registered_model_alias(self.name, CANDIDATE, version)
        return promotion

    def runs(self, limit: int) -> list[Run]:
        """List the newest training runs of the experiment. Raises ModelError where nothing has been trained yet."""
        with self._existing(f"models:/{self.name}") as mlflow:
            client = mlflow.MlflowClient()
            experiment = client.get_experiment_by_name(self.settings.experiment)
            if experiment is None:
                raise ModelError(f"MLflow has no experiment {self.settings.experiment}: run `cbmir train` first")
            found = client.search_runs(
                [experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=limit
            )
            versions = {each.run_id: each for each in client.search_model_versions(f"name = '{self.name}'")}
            aliases: dict[str, list[str]] = {}
            if versions:
                for alias, version in client.get_registered_model(self.name).aliases.items():
                    aliases.setdefault(str(version), []).append(alias)
        return [_run(each, versions.get(each.info.run_id), aliases) for each in found]

    @contextmanager
    def _existing(self, uri: str) -> Iterator[Any]:
        """Connect, but raise ModelError rather than create a database where nothing has been trained."""
        tracking = self.tracking
        if tracking.is_new:
            raise ModelError(f"model {uri} is not there: nothing was trained on this lake; run `cbmir train` first")
        with tracking.connect() as mlflow:
            yield mlflow

    def _versions(self, client: Any, model_id: str) -> list[Any]:
        return [
            version
            for version in client.search_model_versions(f"name = '{self.name}'")
            if version.tags.get(_MODEL_ID_TAG) == model_id
        ]


def _run(run: Any, version: Any, aliases: Mapping[str, list[str]]) -> Run:
    return Run(
        run_id=run.info.run_id,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        status=run.info.status,
        parameters={key: run.data.params[key] for key in _SHOWN_PARAMETERS if key in run.data.params},
        metrics={key: run.data.metrics[key] for key in _SHOWN_METRICS if key in run.data.metrics},
        version=str(version.version) if version else None,
        model_id=version.tags.get(_MODEL_ID_TAG) if version else None,
        aliases=tuple(sorted(aliases.get(str(version.version), ()))) if version else (),
        promotion=version.tags.get("promotion.reason") if version else None,
    )


def _log_files(client: Any, run_id: str, files: Mapping[str, bytes], folder: str) -> None:
    with TemporaryDirectory(prefix="cbmir-artifacts-") as temporary:
        for name, content in files.items():
            path = Path(temporary) / name
            path.write_bytes(content)
            client.log_artifact(run_id, str(path), folder)


def _text(manifest: bytes, uri: str) -> str:
    try:
        return manifest.decode()
    except UnicodeDecodeError:
        raise ModelError(f"model {uri}: its {MANIFEST_FILE} is not text; export the model again") from None


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
