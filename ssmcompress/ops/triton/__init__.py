"""Backend of Triton kernels for CUDA devices; in Triton's interpreter (TRITON_INTERPRET=1), for CPU tensors.

Activations are float32, bfloat16 or float16, read without conversion. Only first derivatives are supported.
"""

from __future__ import annotations

from itertools import chain, islice

import torch
from torch import Tensor

from .. import reference
from ..operators import conv_operator, empty_like, grid_conv_operator, operator, wants_gradient
from ..reference import gather_tokens, rms_norm, topk_tokens
from ..selective_scan import ScanPath, scan_one_by_one
from . import conv, grid_conv, scan
from .launch import INTERPRETED, check_driver

__all__ = [
    "causal_conv1d",
    "check_driver",
    "gather_tokens",
    "grid_conv2d",
    "rms_norm",
    "scan_paths",
    "selective_scan",
    "topk_tokens",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    path = ScanPath(u, delta, A, B, C, D, delta_bias, gap, reverse, order)
    return _scan_together([path], z, add, delta_softplus, None, 1)[0]


def scan_paths(paths: list[ScanPath], z, delta_softplus, score, scored) -> tuple[Tensor, Tensor | None]:
    """See `ssmcompress.ops.scan_paths`. One launch scans all paths, unless that would leave the device idle."""
    first = paths[0]
    if len(paths) > 1 and first.order is not None and scan.forward_shape(first.u, first.A)[0] < first.u.shape[1]:
        # A chunk of steps visits different tokens on each path, so one launch cannot sum the paths.
        return scan_one_by_one(selective_scan, paths, z, delta_softplus, score, scored)
    y, scores = _scan_together(paths, z, None, delta_softplus, score, scored or len(paths))
    return y, None if score is None else scores


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    _check(x, weight)
    return _conv(x, weight, bias, positions, activation == "silu", reverse)


def grid_conv2d(x, weight, bias, grid, positions, activation) -> Tensor:
    """See `ssmcompress.ops.grid_conv2d`. A full grid, or inputs that need gradients, use torch's convolution."""
    if positions is None or wants_gradient(x, weight, bias):
        return reference.grid_conv2d(x, weight, bias, grid, positions, activation)
    _check(x, weight)
    return _grid_conv(x, weight, bias, positions, *grid, activation == "silu")


def _scan_together(paths: list[ScanPath], z, add, softplus, score, scored) -> tuple[Tensor, Tensor]:
    _check(z, add, *(t for path in paths for t in (path.u, path.delta)))
    u, delta, A, B, C, D, bias, gap, reverse, order, _, _ = zip(*paths, strict=True)
    if any(isinstance(g, Tensor) for g in gap):  # then every gap must be one tensor
        gap = [g[0][..., None] * g[1] if isinstance(g, tuple) else g for g in gap]
    steps, gap_delta, gap = zip(*map(_gap_parts, gap), strict=True)
    if any(o is not None and o.ndim > 1 for o in order):  # then every path needs one order for each image
        order = [None if o is None else o.expand(u[0].shape[:2]) for o in order]
    optional = (_present(tensors) for tensors in (D, bias, steps, gap_delta, gap, order))
    return _scan(u, delta, A, B, C, *optional, z, add, softplus, reverse, score, scored)


def _gap_parts(gap) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (steps, gap_delta, None), or (None, None, gap) if the gap is one tensor or its parts need gradients."""
    if not isinstance(gap, tuple):
        return None, None, gap
    if any(t.requires_grad for t in gap):
        return None, None, gap[0][..., None] * gap[1]
    return gap[0].float(), gap[1], None


def _present(tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"triton ops: expected float32, bfloat16 or float16, found {tensor.dtype}")
        if tensor.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"triton ops: expected CUDA tensors, found {tensor.device.type}; for Triton's interpreter on the CPU, "
                "set TRITON_INTERPRET=1 before Python starts"
            )


# A list holds one tensor per path, or is empty for a missing input. A gap is one tensor, or steps (batch, length)
# and gap_delta (d_inner,), which have no gradient; orders are (length,) on all paths, or (batch, length) on all.
_INPUTS = """Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] bias,
    Tensor[] steps, Tensor[] gap_delta, Tensor[] gap, Tensor[] order, Tensor? z"""
_DEVICES = ["cuda", "cpu"] if INTERPRETED else ["cuda"]


def _with_gradient(u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z) -> list[list[Tensor]]:
    return [u, delta, A, B, C, D, bias, gap, [] if z is None else [z]]


def _fake_scan(u, *others):
    score = others[-2]
    y = empty_like(u[0], u[0])
    return y, y.new_empty(u[0].shape[:2] if score is not None else (0,), dtype=torch.float32)


def _save_scan(ctx, inputs, output) -> None:
    *lists, z, add, softplus, reverse, _, _ = inputs
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(t for tensors in lists for t in tensors), *([] if z is None else [z]))
    ctx.flags, ctx.add_dtype = (softplus, reverse), None if add is None else add.dtype
    ctx.mark_non_differentiable(output[1])  # scores are for ranking


def _scan_gradients(ctx, dy, dscores):
    saved = ctx.saved_tensors  # read once: activation checkpointing forbids reading them twice
    lists = _split(saved, [*ctx.counts, len(saved) - sum(ctx.counts)])
    *tensors, z = lists
    z = z[0] if z else None
    counts = [len(part) for part in _with_gradient(*tensors, z)]
    gradients = _scan_backward(dy, *tensors, z, *ctx.flags)
    *dinputs, dgap, dz = _split(gradients, counts)
    none = [[None] * len(part) for part in tensors[7:11]]
    add = None if ctx.add_dtype is None else dy.to(ctx.add_dtype)
    return *dinputs, none[0], none[1], dgap, none[3], dz[0] if dz else None, add, None, None, None, None


def _split(tensors, counts: list[int]) -> list[list[Tensor]]:
    tensors = iter(tensors)
    return [list(islice(tensors, count)) for count in counts]


_scan_backward = operator(
    f"scan_paths_backward(Tensor dy, {_INPUTS}, bool softplus, bool[] reverse) -> Tensor[]",
    lambda *arguments: list(chain(*scan.backward(*arguments))),
    _DEVICES,
    lambda dy, *inputs: [empty_like(t, t) for tensors in _with_gradient(*inputs[:-2]) for t in tensors],
)
_scan = operator(
    f"scan_paths({_INPUTS}, Tensor? add, bool softplus, bool[] reverse, str? score, int scored) -> (Tensor, Tensor)",
    scan.forward,
    _DEVICES,
    _fake_scan,
    _scan_gradients,
    _save_scan,
)
_conv = conv_operator("triton_causal_conv1d", conv.forward, conv.backward, _DEVICES)
_grid_conv = grid_conv_operator("triton_grid_conv2d", grid_conv.forward, _DEVICES)
