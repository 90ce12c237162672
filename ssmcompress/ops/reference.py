"""Reference backend: the ops in plain torch. Differentiable, float64-capable, and the oracle of the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .orders import inverse, to_scan_order


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are kept in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def discretise(
    delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, gap, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(delta, delta + gap) after bias and softplus, each (batch, length, d_inner): input step, decay step."""
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)  # torch's threshold of 20 is that of the published kernels
    if gap is None:
        return delta, delta
    if isinstance(gap, tuple):
        steps, gap_delta = gap
        gap = steps.to(dtype)[..., None] * gap_delta.to(dtype)
    return delta, delta + gap.to(dtype)


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None, add: Tensor | None) -> Tensor:
    """(y + D u) * silu(z) + add in the dtype of y; all (batch, length, d_inner)."""
    if D is not None:
        y = y + D.to(y.dtype) * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y if add is None else y + add.to(y.dtype)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    dtype = wide(u.dtype)
    delta, decay = discretise(delta, delta_bias, delta_softplus, gap, dtype)
    steps = range(u.shape[1] - 1, -1, -1) if reverse else range(u.shape[1])
    entering = u if order is None else to_scan_order(u, order)
    inputs, A, B, C = delta * entering.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)[..., None]
    state = inputs.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs: list[Tensor] = [state] * u.shape[1]
    for t in steps:
        present = inputs[:, t, :, None] * B[:, t, None, :]
        state = torch.addcmul(present, torch.exp(decay[:, t, :, None] * A), state)
        outputs[t] = torch.matmul(state, C[:, t])[..., 0]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs)
    if order is not None:
        y = to_scan_order(y, inverse(order))
    return skip_and_gate(y, u, D, z, add).to(u.dtype)


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    dtype = wide(x.dtype)
    width, length = weight.shape[1], x.shape[1]
    source = x.to(dtype)
    # taps[d] multiplies the token at distance d on the original path; one more row of zeros: out of reach.
    taps = F.pad(weight.to(dtype).flip(1).t(), (0, 0, 0, 1))
    y = source * taps[0]
    # Kept tokens are ordered, so whatever is in reach is one of the width-1 tokens just before.
    for back in range(1, min(width, length)):
        if positions is None:
            tap = taps[back]
        else:
            distance = positions[:, back:] - positions[:, : length - back]
            tap = F.embedding(distance.clamp(max=width), taps)
        if reverse:
            y = y + F.pad(tap * source[:, back:], (0, 0, 0, back))
        else:
            y = y + F.pad(tap * source[:, : length - back], (0, 0, back, 0))
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def grid_conv2d(x, weight, bias, grid, positions, activation) -> Tensor:
    """See `ssmcompress.ops.grid_conv2d`. On the whole grid, whatever is missing."""
    dtype = wide(x.dtype)
    places = grid[0] * grid[1]
    everything = x.to(dtype)
    if positions is not None:
        index = positions[..., None].expand_as(x)
        everything = everything.new_zeros(x.shape[0], places, x.shape[2]).scatter(1, index, everything)
    image = everything.transpose(1, 2).unflatten(2, grid)
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(image, weight.to(dtype), bias, padding=padding, groups=x.shape[2]).flatten(2).transpose(1, 2)
    y = y if positions is None else y.gather(1, index)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssmcompress.ops.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """See `ssmcompress.ops.gather_tokens`."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[2]))


def topk_tokens(scores: Tensor, count: int) -> Tensor:
    """See `ssmcompress.ops.topk_tokens`. topk promises nothing about equal values; a stable sort does."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values
