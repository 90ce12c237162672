"""Backend of the compiled CPU kernels in `cpu`; supports first derivatives only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .operators import conv_operator, empty_like, grid_conv_operator, may_skip_dispatcher, operator, wants_gradient
from .reference import gather_tokens, topk_tokens
from .selective_scan import ScanPath

__all__ = ["causal_conv1d", "gather_tokens", "grid_conv2d", "rms_norm", "segment_sums", "selective_scan", "topk_tokens"]


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    steps = gap_delta = None
    if isinstance(gap, tuple):
        if any(t.requires_grad for t in gap):
            gap = gap[0][..., None] * gap[1]
        else:
            (steps, gap_delta), gap = (_float(t) for t in gap), None
    dtype = _scan_dtype(B, C, u, delta, z, add)
    y = _scan(
        _as(dtype, u), _as(dtype, delta), _float(A), _as(dtype, B), _as(dtype, C), _float(D), _as(dtype, z),
        _float(delta_bias), steps, gap_delta, _float(gap), _as(dtype, add), _as(torch.int64, order), delta_softplus,
        reverse,
    )  # fmt: skip
    return _as(u.dtype, y)


def scan_parameters(path: ScanPath, z: Tensor | None, delta_softplus: bool, add: Tensor | None) -> Tensor | None:
    """Scan a path without materialising its delta and A; see `ssmcompress.ops.scan_paths`.

    Returns:
        y (batch, length, d_inner), or None if torch has to see the ops, for example for gradients or tracing.
    """
    u, delta, A, B, C, D, bias, gap, reverse, order, weight, log_A = path
    gaps = gap if isinstance(gap, tuple) else (gap,)
    if (weight is None and not log_A) or not may_skip_dispatcher(
        (u, delta, A, B, C, D, bias, order, weight, z, add, *gaps)
    ):
        return None
    steps, gap_delta, gap = (*(_float(t) for t in gap), None) if isinstance(gap, tuple) else (None, None, _float(gap))
    dtype = _scan_dtype(B, C, u, delta, z, add)
    y = _import_cpu().scan_forward(
        _as(dtype, u), _as(dtype, delta), _float(A), _as(dtype, B), _as(dtype, C), _float(D), _as(dtype, z),
        _float(bias), steps, gap_delta, gap, _as(dtype, add), _as(torch.int64, order), delta_softplus, reverse,
        _as(dtype, weight), log_A,
    )  # fmt: skip
    return _as(u.dtype, y)


def scan_rows(delta, A, B, C, delta_bias, delta_softplus, gap, spends, reverse, order, total) -> None:
    """See `ssmcompress.ops.scan_rows`."""
    steps, gap_delta, gap = (*(_float(t) for t in gap), None) if isinstance(gap, tuple) else (None, None, _float(gap))
    _import_cpu().scan_rows(
        _as(_common(delta), delta), _float(A), _float(B), _float(C), _float(delta_bias), steps, gap_delta, gap, spends,
        _as(torch.int64, order), delta_softplus, reverse, total,
    )  # fmt: skip


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    positions = _as(torch.int64, positions)
    y = _conv(_as(_common(x), x), _float(weight), _float(bias), positions, activation == "silu", reverse)
    return _as(x.dtype, y)


def grid_conv2d(x, weight, bias, grid, positions, activation) -> Tensor:
    """See `ssmcompress.ops.grid_conv2d`. A full grid uses torch's convolution.

    For (8, 196 places, 768), 7x7, on one thread: all 196 tokens take 2.4 ms here and 4.7 in the kernel, 138 take 6.5
    and 2.7, 60 take 4.5 and 0.5. With its gradients, (8, 137 of 196 places, 384) takes 23 ms in torch and 9.2 here.
    """
    if positions is None:
        return reference.grid_conv2d(x, weight, bias, grid, positions, activation)
    y = _grid_conv(_as(_common(x), x), _float(weight), _float(bias), positions, *grid, activation == "silu")
    return _as(x.dtype, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssmcompress.ops.rms_norm`. One pass instead of torch's six; torch is used if gradients are needed."""
    return rms_norm_to(x, weight, eps, x.dtype)


