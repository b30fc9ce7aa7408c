"""What travels with a trained network: weights, manifest, projection. torch, numpy and safetensors only.

This module also runs where there is no Spark and no MLflow: on executors, in notebooks, behind a service.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from cbmir_spark.errors import ModelError
from cbmir_spark.networks import SIDE, Network, build

FORMAT = 1
PROJECTION_DIRECTIONS = 128
UNKNOWN = "UNKNOWN"

LabelKind = Literal["body_part", "modality/body_part"]

_MODEL = "model."
_MEAN = "projection.mean"
_DIRECTIONS = "projection.directions"
_METADATA_KEY = "cbmir"
# Rows of one forward pass of embed_batches; smaller batches are filled up, see there.
_ROWS = 16
# Rows that a projection is applied to at a time.
_PROJECTED = 1_024


def body_part_of(label: str) -> str:
    """CHEST of the labels CHEST and CT/CHEST."""
    return label.rpartition("/")[2]


@dataclass(frozen=True)
class Projection:
    """Directions in which the feature vectors of a model vary most, for lower bounds of distances.

    With orthonormal rows P, p = P(x − mean) and r = ‖(x − mean) − Pᵀp‖, any two vectors are at least
    √(‖p₁ − p₂‖² + (r₁ − r₂)²) apart (design decision 4). mean is (D,) and directions (K, D), both float64.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    @property
    def defect(self) -> float:
        """‖PPᵀ − I‖₂: how far the rows are from orthonormal, which a proved bound has to allow for."""
        gram = self.directions @ self.directions.T
        return float(np.linalg.norm(gram - np.eye(len(gram)), 2))

    def apply(self, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """(N, D) float32 vectors → (N, K) float32 coordinates and (N,) float64 residual norms.

        The residual is formed and then measured: ‖x‖² − ‖p‖² loses the digits that the bound lives on. Memory: two
        float64 blocks of _PROJECTED rows, beside what is given and returned.
        """
        coordinates = np.empty((len(vectors), len(self.directions)), np.float32)
        squares = np.empty(len(vectors))
        for start in range(0, len(vectors), _PROJECTED):
            block = slice(start, start + _PROJECTED)
            residual = vectors[block].astype(np.float64)
            residual -= self.mean
            found = residual @ self.directions.T
            residual -= found @ self.directions
            coordinates[block] = found
            squares[block] = np.einsum("nd,nd->n", residual, residual)
        return coordinates, np.sqrt(squares)

    @staticmethod
    def fit(batches: Iterable[NDArray[np.float32]], directions: int = PROJECTION_DIRECTIONS) -> "Projection":
        """Principal directions of all rows of the (n, D) batches, in float64; batches are seen once.

        There are min(directions, D) of them, also where the rows span less: any orthonormal rows give a
        valid bound. Raises ModelError where there are no rows.
        """
        count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
        for batch in batches:
            rows = batch.astype(np.float64)
            if not len(rows):
                continue
            batch_mean = rows.mean(axis=0)
            rows -= batch_mean
            if not count:
                count, mean, scatter = len(rows), batch_mean, rows.T @ rows
                continue
            # Chan et al. 1983: means and scatters of two sets combined, without the cancellation of Σx².
            total = count + len(batch)
            shift = batch_mean - mean
            scatter += rows.T @ rows + np.outer(shift, shift) * (count * len(batch) / total)
            mean = mean + shift * (len(batch) / total)
            count = total
        if not count:
            raise ModelError("no feature vectors to fit the projection on; the train split is empty")
        _, eigenvectors = np.linalg.eigh(scatter)
        leading = eigenvectors[:, ::-1][:, :directions]
        orthonormal, _ = np.linalg.qr(leading)
        return Projection(mean=mean, directions=np.ascontiguousarray(orthonormal.T))


@dataclass(frozen=True)
class Manifest:
    """What a model's weights are and what they may be used with.

    `possible` names the classes that each modality had in training. `snapshot` is the digest of the training
    snapshot. A copy without `weights_sha256` lies in the weights file itself, so that the digest covers both.
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
        return f"{self.preset}-{self.weights_sha256[:12]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """Raises ModelError where the text is not a manifest, or one of a format that this version cannot read."""
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
    """A model as the two files that travel: `weights.safetensors` and `manifest.json`."""

    weights: bytes
    manifest: Manifest


@dataclass(frozen=True)
class Loaded:
    """A model ready to embed: in evaluation mode, on the CPU until `model.to` moves it."""

    model: Network
    manifest: Manifest
    projection: Projection


def save(
    model: Network,
    projection: Projection,
    *,
    label: LabelKind,
    classes: Sequence[str],
    possible: Mapping[str, Sequence[str]],
    preprocessing: str,
    snapshot: str,
) -> Saved:
    """The files of a trained model. The same model gives the same bytes, and so the same model id.

    Raises ModelError where classes, model and projection do not belong together.
    """
    if len(classes) != model.classes:
        raise ModelError(f"{len(classes)} classes for a network with {model.classes} outputs")
    if projection.mean.shape != (model.embedding,):
        raise ModelError(f"a projection of {projection.mean.shape} for vectors of {model.embedding}")
    if UNKNOWN in {body_part_of(name) for name in classes}:
        raise ModelError("UNKNOWN is no class; leave such rows out of the training")
    manifest = Manifest(
        format=FORMAT,
        preset=model.preset.name,
        label=label,
        classes=tuple(classes),
        possible={modality: tuple(labels) for modality, labels in sorted(possible.items())},
        preprocessing=preprocessing,
        embedding_dim=model.embedding,
        projection_dim=len(projection.directions),
        snapshot=snapshot,
        weights_sha256="",
    )
    tensors = {_MODEL + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors[_MEAN] = torch.from_numpy(projection.mean)
    tensors[_DIRECTIONS] = torch.from_numpy(projection.directions)
    weights = safetensors.torch.save(tensors, metadata={_METADATA_KEY: manifest.to_json()})
    return Saved(weights, replace(manifest, weights_sha256=hashlib.sha256(weights).hexdigest()))


def load(weights: bytes, manifest_json: str | bytes) -> Loaded:
    """The model of two files written by `save`; nothing in them is executed (safetensors and JSON).

    Raises ModelError where the format is not known, the weights are not those of the manifest, or the
    manifest was changed.
    """
    manifest = Manifest.from_json(manifest_json)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != manifest.weights_sha256:
        raise ModelError(
            f"the weights have SHA-256 {digest}, their manifest says {manifest.weights_sha256}; fetch the model again"
        )
    try:
        tensors = safetensors.torch.load(weights)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        inner = header["__metadata__"][_METADATA_KEY]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
        raise ModelError("the weights file is not one that cbmir wrote; export the model again") from None
    if inner != replace(manifest, weights_sha256="").to_json():
        raise ModelError("the manifest differs from the copy within the weights; fetch the model again")
    try:
        projection = Projection(tensors.pop(_MEAN).numpy(), tensors.pop(_DIRECTIONS).numpy())
        model = build(manifest.preset, len(manifest.classes))
        model.load_state_dict({name.removeprefix(_MODEL): tensor for name, tensor in tensors.items()})
    except (KeyError, RuntimeError):
        raise ModelError(
            f"the weights are not those of preset {manifest.preset} with {len(manifest.classes)} classes as "
            "this version builds it; train the model again"
        ) from None
    # The memory order that convolutions are fastest in, on CPUs too.
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Loaded(model, manifest, projection)


def projection_of(weights: bytes) -> Projection:
    """The projection of weights whose digest was checked."""
    try:
        tensors = safetensors.torch.load(weights)
        return Projection(tensors[_MEAN].numpy(), tensors[_DIRECTIONS].numpy())
    except (safetensors.SafetensorError, KeyError, ValueError):
        raise ModelError("the weights file is not one that cbmir wrote; export the model again") from None


@dataclass(frozen=True)
class Embedded:
    """What a model says of N pictures.

    vectors: (N, D) float32. scores: (N, classes) float32, softmax renormalised over the labels that are
    possible for each picture's modality. labels and probabilities (N,): the best score and its class, or
    None and 0 where the model learned no class of that modality.
    """

    vectors: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: tuple[str | None, ...]
    probabilities: NDArray[np.float32]


def embed_batches(loaded: Loaded, pixels: NDArray[np.uint8], modalities: Sequence[str] | None = None) -> Embedded:
    """Vectors and class scores of (N, 256, 256) uint8 pixels; runs per task, on the model's device.

    `modalities` are the N normalised Modality values; UNKNOWN, or no modalities, leaves every class open.
    Raises ModelError for pixels of another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIDE, SIDE):
        raise ModelError(f"pixels are {pixels.dtype} {pixels.shape}, the network takes uint8 (N, 256, 256)")
    model, manifest = loaded.model, loaded.manifest
    device = model.device
    vectors = np.empty((len(pixels), manifest.embedding_dim), dtype=np.float32)
    logits = np.empty((len(pixels), len(manifest.classes)), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(pixels), _ROWS):
            rows = pixels[start : start + _ROWS]
            # Matrix products of another height round differently: always the same height, so that a picture
            # gets the same vector alone, as a query, and among others, in the index.
            batch = np.zeros((_ROWS, SIDE, SIDE), dtype=np.uint8)
            batch[: len(rows)] = rows
            inputs = model.to_input(torch.from_numpy(batch).to(device)).contiguous(memory_format=torch.channels_last)
            embedded = model.embed(inputs)
            vectors[start : start + len(rows)] = embedded[: len(rows)].cpu().numpy()
            logits[start : start + len(rows)] = model.classify(embedded)[: len(rows)].cpu().numpy()
    scores = class_scores(logits, manifest, modalities)
    best = scores.argmax(axis=1) if len(scores) else np.zeros(0, dtype=np.int64)
    probabilities = scores[np.arange(len(scores)), best]
    labels = tuple(
        manifest.classes[index] if probability > 0 else None
        for index, probability in zip(best, probabilities, strict=True)
    )
    return Embedded(vectors, scores, labels, probabilities)


def class_scores(
    logits: NDArray[np.float32], manifest: Manifest, modalities: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """(N, classes) softmax over the classes possible for each row's modality, 0 for the others."""
    allowed = np.ones(logits.shape, dtype=bool)
    for row, modality in enumerate(modalities or ()):
        if modality != UNKNOWN:
            possible = manifest.possible.get(modality, ())
            allowed[row] = [name in possible for name in manifest.classes]
    # Masked before the softmax, not divided after it: a sum that underflows would leave 0/0.
    masked = np.where(allowed, logits.astype(np.float64), -np.inf)
    top = masked.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return shares.astype(np.float32)
