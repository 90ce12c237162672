"""Backend of compiled kernels: the ops as torch.library operators, with a kernel for each kind of device.

Being operators, they work under torch.compile and torch.export, and autograd knows them: one backward, no second
derivative. CPU kernels are in `cpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import top_tokens

__all__ = ["causal_conv1d", "rms_norm", "selective_scan", "top_tokens"]


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    steps = gap_delta = None
    if isinstance(gap, tuple):
        if any(t.requires_grad for t in gap):
            gap = gap[0][..., None] * gap[1]
        else:
            (steps, gap_delta), gap = (_float(t) for t in gap), None
    dtype = _common(u, delta, z, add)
    y = _scan(
        _as(dtype, u), _as(dtype, delta), _float(A), _float(B), _float(C), _float(D), _as(dtype, z),
        _float(delta_bias), steps, gap_delta, _float(gap), _as(dtype, add), delta_softplus, reverse,
    )  # fmt: skip
    return _as(u.dtype, y)


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    positions = _as(torch.int64, positions)
    y = _conv(_as(_common(x), x), _float(weight), _float(bias), positions, activation == "silu", reverse)
    return _as(x.dtype, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssmcompress.ops.rms_norm`. One pass for torch's six, but no gradient: for that it is torch's."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return reference.rms_norm(x, weight, eps)
    return _as(x.dtype, _norm(_as(_common(x), x), _float(weight), eps))


def _common(*activations: Tensor | None) -> torch.dtype:
    """bfloat16 where all are, else float32, which holds every narrower dtype."""
    dtypes = {t.dtype for t in activations if t is not None}
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"compiled ops: expected float32, bfloat16 or float16, found {', '.join(map(str, dtypes))}")
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return _as(torch.float32, tensor)


# Defined by hand: torch.library.custom_op would take 15 us more at each of a forward's hundred calls.
_OPERATORS = """
selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,
    Tensor? bias, Tensor? steps, Tensor? gap_delta, Tensor? gap, Tensor? add, bool softplus, bool reverse) -> Tensor
selective_scan_backward(Tensor dy, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,
    Tensor? bias, Tensor? steps, Tensor? gap_delta, Tensor? gap, bool softplus, bool reverse) -> Tensor[]
causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? positions, bool silu, bool reverse) -> Tensor
causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? positions, bool silu,
    bool reverse) -> Tensor[]
rms_norm(Tensor x, Tensor weight, float eps) -> Tensor
"""
for _schema in _OPERATORS.strip().replace("\n    ", " ").splitlines():
    torch.library.define(f"ssmcompress::{_schema.partition('(')[0]}", _schema[_schema.index("(") :])
_scan = torch.ops.ssmcompress.selective_scan.default
_scan_backward = torch.ops.ssmcompress.selective_scan_backward.default
_conv = torch.ops.ssmcompress.causal_conv1d.default
_conv_backward = torch.ops.ssmcompress.causal_conv1d_backward.default
_norm = torch.ops.ssmcompress.rms_norm.default


@torch.library.impl("ssmcompress::selective_scan", "cpu")
def _(u, *others):
    """u, delta, z and add float32 or bfloat16, all alike; the rest float32.

    The gap comes whole, or as steps (batch, length) and gap_delta (d_inner,), which have no gradient.
    """
    from . import cpu

    return cpu.scan_forward(u, *others)


@torch.library.impl("ssmcompress::selective_scan_backward", "cpu")
def _(dy, *others):
    """Gradients of u, delta, A, B, C, D, z, bias and gap; without elements where there is no such input."""
    from . import cpu

    return cpu.scan_backward(dy, *others)


@torch.library.impl("ssmcompress::causal_conv1d", "cpu")
def _(x, *others):
    """x float32 or bfloat16; weight (channels, width) and bias float32; positions (batch, length) int64."""
    from . import cpu

    return cpu.conv_forward(x, *others)


@torch.library.impl("ssmcompress::causal_conv1d_backward", "cpu")
def _(dy, *others):
    """Gradients of x, weight and bias; without elements where there is no such input."""
    from . import cpu

    return cpu.conv_backward(dy, *others)


@torch.library.impl("ssmcompress::rms_norm", "cpu")
def _(x, weight, eps):
    from . import cpu

    return cpu.norm_forward(x, weight, eps)


def _empty(like: Tensor | None, of: Tensor) -> Tensor:
    return of.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


@torch.library.register_fake("ssmcompress::selective_scan")
def _(u, *others):
    return _empty(u, u)


@torch.library.register_fake("ssmcompress::selective_scan_backward")
def _(dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, softplus, reverse):
    return [_empty(t, u) for t in (u, delta, A, B, C, D, z, bias, gap)]


@torch.library.register_fake("ssmcompress::causal_conv1d")
def _(x, *others):
    return _empty(x, x)


@torch.library.register_fake("ssmcompress::rms_norm")
def _(x, weight, eps):
    return _empty(x, x)


@torch.library.register_fake("ssmcompress::causal_conv1d_backward")
def _(dy, x, weight, bias, positions, silu, reverse):
    return [_empty(t, x) for t in (x, weight, bias)]


def _save_scan(ctx, inputs, output) -> None:
    *tensors, add, softplus, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.adds, ctx.flags = add is not None, (softplus, reverse)


def _scan_gradients(ctx, dy):
    tensors = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias, dgap = _scan_backward(dy, *tensors, *ctx.flags)
    _, _, _, _, _, D, z, bias, _, _, gap = tensors
    optional = (None if t is None else d for t, d in ((D, dD), (z, dz), (bias, dbias)))
    dgap = None if gap is None else dgap
    return du, ddelta, dA, dB, dC, *optional, None, None, dgap, dy if ctx.adds else None, None, None


def _save_conv(ctx, inputs, output) -> None:
    *tensors, silu, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.flags = silu, reverse


def _conv_gradients(ctx, dy):
    tensors = ctx.saved_tensors
    dx, dweight, dbias = _conv_backward(dy, *tensors, *ctx.flags)
    return dx, dweight, None if tensors[2] is None else dbias, None, None, None


def _no_gradients(ctx, *upper):
    raise NotImplementedError("compiled ops have no second derivative; backend='reference' has")


torch.library.register_autograd("ssmcompress::selective_scan", _scan_gradients, setup_context=_save_scan)
torch.library.register_autograd("ssmcompress::causal_conv1d", _conv_gradients, setup_context=_save_conv)
for _name in ("selective_scan_backward", "causal_conv1d_backward", "rms_norm"):
    torch.library.register_autograd(f"ssmcompress::{_name}", _no_gradients)
