"""Where MLflow records, and how to reach it."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbmir_spark import storage
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import ConfigError, ModelError
from cbmir_spark.lake.paths import LakePaths


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
    return tracking_of(settings, LakePaths.of(settings.lake)).uri


def tracking_of(settings: Settings, lake: LakePaths) -> Tracking:
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


def _object_storage(storage: StorageSettings) -> dict[str, str]:
    """What makes MLflow's own client talk to the server that ours talks to: by default it asks AWS, whatever we say."""
    variables = {
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path" if storage.path_style else "virtual",
        "AWS_DEFAULT_REGION": storage.region,
        # Many S3-compatible servers know nothing of the checksums that AWS would be sent unasked.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    return variables | ({"MLFLOW_S3_ENDPOINT_URL": storage.endpoint} if storage.endpoint else {})


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
    place = tracking_of(settings, LakePaths.of(settings.lake))
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
