"""The two roots of a lake, and the folders below them."""

from dataclasses import dataclass

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.lake.schemas import FEATURES, VAULT, Table
from cbmir_spark.storage import ObjectStore


@dataclass(frozen=True)
class Lake:
    """The two roots of one installation, as canonical URIs."""

    uri: str
    vault: str

    @classmethod
    def of(cls, settings: Settings) -> "Lake":
        """The lake that the settings name. Raises InputError where a file stands in its place."""
        uri = storage.canonical(settings.lake.uri)
        vault = storage.canonical(settings.lake.vault) if settings.lake.vault else storage.join(uri, "vault")
        for root in (uri, vault):
            if ObjectStore(settings.storage).kind(root) == "file":
                raise InputError(f"lake {root} is a file: give a folder or prefix, with --lake")
        return cls(uri, vault)

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.uri)

    def path(self, table: Table) -> str:
        """Where a table lives; FEATURES has one table for each model, see `features`."""
        return storage.join(self.vault if table.root == VAULT else self.uri, table.name)

    def features(self, model_id: str) -> str:
        """Where the FEATURES table of one model lives."""
        return storage.join(self.uri, FEATURES.name, model_id)

    def models(self, model_id: str) -> str:
        """The folder of a model's weights and manifest that every worker can read."""
        return storage.join(self.uri, "models", model_id)

    def snapshots(self) -> str:
        """The folder of training snapshots."""
        return storage.join(self.uri, "snapshots")

    def checkpoints(self) -> str:
        """The folder of unfinished trainings' checkpoints, a folder for each."""
        return storage.join(self.uri, "training")
