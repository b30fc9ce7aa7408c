"""Patients are split between train, validation and test by seed and ids alone; no class leaves train."""

import random
from collections import Counter

import pandas as pd
import pytest

from cbmir_spark.config import StorageSettings
from cbmir_spark.training.manifest import TEST, TRAIN, VALIDATION
from cbmir_spark.training.split import split_patients

LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)


def images_of(patients: dict[str, list[str]]) -> pd.DataFrame:
    rows = [(patient, label, 3) for label, members in patients.items() for patient in members]
    return pd.DataFrame(rows, columns=["patient_id", "label", "n"])


def test_split_takes_the_asked_share_of_each_class_and_keeps_single_patients_in_train() -> None:
    patients = {"CT/CHEST": [f"a{i}" for i in range(20)], "MR/HEAD": [f"b{i}" for i in range(10)], "US/LIVER": ["c"]}
    side = split_patients(images_of(patients), test_fraction=0.3, validation_fraction=0.1, seed=1)
    count = {label: Counter(side[p] for p in members) for label, members in patients.items()}
    assert count["CT/CHEST"] == {TEST: 6, VALIDATION: 2, TRAIN: 12}
    assert count["MR/HEAD"] == {TEST: 3, VALIDATION: 1, TRAIN: 6}
    assert count["US/LIVER"] == {TRAIN: 1}


def test_split_depends_on_seed_and_ids_alone() -> None:
    frame = images_of({"A": [f"p{i}" for i in range(30)], "B": [f"p{i}" for i in range(20, 50)]})
    shuffled = frame.sample(frac=1.0, random_state=3)
    assert split_patients(frame, 0.3, 0.0, 1) == split_patients(shuffled, 0.3, 0.0, 1)
    assert split_patients(frame, 0.3, 0.0, 1) != split_patients(frame, 0.3, 0.0, 2)


@pytest.mark.parametrize("seed", range(1, 41))
def test_split_keeps_every_class_in_train_and_in_test_wherever_one_move_could(seed: int) -> None:
    """Random overlaps of classes: patients may have several labels, as with CT of chest and abdomen."""
    draws = random.Random(seed)
    names = [f"p{i}" for i in range(draws.randint(2, 12))]
    patients = {label: draws.sample(names, draws.randint(1, min(4, len(names)))) for label in "ABCDE"}
    side = split_patients(images_of(patients), 0.3, 0.15, seed)
    assert set(side) == {p for members in patients.values() for p in members}
    in_train = {label: {p for p in members if side[p] == TRAIN} for label, members in patients.items()}
    assert all(in_train.values())
    for label, members in patients.items():
        if len(members) > 1 and not any(side[p] == TEST for p in members):
            # Each patient who could serve is the last one in train of some class.
            for p in in_train[label]:
                assert any(in_train[other] == {p} for other, who in patients.items() if p in who)


def test_split_first_takes_who_serves_several_classes() -> None:
    """Both classes share one patient: whichever is looked at first, one test patient can serve both."""
    side = split_patients(images_of({"A": ["both", "a"], "B": ["both", "b"]}), 0.3, 0.0, 1)
    assert side == {"both": TEST, "a": TRAIN, "b": TRAIN}
