"""The networks of the presets. torch alone; see `presets` for their shapes and where they come from."""

import torch
from torch import nn

from cbmir_spark.models.layers import Block, Draw, Dropout, GeneralisedMean
from cbmir_spark.models.presets import AlexNetShape, EmbedderShape, Preset, preset_of

SIDE = 256


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

    def with_margin(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Make the logits harder for the loss, where a network is trained with a margin."""
        return logits

    def set_draw(self, draw: Draw | None) -> None:
        """Set where the next training pass draws from; None for torch's global generator."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.draw = draw

    @staticmethod
    def to_input(pixels: torch.Tensor) -> torch.Tensor:
        """Scale (N, 256, 256) uint8 pixels to the (N, 1, 256, 256) float32 that the network takes, within ±2."""
        return ((pixels.to(torch.float32) - 127.5) / 63.75).unsqueeze(1)


class AlexNet(Network):
    """The paper's network or a smaller one of its kind; a vector is FC2 after its ReLU, so never negative."""

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
        if shape.he_init:
            self._initialise()

    def _initialise(self) -> None:
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


class Embedder(Network):
    """L2-normalised vectors; logits are scaled cosines with one direction for each class."""

    def __init__(self, preset: Preset, shape: EmbedderShape, classes: int) -> None:
        super().__init__(preset, shape.embedding, classes)
        self._shape = shape
        channels = shape.stages[0][0]
        layers: list[nn.Module] = [nn.AvgPool2d(shape.shrink)] if shape.shrink > 1 else []
        layers += [nn.Conv2d(1, channels, 5, 2, 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        for outputs, blocks in shape.stages:
            for number in range(blocks):
                layers.append(Block(channels, outputs, stride=2 if number == 0 else 1))
                channels = outputs
        self.features = nn.Sequential(*layers)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.pool = GeneralisedMean()
        self.reduce = nn.Linear(channels, shape.embedding, bias=False)
        self.norm = nn.BatchNorm1d(shape.embedding)
        self.directions = nn.Parameter(torch.randn(classes, shape.embedding))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.norm(self.reduce(self.pool(self.features(x)))))

    def classify(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._shape.scale * vectors @ nn.functional.normalize(self.directions).T

    def with_margin(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        right = nn.functional.one_hot(targets, self.classes).to(logits.dtype)
        return logits - self._shape.scale * self._shape.margin * right


def build(preset: str, classes: int) -> Network:
    """Build the network of a preset, initialised from torch's global generator.

    Raises ModelError for an unknown preset.
    """
    chosen = preset_of(preset)
    if isinstance(chosen.shape, AlexNetShape):
        return AlexNet(chosen, chosen.shape, classes)
    return Embedder(chosen, chosen.shape, classes)
