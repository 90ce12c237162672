"""Triton kernels of the selective scan, forward: all paths of a layer, a token at a time.

Tuples (`us`, `deltas`, ...) have one element per path. The inputs of a token are loaded one step ahead, because the
compiler cannot move a load before an earlier store. z has the row stride `z_stride`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scan_steps import (
    load_input,
    load_matrix,
    load_states,
    optional_load,
    optional_row,
    place,
    row_of,
    sigmoid,
    step_sizes,
    store_row,
    token_of,
)


@triton.jit
def load_step(
    u, delta, B, C, steps, gap, z, here, there, e, n, channels, state_stride, z_stride,
    STATES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Load the inputs of a step as `load_input` does, with C and z: u, delta, B, C, pruned steps, gap, z."""
    u, delta, B, steps, gap = load_input(u, delta, B, steps, gap, here, there, e, n, channels, state_stride, STATES, N)
    C = load_states(C + there * state_stride, n, STATES, N)
    return u, delta, B, C, steps, gap, optional_row(z, here * z_stride, e)


@triton.jit
def entering_state(h, ends, decays, a, n, columns, channels, stride, REVERSE: tl.constexpr, N: tl.constexpr):
    """Return the initial state of a chunk: the decayed final states of all chunks before it on the path."""
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    before = chunks - 1 - chunk if REVERSE else chunk
    for i in range(before):
        slot = chunks - 1 - i if REVERSE else i
        decay = tl.load(decays + slot * channels + columns)
        end = tl.load(ends + slot * N * channels + n * stride + columns[None, :])
        h = tl.exp2(decay[None, :] * a) * h + end
    return h


@triton.jit
def token_score(y, live, SCORE: tl.constexpr, EVEN: tl.constexpr):
    """Return one tile's contribution to the sum over channels in a score."""
    if SCORE == "clip":
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    elif SCORE == "l1":
        y = tl.abs(y)
    elif SCORE == "l2":
        y = y * y
    if not EVEN:
        y = tl.where(live, y, 0.0)
    return tl.sum(y, 0)


