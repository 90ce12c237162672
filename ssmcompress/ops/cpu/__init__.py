"""CPU backend: ops compiled by Numba that work in place on torch tensors and run in torch's threads."""

from __future__ import annotations

from array import array
from functools import cache

import torch
from torch import Tensor

from .arguments import COLUMNS
from .entries import address
from .scan import BLOCK
from .threads import run

# Number of multiply-adds below which a second thread costs more than it saves.
_SMALL = 1 << 15


def scan_forward(
    u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, add, order, softplus, reverse, weight=None, log_A=False
) -> Tensor:
    """Return y (batch, length, d_inner); the arguments are those of `ssmcompress.ops.compiled`."""
    y = _new(u, u.shape, u.dtype)
    if y.numel():
        arrays = [u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, add, order, y, weight]
        flags = (softplus, reverse, log_A)
        _launch("scan_forward", flags, arrays, u.dtype, u.numel() * A.shape[1])
    return y


def scan_rows(delta, A, B, C, bias, steps, gap_delta, gap, spends, order, softplus, reverse, y) -> None:
    """Add to y (batch, length, d_inner) float32, in place; the arguments are those of `ssmcompress.ops.compiled`."""
    if y.numel():
        arrays = [delta, A, B, C, bias, steps, gap_delta, gap, spends, order, y]
        _launch("scan_rows", (softplus, reverse), arrays, delta.dtype, y.numel() * A.shape[1])


