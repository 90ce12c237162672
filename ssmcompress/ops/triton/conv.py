"""The aligned causal convolution in Triton: kernels and their launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import even_rows, launch, sums
from .scan_steps import sigmoid

# Tokens and channels of a program.
_TOKENS, _CHANNELS = 16, 64


@triton.jit
def token_distances(positions, row0, t, length, REVERSE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the path distances from `t` to the tokens 0 .. WIDTH - 1 before it, each (tokens,), at most WIDTH."""
    found = ()
    for back in tl.static_range(WIDTH):
        s = t + back if REVERSE else t - back
        inside = (s >= 0) & (s < length)
        if positions is None:
            found = found + (tl.where(inside, back, WIDTH),)
        else:
            here = tl.load(positions + row0 + t, mask=t < length, other=0)
            there = tl.load(positions + row0 + s, mask=inside & (t < length), other=0)
            apart = tl.minimum(there - here if REVERSE else here - there, WIDTH)
            found = found + (tl.where(inside, apart, WIDTH).to(tl.int32),)
    return found


@triton.jit
def source_at(t, distances, distance: tl.constexpr, length, REVERSE: tl.constexpr, WIDTH: tl.constexpr):
    """Return (index of the token at path distance `distance` before each of `t`, whether it was kept)."""
    source = t
    kept = t < 0
    for back in tl.static_range(WIDTH):
        match = distances[back] == distance
        source = tl.where(match, t + back if REVERSE else t - back, source)
        kept = kept | match
    return source, kept & (t < length)


@triton.jit
def before_activation(
    x, weight, bias, distances, row0, t, length, e, live, x_stride, REVERSE: tl.constexpr, WIDTH: tl.constexpr
):
    """Return (tokens, channels) sums of taps times tokens, plus bias."""
    total = tl.zeros([t.shape[0], e.shape[0]], tl.float32)
    if bias is not None:
        total += tl.load(bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
    for distance in tl.static_range(WIDTH):
        source, kept = source_at(t, distances, distance, length, REVERSE, WIDTH)
        mask = kept[:, None] & live[None, :]
        token = tl.load(x + (row0 + source)[:, None] * x_stride + e[None, :], mask=mask, other=0.0)
        tap = tl.load(weight + e * WIDTH + (WIDTH - 1 - distance), mask=live, other=0.0)
        total += token.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["length"])
def conv_forward(
    x, weight, bias, positions, y, length, channels, x_stride,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute y. Grid: images x tiles of channels, tiles of tokens."""
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    row0 = (program // blocks).to(tl.int64) * length
    e = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = e < channels
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    distances = token_distances(positions, row0, t, length, REVERSE, WIDTH)
    total = before_activation(x, weight, bias, distances, row0, t, length, e, live, x_stride, REVERSE, WIDTH)
    if SILU:
        total *= sigmoid(total)
    where = y + (row0 + t)[:, None] * channels + e[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["length"])
def conv_backward(
    x, weight, bias, positions, dy, slope, dweight, dbias, length, channels, x_stride,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute `slope`, the gradient of the activation's input, and one image's contribution to dweight and dbias.

    The gradient of x is the convolution of `slope` in the opposite direction. Grid: images x tiles of channels.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    row0 = b * length
    e = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = e < channels
    nothing = tl.zeros([TOKENS, CHANNELS], tl.float32)
    bias_sum = nothing
    tap_sums = ()
    for _ in tl.static_range(WIDTH):
        tap_sums = tap_sums + (nothing,)
    for first in range(0, length, TOKENS):
        t = first + tl.arange(0, TOKENS)
        distances = token_distances(positions, row0, t, length, REVERSE, WIDTH)
        mask = (t < length)[:, None] & live[None, :]
        here = (row0 + t)[:, None] * channels + e[None, :]
        g = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            before = before_activation(x, weight, bias, distances, row0, t, length, e, live, x_stride, REVERSE, WIDTH)
            share = sigmoid(before)
            g *= share * (1.0 + before * (1.0 - share))
            tl.store(slope + here, g, mask=mask)
        bias_sum += g
        added = ()
        for distance in tl.static_range(WIDTH):
            source, kept = source_at(t, distances, distance, length, REVERSE, WIDTH)
            where = x + (row0 + source)[:, None] * x_stride + e[None, :]
            token = tl.load(where, mask=kept[:, None] & live[None, :], other=0.0).to(tl.float32)
            added = added + (tap_sums[distance] + g * token,)
        tap_sums = added
    for distance in tl.static_range(WIDTH):
        where = dweight + (b * channels + e) * WIDTH + (WIDTH - 1 - distance)
        tl.store(where, tl.sum(tap_sums[distance], 0), mask=live)
    if bias is not None:
        tl.store(dbias + b * channels + e, tl.sum(bias_sum, 0), mask=live)


def forward(x, weight, bias, positions, silu, reverse) -> Tensor:
    """Return y (batch, length, channels); the arguments are those of the operator."""
    y = x.new_empty(x.shape)
    if y.numel():
        _launch(conv_forward, _blocks(x, tokens=True), x, weight, bias, positions, silu, reverse, y=y)
    return y


def backward(dy, x, weight, bias, positions, silu, reverse) -> list[Tensor]:
    """Return the gradients of x, weight and bias; the last is empty if there is no bias."""
    batch, _, channels = x.shape
    dweight, dbias = sums(x, batch, *weight.shape), sums(x, batch, channels)
    dx = x.new_empty(x.shape)
    if x.numel():
        dy = dy.contiguous()
        slope = torch.empty_like(dy, dtype=torch.float32) if silu else dy
        outputs = {"dy": dy, "slope": slope, "dweight": dweight, "dbias": dbias}
        _launch(conv_backward, _blocks(x, tokens=False), x, weight, bias, positions, silu, reverse, **outputs)
        _launch(conv_forward, _blocks(x, tokens=True), slope, weight, None, positions, False, not reverse, y=dx)
    return [dx, dweight.sum(0).to(weight.dtype), x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)]


def _blocks(x: Tensor, tokens: bool) -> tuple[int, int]:
    batch, length, channels = x.shape
    return batch * triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _TOKENS) if tokens else 1


def _launch(kernel, grid, x, weight, bias, positions, silu, reverse, **outputs) -> None:
    x, x_stride = even_rows(x)
    arguments = {
        "x": x,
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "positions": None if positions is None else positions.contiguous(),
        "length": x.shape[1],
        "channels": x.shape[2],
        "x_stride": x_stride,
        "SILU": silu,
        "REVERSE": reverse,
        "WIDTH": weight.shape[1],
    }
    warps = 8 if kernel is conv_backward else 4  # the backward pass holds five sums
    launch(kernel, grid, x, arguments | outputs, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=warps)
