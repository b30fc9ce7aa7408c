"""Open the FEATURES table of one model at one version, and put a model where workers can load it."""

from dataclasses import dataclass

from pyspark.sql import DataFrame

from cbmir_spark import storage
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.lake import delta
from cbmir_spark.lake.delta import Latest, TableVersion
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.models.artifact import MANIFEST_FILE, WEIGHTS_FILE, Manifest, Saved
from cbmir_spark.models.projection import Projection
from cbmir_spark.models.registry import CHAMPION, Registry
from cbmir_spark.storage import ObjectStore

# Properties of a FEATURES table that name what made it, so that a table moved elsewhere is recognised.
MODEL_PROPERTY, PREPROCESSING_PROPERTY = "cbmir.model", "cbmir.preprocessing"


@dataclass(frozen=True)
class Index:
    """A model's FEATURES at one version. `folder` holds the model's files, for workers to load."""

    manifest: Manifest
    projection: Projection
    folder: str
    table: TableVersion

    @property
    def path(self) -> str:
        """The table's URI."""
        return self.table.path

    @property
    def version(self) -> int:
        """The table's version."""
        return self.table.version

    @property
    def rows(self) -> DataFrame:
        """The table's rows; lazy, looked up once."""
        return self.table.rows

    @property
    def files(self) -> tuple[str, ...]:
        """Canonical URIs of the table's live Parquet files, sorted; looked up once."""
        return self.table.files


def open_index(lake: OpenLake, registry: Registry, model: str | None = None) -> Index:
    """Open the index of a model, named as `Registry.resolve` takes it; None for that of the champion.

    Raises ModelError where there is no such model or the table is another model's, TableError where it has none.
    """
    uri = model or registry.alias_uri(CHAMPION)
    try:
        saved = registry.resolve(uri)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"no index is ready to be searched: run `cbmir train`, then `cbmir index` ({error})") from None
    manifest = saved.manifest
    path = lake.paths.features(manifest.model_id)
    found = delta.latest(lake.spark, path)
    if found is None:
        raise TableError(f"model {manifest.model_id} has no index in {lake.paths.uri}: run `cbmir index --model {uri}`")
    check_table(path, found, manifest)
    folder = publish_model(lake, saved)
    return Index(manifest, saved.projection(), folder, TableVersion(lake.spark, path, found.version))


def publish_model(lake: OpenLake, model: Saved) -> str:
    """Put a model's files where every worker can read them, once; their folder. The manifest comes last."""
    folder = lake.paths.models(model.manifest.model_id)
    target = storage.join(folder, MANIFEST_FILE)
    if lake.store.kind(target) != "file":
        lake.store.write_bytes(storage.join(folder, WEIGHTS_FILE), model.weights)
        lake.store.write_bytes(target, model.manifest.to_json().encode())
    elif lake.store.read_bytes(target).decode() != model.manifest.to_json():
        raise ModelError(
            f"{folder} holds another manifest under the name {model.manifest.model_id}: remove that folder"
        )
    return folder


def read_model(folder: str, store: ObjectStore) -> Saved:
    """Read a model's files. Raises ModelError if they are not those of one model."""
    weights, manifest = (store.read_bytes(storage.join(folder, name)) for name in (WEIGHTS_FILE, MANIFEST_FILE))
    return Saved.of(weights, manifest)


def check_table(path: str, found: Latest, manifest: Manifest) -> None:
    """Raise ModelError, naming both, if a FEATURES table was made by another model or from other pixels."""
    expected = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
    for name, value in expected.items():
        if found.properties.get(name) != value:
            raise ModelError(
                f"the index at {path} has {name} {found.properties.get(name)}, the model has {value}: vectors of two "
                "models cannot be compared; name the model that made it, or run `cbmir index` for this one"
            )
