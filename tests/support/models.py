"""Models for tests: networks with fresh weights, and registries and indexes of their lakes."""

from pathlib import Path

import numpy as np
import torch
from pyspark.sql import SparkSession
from torch import nn

from cbmir_spark.config import Settings
from cbmir_spark.index import open as index_open
from cbmir_spark.lake.open import open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import networks, weights
from cbmir_spark.models.artifact import Saved
from cbmir_spark.models.projection import Projection
from cbmir_spark.models.registry import Registry
from cbmir_spark.storage import ObjectStore
from tests.support.tiny_lake import PREPROCESSING


def registry_of(settings: Settings) -> Registry:
    """The registry of a lake's models, as jobs build it."""
    return Registry(settings.mlflow, LakePaths.of(settings.lake).uri, ObjectStore(settings.storage))


def open_index(spark: SparkSession, settings: Settings) -> index_open.Index:
    """The index that is searched, of the lake as it is now."""
    return index_open.open_index(open_lake(spark, settings), registry_of(settings), settings.retrieval.model)


def save_model(folder: Path, seed: int = 1, preprocessing: str = PREPROCESSING, spoil: float | None = None) -> Saved:
    """The small network, untrained; `spoil` is put into the weights of its feature layer."""
    torch.manual_seed(seed)
    network = networks.build("alexnet-small", 3).eval()
    assert isinstance(network.fc2, nn.Module)
    if spoil is not None:
        with torch.no_grad():
            for parameter in network.fc2.parameters():
                parameter.fill_(spoil)
    random = np.random.default_rng(seed)
    saved = weights.save(
        network,
        Projection.fit([random.random((64, 512), dtype=np.float32)]),
        label="modality/body_part",
        classes=("CT/CHEST", "CT/HEAD", "MR/BRAIN"),
        possible={"CT": ("CT/CHEST", "CT/HEAD"), "MR": ("MR/BRAIN",)},
        preprocessing=preprocessing,
        snapshot="s",
    )
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(saved.manifest.to_json())
    (folder / "weights.safetensors").write_bytes(saved.weights)
    return saved
