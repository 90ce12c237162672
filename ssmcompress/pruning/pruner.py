"""Rewriting a model by a plan: pruners beside its blocks, gap deltas in the blocks after them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import top_tokens
from ..tokens import Tokens
from .importance import random_scores
from .schedule import Plan, kept_count

if TYPE_CHECKING:
    from ..models.base import TokenModel


class TokenPruner(nn.Module):
    """Keeps the tokens that score highest, each image its own; the count is fixed by the incoming length."""

    def __init__(self, ratio: float, metric: str, length: int, seed: int):
        super().__init__()
        self.ratio = ratio
        self.metric = metric
        draw = random_scores(length, seed) if metric == "random" else None
        self.register_buffer("draw", draw, persistent=False)

    @property
    def asks_for(self) -> str | None:
        """The scores that the block before it is to give; None where a draw decides."""
        return self.metric if self.draw is None else None

    def forward(self, tokens: Tokens) -> Tokens:
        """The kept tokens of `tokens`, which carry the scores that it asks for; the protected token is always kept."""
        positions = tokens.explicit_positions()
        scores = self.scores(tokens)
        if tokens.protected is not None:
            scores = scores.masked_fill(positions == tokens.protected, torch.inf)
        count = kept_count(scores.shape[1], self.ratio, tokens.protected is not None)
        return tokens.keep(top_tokens(scores, count))

    def scores(self, tokens: Tokens) -> Tensor:
        """(batch, kept) what tokens are ranked by."""
        return tokens.scores if self.draw is None else self.draw[tokens.explicit_positions()]

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, metric={self.metric!r}"


def prune(model: TokenModel, plan: Plan) -> TokenModel:
    """A copy of `model` that prunes by `plan`; the argument is left as it is.

    Args:
        model: a dense model as `load` returns it.
        plan: from `calibrate`, or made by hand (with `gap="bias"`, no images are needed).

    Raises:
        InputError: the plan does not fit the model, or the model is pruned already.
    """
    if model.plan is not None:
        raise InputError("the model is pruned already; prune the dense model it came from")
    return install(copy.deepcopy(model), plan)


@torch.no_grad()
def install(model: TokenModel, plan: Plan) -> TokenModel:
    """Put the pruners and gap deltas of `plan` into `model` itself, and return it."""
    plan.validate(len(model.blocks))
    if plan.alignment.pool and not model.pools:
        raise InputError("the plan's alignment has pool, but this model reads out no mean over its tokens")
    if plan.gap is None:
        plan = replace(plan, gap="bias" if plan.calibration is None else "calibrated")
    if plan.gap == "calibrated" and plan.calibration is None:
        raise InputError("gap 'calibrated' needs calibration images: use calibrate(), or gap 'bias'")
    for index, stage in enumerate(plan.stages):
        seed = plan.seed * 1000 + index  # a draw of its own for each stage
        model.pruners[str(stage.after)] = TokenPruner(stage.ratio, stage.importance, model.length, seed)
    if plan.gap == "calibrated" and len(plan.calibration.gap_deltas) != len(model.blocks):
        raise InputError(
            f"the plan was calibrated on a model of {len(plan.calibration.gap_deltas)} layers, "
            f"this one has {len(model.blocks)}"
        )
    first = min((stage.after for stage in plan.stages), default=len(model.blocks))
    for index, block in enumerate(model.blocks[first:], first):
        delta = block.bias_delta()
        if plan.gap == "calibrated":
            calibrated = plan.calibration.gap_deltas[index]
            if calibrated.shape != delta.shape:
                raise InputError(
                    f"calibrated gap deltas of layer {index + 1}: expected {tuple(delta.shape)}, "
                    f"found {tuple(calibrated.shape)}; the plan was made for another model"
                )
            delta = calibrated.to(delta, copy=True)
        block.set_gap_delta(delta)
    model.plan = plan
    model.alignment = plan.alignment
    model.pruners.to(next(model.parameters()).device)
    return model
