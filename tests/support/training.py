"""A small lake to train on: three classes, each of a few patients."""

from pathlib import Path

from cbmir_spark import config
from cbmir_spark.config import Settings
from tests.support.tiny_lake import Drawn

PATIENTS, IMAGES_EACH = 4, 3


def images(each: int = IMAGES_EACH) -> list[Drawn]:
    """Images of CT/CHEST, CT/HEAD and MR/HEAD, of four patients each, `each` for a patient."""
    return [
        Drawn(f"{modality}{part}{patient}-{number}", f"{modality}{part}{patient}", modality, part)
        for modality, part in (("CT", "CHEST"), ("CT", "HEAD"), ("MR", "HEAD"))
        for patient in range(PATIENTS)
        for number in range(each)
    ]


def settings_for(folder: Path, *overrides: str) -> Settings:
    """Settings of a training of seconds on a lake below a folder, without validation patients."""
    given = [f"lake.uri={folder / 'lake'}", "dataset.min_images=3", "training.epochs=2", "training.batch_size=8"]
    given += ["dataset.test_fraction=0.3", "dataset.validation_fraction=0"]
    return config.load(overrides=[*given, *overrides], environ={})
