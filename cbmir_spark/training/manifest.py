"""The manifest of a snapshot."""

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

# A small split is cut finer than `rows_per_group`, so that up to eight processes have something to read.
LEAST_GROUPS = 8
GROUPS_PER_FILE = 8


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a split: its place below the snapshot, and the rows of each row group."""

    path: str
    groups: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot's manifest says.

    `possible` names the classes that occur with each modality, `images` counts frames by split and class,
    `lonely` are the classes with a single patient (who is in the train split), `left_out` the labels with
    fewer frames than asked for, `versions` the Delta versions the snapshot was first written from.
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
    lonely: tuple[str, ...]
    left_out: Mapping[str, int]
    versions: Mapping[str, int]
    files: Mapping[str, tuple[DataFile, ...]]

    def rows(self, split: str) -> int:
        return sum(sum(file.groups) for file in self.files[split])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, uri: str) -> "Snapshot":
        """The snapshot of a manifest found in folder `uri` (a lake may have been moved since it was written)."""
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
        tuples = {name: tuple(values[name]) for name in ("classes", "lonely")}
        possible = {modality: tuple(labels) for modality, labels in values["possible"].items()}
        return Snapshot(**{**values, **tuples, "uri": uri, "possible": possible, "files": files})
