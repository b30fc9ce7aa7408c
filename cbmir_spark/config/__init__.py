"""Typed settings in four layers: conf/base.yaml, a settings file, the environment `CBMIR_…`, the command line.

`load` reads them, `Settings.override` and `Section.replace` change them with checks. Import from here, not from the
modules below; `python -m cbmir_spark.config.annotate` writes the descriptions into conf/base.yaml.
"""

from cbmir_spark.config.load import DEBUG_VARIABLE, ENVIRONMENT_PREFIX, conf_folder, debugging, load
from cbmir_spark.config.sections import (
    MOST_HITS,
    Choice,
    DatasetSettings,
    DemoSettings,
    EvaluationSettings,
    IndexSettings,
    IngestSettings,
    LakeSettings,
    MlflowSettings,
    PixelsSettings,
    Prefilter,
    PrivacySettings,
    RetrievalSettings,
    SparkSettings,
    StorageSettings,
    TrainingSettings,
    VocabularySettings,
)
from cbmir_spark.config.settings import Settings, describe

__all__ = [
    "DEBUG_VARIABLE",
    "ENVIRONMENT_PREFIX",
    "MOST_HITS",
    "Choice",
    "DatasetSettings",
    "DemoSettings",
    "EvaluationSettings",
    "IndexSettings",
    "IngestSettings",
    "LakeSettings",
    "MlflowSettings",
    "PixelsSettings",
    "Prefilter",
    "PrivacySettings",
    "RetrievalSettings",
    "Settings",
    "SparkSettings",
    "StorageSettings",
    "TrainingSettings",
    "VocabularySettings",
    "conf_folder",
    "debugging",
    "describe",
    "load",
]
