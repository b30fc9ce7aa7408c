"""The networks and what travels with them: weights, manifest, projection. torch, numpy and safetensors only.

This module also runs where there is no Spark and no MLflow: on executors, in notebooks, behind a service.

The paper's AlexNet ("An Insight Framework for CBMIR using Deep CNN", IJEAT 2019) on one gray channel of
256×256. The paper gives no padding for its first layer, so there is none, and pooling is 3×3 with stride 2
throughout, after Krizhevsky et al. 2012. The sides then come out as in that network:

    input 256 → conv 11×11 s4: (256−11)//4+1 = 62 → pool: (62−3)//2+1 = 30 → conv 5×5 p2: 30 → pool: 14
    → conv 3×3 p1 ×3: 14 → pool: 6 → 256·6·6 = 9,216 → FC 4,096 → FC 4,096 → FC classes

A picture's feature vector is the output of the second fully connected layer after its ReLU ("FC2").
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from cbmir_spark.errors import ModelError

FORMAT = 1
SIDE = 256
PROJECTION_DIRECTIONS = 32
UNKNOWN = "UNKNOWN"

LabelKind = Literal["body_part", "modality/body_part"]

_MODEL = "model."
_MEAN = "projection.mean"
_DIRECTIONS = "projection.directions"
_METADATA_KEY = "cbmir"
# Rows of one forward pass of embed_batches; smaller batches are filled up, see there.
_ROWS = 16


@dataclass(frozen=True)
class Conv:
    """One convolution with its ReLU, and whether a 3×3 max pooling with stride 2 follows."""

    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: bool = False


@dataclass(frozen=True)
class Preset:
    """A network and the way it is trained when settings do not say otherwise."""

    name: str
    convs: tuple[Conv, ...]
    hidden: int
    dropout: float
    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    shrink: int = 1
    """Side of the average pooling that the input passes first."""
    batch_norm: bool = False
    """Batch normalisation between each convolution or hidden layer and its ReLU."""


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        # The paper's network. Dropout 0.5 after both hidden layers as in Krizhevsky et al. 2012: the paper
        # does not speak of it, and it has no weights, so the network is the paper's all the same.
        Preset(
            name="alexnet",
            convs=(
                Conv(96, 11, stride=4, pool=True),
                Conv(256, 5, padding=2, pool=True),
                Conv(384, 3, padding=1),
                Conv(384, 3, padding=1),
                Conv(256, 3, padding=1, pool=True),
            ),
            hidden=4096,
            dropout=0.5,
            optimiser="sgd",
            learning_rate=0.005,
            weight_decay=5e-4,
            batch_size=64,
            epochs=30,
        ),
        # The same five convolutions and three fully connected layers for CPUs: narrower, on the picture halved, and
        # so without the first pooling (sides 256 → 128 → 32 → 15 → 7). Batch normalisation makes ten epochs enough.
        Preset(
            name="alexnet-small",
            convs=(
                Conv(32, 11, stride=4, padding=5),
                Conv(64, 5, padding=2, pool=True),
                Conv(96, 3, padding=1),
                Conv(96, 3, padding=1),
                Conv(64, 3, padding=1, pool=True),
            ),
            hidden=512,
            dropout=0.3,
            optimiser="adamw",
            learning_rate=1e-3,
            weight_decay=1e-2,
            batch_size=32,
            epochs=10,
            shrink=2,
            batch_norm=True,
        ),
    )
}


@dataclass(frozen=True)
class Draw:
    """Random numbers of one training step: those of its whole batch, of which a process uses those of its rows."""

    generator: torch.Generator
    first: int
    total: int


class Dropout(nn.Module):
    """Dropout whose mask of a row does not depend on how the batch is shared out among processes."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.draw: Draw | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.draw is None:
            return nn.functional.dropout(x, self.p)
        drawn = torch.rand((self.draw.total, *x.shape[1:]), generator=self.draw.generator, device=x.device)
        mask = drawn[self.draw.first : self.draw.first + len(x)] >= self.p
        return x * mask / (1.0 - self.p)


