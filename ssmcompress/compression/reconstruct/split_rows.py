"""The rows of a linear map, split into those to fit on and those held out, and the refit that these confirm."""

from __future__ import annotations

import torch
from torch import Tensor

from .least_squares import Refit, Rows, refit


class SplitRows:
    """Sums over the rows of a linear map: of images to fit on, and of those held out.

    Args:
        inputs, outputs: sizes of the map.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.fitted, self.held_out = (Rows.zeros(inputs, outputs, device) for _ in range(2))

    def add(self, x: Tensor, t: Tensor, w: Tensor, held: Tensor) -> None:
        """Add the rows of a chunk.

        Args:
            x: (images, ..., inputs). t: (images, ..., outputs). w: (images, ...), their weights.
            held: (images,), whether an image is held out.
        """
        for rows, mask in ((self.fitted, ~held), (self.held_out, held)):
            rows.add(x[mask].flatten(0, -2), t[mask].flatten(0, -2), w[mask].flatten())

    def sums(self) -> list[Tensor]:
        """Return all sums, to be added over processes in place."""
        return [value for rows in (self.fitted, self.held_out) for value in (rows.gram, rows.cross, rows.power)]

    def refit(self, weight: Tensor, groups: list[int]) -> Refit:
        """Return the `refit` of a weight (outputs, inputs)."""
        return refit(self.fitted, self.held_out, weight.to(self.fitted.gram.device), groups)
