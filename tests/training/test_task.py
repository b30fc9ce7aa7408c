"""What training processes are given, and the names by which stopped trainings are found again."""

import dataclasses
import json

import pytest

from cbmir_spark.config import StorageSettings
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.manifest import FORMAT, TEST, TRAIN, VALIDATION, DataFile, Snapshot
from cbmir_spark.training.task import TrainingTask

TASK = TrainingTask(
    snapshot=Snapshot(
        format=FORMAT,
        digest="d" * 32,
        uri="file:///lake/snapshots/d",
        label="body_part",
        classes=("A", "B"),
        possible={"CT": ("A", "B")},
        preprocessing="px1",
        images={TRAIN: {"A": 2, "B": 1}, VALIDATION: {}, TEST: {}},
        patients={TRAIN: 2, VALIDATION: 0, TEST: 0},
        single_patient_classes=("B",),
        left_out={"C": 1},
        versions={"sources": 1, "tags": 2, "pixels": 3},
        files={TRAIN: (DataFile("train/part-00000.parquet", (3,), "0" * 64),), VALIDATION: (), TEST: ()},
    ),
    store=ObjectStore(StorageSettings(endpoint=None, region="eu-central-1", path_style=False, attempts=1)),
    preset="alexnet-small",
    fitting=Fitting("adamw", learning_rate=1e-3, weight_decay=1e-2, epochs=2, class_weights=(0.75, 1.5), seed=1),
    batch_size=8,
    data_seed=1,
    use_gpu=False,
    checkpoints_root="file:///lake/training",
    checkpoint_steps=2,
)


def test_a_task_comes_through_json_as_it_was() -> None:
    assert TrainingTask.from_values(json.loads(json.dumps(TASK.to_values()))) == TASK


def test_checkpoints_lie_where_earlier_versions_put_them() -> None:
    """The digest is that of the version before `TrainingTask`; with another one its trainings would start over."""
    assert TASK.checkpoints.uri == "file:///lake/training/f65d2b93d45fe0b0bfd6e45760f1c75b"
    assert json.loads(TASK.snapshot.to_json())["lonely"] == ["B"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"checkpoint_steps": 1}, True),
        ({"batch_size": 4}, False),
        ({"data_seed": 2}, False),
        ({"preset": "alexnet"}, False),
        ({"fitting": dataclasses.replace(TASK.fitting, epochs=3)}, False),
    ],
)
def test_trainings_share_checkpoints_if_they_take_the_same_steps(change: dict[str, object], same: bool) -> None:
    assert (dataclasses.replace(TASK, **change).course_id == TASK.course_id) == same  # type: ignore[arg-type]
