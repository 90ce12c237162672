"""Orders of steps: permutations of tokens, integers, one for all images (length,) or one each (batch, length)."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_tokens import gather_tokens


def inverse(order: Tensor) -> Tensor:
    """The step at which each token is visited, from the token that each step visits.

    By scattering, for a sort would stay in an ONNX graph even of an order that is constant.
    """
    order = order.long()  # torch takes no other integers for indices
    steps = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(order).scatter(-1, order, steps.expand_as(order))


def to_scan_order(tokens: Tensor, order: Tensor) -> Tensor:
    """(batch, length, channels) in the order of steps, from token order."""
    if order.ndim == 1:
        return tokens.index_select(1, order)
    return gather_tokens(tokens, order)
