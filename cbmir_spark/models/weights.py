"""Turn a trained network into its files, and the files into a network again. torch, numpy and safetensors only.

Runs where there is no Spark and no MLflow: on executors, in notebooks, behind a service.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch

from cbmir_spark.errors import ModelError
from cbmir_spark.models.artifact import (
    DIRECTIONS,
    FOREIGN,
    FORMAT,
    MEAN,
    METADATA_KEY,
    UNKNOWN,
    LabelKind,
    Manifest,
    Saved,
    body_part_of,
)
from cbmir_spark.models.networks import Network, build
from cbmir_spark.models.projection import Projection

_MODEL = "model."


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
    """Make the files of a trained model. The same model gives the same bytes, and so the same model id.

    Raises ModelError where classes, model and projection do not fit together.
    """
    if len(classes) != model.classes:
        raise ModelError(f"{len(classes)} classes for a network with {model.classes} outputs")
    if projection.mean.shape != (model.embedding,):
        raise ModelError(f"a projection of {projection.mean.shape} for vectors of {model.embedding}")
    if UNKNOWN in {body_part_of(name) for name in classes}:
        raise ModelError("UNKNOWN is no class; leave such rows out of training")
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
    tensors[MEAN] = torch.from_numpy(projection.mean)
    tensors[DIRECTIONS] = torch.from_numpy(projection.directions)
    weights = safetensors.torch.save(tensors, metadata={METADATA_KEY: manifest.to_json()})
    return Saved(weights, replace(manifest, weights_sha256=hashlib.sha256(weights).hexdigest()))


def load(saved: Saved) -> Loaded:
    """Build the network with its weights.

    Raises ModelError where the weights are not a file of ours, the manifest was changed after it was written, or this
    version builds another network for the preset.
    """
    saved.check()
    try:
        tensors = safetensors.torch.load(saved.weights)
    except (safetensors.SafetensorError, ValueError):
        raise ModelError(FOREIGN) from None
    manifest = saved.manifest
    try:
        projection = Projection(tensors.pop(MEAN).numpy(), tensors.pop(DIRECTIONS).numpy())
        model = build(manifest.preset, len(manifest.classes))
        model.load_state_dict({name.removeprefix(_MODEL): tensor for name, tensor in tensors.items()})
    except (KeyError, RuntimeError):
        raise ModelError(
            f"the weights do not fit preset {manifest.preset} with {len(manifest.classes)} classes as "
            "this version builds it; train the model again"
        ) from None
    # The memory order that convolutions are fastest in, on CPUs too.
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Loaded(model, manifest, projection)


def load_files(weights: bytes, manifest_json: str | bytes) -> Loaded:
    """Load the model of two files. Raises ModelError as `Saved.of` and `load` do."""
    return load(Saved.of(weights, manifest_json))
