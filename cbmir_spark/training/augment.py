"""Augment a batch of pictures."""

import math

import torch
from torch import nn

from cbmir_spark.models.layers import Draw

_BLACK = -2.0
# Largest turn (degrees), scaling, shift (shares of a side), and change of contrast and of brightness. Pictures are not
# mirrored: left and right differ in a body.
_TURN, _SCALE, _SHIFT, _CONTRAST, _BRIGHTNESS = 10.0, 0.1, 0.06, 0.2, 0.2


def augment_batch(inputs: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Turn, scale and shift each picture of a network's input a little, and change its contrast and brightness.

    What happens to a row depends on its place in the whole batch alone, as in `layers.Dropout`.
    """
    drawn = torch.rand((draw.total, 6), generator=draw.generator, device=inputs.device)
    turn, scale, right, down, contrast, brightness = (
        2 * drawn[draw.first : draw.first + len(inputs)].to(inputs.dtype) - 1
    ).unbind(1)
    angle, size = turn * math.radians(_TURN), 1 + scale * _SCALE
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [torch.stack([cosine, -sine, right * 2 * _SHIFT], 1), torch.stack([sine, cosine, down * 2 * _SHIFT], 1)]
    places = nn.functional.affine_grid(torch.stack(rows, 1), list(inputs.shape), align_corners=False)
    # grid_sample fills with 0 at the sides, which has to be black.
    moved = nn.functional.grid_sample(inputs - _BLACK, places, align_corners=False) + _BLACK
    gain = (1 + contrast * _CONTRAST).reshape(-1, 1, 1, 1)
    return moved * gain + (brightness * _BRIGHTNESS).reshape(-1, 1, 1, 1)
