"""Shapes of the inputs of models: (channels, height, width) of images, (channels, frames, height, width) of videos.

In an expected shape, None stands for a side of any length.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.items import SIDES


def describe_shape(shape: Sequence[int | None]) -> str:
    """Format an input shape for messages, as in "3, height, width"."""
    return ", ".join(str(side or name) for side, name in zip(shape, SIDES[len(shape)], strict=True))


def fits_shape(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    """Return whether an input has this shape; a side of any length must have at least one pixel."""
    if len(found) != len(shape):
        return False
    pairs = zip(found, shape, strict=True)
    return all(side > 0 if expected is None else side == expected for side, expected in pairs)


def advise_on_shape(found: Sequence[int], shape: Sequence[int | None]) -> str:
    """Return advice for a batch of the shape `found`, whose inputs do not have `shape`."""
    last = len(shape)
    order = (0, last, *range(1, last))  # channels first
    if len(found) == 1 + last and fits_shape([found[side] for side in order[1:]], shape):
        return f"use images.permute{order} for channels that come last"
    if last == 4 and len(found) == 5 and fits_shape((found[2], found[1], *found[3:]), shape):
        return "use videos.transpose(1, 2) for frames that come before the channels"
    if last == 4 and len(found) == 4:
        return f"this model takes videos of {shape[1]} frames, not images"
    if last == 3 and len(found) == 5:
        return "this model takes images, not videos"
    if last == 4 and len(found) == 5 and fits_shape((found[1], *found[3:]), (shape[0], *shape[2:])):
        return "load the model with another number of `frames` for other videos"
    if None in shape:
        return "this model takes images of any size, normalised and in colour"
    return "load the model with another image_size for other images"