class _SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the mean and variance of all processes' rows, also on CPUs (torch has it for GPUs)."""

    group: Any = None

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        axes, shape = [0, *range(2, input.dim())], [1, -1, *[1] * (input.dim() - 2)]
        rows = torch.tensor(float(input.numel() // input.shape[1]), device=input.device)
        dist.all_reduce(rows, group=self.group)
        mean = self._over_all(input.sum(axes)) / rows
        centred = input - mean.reshape(shape)
        variance = self._over_all((centred**2).sum(axes)) / rows
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale.reshape(shape) + self.bias.reshape(shape)

    def _over_all(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; gradients flow back to every one of them."""
        total: torch.Tensor = _SumOfAll.apply(values, self.group)  # type: ignore[no-untyped-call]
        return total


def synchronise(model: nn.Module) -> Any:
    """Make the batch normalisations of a model count the rows of all processes; the group in which they talk.

    Call it in every process, before the model is wrapped.
    """
    group = dist.new_group()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                twin = _Synchronised(child.num_features, child.eps, child.momentum)
                # The very tensors: an optimiser may hold them already.
                twin._parameters, twin._buffers = child._parameters, child._buffers
                twin.group = group
                setattr(module, name, twin)
    return group


class Network(nn.Module):
    """A `Preset` as a torch module for a number of classes.

    `forward` takes (N, 1, 256, 256) float32 as `to_input` makes it and gives (N, classes) float32 logits;
    `embed` gives the (N, hidden) float32 feature vectors, which are never negative.
    """

    def __init__(self, preset: Preset, classes: int) -> None:
        super().__init__()
        self.preset = preset
        layers: list[nn.Module] = [nn.AvgPool2d(preset.shrink)] if preset.shrink > 1 else []
        channels, side = 1, SIDE // preset.shrink
        for conv in preset.convs:
            layers.append(
                nn.Conv2d(channels, conv.out, conv.kernel, conv.stride, conv.padding, bias=not preset.batch_norm)
            )
            layers += [nn.BatchNorm2d(conv.out)] if preset.batch_norm else []
            layers.append(nn.ReLU())
            side = (side + 2 * conv.padding - conv.kernel) // conv.stride + 1
            if conv.pool:
                layers.append(nn.MaxPool2d(3, 2))
                side = (side - 3) // 2 + 1
            channels = conv.out
        self.features = nn.Sequential(*layers)
        self.fc1 = self._hidden(channels * side * side)
        self.fc2 = self._hidden(preset.hidden)
        self.dropout = Dropout(preset.dropout)
        self.fc3 = nn.Linear(preset.hidden, classes)
        for module in self.modules():
            # torch's default shrinks the signal at each ReLU; eight layers without normalisation then stall.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc3.weight, std=0.01)

    def _hidden(self, inputs: int) -> nn.Sequential:
        linear = nn.Linear(inputs, self.preset.hidden, bias=not self.preset.batch_norm)
        norm = [nn.BatchNorm1d(self.preset.hidden)] if self.preset.batch_norm else []
        return nn.Sequential(linear, *norm, nn.ReLU())

    def draw(self, draw: "Draw | None") -> None:
        """Where the random numbers of the next forward pass in training come from; None: torch's global generator."""
        self.dropout.draw = draw

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self._fc2(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.dropout(self._fc2(x)))  # type: ignore[no-any-return]

    def _fc2(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.fc1(torch.flatten(self.features(x), 1)))
        return self.fc2(hidden)  # type: ignore[no-any-return]

    @staticmethod
    def to_input(pixels: torch.Tensor) -> torch.Tensor:
        """(N, 256, 256) uint8 pixels as the (N, 1, 256, 256) float32 that the network takes, within ±2."""
        return ((pixels.to(torch.float32) - 127.5) / 63.75).unsqueeze(1)


def build(preset: str, classes: int) -> Network:
    """The network of a preset with fresh weights from torch's global generator.

    Raises ModelError for a preset that is not known.
    """
    return Network(preset_of(preset), classes)


def preset_of(name: str) -> Preset:
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


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

        The residual is formed and then measured: ‖x‖² − ‖p‖² loses the digits that the bound lives on.
        """
        centred = vectors.astype(np.float64) - self.mean
        coordinates = centred @ self.directions.T
        residual = centred - coordinates @ self.directions
        return coordinates.astype(np.float32), np.sqrt(np.einsum("nd,nd->n", residual, residual))

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
        except (ValueError, AttributeError):
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
    if len(classes) != model.fc3.out_features:
        raise ModelError(f"{len(classes)} classes for a network with {model.fc3.out_features} outputs")
    if projection.mean.shape != (model.preset.hidden,):
        raise ModelError(f"a projection of {projection.mean.shape} for vectors of {model.preset.hidden}")
    if UNKNOWN in {body_part_of(name) for name in classes}:
        raise ModelError("UNKNOWN is no class; leave such rows out of the training")
    manifest = Manifest(
        format=FORMAT,
        preset=model.preset.name,
        label=label,
        classes=tuple(classes),
        possible={modality: tuple(labels) for modality, labels in sorted(possible.items())},
        preprocessing=preprocessing,
        embedding_dim=model.preset.hidden,
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
    return Loaded(model.eval(), manifest, projection)


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
    device = model.fc3.weight.device
    vectors = np.empty((len(pixels), manifest.embedding_dim), dtype=np.float32)
    logits = np.empty((len(pixels), len(manifest.classes)), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(pixels), _ROWS):
            rows = pixels[start : start + _ROWS]
            # Matrix products of another height round differently: always the same height, so that a picture
            # gets the same vector alone, as a query, and among others, in the index.
            batch = np.zeros((_ROWS, SIDE, SIDE), dtype=np.uint8)
            batch[: len(rows)] = rows
            embedded = model.embed(model.to_input(torch.from_numpy(batch).to(device)))
            vectors[start : start + len(rows)] = embedded[: len(rows)].cpu().numpy()
            logits[start : start + len(rows)] = model.fc3(embedded)[: len(rows)].cpu().numpy()
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
