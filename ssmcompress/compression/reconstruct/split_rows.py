"""The rows of a linear map, split into rows for fitting and held-out rows, and the refit validated on the latter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .least_squares import Refit, Rows, principal_directions, project, reduce_rank, refit, refit_with


class SplitRows:
    """Sums over the rows of a linear map, for fitted and for held-out images.

    The fitted images are split into two halves, every other one, so that the refit on one half alone can be measured as
    well. The sums of the halves are separate and are added for the refit, which needs no more arithmetic. One of the
    three sums is additional: with 2,305 inputs and 768 outputs (a Vim-base layer with its correction) 57 of 170 MB.

    Args:
        inputs, outputs: sizes of the map.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        # `fitted` has one half until `refit` adds the other.
        self.fitted, self.half, self.held_out = (Rows.zeros(inputs, outputs, device) for _ in range(3))
        self.images = 0  # to fit on, of this process

    def add(self, x: Tensor, t: Tensor, w: Tensor, held: Tensor) -> None:
        """Add the rows of a chunk.

        Args:
            x: (images, ..., inputs). t: (images, ..., outputs). w: (images, ...), their weights.
            held: (images,), whether an image is held out.
        """
        numbers = self.images + (~held).cumsum(0)
        self.images += int((~held).sum())
        odd = numbers % 2 == 1
        for rows, mask in ((self.fitted, ~held & ~odd), (self.half, ~held & odd), (self.held_out, held)):
            rows.add(x[mask].flatten(0, -2), t[mask].flatten(0, -2), w[mask].flatten())

    def sums(self) -> list[Tensor]:
        """Return all sums, to be added over processes in place."""
        return [value for rows in (self.fitted, self.half, self.held_out) for value in rows.values()]

    def refit(self, weight: Tensor, groups: list[int]) -> Refit:
        """Return the `refit` of a weight (outputs, inputs); call it once, after all rows have been added."""
        weight, halves = weight.to(self.fitted.gram), all(rows.power > 0 for rows in (self.fitted, self.half))
        self.fitted.include(self.half)
        result = refit(self.fitted, self.held_out, weight, groups)
        if not result.ridges or not halves:
            return result
        self.half_weight = refit_with(self.half, weight, groups, result.ridges)
        return replace(result, half=self.held_out.error(self.half_weight) / float(self.held_out.power))

    def reduce_rank(
        self, full: Refit, columns: int, base: Tensor | None = None, most: int | None = None
    ) -> tuple[Refit, Tensor, Tensor]:
        """Apply `least_squares.reduce_rank` to the result of `refit`; see there for the arguments."""
        reduced, outwards, inwards = reduce_rank(full, self.fitted, self.held_out, columns, base, most)
        if full.half is None:
            return reduced, outwards, inwards
        directions = principal_directions(self.half_weight, self.half, columns, base)[:, : len(inwards)]
        weight, *_ = project(self.half_weight, directions, columns, base)
        half = self.held_out.error(weight) / float(self.held_out.power)
        return replace(reduced, half=half), outwards, inwards
