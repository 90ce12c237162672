"""Building blocks of the Triton scan kernels: the tile of a program, the loads of a step, and its step sizes.

A program scans a tile of channels of one image, token by token. A tile is (states, channels), held in float32
registers, so that for up to 16 states a thread holds all of them and their sum needs no communication. Activations are
rows of `channels` elements; rows of B and C have the stride `state_stride`. None stands for a missing input. Rows of an
image are indexed with 32 bits, which takes fewer instructions; each path advances its pointers to the image itself,
because in Triton 3.6 no function can return None.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2 artanh(s) / s - 2 as a polynomial in s^2 on [0, 1/9], with a relative error of at most 8e-9.
S1 = tl.constexpr(0.6666654348373413)
S2 = tl.constexpr(0.4001464545726776)
S3 = tl.constexpr(0.2810843586921692)
S4 = tl.constexpr(0.2751307785511017)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def softplus(x):
    """Return log(1 + e^x) = max(x, 0) + 2 artanh(t / (2 + t)), t = e^-|x|: accurate where e^x is small."""
    t = tl.exp2(tl.abs(x) * -LOG2_E)
    s = t / (2.0 + t)
    q = s * s
    return tl.maximum(x, 0.0) + s * (2.0 + q * (S1 + q * (S2 + q * (S3 + q * S4))))


@triton.jit
def optional_load(pointer, offset):
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + offset).to(tl.float32)


@triton.jit
def optional_row(pointer, offset, e):
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + offset + e)


@triton.jit
def load_states(pointer, n, STATES: tl.constexpr, N: tl.constexpr):
    """Load a row of B or C as (N, 1), with zeros beyond STATES."""
    if N == STATES:
        return tl.load(pointer + n).to(tl.float32)
    else:
        return tl.load(pointer + n, mask=n < STATES, other=0.0).to(tl.float32)


@triton.jit
def store_states(pointer, value, STATES: tl.constexpr, N: tl.constexpr):
    """Store a row (N,) of the gradient of B or C."""
    n = tl.arange(0, N)
    if N == STATES:
        tl.store(pointer + n, value)
    else:
        tl.store(pointer + n, value, mask=n < STATES)


@triton.jit
def load_matrix(A, path, n, columns, channels, stride, STATES: tl.constexpr, N: tl.constexpr):
    """Load a tile (N, channels) of a path's A times log2(e), padded with zeros (no decay) beyond STATES.

    `stride` equals `channels` but is never specialised: since Triton does not know its divisibility, it does not
    vectorise the loads over neighbouring channels, and thus does not split the states of a channel among threads.
    """
    where = A + path * STATES * channels + n * stride + columns[None, :]
    if N == STATES:
        return tl.load(where).to(tl.float32) * LOG2_E
    else:
        return tl.load(where, mask=n < STATES, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def place(program, channels, APART: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Return (image, e, columns, live) of a program, where `e` are its channels, padded by repeating the last one.

    `live` masks the channels that exist. `columns` holds the same numbers, which Triton knows to be contiguous. With
    APART, it does not know that `e` is contiguous, so neighbouring channels belong to different threads, which then
    hold all states of their channels and need no communication. Otherwise a thread may load a few neighbours at once
    and share their states with other threads.
    """
    blocks = tl.cdiv(channels, BLOCK)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    e = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = e < channels
    if not EVEN:
        e = tl.minimum(e, channels - 1)
        columns = e
    if APART:
        e = tl.max_contiguous(e, 1)
    return (program // blocks).to(tl.int64), e, columns, live


@triton.jit
def store_row(pointer, e, value, live, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer + e, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + e, value.to(pointer.dtype.element_ty), mask=live)


@triton.jit
def row_of(step, first, count, REVERSE: tl.constexpr):
    """Return the row of step `step` of a path over tokens `first` .. `first + count - 1`."""
    return first + (count - 1 - step if REVERSE else step)


@triton.jit
def token_of(row, order):
    """Return the token whose u, z and y belong to the step at `row`: `row` itself, or order[row] if given."""
    if order is None:
        return row
    else:
        return tl.load(order + row).to(tl.int32)


@triton.jit
def step_sizes(raw, bias, steps, gap_delta, gap, SOFTPLUS: tl.constexpr):
    """Return (delta, delta + gap) (channels,) of a token: the step sizes of its input and of its decay."""
    delta = raw.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return delta, delta + (steps * gap_delta + gap)


@triton.jit
def load_input(
    u, delta, B, steps, gap, here, there, e, n, channels, state_stride, STATES: tl.constexpr, N: tl.constexpr
):
    """Load the inputs of a step: u of row `here`; delta, B, pruned steps and gap of row `there`."""
    return (
        tl.load(u + here * channels + e),
        tl.load(delta + there * channels + e),
        load_states(B + there * state_stride, n, STATES, N),
        optional_load(steps, there),
        optional_load(gap, there * channels + e),
    )
