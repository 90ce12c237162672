"""Refit of one linear layer and of the correction added to its output: sums over rows, then new weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ...models.blocks import low_rank
from .least_squares import Refit
from .split_rows import SplitRows


class LinearSums:
    """Sums over the rows of a linear layer; a bias is treated as an additional input that is always 1.

    Args:
        correction: the full-rank correction to refit together with the layer.
        scale: scalar or per-output factor of the layer's output in the targets, to which the correction is added.
        most: the largest rank of a new correction; None: `max_rank`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        device: torch.device,
        correction: nn.Linear | None = None,
        scale: float | Tensor = 1.0,
        most: int | None = None,
    ):
        self.linear, self.correction, self.most = linear, correction, most
        self.scale = scale.detach()[:, None] if isinstance(scale, Tensor) else scale
        self.new_correction: nn.Sequential | None = None
        self.groups = [linear.in_features + (linear.bias is not None)]
        if correction is not None:
            self.groups.append(correction.in_features)
        self.rows = SplitRows(sum(self.groups), linear.out_features, device)

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor, held: Tensor, read: Tensor | None = None) -> None:
        """Add the rows of a chunk.

        Args:
            inputs: (images, ..., n). targets: (images, ..., m), including the scale. weights: (images, ...).
            held: (images,), whether an image is held out.
            read: (images, m), the input of the correction, if there is one.
        """
        if self.linear.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if read is not None:
            inputs = torch.cat([inputs, read[:, None].expand(-1, inputs.shape[1], -1)], dim=-1)
        self.rows.add(inputs, targets, weights, held)

    def refit(self) -> Refit:
        """Refit the layer in place; a new correction is stored in `new_correction` as two low-rank factors."""
        weight, bias = self.linear.weight, self.linear.bias
        old = [weight * self.scale] + ([] if bias is None else [bias[:, None] * self.scale])
        old += [] if self.correction is None else [self.correction.weight]
        result = self.rows.refit(torch.cat(old, dim=1), self.groups)
        if len(result.ridges) == 2 and result.ridges[1] is not None:
            reduced, outwards, inwards = self.rows.reduce_rank(result, self.groups[1], most=self.most)
            if reduced.after >= result.before:  # the rank is too low for any gain
                return replace(result, ridges=(), after=result.before, half=None)
            self.new_correction = low_rank(self.groups[1], len(inwards), len(weight), weight.device)
            self.new_correction[0].weight.copy_(inwards)
            self.new_correction[1].weight.copy_(outwards)
            result = reduced
        if result.ridges:
            new = result.weight.split([part.shape[1] for part in old], dim=1)
            weight.copy_(self._unscale(new[0], weight))
            if bias is not None:
                bias.copy_(self._unscale(new[1], bias[:, None])[:, 0])
        return result

    def _unscale(self, new: Tensor, old: Tensor) -> Tensor:
        """Divide new weights (outputs, inputs) by the scale; outputs with a scale of zero keep their old weights."""
        if not isinstance(self.scale, Tensor):
            return new / self.scale
        scale = self.scale.to(new)
        return torch.where(scale == 0, old.to(new), new / torch.where(scale == 0, 1, scale))


def zero_map(inputs: int, outputs: int, device: torch.device) -> nn.Sequential:
    """Return a zero correction of rank 1."""
    return fill_zero(low_rank(inputs, 1, outputs, device))


def fill_zero(correction: nn.Sequential) -> nn.Sequential:
    """Set the weights of a correction to zero, and return it."""
    for linear in correction:
        nn.init.zeros_(linear.weight)
    return correction


def full_rank(correction: nn.Sequential) -> nn.Linear:
    """Return a correction as one matrix."""
    inwards, outwards = correction
    sizes = (inwards.in_features, outwards.out_features)
    linear = skip_init(nn.Linear, *sizes, bias=False, device=inwards.weight.device, dtype=torch.float32)
    linear.weight.copy_(outwards.weight @ inwards.weight)
    return linear
