"""Where MLflow records, and how to connect to it."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbmir_spark import storage
from cbmir_spark.config import MlflowSettings, StorageSettings
from cbmir_spark.errors import ConfigError

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A machine without git is no error.
    "GIT_PYTHON_REFRESH": "quiet",
}
# They log each schema migration and each registered version at INFO.
_CHATTY = ("mlflow", "alembic")


@dataclass(frozen=True)
class Tracking:
    """A tracking server, or a database with the folder that its artifacts go to.

    `variables` tell MLflow's client where the artifacts' object storage is; the environment takes precedence.
    """

    uri: str
    artifacts: str | None
    database: Path | None
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: MlflowSettings, storage_settings: StorageSettings, lake_uri: str) -> "Tracking":
        """Locate the runs of a lake; no I/O. Raises ConfigError for an object-store lake without a tracking URI."""
        folder = storage.join(lake_uri, "mlflow")
        given = settings.tracking_uri
        if given is None:
            if not storage.is_local(lake_uri):
                raise ConfigError(
                    f"mlflow.tracking_uri is not set, and lake {lake_uri} cannot hold MLflow's database: "
                    "set it to the URI of a tracking server"
                )
            database = Path(storage.local_path(folder)) / "mlflow.db"
            return cls(f"sqlite:///{database}", storage.join(folder, "artifacts"), database)
        if given.startswith(("http:", "https:", "databricks", "uc:")):
            return cls(given, None, None)
        # Without a server MLflow puts artifacts below the job's working folder.
        artifacts = storage.join(folder, "artifacts").replace("s3a://", "s3://", 1)
        variables = _object_storage(storage_settings) if artifacts.startswith("s3:") else {}
        return cls(given, artifacts, None, variables)

    @property
    def is_new(self) -> bool:
        """Whether nothing has been recorded here; a server's or a foreign database's content is not looked at."""
        return self.database is not None and not self.database.is_file()

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """Import MLflow and point it here for the duration of the block; nested calls are fine."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            # MLflow's import warns of its own type hints.
            warnings.simplefilter("ignore")
            import mlflow

        if self.database is not None:
            self.database.parent.mkdir(parents=True, exist_ok=True)
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(self.uri)
        added = {name: value for name, value in self.variables.items() if name not in os.environ}
        os.environ.update(added)
        try:
            with _quiet():
                yield mlflow
        finally:
            mlflow.set_tracking_uri(before)
            for name in added:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _object_storage(settings: StorageSettings) -> dict[str, str]:
    """Point MLflow's S3 client at the configured endpoint, since by default it talks to AWS."""
    variables = {
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path" if settings.path_style else "virtual",
        "AWS_DEFAULT_REGION": settings.region,
        # Many S3-compatible servers do not support the checksums that AWS gets by default.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    return variables | ({"MLFLOW_S3_ENDPOINT_URL": settings.endpoint} if settings.endpoint else {})
