"""The networks by preset, and how each is trained when settings do not say otherwise. torch alone.

The paper's AlexNet ("An Insight Framework for CBMIR using Deep CNN", IJEAT 2019) on one gray channel of
256×256. The paper gives no padding for its first layer, so there is none, and pooling is 3×3 with stride 2
throughout, after Krizhevsky et al. 2012. The sides then come out as in that network:

    input 256 → conv 11×11 s4: (256−11)//4+1 = 62 → pool: (62−3)//2+1 = 30 → conv 5×5 p2: 30 → pool: 14
    → conv 3×3 p1 ×3: 14 → pool: 6 → 256·6·6 = 9,216 → FC 4,096 → FC 4,096 → FC classes

A picture's feature vector is the output of the second fully connected layer after its ReLU ("FC2").

The preset `retrieval` is ours: residual blocks, generalised mean pooling (Radenović et al. 2019) and a normalised
vector, trained with a cosine margin (CosFace, Wang et al. 2018) so that distances are what is learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from cbmir_spark.errors import ModelError

SIDE = 256


@dataclass(frozen=True)
class Conv:
    """One convolution with its ReLU, and whether a 3×3 max pooling with stride 2 follows."""

    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: bool = False


@dataclass(frozen=True)
class AlexNetShape:
    """Five convolutions and three fully connected layers."""

    convs: tuple[Conv, ...]
    hidden: int
    dropout: float
    shrink: int = 1
    """Side of the average pooling that the input passes first."""
    batch_norm: bool = False
    """Batch normalisation between each convolution or hidden layer and its ReLU."""
    even: bool = True
    """First weights that keep the signal's size through the layers (He et al. 2015), not torch's smaller ones."""


@dataclass(frozen=True)
class EmbedderShape:
    """Residual stages of (channels, blocks), each but the first at half the side of the one before it."""

    stages: tuple[tuple[int, int], ...]
    embedding: int
    shrink: int
    scale: float
    """What cosines are multiplied by to become logits."""
    margin: float
    """By how much the cosine of the right class has to be larger than those of the others."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `updates`, where given, ends the training whatever the number of epochs."""

    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    updates: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    clip: float | None = 5.0
    """Steps of the first epochs are large where a few classes dominate; a longer gradient is cut to this length."""
    augment: bool = False


@dataclass(frozen=True)
class Preset:
    """A network and the way it is trained."""

    name: str
    shape: AlexNetShape | EmbedderShape
    recipe: Recipe


