"""Gradients of a model's decision margin: how much an error in a token changes the decision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.precision import check_not_quantised


def margin_gradients(model: TokenModel, images: Tensor) -> Tensor:
    """Return the squared norm of each gradient of `features_and_gradients`, (layers + 1, images, tokens) float32.

    It measures how much an error in a token's features changes the model's decision.
    """
    return torch.stack([gradient.square().sum(-1) for gradient in features_and_gradients(model, images)[1]])


def features_and_gradients(model: TokenModel, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return every token's features and the gradients of the margin by them, each (images, tokens, d_model).

    The margin is the largest logit minus the second largest. Entry 0 is for the features before the first layer, entry
    i for those after layer i. The activations of one layer are held at a time.
    """
    check_not_quantised(model)
    with torch.no_grad():  # no graph is needed before the first layer
        tokens = model.embed(images)
    with torch.enable_grad():
        states = [tokens.features.detach().requires_grad_()]
        for block in model.blocks:
            after = checkpoint(
                lambda x, block=block: block(tokens.updated(x)).features, states[-1], use_reentrant=False
            )
            states.append(after)
        logits = model.readout(tokens.updated(states[-1]))
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        best = logits.topk(min(2, logits.shape[1]), dim=1).values
        margin = 2 * best[:, 0] - best.sum(1)
        gradients = torch.autograd.grad(margin.sum(), states)
    return [state.detach() for state in states], list(gradients)