def scan_backward(dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, order, softplus, reverse) -> list[Tensor]:
    """Return the gradients of u, delta, A, B, C, D, z, bias, gap; arguments as in `ssmcompress.ops.compiled`."""
    batch, _, d_inner = u.shape
    blocks = -(-d_inner // int(BLOCK))
    du, ddelta = _new(u, u.shape, u.dtype), _new(u, u.shape, u.dtype)
    dz = _new(u, u.shape if z is not None else (0,), u.dtype)
    dgap = _new(u, u.shape if gap is not None else (0,))
    # Partial sums, so that no two threads add to the same element.
    dA = _new(u, (batch, *A.shape))
    dB, dC = _new(u, (blocks, *B.shape)), _new(u, (blocks, *B.shape))
    dD = _new(u, (batch, d_inner) if D is not None else (0,))
    dbias = _new(u, (batch, d_inner) if bias is not None else (0,))
    if u.numel():
        arrays = [u, delta, A, B.float(), C.float(), D, z, bias, steps, gap_delta, gap, order, dy]
        arrays += [du, ddelta, dA, dB.flatten(0, 1), dC.flatten(0, 1), dD, dz, dbias, dgap]
        _launch("scan_backward", (softplus, reverse), arrays, u.dtype, u.numel() * A.shape[1])
    return [du, ddelta, _sum(dA), _sum(dB).to(B.dtype), _sum(dC).to(C.dtype), _sum(dD), dz, _sum(dbias), dgap]


def conv_forward(x, weight, bias, positions, silu, reverse) -> Tensor:
    """Return y (batch, length, channels); the arguments are those of `ssmcompress.ops.compiled`."""
    y = _new(x, x.shape, x.dtype)
    if y.numel():
        arrays = [x, weight, bias, positions, y]
        _launch("conv_forward", (silu, reverse), arrays, x.dtype, x.numel() * weight.shape[1])
    return y


def conv_backward(dy, x, weight, bias, positions, silu, reverse) -> list[Tensor]:
    """Return the gradients of x, weight and bias; the arguments are those of `ssmcompress.ops.compiled`."""
    batch, _, channels = x.shape
    dx, dweight = _new(x, x.shape, x.dtype), _new(x, (batch, *weight.shape))
    dbias = _new(x, (batch, channels) if bias is not None else (0,))
    if x.numel():
        arrays = [x, weight, bias, positions, dy, dx, dweight, dbias]
        _launch("conv_backward", (silu, reverse), arrays, x.dtype, x.numel() * weight.shape[1])
    return [dx, _sum(dweight), _sum(dbias)]


def grid_conv_forward(x, weight, bias, positions, rows, columns, silu) -> Tensor:
    """Return y (batch, length, channels); the arguments are those of `ssmcompress.ops.compiled`."""
    y = _new(x, x.shape, x.dtype)
    if y.numel():
        flags = (silu, rows, columns, *weight.shape[2:])
        arrays = [x, weight.flatten(1), bias, positions, y]
        _launch("grid_conv_forward", flags, arrays, x.dtype, y.numel() * weight[0].numel())
    return y


def grid_conv_backward(dy, x, weight, bias, positions, rows, columns, silu) -> list[Tensor]:
    """Return the gradients of x, weight and bias; the arguments are those of `ssmcompress.ops.compiled`."""
    batch, _, channels = x.shape
    dx, dweight = _new(x, x.shape, x.dtype), _new(x, (batch, channels, weight[0].numel()))
    dbias = _new(x, (batch, channels) if bias is not None else (0,))
    if x.numel():
        flags = (silu, rows, columns, *weight.shape[2:])
        arrays = [x, weight.flatten(1), bias, positions, dy, dx, dweight, dbias]
        _launch("grid_conv_backward", flags, arrays, x.dtype, x.numel() * weight[0].numel())
    return [dx, _sum(dweight).view(weight.shape), _sum(dbias)]


def norm_forward(x, weight, eps, narrow) -> Tensor:
    """Return y (..., channels), bfloat16 if `narrow`; the arguments are those of `ssmcompress.ops.compiled`."""
    y = _new(x, x.shape, torch.bfloat16 if narrow else x.dtype)
    if y.numel():
        arrays = [x.reshape(-1, x.shape[-1]), weight, _number(eps), y.view(-1, x.shape[-1])]
        _launch("norm_forward" if y.dtype == x.dtype else "norm_to_half", (), arrays, y.dtype, x.numel())
    return y


def segment_sums(x, index, sums, segments, eps, sign) -> Tensor:
    """Return (batch, segments * (channels + 1)); the arguments are those of `ssmcompress.ops.compiled`."""
    y = _new(x, (x.shape[0], segments * (x.shape[2] + 1)))
    if x.numel():
        _launch("segment_sums", (segments, sign), [x, index, sums, _number(eps), y], x.dtype, x.numel())
    elif sums is not None:
        y[:, : segments * x.shape[2]] = sums[:, : segments * x.shape[2]]
    return y


@cache
def _number(value: float) -> Tensor:
    """Return a cached float32 scalar for a kernel, always on the CPU, regardless of torch's default device."""
    return torch.tensor([value], dtype=torch.float32, device="cpu")


def _new(of: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised output tensor for a kernel over `of`; zeros if `of` is empty and no kernel runs."""
    return (of.new_empty if of.numel() else of.new_zeros)(shape, dtype=dtype)


def _sum(parts: Tensor) -> Tensor:
    """Sum partial results over the first axis; a missing optional input has only one."""
    return parts.sum(0) if parts.ndim > 1 else parts


def _launch(kernel: str, flags: tuple[int, ...], arrays: list[Tensor | None], dtype: torch.dtype, work: int) -> None:
    """Run a kernel over all of its items; `entries` describes the table that it takes."""
    words = [0, *flags, *_NO_ARRAY[1 + len(flags) :]]
    dense = []  # copies stay referenced until the kernel returns
    for a in arrays:
        if a is None:
            words += _NO_ARRAY
            continue
        strides = a.stride()
        if strides[-1] != 1:
            a = a.contiguous()
            dense.append(a)
            strides = a.stride()
        if len(strides) == 3:
            words += (a.data_ptr(), *a.shape, *strides)
        else:
            missing = 3 - len(strides)
            words += (a.data_ptr(), *_ONES[:missing], *a.shape, *_NO_ARRAY[:missing], *strides)
    table = array("q", words)
    threads = torch.get_num_threads() if work > _SMALL else 1
    run(address(kernel, dtype == torch.bfloat16), table.buffer_info()[0], threads)
    if not table[0]:  # every thread failed before its first item, and only the allocation of scratch can fail
        raise MemoryError(f"out of memory in {kernel}")


_NO_ARRAY, _ONES = (0,) * COLUMNS, (1,) * COLUMNS
