"""A trained network as its two files, weights and manifest. numpy and safetensors only; `weights` is the torch side.

Runs where there is no Spark and no MLflow: on executors, in notebooks, behind a service.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import safetensors
import safetensors.numpy

from cbmir_spark.errors import ModelError
from cbmir_spark.models.projection import Projection

FORMAT = 1
UNKNOWN = "UNKNOWN"
WEIGHTS_FILE, MANIFEST_FILE = "weights.safetensors", "manifest.json"

LabelKind = Literal["body_part", "modality/body_part"]

# Within the weights file: the projection's arrays, and the copy of the manifest in the metadata.
MEAN, DIRECTIONS = "projection.mean", "projection.directions"
METADATA_KEY = "cbmir"
FOREIGN = "the weights file is not one that cbmir wrote; export the model again"


def body_part_of(label: str) -> str:
    """Take the body part of a label: CHEST of CHEST and of CT/CHEST."""
    return label.rpartition("/")[2]


@dataclass(frozen=True)
class Manifest:
    """The description of a model's weights, and of the pixels that they are for.

    `possible` names the classes that each modality had in training. `snapshot` is the digest of the training
    snapshot. The weights file holds a copy without `weights_sha256`, so that the digest covers both.
    """

    format: int
    preset: str
    label: LabelKind
    classes: tuple[str, ...]
    possible: Mapping[str, tuple[str, ...]]
    preprocessing: str
    embedding_dim: int
    projection_dim: int
    snapshot: str
    weights_sha256: str

    @property
    def model_id(self) -> str:
        """The model's name, unique by its weights' digest."""
        return f"{self.preset}-{self.weights_sha256[:12]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """Read a manifest. Raises ModelError where the text is none, or one of another format."""
        try:
            values = json.loads(text)
            found = values.get("format")
        except (ValueError, AttributeError, RecursionError):
            raise ModelError("the model's manifest is not a JSON object; export the model again") from None
        if found != FORMAT:
            raise ModelError(
                f"the model's manifest has format {found!r}, this version reads {FORMAT}; "
                "train the model again or use the version of cbmir_spark that wrote it"
            )
        expected = {field.name for field in fields(Manifest)}
        if set(values) != expected:
            raise ModelError(
                f"the model's manifest lacks {sorted(expected - set(values))} "
                f"and has unknown {sorted(set(values) - expected)}; export the model again"
            )
        if not _well_formed(values):
            raise ModelError("the model's manifest has values of another type; export the model again")
        return Manifest(
            **{
                **values,
                "classes": tuple(values["classes"]),
                "possible": {modality: tuple(labels) for modality, labels in values["possible"].items()},
            }
        )


def _well_formed(values: Mapping[str, Any]) -> bool:
    def labels(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(label, str) for label in value)

    numbers, texts = (
        ("embedding_dim", "projection_dim"),
        ("preset", "preprocessing", "snapshot", "weights_sha256"),
    )
    return (
        all(type(values[name]) is int and values[name] > 0 for name in numbers)
        and all(isinstance(values[name], str) for name in texts)
        and values["label"] in ("body_part", "modality/body_part")
        and labels(values["classes"])
        and isinstance(values["possible"], dict)
        and all(labels(possible) for possible in values["possible"].values())
    )


@dataclass(frozen=True)
class Saved:
    """A model as its two files, `weights.safetensors` and `manifest.json`; nothing in them can carry code."""

    weights: bytes
    manifest: Manifest

    @classmethod
    def of(cls, weights: bytes, manifest_json: str | bytes) -> "Saved":
        """Put two files together.

        Raises ModelError where the manifest cannot be read, or names weights of another digest.
        """
        manifest = Manifest.from_json(manifest_json)
        digest = hashlib.sha256(weights).hexdigest()
        if digest != manifest.weights_sha256:
            raise ModelError(
                f"the weights have SHA-256 {digest}, their manifest says {manifest.weights_sha256}; "
                "fetch the model again"
            )
        return cls(weights, manifest)

    def check(self) -> None:
        """Raise ModelError where the weights are not a file of ours, or hold the copy of another manifest."""
        try:
            header = json.loads(self.weights[8 : 8 + int.from_bytes(self.weights[:8], "little")])
            inner = header["__metadata__"][METADATA_KEY]
        except (ValueError, KeyError, TypeError):
            raise ModelError(FOREIGN) from None
        if inner != replace(self.manifest, weights_sha256="").to_json():
            raise ModelError("the manifest differs from the copy within the weights; fetch the model again")

    def projection(self) -> Projection:
        """Read the projection alone. Raises ModelError where the weights are not a file of ours."""
        try:
            arrays = safetensors.numpy.load(self.weights)
            return Projection(arrays[MEAN], arrays[DIRECTIONS])
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise ModelError(FOREIGN) from None