@triton.jit
def forward_path(
    u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, total, add, out_rows, score, ends, decays,
    path, b, e, columns, live, first, count, length, channels, state_stride, z_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, SCORE: tl.constexpr, SCORE_SUM: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan one path of `scan_forward` over tokens `first` .. `first + count - 1`, adding to the previous paths."""
    n = tl.arange(0, N)[:, None]
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    C += first_row * state_stride
    out_rows += first_row * channels
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    if z is not None:
        z += first_row * z_stride
    if total is not None:
        total += first_row * channels
    if add is not None:
        add += first_row * channels
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    skip, bias, gap_delta = optional_load(D, e), optional_load(bias, e), optional_load(gap_delta, e)
    h = tl.zeros([N, BLOCK], tl.float32)
    if ends is not None:
        h = entering_state(h, ends, decays, a, n, columns, channels, stride, REVERSE, N)
    row = row_of(0, first, count, REVERSE)
    token = token_of(row, order)
    upcoming = load_step(u, delta, B, C, steps, gap, z, token, row, e, n,
                         channels, state_stride, z_stride, STATES, N)  # fmt: skip
    for i in range(count):
        u_t, raw, B_t, C_t, steps_t, gap_t, z_t = upcoming
        row_t, token_t = row, token
        # These two are needed last, so they can be loaded in this step.
        out = optional_row(total, token * channels, e)
        more = optional_row(add, token * channels, e)
        row = row_of(tl.minimum(i + 1, count - 1), first, count, REVERSE)
        token = token_of(row, order)
        upcoming = load_step(u, delta, B, C, steps, gap, z, token, row, e, n,
                             channels, state_stride, z_stride, STATES, N)  # fmt: skip
        u_t = u_t.to(tl.float32)
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t)[None, :] * B_t
        out = tl.sum(h * C_t, 0) + (skip * u_t + out)
        gated = out
        if z is not None:
            z_t = z_t.to(tl.float32)
            gated = out * (z_t * sigmoid(z_t))
        if SCORE == "delta":
            part = token_score(delta_t, live, SCORE, EVEN)
            if SCORE_SUM:
                part += tl.load(score + row_t)
            tl.store(score + row_t, part)
        elif SCORE is not None:
            tl.store(score + token_t, token_score(gated, live, SCORE, EVEN))
        store_row(out_rows + token_t * channels, e, gated + more if GATED else out, live, EVEN)


@triton.jit(do_not_specialize=["length", "chunk", "order_stride", "stride"])
def scan_forward(
    us, deltas, A, Bs, Cs, Ds, biases, steps, gap_deltas, gaps, orders, z, add, y, sums, scores, ends, decays,
    length, chunk, channels, state_stride, z_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SCORE: tl.constexpr, SCORED: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute y = (sum over paths) * silu(z) + add. Grid: images x tiles of channels, chunks of tokens.

    Until the last path, the sum is accumulated in `sums` (shaped like y), which may be y itself. With `ends` and
    `decays` from `scan_chunks`, a program starts from the initial state of its chunk. Each tile writes its contribution
    to the sum over channels of the first SCORED paths, gated, to `scores` (images, tiles, length).
    """
    program, c = tl.program_id(0), tl.program_id(1)
    b, e, columns, live = place(program, channels, True, EVEN, BLOCK)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    score = scores + program.to(tl.int64) * length
    for p in tl.static_range(PATHS):
        # The sum of the paths stays ungated until it is complete; before that, only a score reads it gated.
        forward_path(
            us[p], deltas[p], A, Bs[p], Cs[p], Ds[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p],
            z if p == PATHS - 1 or (SCORE is not None and p == SCORED - 1) else None,
            sums if p > 0 else None, add if p == PATHS - 1 else None, y if p == PATHS - 1 else sums, score,
            None if ends is None else ends + (b * PATHS + p) * tl.num_programs(1) * N * channels,
            None if decays is None else decays + (b * PATHS + p) * tl.num_programs(1) * channels,
            p, b, e, columns, live, first, count, length, channels, state_stride, z_stride, order_stride, stride,
            REVERSE[p], SOFTPLUS, p == PATHS - 1, SCORE if SCORE == "delta" or p == SCORED - 1 else None, p > 0,
            STATES, N, EVEN, BLOCK,
        )  # fmt: skip
        if p < PATHS - 1:
            tl.debug_barrier()  # the next path reads what this one wrote, in other threads if the layouts differ


@triton.jit
def chunk_path(
    u, delta, A, B, bias, steps, gap_delta, gap, order, end, whole,
    path, b, e, columns, live, first, count, length, channels, state_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan one path of `scan_chunks`."""
    n = tl.arange(0, N)[:, None]
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    bias, gap_delta = optional_load(bias, e), optional_load(gap_delta, e)
    h = tl.zeros([N, BLOCK], tl.float32)
    decays = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        row = row_of(i, first, count, REVERSE)
        token = token_of(row, order)
        u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                   channels, state_stride, STATES, N)  # fmt: skip
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
        decays += decay
    store_row(whole, e, decays, live, EVEN)
    tl.store(end + n * stride + columns[None, :], h, mask=live[None, :])


@triton.jit(do_not_specialize=["length", "chunk", "order_stride", "stride"])
def scan_chunks(
    us, deltas, A, Bs, biases, steps, gap_deltas, gaps, orders, ends, decays,
    length, chunk, channels, state_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the final state of each chunk of tokens from a zero state, and the sum of its decay exponents.

    They are written to `ends` (images, paths, chunks, N, channels) and `decays` (images, paths, chunks, channels). The
    grid is the same as for `scan_forward`.
    """
    c = tl.program_id(1)
    b, e, columns, live = place(tl.program_id(0), channels, True, EVEN, BLOCK)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    for p in tl.static_range(PATHS):
        slot = (b * PATHS + p) * tl.num_programs(1) + c
        chunk_path(
            us[p], deltas[p], A, Bs[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p],
            ends + slot * N * channels, decays + slot * channels, p, b, e, columns, live, first, count, length,
            channels, state_stride, order_stride, stride, REVERSE[p], SOFTPLUS, STATES, N, EVEN, BLOCK,
        )  # fmt: skip
