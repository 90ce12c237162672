"""The convolution on a grid of `ssmcompress.ops` in Triton, forward only, at the kept tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import even_rows, launch
from .scan_steps import sigmoid

# Tokens and channels of a program.
_TOKENS, _CHANNELS = 16, 64


@triton.jit(do_not_specialize=["length", "rows", "columns"])
def grid_conv_forward(
    x, weight, bias, positions, token_at, y, length, channels, x_stride, rows, columns,
    SILU: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute y. Grid: images x tiles of channels, tiles of tokens."""
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    e = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = e < channels
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here = tl.load(positions + b * length + t, mask=t < length, other=0)
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
    for place in range(HEIGHT * WIDTH):
        row = here // columns + place // WIDTH - HEIGHT // 2
        column = here % columns + place % WIDTH - WIDTH // 2
        inside = (t < length) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        source = tl.load(token_at + b * rows * columns + row * columns + column, mask=inside, other=-1)
        mask = (source >= 0)[:, None] & live[None, :]
        token = tl.load(x + (b * length + source)[:, None] * x_stride + e[None, :], mask=mask, other=0.0)
        tap = tl.load(weight + e * (HEIGHT * WIDTH) + place, mask=live, other=0.0)
        total += token.to(tl.float32) * tap.to(tl.float32)[None, :]
    if SILU:
        total *= sigmoid(total)
    where = y + (b * length + t)[:, None] * channels + e[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & live[None, :])


def forward(x, weight, bias, positions, rows, columns, silu) -> Tensor:
    """Return y (batch, length, channels); the arguments are those of the operator."""
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    tokens = torch.arange(length, device=x.device).expand_as(positions)
    x, x_stride = even_rows(x)
    arguments = {
        "x": x,
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "positions": positions.contiguous(),
        "token_at": tokens.new_full((batch, rows * columns), -1).scatter(1, positions, tokens),
        "y": y,
        "length": length,
        "channels": channels,
        "x_stride": x_stride,
        "rows": rows,
        "columns": columns,
    }
    grid = batch * triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _TOKENS)
    sizes = {"HEIGHT": weight.shape[2], "WIDTH": weight.shape[3], "TOKENS": _TOKENS, "CHANNELS": _CHANNELS}
    launch(grid_conv_forward, grid, x, arguments, SILU=silu, **sizes)
    return y
