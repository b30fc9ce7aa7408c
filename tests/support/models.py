"""Models for tests: registries of their lakes."""

from cbmir_spark.config import Settings
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models.registry import Registry
from cbmir_spark.storage import ObjectStore


def registry_of(settings: Settings) -> Registry:
    """The registry of a lake's models, as jobs build it."""
    return Registry(settings.mlflow, LakePaths.of(settings.lake).uri, ObjectStore(settings.storage))
