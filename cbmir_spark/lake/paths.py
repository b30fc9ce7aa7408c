"""Where everything of a lake lives: two roots, and the tables and folders below them."""

from dataclasses import dataclass

from cbmir_spark import storage
from cbmir_spark.config import LakeSettings
from cbmir_spark.lake.schemas import VAULT, Table


@dataclass(frozen=True)
class LakePaths:
    """The roots of a lake and of its vault, as canonical URIs. No method reads or writes."""

    uri: str
    vault: str

    @classmethod
    def of(cls, settings: LakeSettings) -> "LakePaths":
        """Name the roots that the settings give; the vault lies inside the lake by default."""
        uri = storage.canonical(settings.uri)
        return cls(uri, storage.canonical(settings.vault) if settings.vault else storage.join(uri, "vault"))

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.uri)

    @property
    def vault_folder(self) -> str | None:
        """The vault as a local path; None where it lies in object storage."""
        return storage.local_path(self.vault) if storage.is_local(self.vault) else None

    def path(self, table: Table) -> str:
        """Locate a table; FEATURES has one table per model, see `features`."""
        return storage.join(self.vault if table.root == VAULT else self.uri, table.name)

    def features(self, model_id: str) -> str:
        """Locate the FEATURES table of one model."""
        return storage.join(self.features_root, model_id)

    @property
    def features_root(self) -> str:
        """The folder of all FEATURES tables."""
        return storage.join(self.uri, "features")

    def models(self, model_id: str) -> str:
        """Locate the folder that workers load a model from."""
        return storage.join(self.uri, "models", model_id)

    @property
    def snapshots(self) -> str:
        """The folder of training snapshots."""
        return storage.join(self.uri, "snapshots")

    def snapshot(self, digest: str) -> str:
        """Locate one training snapshot."""
        return storage.join(self.snapshots, digest)

    @property
    def checkpoints(self) -> str:
        """The folder of checkpoints, one folder per unfinished training."""
        return storage.join(self.uri, "training")

    @property
    def staging(self) -> str:
        """The folder of an ingest's intermediate files."""
        return storage.join(self.vault, "staging")

    @property
    def unlisted(self) -> str:
        """The CSV file of the archive's folders that the last ingest could not list; absent where it could list all."""
        return storage.join(self.vault, "unlisted.csv")

    @property
    def answers(self) -> tuple[str, str]:
        """The folders that hold one folder per answered query list, and one per evaluation."""
        return storage.join(self.uri, "results"), storage.join(self.uri, "evaluation")

    def results(self, run_id: str) -> str:
        """Locate the answer of one retrieve run."""
        return storage.join(self.answers[0], run_id)

    def evaluation(self, run_id: str) -> str:
        """Locate the report of one evaluate run."""
        return storage.join(self.answers[1], run_id)
