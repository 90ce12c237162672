"""What the refit of one linear layer needs: sums over its rows, then its new weight, and the correction beside it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ...models.base import TokenModel, low_rank
from .least_squares import Refit, Rows, reduce_rank, refit


class LinearSums:
    """Rows of a linear layer, those to fit and those held out; a bias is one more input, which is always 1."""

    def __init__(
        self, linear: nn.Linear, device: torch.device, correction: nn.Linear | None = None, scale: float = 1.0
    ):
        self.linear, self.correction, self.scale = linear, correction, scale
        self.thin: nn.Sequential | None = None
        self.groups = [linear.in_features + (linear.bias is not None)]
        if correction is not None:
            self.groups.append(correction.in_features)
        self.fitted, self.held_out = (Rows.none(sum(self.groups), linear.out_features, device) for _ in range(2))

    def add(
        self, inputs: Tensor, targets: Tensor, weights: Tensor, held: Tensor, pruned_mean: Tensor | None = None
    ) -> None:
        """Rows of a block.

        Args:
            inputs: (images, ..., n). targets: (images, ..., m). weights: (images, ...). held: (images,).
            pruned_mean: (images, d_model), what the correction receives, if there is one.
        """
        if self.linear.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if pruned_mean is not None:
            inputs = torch.cat([inputs, pruned_mean[:, None].expand(-1, inputs.shape[1], -1)], dim=-1)
        for rows, chosen in ((self.fitted, ~held), (self.held_out, held)):
            rows.add(inputs[chosen].flatten(0, -2), targets[chosen].flatten(0, -2), weights[chosen].flatten())

    def refit(self) -> Refit:
        """The refit, put into the layer; a new correction is in `thin`, as two thin matrices."""
        weight, bias = self.linear.weight, self.linear.bias
        old = [weight] + ([] if bias is None else [bias[:, None]])
        old += [] if self.correction is None else [self.correction.weight / self.scale]
        found = refit(self.fitted, self.held_out, torch.cat(old, dim=1).to(self.fitted.gram.device), self.groups)
        if len(found.ridges) == 2 and found.ridges[1] is not None:
            reduced, outwards, inwards = reduce_rank(found, self.fitted, self.held_out, self.groups[1])
            if reduced.after >= found.before:  # a rank that is too low for any gain
                return replace(found, ridges=(), after=found.before)
            self.thin = low_rank(self.groups[1], len(inwards), weight.device)
            self.thin[0].weight.copy_(inwards * self.scale)
            self.thin[1].weight.copy_(outwards)
            found = reduced
        if found.ridges:
            new = found.weight.split([part.shape[1] for part in old], dim=1)
            weight.copy_(new[0])
            if bias is not None:
                bias.copy_(new[1][:, 0])
        return found


def full_rank(model: TokenModel, thin: nn.Sequential | None) -> nn.Linear:
    """A correction as one matrix; without one, zero."""
    width, device = model.d_model, model.classifier.weight.device
    linear = skip_init(nn.Linear, width, width, bias=False, device=device)
    linear.weight.copy_(torch.zeros(()) if thin is None else thin[1].weight @ thin[0].weight)
    return linear