# The paper's network. Dropout 0.5 after both hidden layers as in Krizhevsky et al. 2012: the paper does not speak of
# it, and it has no weights, so the network is the paper's all the same.
_PAPER = AlexNetShape(
    convs=(
        Conv(96, 11, stride=4, pool=True),
        Conv(256, 5, padding=2, pool=True),
        Conv(384, 3, padding=1),
        Conv(384, 3, padding=1),
        Conv(256, 3, padding=1, pool=True),
    ),
    hidden=4096,
    dropout=0.5,
)

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "alexnet",
            _PAPER,
            Recipe("adamw", learning_rate=3e-4, weight_decay=1e-2, batch_size=64, epochs=20, augment=True),
        ),
        # The same five convolutions and three fully connected layers for CPUs: narrower, on the picture halved, and
        # so without the first pooling (sides 256 → 128 → 32 → 15 → 7). Batch normalisation makes ten epochs enough.
        Preset(
            "alexnet-small",
            AlexNetShape(
                convs=(
                    Conv(32, 11, stride=4, padding=5),
                    Conv(64, 5, padding=2, pool=True),
                    Conv(96, 3, padding=1),
                    Conv(96, 3, padding=1),
                    Conv(64, 3, padding=1, pool=True),
                ),
                hidden=512,
                dropout=0.3,
                shrink=2,
                batch_norm=True,
            ),
            Recipe("adamw", learning_rate=1e-3, weight_decay=1e-2, batch_size=32, epochs=10),
        ),
        # As the paper says it was trained: 3,000 updates of 32 pictures at a fixed rate, and nothing else. From He's
        # first weights its rate diverges within four updates; from torch's, which the paper may have had, within some
        # dozens.
        Preset(
            "paper",
            replace(_PAPER, even=False),
            Recipe(
                "sgd",
                learning_rate=0.25,
                weight_decay=0.0,
                batch_size=32,
                epochs=1,
                updates=3_000,
                schedule="constant",
                momentum=0.0,
                clip=None,
            ),
        ),
        Preset(
            "retrieval",
            EmbedderShape(
                stages=((48, 1), (96, 2), (192, 2), (320, 1)), embedding=256, shrink=2, scale=16.0, margin=0.2
            ),
            Recipe("adamw", learning_rate=2e-3, weight_decay=5e-2, batch_size=64, epochs=40, augment=True),
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
    """A network of a preset for a number of classes.

    `forward` takes (N, 1, 256, 256) float32 as `to_input` makes it and gives (N, classes) float32 logits; `embed`
    gives the (N, embedding) float32 feature vectors, and `classify` the logits of such vectors.
    """

    def __init__(self, preset: Preset, embedding: int, classes: int) -> None:
        super().__init__()
        self.preset = preset
        self.embedding = embedding
        self.classes = classes

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def classify(self, vectors: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.embed(x))

    def penalised(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The logits that the loss is taken of, where learning is made harder than what is asked afterwards."""
        return logits

    def draw(self, draw: Draw | None) -> None:
        """Where the random numbers of the next forward pass in training come from; None: torch's global generator."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.draw = draw

    @staticmethod
    def to_input(pixels: torch.Tensor) -> torch.Tensor:
        """(N, 256, 256) uint8 pixels as the (N, 1, 256, 256) float32 that the network takes, within ±2."""
        return ((pixels.to(torch.float32) - 127.5) / 63.75).unsqueeze(1)


class AlexNet(Network):
    """The paper's network or a smaller one of its kind; its vectors (FC2 after its ReLU) are never negative."""

    def __init__(self, preset: Preset, shape: AlexNetShape, classes: int) -> None:
        super().__init__(preset, shape.hidden, classes)
        self._shape = shape
        layers: list[nn.Module] = [nn.AvgPool2d(shape.shrink)] if shape.shrink > 1 else []
        channels, side = 1, SIDE // shape.shrink
        for conv in shape.convs:
            layers.append(
                nn.Conv2d(channels, conv.out, conv.kernel, conv.stride, conv.padding, bias=not shape.batch_norm)
            )
            layers += [nn.BatchNorm2d(conv.out)] if shape.batch_norm else []
            layers.append(nn.ReLU())
            side = (side + 2 * conv.padding - conv.kernel) // conv.stride + 1
            if conv.pool:
                layers.append(nn.MaxPool2d(3, 2))
                side = (side - 3) // 2 + 1
            channels = conv.out
        self.features = nn.Sequential(*layers)
        self.fc1 = self._hidden(channels * side * side)
        self.fc2 = self._hidden(shape.hidden)
        self.dropout = Dropout(shape.dropout)
        self.fc3 = nn.Linear(shape.hidden, classes)
        if shape.even:
            self._even_out()

    def _even_out(self) -> None:
        for module in self.modules():
            # torch's default shrinks the signal at each ReLU; eight layers without normalisation then stall.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc3.weight, std=0.01)

    def _hidden(self, inputs: int) -> nn.Sequential:
        linear = nn.Linear(inputs, self._shape.hidden, bias=not self._shape.batch_norm)
        norm = [nn.BatchNorm1d(self._shape.hidden)] if self._shape.batch_norm else []
        return nn.Sequential(linear, *norm, nn.ReLU())

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.fc1(torch.flatten(self.features(x), 1)))
        return self.fc2(hidden)  # type: ignore[no-any-return]

    def classify(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.dropout(vectors))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        # A block begins as its shortcut, so that depth costs nothing at first.
        nn.init.zeros_(self.second_norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(y + self.shortcut(x))


class _GeneralisedMean(nn.Module):
    """(N, C, H, W) → (N, C): the mean of powers; the exponent is learned, from the mean (1) towards the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-6).pow(self.exponent).mean((2, 3)).pow(1.0 / self.exponent)


class Embedder(Network):
    """A vector of length 1 for each picture; logits are cosines with one direction for each class."""

    def __init__(self, preset: Preset, shape: EmbedderShape, classes: int) -> None:
        super().__init__(preset, shape.embedding, classes)
        self._shape = shape
        channels = shape.stages[0][0]
        layers: list[nn.Module] = [nn.AvgPool2d(shape.shrink)] if shape.shrink > 1 else []
        layers += [nn.Conv2d(1, channels, 5, 2, 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        for outputs, blocks in shape.stages:
            for number in range(blocks):
                layers.append(_Block(channels, outputs, stride=2 if number == 0 else 1))
                channels = outputs
        self.features = nn.Sequential(*layers)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.pool = _GeneralisedMean()
        self.reduce = nn.Linear(channels, shape.embedding, bias=False)
        self.norm = nn.BatchNorm1d(shape.embedding)
        self.directions = nn.Parameter(torch.randn(classes, shape.embedding))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.norm(self.reduce(self.pool(self.features(x)))))

    def classify(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._shape.scale * vectors @ nn.functional.normalize(self.directions).T

    def penalised(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        right = nn.functional.one_hot(targets, self.classes).to(logits.dtype)
        return logits - self._shape.scale * self._shape.margin * right


def build(preset: str, classes: int) -> Network:
    """The network of a preset with fresh weights from torch's global generator.

    Raises ModelError for a preset that is not known.
    """
    chosen = preset_of(preset)
    if isinstance(chosen.shape, AlexNetShape):
        return AlexNet(chosen, chosen.shape, classes)
    return Embedder(chosen, chosen.shape, classes)


def preset_of(name: str) -> Preset:
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
