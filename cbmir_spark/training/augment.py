"""Augment a batch of pictures."""

import math

import torch
from torch import nn

from cbmir_spark.models.networks import Draw

# Augmentation: the most that a picture is turned (degrees), scaled, shifted (shares of its side), and that its contrast
# and its brightness change. Pictures are not mirrored: left and right differ in a body.
_BLACK = -2.0
_TURN, _SCALE, _SHIFT, _CONTRAST, _BRIGHTNESS = 10.0, 0.1, 0.06, 0.2, 0.2


def augmented(inputs: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Pictures as the network takes them, each turned, scaled, shifted and exposed a little differently.

    What happens to a row depends on its place in the whole batch alone, as in networks.Dropout.
    """
    drawn = torch.rand((draw.total, 6), generator=draw.generator, device=inputs.device)
    turn, scale, right, down, contrast, brightness = (
        2 * drawn[draw.first : draw.first + len(inputs)].to(inputs.dtype) - 1
    ).unbind(1)
    angle, size = turn * math.radians(_TURN), 1 + scale * _SCALE
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [torch.stack([cosine, -sine, right * 2 * _SHIFT], 1), torch.stack([sine, cosine, down * 2 * _SHIFT], 1)]
    places = nn.functional.affine_grid(torch.stack(rows, 1), list(inputs.shape), align_corners=False)
    # What comes in at the sides is 0 there, and has to be black.
    moved = nn.functional.grid_sample(inputs - _BLACK, places, align_corners=False) + _BLACK
    gain = (1 + contrast * _CONTRAST).reshape(-1, 1, 1, 1)
    return moved * gain + (brightness * _BRIGHTNESS).reshape(-1, 1, 1, 1)