def rms_norm_to(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `ssmcompress.ops.rms_norm`; from float32 to bfloat16 in the same pass."""
    if wants_gradient(x, weight):
        return reference.rms_norm(x, weight, eps).to(dtype)
    return _as(dtype, _norm(_as(_common(x), x), _float(weight), eps, dtype == torch.bfloat16))


def segment_sums(x, index, segments, eps, sums, sign) -> Tensor:
    """See `ssmcompress.ops.segment_sums`. Torch is used if gradients are needed."""
    if wants_gradient(x, sums):
        return reference.segment_sums(x, index, segments, eps, sums, sign)
    return _segment_sums(_as(_common(x), x), _as(torch.int64, index), _float(sums), segments, eps, sign)


def _common(*activations: Tensor | None) -> torch.dtype:
    """Return bfloat16 if all tensors are, else float32, which represents every narrower dtype."""
    dtypes = {t.dtype for t in activations if t is not None}
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"compiled ops: expected float32, bfloat16 or float16, found {', '.join(map(str, dtypes))}")
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _scan_dtype(B: Tensor, C: Tensor, *activations: Tensor | None) -> torch.dtype:
    """Return the dtype of a scan: bfloat16 if the activations and B and C are, else float32."""
    dtype = _common(*activations)
    return dtype if B.dtype == C.dtype == torch.bfloat16 else torch.float32


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return _as(torch.float32, tensor)


def _kernel(name: str) -> Callable[..., Any]:
    """Return a kernel of `cpu`, imported at the first call because the import takes a second."""
    return lambda *arguments: getattr(_import_cpu(), name)(*arguments)


@cache
def _import_cpu() -> ModuleType:
    return import_module(".cpu", __package__)


# u, delta, B, C, z, add and dy all have the same dtype, float32 or bfloat16; the rest is float32. The gap is one
# tensor, or steps (batch, length) and gap_delta (d_inner,), which have no gradient.
_INPUTS = """Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? steps,
    Tensor? gap_delta, Tensor? gap"""
# The last arguments of a forward and a backward.
_DIRECTION = "Tensor? order, bool softplus, bool reverse"


def _save_scan(ctx, inputs, output) -> None:
    *tensors, add, order, softplus, reverse = inputs
    ctx.save_for_backward(*tensors, order)
    ctx.adds, ctx.flags = add is not None, (softplus, reverse)


def _scan_gradients(ctx, dy):
    tensors = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias, dgap = _scan_backward(dy, *tensors, *ctx.flags)
    _, _, _, _, _, D, z, bias, _, _, gap, _ = tensors
    optional = (None if t is None else d for t, d in ((D, dD), (z, dz), (bias, dbias)))
    dgap = None if gap is None else dgap
    return du, ddelta, dA, dB, dC, *optional, None, None, dgap, dy if ctx.adds else None, None, None, None


_scan_backward = operator(
    f"selective_scan_backward(Tensor dy, {_INPUTS}, {_DIRECTION}) -> Tensor[]",
    _kernel("scan_backward"),
    ["cpu"],
    lambda dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, *others: [
        empty_like(t, u) for t in (u, delta, A, B, C, D, z, bias, gap)
    ],
)
_scan = operator(
    f"selective_scan({_INPUTS}, Tensor? add, {_DIRECTION}) -> Tensor",
    _kernel("scan_forward"),
    ["cpu"],
    lambda u, *others: empty_like(u, u),
    _scan_gradients,
    _save_scan,
)
_conv = conv_operator("causal_conv1d", _kernel("conv_forward"), _kernel("conv_backward"), ["cpu"])
_grid_conv = grid_conv_operator("grid_conv2d", _kernel("grid_conv_forward"), ["cpu"], _kernel("grid_conv_backward"))
_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps, bool narrow) -> Tensor",
    _kernel("norm_forward"),
    ["cpu"],
    lambda x, weight, eps, narrow: torch.empty(x.shape, dtype=torch.bfloat16 if narrow else x.dtype, device=x.device),
)
_segment_sums = operator(
    "segment_sums(Tensor x, Tensor index, Tensor? sums, int segments, float eps, int sign) -> Tensor",
    _kernel("segment_sums"),
    ["cpu"],
    lambda x, index, sums, segments, *others: x.new_empty(x.shape[0], segments * (x.shape[2] + 1), dtype=torch.float32),
)
