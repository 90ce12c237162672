"""CPU backend: the ops compiled by Numba, on torch's tensors in place and torch's threads."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from .entries import COLUMNS, address
from .scan import BLOCK
from .threads import run

# Multiply-adds below which a second thread costs more than it brings.
_SMALL = 1 << 15


def scan_forward(u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, add, softplus, reverse) -> Tensor:
    """y (batch, length, d_inner); arguments as in `ssmcompress.ops.compiled`."""
    y = torch.empty(u.shape, dtype=u.dtype)
    if y.numel():
        arrays = [u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, add, y]
        flags = (softplus, reverse, _channels(u.shape[0], u.shape[2]))
        _launch("scan_forward", flags, arrays, u.dtype, u.numel() * A.shape[1])
    return y


def _channels(batch: int, d_inner: int) -> int:
    """Channels that a thread takes at a time.

    Many, for rows are read fastest whole (384 in 0.16 ns an element, 64 in 0.19); few enough to go round twice.
    """
    most = min(384, d_inner * batch // (2 * torch.get_num_threads()))
    return max(64, most // 64 * 64)


def scan_backward(dy, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, softplus, reverse) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, bias, gap; arguments as in `ssmcompress.ops.compiled`."""
    batch, _, d_inner = u.shape
    blocks = -(-d_inner // int(BLOCK))
    new = torch.empty if u.numel() else torch.zeros
    du, ddelta = new(u.shape, dtype=u.dtype), new(u.shape, dtype=u.dtype)
    dz = new(u.shape if z is not None else 0, dtype=u.dtype)
    dgap = new(u.shape if gap is not None else 0)
    # In parts that no two threads share.
    dA = new(batch, *A.shape)
    dB, dC = new(blocks, *B.shape), new(blocks, *B.shape)
    dD = new((batch, d_inner) if D is not None else 0)
    dbias = new((batch, d_inner) if bias is not None else 0)
    if u.numel():
        arrays = [u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, dy]
        arrays += [du, ddelta, dA, dB.flatten(0, 1), dC.flatten(0, 1), dD, dz, dbias, dgap]
        _launch("scan_backward", (softplus, reverse), arrays, u.dtype, u.numel() * A.shape[1])
    return [du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dgap]


def conv_forward(x, weight, bias, positions, silu, reverse) -> Tensor:
    """y (batch, length, channels); arguments as in `ssmcompress.ops.compiled`."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        arrays = [x, weight, bias, positions, y]
        _launch("conv_forward", (silu, reverse), arrays, x.dtype, x.numel() * weight.shape[1])
    return y


def conv_backward(dy, x, weight, bias, positions, silu, reverse) -> list[Tensor]:
    """Gradients of x, weight and bias; arguments as in `ssmcompress.ops.compiled`."""
    batch, _, channels = x.shape
    new = torch.empty if x.numel() else torch.zeros
    dx, dweight = new(x.shape, dtype=x.dtype), new(batch, *weight.shape)
    dbias = new((batch, channels) if bias is not None else 0)
    if x.numel():
        arrays = [x, weight, bias, positions, dy, dx, dweight, dbias]
        _launch("conv_backward", (silu, reverse), arrays, x.dtype, x.numel() * weight.shape[1])
    return [dx, dweight.sum(0), dbias.sum(0)]


def norm_forward(x, weight, eps) -> Tensor:
    """y (..., channels); arguments as in `ssmcompress.ops.compiled`."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        arrays = [x.reshape(-1, x.shape[-1]), weight, torch.tensor([eps]), y.view(-1, x.shape[-1])]
        _launch("norm_forward", (), arrays, x.dtype, x.numel())
    return y


def _launch(kernel: str, flags: tuple[int, ...], arrays: list[Tensor | None], dtype: torch.dtype, work: int) -> None:
    """Run a kernel over all of its items; see `entries` for the table that it takes."""
    dense = [None if a is None else a if a.stride(-1) == 1 else a.contiguous() for a in arrays]  # alive to the end
    table = array("q", (0, *flags, *_NO_ARRAY[1 + len(flags) :]))
    for a in dense:
        table.extend(_NO_ARRAY if a is None else _row(a))
    threads = torch.get_num_threads() if work > _SMALL else 1
    run(address(kernel, dtype == torch.bfloat16), table.buffer_info()[0], threads)
    if not table[0]:  # every thread failed before its first item, and only the making of scratch can fail
        raise MemoryError(f"out of memory in {kernel}")


_NO_ARRAY = (0,) * COLUMNS


def _row(tensor: Tensor) -> tuple[int, ...]:
    """Address, shape and strides in bytes, as of three axes."""
    missing, size = 3 - tensor.ndim, tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return tensor.data_ptr(), *(1,) * missing, *tensor.shape, *(0,) * missing, *strides
