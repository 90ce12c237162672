"""The depthwise convolution over a grid of tokens, aligned to the positions that pruning removed."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import full_precision, select


def grid_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    positions: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Apply a depthwise 2-D convolution over a grid from which tokens may be missing, at the kept tokens.

    A token sees its neighbours on the grid, and zeros beyond the edges and at empty positions. This equals the dense
    convolution with zeros at the pruned positions, evaluated at the kept tokens; the cost is the taps of one window for
    each kept token, regardless of the grid size.

    Args:
        x: (batch, length, channels). weight: (channels, 1, height, width), both odd. bias: (channels,).
        grid: (rows, columns).
        positions: (batch, length) or (length,) integers, strictly increasing: row * columns + column of each token.
            None: the first `length` places of the grid, row by row.
        activation: "silu" or None.
        backend: "cpu", "triton", "reference", or None for the best one available.

    Returns:
        (batch, length, channels) in the dtype of `x`; sums are float32 or wider.

    Raises:
        ValueError: the shapes do not match, or the activation or the backend is unknown.
    """
    if x.ndim != 3 or weight.ndim != 4 or tuple(weight.shape[:2]) != (x.shape[2], 1):
        raise ValueError(
            f"grid_conv2d: expected x (batch, length, channels) and weight (channels, 1, height, width), "
            f"found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not all(side % 2 for side in weight.shape[2:]):
        raise ValueError(f"grid_conv2d: expected a window of odd sides, found {tuple(weight.shape[2:])}")
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ValueError(f"grid_conv2d: expected bias ({x.shape[2]},), found {tuple(bias.shape)}")
    if len(grid) != 2 or x.shape[1] > grid[0] * grid[1]:
        raise ValueError(f"grid_conv2d: {x.shape[1]} tokens do not fit on a grid (rows, columns) of {tuple(grid)}")
    if positions is None and x.shape[1] < grid[0] * grid[1]:
        positions = torch.arange(x.shape[1], device=x.device)
    if positions is not None:
        if positions.ndim == 1:
            positions = positions.expand(x.shape[0], -1)
        if positions.shape != x.shape[:2]:
            raise ValueError(f"grid_conv2d: expected positions {tuple(x.shape[:2])}, found {tuple(positions.shape)}")
        positions = positions.long()
    if activation not in ("silu", None):
        raise ValueError(f"grid_conv2d: activation is 'silu' or None, found {activation!r}")
    with full_precision(x.device):
        # For a backend, positions None means a full grid.
        return select(backend, x).grid_conv2d(x, weight, bias, tuple(grid), positions, activation)
