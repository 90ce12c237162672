"""Gradients of a model's decision margin, which measure the effect of an error in a token on the decision."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.precision import check_not_quantised
from ..pruning.tokens import Level, Tokens


def margin_gradients(model: TokenModel, images: Tensor) -> list[Tensor]:
    """Return the squared norm of each gradient of `features_and_gradients`, (images, tokens) float32 for each point.

    It measures the effect of an error in a token's features on the model's decision.
    """
    return [gradient.square().sum(-1) for gradient in features_and_gradients(model, images)[1]]


def features_and_gradients(model: TokenModel, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the features of all tokens and the margin's gradients with respect to them, (images, tokens, d_model).

    The margin is `Task.margin`, for a classifier the largest logit minus the second largest. Entry 0 is for the
    features before the first layer, entry i for those at the i-th point (`TokenModel.count_points`); in models whose
    layers have one part, these are the ends of the layers. Only the activations of one part are in memory at a time.
    """
    check_not_quantised(model)
    with torch.no_grad():  # no graph is needed before the first layer
        tokens = model.embed(images)
    with torch.enable_grad():
        states, levels = [tokens.features.detach().requires_grad_()], []
        for layer, block in enumerate(model.blocks, 1):
            if model.starts_section(layer):
                before = tokens
                states.append(checkpoint(_enter, model, layer, before, states[-1], use_reentrant=False))
                with torch.no_grad():
                    tokens = model.enter(layer, before.updated(states[-2][:1].detach())).updated(states[-1])
            for part in ("begin", "end")[: 1 + (block.end_projection is not None)]:
                after, *level = checkpoint(_run_part, model, layer, part, tokens, states[-1], use_reentrant=False)
                states.append(after)
                levels += [Level(None, values) for values in level]
        logits = model.readout(replace(tokens.updated(states[-1]), levels=tuple(levels)))
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        # A model that reads out updates does not read the residual stream after its last layer.
        margin = model.task.margin(logits).sum()
        gradients = torch.autograd.grad(margin, states, allow_unused=True, materialize_grads=True)
    return [state.detach() for state in states], list(gradients)


def _enter(model: TokenModel, layer: int, tokens: Tokens, features: Tensor) -> Tensor:
    """Return the input features of a layer of a dense model."""
    return model.enter(layer, tokens.updated(features)).features


def _run_part(model: TokenModel, layer: int, part: str, tokens: Tokens, features: Tensor) -> tuple[Tensor, ...]:
    """Return the features after a part of a layer of a dense model, and its output level if it has one."""
    tokens = tokens.updated(features)
    if part == "end":
        return (model.end(layer, tokens).features,)
    after, _ = model.begin(layer, tokens)
    return after.features, *(level.values for level in after.levels)
