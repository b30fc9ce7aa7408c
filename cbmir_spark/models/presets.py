"""Networks by name, with the recipe that each is trained by unless settings say otherwise. No imports but errors.

The paper's AlexNet ("An Insight Framework for CBMIR using Deep CNN", IJEAT 2019) on one gray channel of
256×256. The paper gives no padding for its first layer, so there is none, and pooling is 3×3 with stride 2
throughout, after Krizhevsky et al. 2012. The sides then come out as in that network:

    input 256 → conv 11×11 s4: (256−11)//4+1 = 62 → pool: (62−3)//2+1 = 30 → conv 5×5 p2: 30 → pool: 14
    → conv 3×3 p1 ×3: 14 → pool: 6 → 256·6·6 = 9,216 → FC 4,096 → FC 4,096 → FC classes

The preset `retrieval` is ours: residual blocks, generalised mean pooling (Radenović et al. 2019) and a normalised
vector, trained with a cosine margin (CosFace, Wang et al. 2018), so that the training shapes the distances themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cbmir_spark.errors import ModelError


@dataclass(frozen=True)
class Conv:
    """One convolution with its ReLU, then a 3×3 max pooling with stride 2 if `pool`."""

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
    """Side of the average pooling that comes first; 1 for none."""
    batch_norm: bool = False
    """Batch normalisation between each convolution or hidden layer and its ReLU."""
    he_init: bool = True
    """Initialise after He et al. 2015, which keeps the signal's size through the layers, not as torch does."""


@dataclass(frozen=True)
class EmbedderShape:
    """Residual stages of (channels, blocks), each but the first at half the side of the one before it."""

    stages: tuple[tuple[int, int], ...]
    embedding: int
    shrink: int
    scale: float
    """Factor from cosines to logits."""
    margin: float
    """Margin by which training asks the cosine of the right class to exceed those of the others."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `updates`, where given, takes precedence over `epochs`."""

    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    updates: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    clip: float | None = 5.0
    """Largest norm of a gradient: first steps are large where a few classes dominate."""
    augment: bool = False


@dataclass(frozen=True)
class Preset:
    """A network and its recipe."""

    name: str
    shape: AlexNetShape | EmbedderShape
    recipe: Recipe


# The paper's network. It does not mention dropout; 0.5 after both hidden layers is that of Krizhevsky et al. 2012, and
# adds no weights.
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
        # The same five convolutions and three fully connected layers, narrower for CPUs, on half the side and so
        # without the first pooling (sides 256 → 128 → 32 → 15 → 7). Batch normalisation makes ten epochs enough.
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
        # The paper's training: 3,000 updates of 32 pictures at a fixed rate, and nothing else. At that rate training
        # diverges within four updates from He's initial weights, and within some dozens from torch's.
        Preset(
            "paper",
            replace(_PAPER, he_init=False),
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


def preset_of(name: str) -> Preset:
    """Look a preset up. Raises ModelError, with the known names, where there is none."""
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
