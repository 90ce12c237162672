"""Measured limits of a GPU: copy bandwidth and exponentials per second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, processors

_ROUNDS = 4096
_BLOCK = 1024


def copy_rate(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of a copy from device memory to device memory."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def exp_rate(device: torch.device) -> float:
    """Measure the exponentials (float32, base 2) per second, of numbers in registers."""
    out = torch.empty(processors(device) * 16 * _BLOCK, dtype=torch.float32, device=device)
    grid, arguments = (out.numel() // _BLOCK,), {"out": out, "rounds": _ROUNDS}
    return out.numel() * _ROUNDS / _seconds(device, lambda: launch(_exponentials, grid, out, arguments, BLOCK=_BLOCK))


@triton.jit
def _exponentials(out, rounds, BLOCK: tl.constexpr):
    where = out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(rounds):
        x = tl.exp2(x - 1.0)
    tl.store(where, x)


def _seconds(device: torch.device, call) -> float:
    with torch.cuda.device(device):
        return 1e-3 * triton.testing.do_bench(call, return_mode="median")
