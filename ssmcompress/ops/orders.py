"""Scan orders: integer permutations of tokens, (length,) for all images or (batch, length) for one per image."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_tokens import gather_tokens


def invert_order(order: Tensor) -> Tensor:
    """Return the step at which each token is visited, given the token that each step visits.

    It scatters instead of sorting, because a sort would stay in an ONNX graph even for a constant order.
    """
    order = order.long()  # torch accepts no other integers as indices
    steps = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(order).scatter(-1, order, steps.expand_as(order))


def to_scan_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder (batch, length, channels) from token order to the order of the steps."""
    if order.ndim == 1:
        return tokens.index_select(1, order)
    return gather_tokens(tokens, order)
