"""Videos as pictures: their frames in rows, from left to right and from top to bottom."""

from __future__ import annotations

import math

from torch import Tensor

from ..models.base import TokenModel


def count_times(model: TokenModel) -> int:
    """Return the number of patches at the same position in different frames; 1: inputs are images."""
    return 1 if model.frames is None else model.config.grid[0] // model.config.frame_grid[0]


def count_columns(times: int) -> int:
    """Return the number of frames per row of a picture: the smallest divisor of `times` from its square root on."""
    return next(count for count in range(math.isqrt(times - 1) + 1, times + 1) if times % count == 0)


def tile_frames(values: Tensor, times: int) -> Tensor:
    """Rearrange values (..., times * rows, columns), with frames stacked vertically, so that frames are in rows."""
    if times == 1:
        return values
    across = count_columns(times)
    *others, height, columns = values.shape
    frames = values.reshape(*others, times // across, across, height // times, columns).transpose(-3, -2)
    return frames.reshape(*others, height // across, across * columns)


def find_grid(model: TokenModel) -> tuple[int, int]:
    """Return the (rows, columns) of patches in a picture of an input."""
    (rows, columns), across = model.config.grid, count_columns(count_times(model))
    return rows // across, columns * across


def to_picture(model: TokenModel, image: Tensor) -> Tensor:
    """Convert an input to an image (channels, height, width); for a video, the first frame of each patch."""
    if image.ndim == 3:
        return image
    times = count_times(model)
    return tile_frames(image[:, :: image.shape[1] // times].flatten(1, 2), times)
