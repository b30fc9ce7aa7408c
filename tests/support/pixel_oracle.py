"""The picture of a frame computed with numpy alone, in float64; the oracle of the tests of pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def triangle_weights(length: int, wanted: int) -> NDArray[np.float64]:
    """(wanted, length) weights: a triangle as wide as the reduction around each output pixel's centre."""
    scale = length / wanted
    width = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distances = np.abs(np.arange(length)[None, :] + 0.5 - centres[:, None]) / width
    weights = np.clip(1.0 - distances, 0.0, None)
    normalized: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalized


def resized(unit: NDArray[Any], rows: int = 256, columns: int = 256) -> NDArray[np.float64]:
    """Values from 0 to 1 → the (256, 256) picture before rounding, centred on black."""
    square = np.zeros((256, 256))
    top, left = (256 - rows) // 2, (256 - columns) // 2
    small = triangle_weights(unit.shape[0], rows) @ unit @ triangle_weights(unit.shape[1], columns).T
    square[top : top + rows, left : left + columns] = small
    return square * 255


def windowed(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """Values from `low` to `high` → 0 to 1, clipped."""
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)


def equals_rounded(picture: NDArray[np.uint8], wanted: NDArray[np.float64]) -> bool:
    """Compare a picture with what it should be before rounding; Pillow sums in another order, so 0.51 is allowed."""
    return bool(picture.dtype == np.uint8 and np.abs(picture - wanted).max() <= 0.51)
