"""Rotary position embedding on a patch grid."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError

Size = tuple[int, int]
# Side of the grid on which the rotary embedding was pretrained; positions on other grids are scaled to it.
ROPE_SIDE = 14


def rotations(
    grid: Size, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (rows * columns, width) of the rotary embedding on a grid.

    The first half of the features is rotated according to the row, the second half to the column; each pair of features
    shares one angle.
    """
    if width % 4:
        raise InputError(f"rotary positions need a width that is a multiple of 4, found {width}")
    options = {"dtype": torch.float64, "device": "cpu"}
    frequencies = 10000.0 ** (-2 * torch.arange(width // 4, **options) / (width // 2))
    angles = []
    for axis, count in enumerate(grid):
        places = torch.arange(count, **options) / count * ROPE_SIDE
        angle = (places[:, None] * frequencies).repeat_interleave(2, dim=1)
        angles.append(angle[:, None] if axis == 0 else angle[None])
    angles = torch.cat([angle.expand(*grid, -1) for angle in angles], dim=-1).flatten(0, 1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@lru_cache(maxsize=8)
def cached_rotations(grid: Size, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `rotations`, cached for all layers and batches."""
    with torch.inference_mode(False):  # they are also used where gradients are computed
        return rotations(grid, width, device, dtype)
