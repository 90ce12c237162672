"""The rows of a linear map, split into those to fit on and those held out, and the refit that these confirm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .least_squares import Refit, Rows, refit


class Split(NamedTuple):
    """How the images of a chunk are used.

    Attributes:
        held: (images,), whether an image is held out. copies: whether the images are altered copies.
    """

    held: Tensor
    copies: bool = False


class SplitRows:
    """Sums over the rows of a linear map: of images to fit on, of their altered copies if any, and of those held out.

    Args:
        inputs, outputs: sizes of the map. copies: whether there are altered copies of images.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device, copies: bool = False):
        self.fitted, self.held_out = (Rows.zeros(inputs, outputs, device) for _ in range(2))
        self.copies = Rows.zeros(inputs, outputs, device) if copies else None

    def add(self, x: Tensor, t: Tensor, w: Tensor, split: Split) -> None:
        """Add the rows of a chunk, x (images, ..., inputs), t (images, ..., outputs), with weights w (images, ...)."""
        if split.copies:
            parts = [(self.copies, slice(None))]
        else:
            parts = [(self.fitted, ~split.held), (self.held_out, split.held)]
        for rows, mask in parts:
            rows.add(x[mask].flatten(0, -2), t[mask].flatten(0, -2), w[mask].flatten())

    def sums(self) -> list[Tensor]:
        """Return all sums, to be added over processes in place."""
        parts = [self.fitted, self.held_out] + ([] if self.copies is None else [self.copies])
        return [value for rows in parts for value in (rows.gram, rows.cross, rows.power)]

    def refit(self, weight: Tensor, groups: list[int]) -> tuple[Refit, Rows]:
        """Return the best `refit` by the rows held out, with the copies or without, and the rows it was fitted to."""
        weight = weight.to(self.fitted.gram.device)
        choices = [self.fitted] + ([] if self.copies is None else [self.fitted + self.copies])
        return min(((refit(rows, self.held_out, weight, groups), rows) for rows in choices), key=lambda c: c[0].after)
