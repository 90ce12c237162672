"""Reference backend in plain torch: differentiable, supports float64; other backends are tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import full_precision
from .orders import invert_order, to_scan_order


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and states: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def discretise(
    delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, gap, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return delta and delta + gap after bias and softplus, (batch, length, d_inner): the input and decay steps."""
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)  # torch's threshold of 20 is also that of the published kernels
    if gap is None:
        return delta, delta
    if isinstance(gap, tuple):
        steps, gap_delta = gap
        gap = steps.to(dtype)[..., None] * gap_delta.to(dtype)
    return delta, delta + gap.to(dtype)


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None, add: Tensor | None) -> Tensor:
    """Return (y + D u) * silu(z) + add in the dtype of y; all (batch, length, d_inner)."""
    if D is not None:
        y = y + D.to(y.dtype) * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y if add is None else y + add.to(y.dtype)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    dtype = accumulation_dtype(u.dtype)
    delta, decay = discretise(delta, delta_bias, delta_softplus, gap, dtype)
    steps = range(u.shape[1] - 1, -1, -1) if reverse else range(u.shape[1])
    ordered = u if order is None else to_scan_order(u, order)
    inputs, A, B, C = delta * ordered.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)[..., None]
    state = inputs.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs: list[Tensor] = [state] * u.shape[1]
    for t in steps:
        increment = inputs[:, t, :, None] * B[:, t, None, :]
        state = torch.addcmul(increment, torch.exp(decay[:, t, :, None] * A), state)
        outputs[t] = torch.matmul(state, C[:, t])[..., 0]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs)
    if order is not None:
        y = to_scan_order(y, invert_order(order))
    return skip_and_gate(y, u, D, z, add).to(u.dtype)


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    dtype = accumulation_dtype(x.dtype)
    width, length = weight.shape[1], x.shape[1]
    source = x.to(dtype)
    # taps[d] multiplies the token at distance d on the original path; the last row, zeros, is for tokens out of range.
    taps = F.pad(weight.to(dtype).flip(1).t(), (0, 0, 0, 1))
    y = source * taps[0]
    # Kept tokens are ordered, so only the width-1 preceding tokens can be in range.
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
    """See `ssmcompress.ops.grid_conv2d`. It convolves the whole grid, with zeros for missing tokens."""
    dtype = accumulation_dtype(x.dtype)
    places = grid[0] * grid[1]
    tokens = x.to(dtype)
    if positions is not None:
        index = positions[..., None].expand_as(x)
        tokens = tokens.new_zeros(x.shape[0], places, x.shape[2]).scatter(1, index, tokens)
    image = tokens.transpose(1, 2).unflatten(2, grid)
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(image, weight.to(dtype), bias, padding=padding, groups=x.shape[2]).flatten(2).transpose(1, 2)
    y = y if positions is None else y.gather(1, index)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssmcompress.ops.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def segment_sums(x, index, segments, eps, sums, sign) -> Tensor:
    """See `ssmcompress.ops.segment_sums`.

    Computed as a product with a matrix of scales and zeros: it is deterministic, exports to ONNX, and needs no
    normalised copy of the tokens, with which (8, 108, 64) took a sixth longer.
    """
    x = x.to(accumulation_dtype(x.dtype))
    with full_precision(x.device):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(x.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt()
        members = F.embedding(index, torch.eye(segments, dtype=x.dtype, device=x.device))
        scaled = (members * (sign * scale)).transpose(1, 2)
        if sums is None:
            result = scaled @ x
        else:
            before = sums[:, : segments * x.shape[2]].unflatten(1, (segments, -1))
            result = torch.baddbmm(before.to(x.dtype), scaled, x)
        return torch.cat([result.flatten(1), members.sum(1)], dim=1)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """See `ssmcompress.ops.gather_tokens`."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[2]))


def topk_tokens(scores: Tensor, count: int) -> Tensor:
    """See `ssmcompress.ops.topk_tokens`. A stable sort defines the order of ties, unlike torch.topk."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values
