"""Rewriting a model by a plan: pruners beside its blocks, gap deltas in the blocks after them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import top_tokens
from .importance import pair_distances, predicted_saliency, random_scores
from .merging import merge_into_kept
from .plan import Plan, kept_count
from .tokens import Tokens

if TYPE_CHECKING:
    from ..models.base import TokenModel


class TokenPruner(nn.Module):
    """Keeps the tokens that score highest, each image its own; the count is fixed by the incoming length.

    Args:
        length: tokens before any pruning. seed: of the metric `random`.
        probe: (d_model + length,) of the metric `saliency`, else None.
        merge: how the others are merged into those kept; None: they are dropped.
    """

    def __init__(
        self,
        ratio: float,
        metric: str,
        length: int,
        seed: int,
        probe: Tensor | None = None,
        merge: str | None = None,
    ):
        super().__init__()
        self.ratio = ratio
        self.metric = metric
        self.merge = merge
        draw = random_scores(length, seed) if metric == "random" else None
        self.register_buffer("draw", draw, persistent=False)
        self.register_buffer("probe", probe)

    @property
    def asks_for(self) -> str | None:
        """The scores that the block before it is to give; None where the pruner has its own."""
        return None if self.metric in ("random", "saliency", "similarity") else self.metric

    def forward(self, tokens: Tokens) -> Tokens:
        """The kept tokens of `tokens`, which carry the scores that it asks for; the protected token is always kept."""
        positions = tokens.explicit_positions()
        scores = self.scores(tokens)
        if tokens.protected is not None:
            scores = scores.masked_fill(positions == tokens.protected, torch.inf)
        count = kept_count(scores.shape[1], self.ratio, tokens.protected is not None)
        index = top_tokens(scores, count)
        return tokens.keep(index) if self.merge is None else merge_into_kept(tokens, index, scores, self.merge)

    def scores(self, tokens: Tokens) -> Tensor:
        """(batch, kept) what tokens are ranked by."""
        if self.metric == "random":
            return self.draw[tokens.explicit_positions()]
        if self.metric == "saliency":
            return predicted_saliency(tokens.features, tokens.explicit_positions(), self.probe)
        if self.metric == "similarity":
            return pair_distances(tokens)[0]
        return tokens.scores

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
    for stage in plan.stages:
        if stage.importance == "saliency" and fitted_probe(plan, stage.after) is None:
            raise InputError(f"importance 'saliency' after layer {stage.after} is fitted on images: use calibrate()")
    return install(copy.deepcopy(model), plan)


def fitted_probe(plan: Plan, layer: int) -> Tensor | None:
    """What was fitted for the saliency after a layer, if anything was."""
    probes = plan.calibration.probes if plan.calibration is not None else ()
    return probes[layer - 1] if len(probes) >= layer and len(probes[layer - 1]) else None


@torch.no_grad()
def install(model: TokenModel, plan: Plan) -> TokenModel:
    """Put the pruners and gap deltas of `plan` into `model` itself, and return it.

    Probes that the plan does not have are zero, for a file to be read into.
    """
    plan.validate(len(model.blocks))
    if plan.alignment.pool and not model.pools:
        raise InputError("the plan's alignment has pool, but this model reads out no mean over its tokens")
    if plan.gap is None:
        plan = replace(plan, gap="bias" if plan.calibration is None else "calibrated")
    if plan.gap == "calibrated" and plan.calibration is None:
        raise InputError("gap 'calibrated' needs calibration images: use calibrate(), or gap 'bias'")
    for index, stage in enumerate(plan.stages):
        seed = plan.seed * 1000 + index  # a draw of its own for each stage
        probe = None
        if stage.importance == "saliency":
            size = model.d_model + model.length
            probe = fitted_probe(plan, stage.after)
            probe = torch.zeros(size) if probe is None else probe.clone()
            if len(probe) != size:
                raise InputError(
                    f"the saliency after layer {stage.after} was fitted for {len(probe)} features and positions, the "
                    f"model has {size}: the plan was made for another model or image size"
                )
        pruner = TokenPruner(stage.ratio, stage.importance, model.length, seed, probe, stage.merge)
        model.pruners[str(stage.after)] = pruner
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
