"""The continuous scan paths of PlainMamba (arXiv 2403.17695) over a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor

# Kinds of steps: the move that leads to a position.
START, RIGHT, LEFT, UP, DOWN = range(5)


def snakes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the four continuous paths over a grid (rows, columns).

    The first starts to the right and snakes down, the third starts downwards and snakes to the right; the second and
    fourth are their reverses.

    Returns:
        visits (4, rows * columns) int64, the position (row * columns + column) at each step, and labels of the same
        shape, the kind of move that leads to it: START, RIGHT, LEFT, UP or DOWN.
    """
    # Explicitly on the CPU, because the model is built on the meta device.
    places = torch.arange(rows * columns, device="cpu").view(rows, columns)
    right, down = places.clone(), places.t().clone()
    right[1::2], down[1::2] = right[1::2].flip(1), down[1::2].flip(1)
    visits = torch.stack([path for start in (right, down) for path in (start.flatten(), start.flatten().flip(0))])
    row, column = visits // columns, visits % columns
    labels = torch.full_like(visits, START)
    for move, axis, step in ((RIGHT, column, 1), (LEFT, column, -1), (UP, row, -1), (DOWN, row, 1)):
        labels[:, 1:][axis.diff(dim=1) == step] = move
    return visits, labels
