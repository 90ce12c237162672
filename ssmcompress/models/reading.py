"""What reading any architecture's published weights takes: shapes, depth, and the grid of a position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import StateDict

# Pixels; a slip of the keyboard must not ask for a position table of terabytes.
LARGEST_SIDE = 8192

Size = tuple[int, int]


class Shapes:
    """Shapes of the tensors of a state dict, with an InputError for those that are missing or odd."""

    def __init__(self, state: StateDict, architecture: str):
        self.state, self.architecture = state, architecture

    def __call__(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.state:
            raise InputError(f"looks like a {self.architecture}, but {key!r} is missing")
        shape = tuple(self.state[key].shape)
        if len(shape) != ndim or 0 in shape:
            raise InputError(f"{key} is {shape}: expected {ndim} dimensions, none empty")
        return shape

    def odd(self, key: str) -> int:
        """The side of a convolution's window, which must be an odd number: its middle is where the result goes."""
        *_, height, width = self(key, 4)
        if height != width or width % 2 == 0:
            raise InputError(f"{key} has a window of {(height, width)}: expected a square one of odd sides")
        return width

    def count(self, prefix: str) -> int:
        """How many layers there are, by the numbers that follow `prefix` in the names."""
        rests = (key.removeprefix(prefix).partition(".")[0] for key in self.state if key.startswith(prefix))
        numbers = [int(rest) for rest in rests if rest.isdecimal() and len(rest) < 9]
        count = 1 + max(numbers, default=-1)
        if count > len(self.state):
            raise InputError(f"layer numbers go up to {count - 1}, but there are only {len(self.state)} tensors")
        return count


def grids(
    entries: int,
    patch: int,
    stride: int,
    grid_of: Callable[[Size], Size],
    image_size: Size | None,
    known: Size | None,
    advice: str = "",
) -> tuple[Size, Size]:
    """(the grid that a position embedding was made for, the image size (height, width) that the model will be run at).

    Args:
        entries: patches that the embedding has a place for. patch, stride: their size and distance, in pixels.
        grid_of: (height, width) of images -> (rows, columns) of patches.
        image_size: what the caller asks for, or None. known: the size trained at, where that is known.
        advice: what else a caller may have to tell.
    """
    side = math.isqrt(entries)
    if known is not None:
        trained = grid_of(known)
    elif side * side == entries:
        trained = (side, side)
    else:
        trained = grid_of(image_size) if image_size is not None else (0, 0)
    if min(trained) < 1 or trained[0] * trained[1] != entries:
        raise InputError(
            f"pos_embed has a place for {entries} patches, which is "
            f"{'not the grid of its image size' if known else 'no square grid'}: "
            f"give the image size it was trained at{advice}"
        )
    if image_size is None:
        image_size = tuple((count - 1) * stride + patch for count in trained)
    if min(image_size) < patch:
        raise InputError(f"image size {image_size} is smaller than the patches, {patch} pixels")
    if max(*image_size, stride) > LARGEST_SIDE:
        raise InputError(f"image size {image_size}, stride {stride}: expected at most {LARGEST_SIDE} pixels")
    return trained, image_size


def resize_grid(table: Tensor, old: Size, new: Size) -> Tensor:
    """A position embedding (1, patches, d_model) for another grid, interpolated (bicubic, as all models here do it)."""
    if old == new:
        return table
    image = table.transpose(1, 2).unflatten(2, old).float()
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(table.dtype)
