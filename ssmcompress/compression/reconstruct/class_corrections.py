"""Fitting of the class token's corrections, see `ssmcompress.models.class_corrections`.

The map of a layer is fitted after its projection, on one row per image: the remaining error of the class token's
features relative to the dense model. This needs no further pass over the images: the update by the refitted projection
is computed from the inputs of the projection, which were recorded in the previous pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.base import TokenModel
from ...models.class_corrections import ClassCorrection
from ...models.precision import cast
from ...ops import gather_tokens
from ...pruning.tokens import Tokens
from .least_squares import Refit
from .linear import fill_zero
from .split_rows import SplitRows


class ClassRows(NamedTuple):
    """Values of the class token of each image of a chunk, recorded before the projection of a layer is refitted.

    Attributes:
        inputs: (images, n), inputs of the projection. summary: (images, segments * (d_model + 1)).
        pruned_mean: (images, d_model). wanted: (images, d_model), the update that would give the dense features.
        weights: (images,).
    """

    inputs: Tensor
    summary: Tensor
    pruned_mean: Tensor
    wanted: Tensor
    weights: Tensor

    @classmethod
    def read(cls, model: TokenModel, tokens: Tokens, inputs: Tensor, dense: Tensor, weights: Tensor) -> ClassRows:
        """Record the rows.

        Args:
            tokens: the pruned model's tokens before the layer. inputs: (images, kept, n), the inputs of its projection.
            dense: (images, tokens, d_model), the dense features after the layer. weights: (images, tokens).
        """
        protected, place = model.protected, tokens.protected_index()[:, None]
        return cls(
            gather_tokens(inputs, place)[:, 0],
            tokens.summarise(model.segments),
            tokens.pruned_mean(),
            dense[:, protected] - gather_tokens(tokens.features, place)[:, 0],
            weights[:, protected],
        )


class ClassSums:
    """Sums over the rows of a layer's class token, and the correction fitted from them."""

    def __init__(self, model: TokenModel, device: torch.device):
        self.width, self.segments, self.device = model.d_model, model.segments, device
        self.groups = [self.width, self.segments * (self.width + 1)]
        self.rows = SplitRows(sum(self.groups), self.width, device)

    def add(self, rows: ClassRows, projection: nn.Linear, scale: float, correction: nn.Module | None, held: Tensor):
        """Add the rows of a chunk.

        Args:
            projection: the refitted projection. scale: its factor. correction: the new correction for all tokens.
            held: (images,), whether an image is held out.
        """
        update = scale * projection(rows.inputs)
        if correction is not None:
            update = update + correction(cast(rows.pruned_mean, correction[0]))
        inputs = torch.cat([update.to(rows.summary.dtype), rows.summary], dim=1)
        self.rows.add(inputs, rows.wanted, rows.weights, held)

    def refit(self) -> tuple[Refit, ClassCorrection | None]:
        """Return the fit and the correction; None if no correction helps on the held-out images."""
        # The map from the same inputs to the wanted update; without a correction it returns the update itself.
        old = torch.eye(self.width, sum(self.groups), device="cpu").to(self.rows.held_out.gram)
        result = self.rows.refit(old, self.groups)
        if not result.ridges:
            return result, None
        # Half the width: each layer has such a map, and its cost is reserved in budgets.
        columns, most = sum(self.groups), max(1, self.width // 2)
        reduced, outwards, inwards = self.rows.reduce_rank(result, columns, old, most)
        if reduced.after >= result.before:  # the rank is too low for any gain
            return replace(result, ridges=(), after=result.before, half=None), None
        correction = ClassCorrection(self.width, self.segments, len(inwards), self.device)
        correction[0].weight.copy_(inwards)
        correction[1].weight.copy_(outwards)
        return reduced, correction


def empty_correction(model: TokenModel) -> ClassCorrection:
    """Return a zero correction; with it in place, tokens carry the sums that the fit of a layer needs."""
    return fill_zero(ClassCorrection(model.d_model, model.segments, 1, model.classifier.weight.device))
