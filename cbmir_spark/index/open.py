"""Open the FEATURES table of one model at one version, and put a model where workers can load it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import ModelError, TableError
from cbmir_spark.index.vector_files import Place
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import artifact
from cbmir_spark.models.artifact import Loaded, Manifest
from cbmir_spark.models.projection import Projection
from cbmir_spark.models.registry import CHAMPION, Registry
from cbmir_spark.storage import ObjectStore

WEIGHTS, MANIFEST = FILES = "weights.safetensors", "manifest.json"
# Properties of a FEATURES table: what made it, so that a table in another place is known for what it is.
MODEL_PROPERTY, PREPROCESSING_PROPERTY = "cbmir.model", "cbmir.preprocessing"


@dataclass(frozen=True)
class Index:
    """A model's FEATURES at one version, so that all that is asked of it is answered by the same rows."""

    manifest: Manifest
    folder: str
    path: str
    version: int
    rows: DataFrame
    projection: Projection


def publish_model(weights: bytes, manifest: Manifest, lake: LakePaths, store: ObjectStore) -> str:
    """Put a model's files where every worker can read them, once; their folder. The manifest comes last."""
    folder = lake.models(manifest.model_id)
    target = storage.join(folder, MANIFEST)
    if store.kind(target) != "file":
        store.write_bytes(storage.join(folder, WEIGHTS), weights)
        store.write_bytes(target, manifest.to_json().encode())
    elif store.read_bytes(target).decode() != manifest.to_json():
        raise ModelError(f"{folder} holds another manifest under the name {manifest.model_id}: remove that folder")
    return folder


@lru_cache(maxsize=1)
def load(folder: str, store: ObjectStore) -> Loaded:
    """The model of a folder. A Python worker keeps it for its later tasks; the folder's name tells it by its digest."""
    weights = store.read_bytes(storage.join(folder, WEIGHTS))
    return artifact.load(weights, store.read_bytes(storage.join(folder, MANIFEST)))


def open_index(spark: SparkSession, settings: Settings) -> Index:
    """The index that is searched: `retrieval.model`'s, or that of the registry's champion.

    Raises ModelError where there is no such model or the table is another model's, TableError where it has none.
    """
    lake, store = LakePaths.of(settings.lake), ObjectStore(settings.storage)
    registry = Registry(settings.mlflow, lake.uri, store)
    uri = settings.retrieval.model or registry.alias_uri(CHAMPION)
    try:
        saved = registry.resolve(uri)
    except ModelError as error:
        if settings.retrieval.model is not None:
            raise
        raise ModelError(f"no index is ready to be searched: run `cbmir train`, then `cbmir index` ({error})") from None
    manifest, projection = saved.manifest, saved.projection()
    path = lake.features(manifest.model_id)
    if not delta.exists(spark, path):
        raise TableError(f"model {manifest.model_id} has no index in {lake.uri}: run `cbmir index --model {uri}`")
    check_table(spark, path, manifest)
    version = delta.version(spark, path)
    folder = publish_model(saved.weights, manifest, lake, store)
    return Index(manifest, folder, path, version, delta.read(spark, path, version), projection)


def scan(rows: DataFrame, places: Iterable[Place]) -> DataFrame:
    """The rows of some partitions: an explicit filter on partition columns, which is what prunes files."""
    parts: dict[str, list[str]] = {}
    for modality, body_part in sorted(places):
        parts.setdefault(modality, []).append(body_part)
    conditions = [(F.col(cols.MODALITY) == m) & F.col(cols.BODY_PART).isin(*found) for m, found in parts.items()]
    return rows.where(reduce(or_, conditions) if conditions else F.lit(False))


def check_table(spark: SparkSession, path: str, manifest: Manifest) -> None:
    """Raises ModelError, naming both, where a FEATURES table was made by another model or from other pixels."""
    made = delta.properties(spark, path)
    expected = {MODEL_PROPERTY: manifest.model_id, PREPROCESSING_PROPERTY: manifest.preprocessing}
    for name, value in expected.items():
        if made.get(name) != value:
            raise ModelError(
                f"the index at {path} has {name} {made.get(name)}, the model has {value}: vectors of two models "
                "cannot be compared; name the model that made it, or run `cbmir index` for this one"
            )


def live_files(spark: SparkSession, settings: Settings) -> tuple[str, list[str]]:
    """The folder of the searched index, and the URIs of its live Parquet files."""
    index = open_index(spark, settings)
    return index.path, delta.live_files(spark, index.path, index.version)
