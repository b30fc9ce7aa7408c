"""The bent coordinate grid of a phantom, and the shapes, textures and noise to draw on it.

Planes are (rows, columns) float32. All randomness comes from generators seeded by names: drawing twice gives the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbmir_spark.synthetic.names import generator_of

__all__ = ["Canvas", "PhantomClass", "Plane", "Subject", "grid", "paint", "step"]

# Single precision: drawing takes most of the time of an archive, and no phantom has more than 16 bits.
Plane = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class PhantomClass:
    """A modality and body part of the demo archive, and the function that draws it."""

    modality: str
    body_part: str
    spellings: tuple[str, ...]  # of the body part, as real archives have them
    description: str
    shape: tuple[int, int]  # rows, columns
    draw: Callable[["Canvas"], Plane]

    @property
    def label(self) -> str:
        return f"{self.modality}/{self.body_part}"


@dataclass(frozen=True)
class Subject:
    """One made-up patient of one class; its name seeds its anatomy."""

    kind: PhantomClass
    number: int
    seed: int

    @property
    def patient_id(self) -> str:
        return f"SYN-{self.kind.modality}-{self.kind.body_part}-{self.number:03d}"

    def rng(self, *purpose: object) -> np.random.Generator:
        return generator_of(self.seed, self.patient_id, *purpose)


class Canvas:
    """A bent coordinate grid from -1 to 1 in both directions.

    The bend differs by patient, the noise by image; `level` (-1 to 1) is the position of the image in the body.
    """

    def __init__(self, shape: tuple[int, int], subject: Subject, level: float, image: int) -> None:
        self.shape = shape
        self.level = level
        self.body = subject.rng("body")
        self.noise_source = subject.rng("noise", image)
        y, x = grid(shape)
        bend = subject.rng("bend")
        for _ in range(4):
            fx, fy = bend.uniform(0.5, 2.6, 2)
            px, py = bend.uniform(0, 2 * np.pi, 2)
            strength = bend.uniform(0.0, 0.035, 2)
            x = x + strength[0] * np.sin(np.pi * (fy * y + 0.4 * level) + px)
            y = y + strength[1] * np.sin(np.pi * (fx * x - 0.4 * level) + py)
        turn = bend.normal(0, 0.06)
        scale = bend.uniform(0.93, 1.1, 2)
        shift = bend.normal(0, 0.035, 2)
        self.x: Plane = (x * np.cos(turn) - y * np.sin(turn)) * scale[0] + shift[0]
        self.y: Plane = (x * np.sin(turn) + y * np.cos(turn)) * scale[1] + shift[1]

    def vary(self, value: float, share: float = 0.12) -> float:
        """Return `value` changed by up to `share` of it, differently for each patient."""
        return value * float(self.body.uniform(1 - share, 1 + share))

    def filled(self, value: float) -> Plane:
        return np.full(self.shape, value, np.float32)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, soft: float = 0.03) -> Plane:
        """Mask an ellipse: 1 inside, 0 outside, with an edge of width `soft`."""
        dx, dy = self.x - cx, self.y - cy
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / max(rx, 1e-3)
        v = (dy * np.cos(turn) - dx * np.sin(turn)) / max(ry, 1e-3)
        return step((1.0 - np.hypot(u, v)) * min(rx, ry), soft)

    def bar(self, x0: float, y0: float, x1: float, y1: float, width: float, soft: float = 0.02) -> Plane:
        """Mask a rod with round ends from one point to another."""
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(((self.x - x0) * (x1 - x0) + (self.y - y0) * (y1 - y0)) / length, 0, 1)
        gap = np.hypot(self.x - x0 - along * (x1 - x0), self.y - y0 - along * (y1 - y0))
        return step(width - gap, soft)

    def texture(self, grain: float, of_body: bool = True) -> Plane:
        """Return smooth noise of unit variance; `grain` is the width of its blobs in pixels."""
        source = self.body if of_body else self.noise_source
        return _smooth_noise(self.shape, grain, source)

    def noise(self, strength: float) -> Plane:
        return self.noise_source.standard_normal(self.shape, dtype=np.float32) * np.float32(strength)


def grid(shape: tuple[int, int]) -> tuple[Plane, Plane]:
    """Return y and x from -1 to 1 as arrays that broadcast to `shape`."""
    y, x = (np.linspace(-1.0, 1.0, side, dtype=np.float32) for side in shape)
    return y[:, None], x[None, :]


def step(signed_distance: Plane, soft: float) -> Plane:
    """Map distances to 0 (far below zero) … 1 (far above): a clipped smoothstep, exact at both ends."""
    t = np.clip(signed_distance / soft + 0.5, 0, 1)
    smooth: Plane = t * t * (3 - 2 * t)
    return smooth


def paint(under: Plane, mask: Plane, value: Plane | float) -> Plane:
    """Blend `value` over a plane where the mask is above 0."""
    painted: Plane = under * (1 - mask) + value * mask
    return painted


def _smooth_noise(shape: tuple[int, int], grain: float, rng: np.random.Generator) -> Plane:
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    spectrum = np.fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * np.exp(
        -2 * (np.pi * grain * frequency) ** 2
    )
    field: Plane = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    field -= field.mean()
    field /= field.std()
    return field
