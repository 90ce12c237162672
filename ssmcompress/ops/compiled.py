"""Backend of compiled kernels: the ops as torch.library operators, with a kernel for each kind of device.

Being operators, they work under torch.compile and torch.export, and autograd knows them: one backward, no second
derivative. CPU kernels are in `cpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import top_tokens

__all__ = ["DTYPES", "causal_conv1d", "selective_scan", "top_tokens"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    activations = _common(u, delta, z)
    steps = gap_delta = None
    if isinstance(gap, tuple):
        if any(t.requires_grad for t in gap):
            gap = gap[0][..., None] * gap[1]
        else:
            (steps, gap_delta), gap = (_float(t) for t in gap), None
    y = _scan(
        u.to(activations), delta.to(activations), _float(A), _float(B), _float(C), _float(D),
        None if z is None else z.to(activations), _float(delta_bias), steps, gap_delta, _float(gap),
        delta_softplus, reverse,
    )  # fmt: skip
    return y.to(u.dtype)


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    taps = _float(weight).flip(1).t().contiguous()  # row d for distance d, as in the reference
    positions = None if positions is None else positions.long()
    y = _conv(x.to(_common(x)), taps, _float(bias), positions, activation == "silu", reverse)
    return y.to(x.dtype)


def _common(*activations: Tensor | None) -> torch.dtype:
    """bfloat16 where all are, else float32, which holds every narrower dtype."""
    dtypes = {t.dtype for t in activations if t is not None}
    if not dtypes <= set(DTYPES):
        raise ValueError(f"compiled ops: expected float32, bfloat16 or float16, found {', '.join(map(str, dtypes))}")
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


@torch.library.custom_op("ssmcompress::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, steps: Tensor | None, gap_delta: Tensor | None, gap: Tensor | None,
    softplus: bool, reverse: bool,
) -> Tensor:  # fmt: skip
    """u, delta, z float32 or bfloat16, all alike; the rest float32; the gap either whole or as steps x gap_delta."""
    from . import cpu

    return cpu.scan_forward(u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, softplus, reverse)


@torch.library.custom_op("ssmcompress::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, steps: Tensor | None, gap_delta: Tensor | None, gap: Tensor | None,
    softplus: bool, reverse: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, bias and gap; without elements where there is no such input."""
    from . import cpu

    return cpu.scan_backward(dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, softplus, reverse)


@torch.library.custom_op("ssmcompress::causal_conv1d", mutates_args=(), device_types="cpu")
def _conv(
    x: Tensor, taps: Tensor, bias: Tensor | None, positions: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    """taps (width, channels) float32, row d for distance d; positions (batch, length) int64."""
    from . import cpu

    return cpu.conv_forward(x, taps, bias, positions, silu, reverse)


@torch.library.custom_op("ssmcompress::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    dy: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, positions: Tensor | None, silu: bool, reverse: bool
) -> list[Tensor]:
    """Gradients of x, taps and bias; without elements where there is no such input."""
    from . import cpu

    return cpu.conv_backward(dy, x, taps, bias, positions, silu, reverse)


def _empty(like: Tensor | None, of: Tensor) -> Tensor:
    return of.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


@_scan.register_fake
def _(u, *others):
    return _empty(u, u)


@_scan_backward.register_fake
def _(dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, softplus, reverse):
    return [_empty(t, u) for t in (u, delta, A, B, C, D, z, bias, gap)]


@_conv.register_fake
def _(x, *others):
    return _empty(x, x)


@_conv_backward.register_fake
def _(dy, x, taps, bias, positions, silu, reverse):
    return [_empty(t, x) for t in (x, taps, bias)]


def _save_inputs(ctx, inputs, output) -> None:
    tensors = [v for v in inputs if not isinstance(v, bool)]
    ctx.save_for_backward(*tensors)
    ctx.flags = inputs[len(tensors) :]


def _scan_gradients(ctx, dy):
    tensors = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias, dgap = _scan_backward(dy, *tensors, *ctx.flags)
    _, _, _, _, _, D, z, bias, _, _, gap = tensors
    optional = (None if t is None else d for t, d in ((D, dD), (z, dz), (bias, dbias)))
    return du, ddelta, dA, dB, dC, *optional, None, None, None if gap is None else dgap, None, None


def _conv_gradients(ctx, dy):
    tensors = ctx.saved_tensors
    dx, dtaps, dbias = _conv_backward(dy, *tensors, *ctx.flags)
    return dx, dtaps, None if tensors[2] is None else dbias, None, None, None


_scan.register_autograd(_scan_gradients, setup_context=_save_inputs)
_conv.register_autograd(_conv_gradients, setup_context=_save_inputs)
