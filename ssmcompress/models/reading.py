"""Helpers for reading published weights of any architecture: shapes, depth, and the grid of a position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .families import StateDict
from .precision import widen

# In pixels; a typo must not allocate a position embedding of terabytes.
LARGEST_SIDE = 8192

Size = tuple[int, int]


class Shapes:
    """Accessor for tensor shapes of a state dict; raises an InputError for a missing tensor or an unexpected shape.

    Args:
        state: the tensors. architecture: its name in messages.
        hints: parameter name -> explanation for messages if the parameter is missing.
    """

    def __init__(self, state: StateDict, architecture: str, hints: Mapping[str, str] | None = None):
        self.state, self.architecture, self.hints = state, architecture, hints or {}

    def __call__(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.state:
            hint = f": {self.hints[key]}" if key in self.hints else ""
            raise InputError(f"looks like a {self.architecture}, but {key!r} is missing{hint}")
        shape = tuple(self.state[key].shape)
        if len(shape) != ndim or 0 in shape:
            raise InputError(f"{key} is {shape}: expected {ndim} dimensions, none empty")
        return shape

    def window(self, key: str) -> int:
        """Return the kernel size of a convolution, which must be odd."""
        *_, height, width = self(key, 4)
        if height != width or width % 2 == 0:
            raise InputError(f"{key} has a window of {(height, width)}: expected a square one of odd sides")
        return width

    def head(self, key: str, width: int) -> int:
        """Return the number of classes of the classifier `key` (classes, width); InputError if it is missing."""
        if key in self.state:
            return self(key, 2)[0]
        others = [k for k, v in self.state.items() if k.endswith(".weight") and v.ndim == 2 and v.shape[1] == width]
        others = [k for k in others if not any(part.isdecimal() for part in k.split("."))]
        reason = (
            f"its classifier may be {others[0]}: rename that and its bias"
            if others
            else "this is a backbone without its classifier, by whose output pruning is judged; load a file with both"
        )
        raise InputError(f"looks like a {self.architecture}, but {key!r} is missing: {reason}")

    def count(self, prefix: str) -> int:
        """Return the number of layers, from the indices that follow `prefix` in the names."""
        texts = (key.removeprefix(prefix).partition(".")[0] for key in self.state if key.startswith(prefix))
        numbers = [int(text) for text in texts if text.isdecimal() and len(text) < 9]
        count = 1 + max(numbers, default=-1)
        if count > len(self.state):
            raise InputError(f"layer numbers go up to {count - 1}, but there are only {len(self.state)} tensors")
        return count


def layer_sizes(shape: Shapes, depth: int, *names: str) -> list[tuple[int, ...]]:
    """Return (d_inner, d_state) of each layer: the shape of its first parameter among `names` ("layers.{}.A_log").

    A layer without any of them gets the sizes of the first layer; its missing parameter is reported with the others.
    """
    sizes: list[tuple[int, ...]] = []
    for layer in range(depth):
        present = [key for name in names if (key := name.format(layer)) in shape.state]
        if present or layer == 0:
            sizes.append(shape(present[0] if present else names[0].format(0), 2))
        else:
            sizes.append(sizes[0])
    return sizes


def infer_grid(
    entries: int,
    patch: int,
    stride: int,
    grid_of: Callable[[Size], Size],
    image_size: Size | None,
    trained_size: Size | None,
    advice: str = "",
) -> tuple[Size, Size]:
    """Infer the grid of a position embedding and the input size (height, width) of the model.

    Args:
        entries: number of patches in the embedding. patch, stride: their size and distance, in pixels.
        grid_of: function from (height, width) of images to (rows, columns) of patches.
        image_size: the size requested by the caller, or None. trained_size: the training size if known, or None.
        advice: appended to the error message: other arguments that the caller may need to pass.

    Returns:
        (trained grid (rows, columns), image size (height, width)).
    """
    side = math.isqrt(entries)
    if trained_size is not None:
        trained = grid_of(trained_size)
    elif side * side == entries:
        trained = (side, side)
    else:
        trained = grid_of(image_size) if image_size is not None else (0, 0)
    if min(trained) < 1 or trained[0] * trained[1] != entries:
        if trained_size is None and image_size is None:
            reason = f"which is no square grid: give the image size it was trained at{advice}"
        else:
            height, width = trained_size or image_size
            reason = (
                f"and images of {height}x{width} pixels have {max(trained[0], 0)}x{max(trained[1], 0)} patches, which "
                f"is not the grid of its image size: give the size it was trained at{advice}"
            )
        raise InputError(f"pos_embed has a place for {entries} patches, {reason}")
    if image_size is None:
        image_size = tuple((count - 1) * stride + patch for count in trained)
    if min(image_size) < patch:
        raise InputError(f"image size {image_size} is smaller than the patches, {patch} pixels")
    if max(*image_size, stride) > LARGEST_SIDE:
        raise InputError(f"image size {image_size}, stride {stride}: expected at most {LARGEST_SIDE} pixels")
    return trained, image_size


def resize_grid(table: Tensor, old: Size, new: Size) -> Tensor:
    """Interpolate a position embedding (1, patches, d_model) to another grid (bicubic, as in all models here)."""
    if old == new:
        return table
    image = widen(table.transpose(1, 2).unflatten(2, old))
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(table.dtype)
