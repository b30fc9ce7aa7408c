"""The manifest of a training snapshot, and the names that its files share."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cbmir_spark.errors import TrainingError
from cbmir_spark.lake import columns as cols
from cbmir_spark.models.artifact import LabelKind

FORMAT = 1
MANIFEST = "manifest.json"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)

LABEL = "label"
TARGET = "target"
SPLIT = "split"
IMAGES = "n"
KEY = "key"
PART = "part"
# What a frame belongs to: the split goes by patient, erasure by any of them.
OWNERS = (cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)

# The key of `single_patient_classes` in manifests of format 1.
_SINGLE_PATIENT = "lonely"

# A small split has smaller row groups than `rows_per_group`, so that up to eight processes have something to read.
LEAST_GROUPS = 8
GROUPS_PER_FILE = 8


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a split: its path below the snapshot, and the rows of each row group."""

    path: str
    groups: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """A training snapshot, as its manifest describes it.

    `possible` names the classes that occur with each modality, `images` counts frames by split and class,
    `single_patient_classes` have one patient, who is in the train split, `left_out` counts the frames of labels with
    fewer than asked for, and `versions` are the Delta versions that the snapshot was first written from.
    """

    format: int
    digest: str
    uri: str
    label: LabelKind
    classes: tuple[str, ...]
    possible: Mapping[str, tuple[str, ...]]
    preprocessing: str
    images: Mapping[str, Mapping[str, int]]
    patients: Mapping[str, int]
    single_patient_classes: tuple[str, ...]
    left_out: Mapping[str, int]
    versions: Mapping[str, int]
    files: Mapping[str, tuple[DataFile, ...]]

    def rows(self, split: str) -> int:
        """Count the frames of a split."""
        return sum(sum(file.groups) for file in self.files[split])

    def to_json(self) -> str:
        """Write the manifest; checkpoints are named by a digest of these bytes."""
        values = asdict(self)
        values[_SINGLE_PATIENT] = values.pop("single_patient_classes")
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, uri: str) -> "Snapshot":
        """Read the manifest in folder `uri`; the lake may have been moved since it was written.

        Raises TrainingError for a manifest of another format.
        """
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise TrainingError(
                f"snapshot {uri} has format {values.get('format')!r}, this version reads {FORMAT}: "
                "delete the folder and train again"
            )
        files = {
            split: tuple(DataFile(f["path"], tuple(f["groups"]), f["sha256"]) for f in found)
            for split, found in values["files"].items()
        }
        read = {
            "uri": uri,
            "classes": tuple(values["classes"]),
            "possible": {modality: tuple(labels) for modality, labels in values["possible"].items()},
            "single_patient_classes": tuple(values.pop(_SINGLE_PATIENT)),
            "files": files,
        }
        return Snapshot(**{**values, **read})
