"""Triton kernel of the selective scan, backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .scan_steps import (
    LOG2_E,
    load_input,
    load_matrix,
    load_states,
    optional_load,
    place,
    row_of,
    sigmoid,
    step_sizes,
    store_row,
    store_states,
    token_of,
)


@triton.jit
def backward_step(
    u, delta, B, C, steps, gap, z, dy, du, ddelta, dB, dC, dgap, dz, a, skip, bias, gap_delta,
    before, after, dh, dA, dD, dbias, token, row, e, live, n, channels, state_stride, z_stride,
    SOFTPLUS: tl.constexpr, DZ_SUM: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Accumulate a step into (dh, dA, dD, dbias), given the states before and after it; store its other gradients."""
    u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                               channels, state_stride, STATES, N)  # fmt: skip
    C_t = load_states(C + row * state_stride, n, STATES, N)
    upper = tl.load(dy + token * channels + e).to(tl.float32)
    u_t = u_t.to(tl.float32)
    delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
    if z is not None:
        z_t = tl.load(z + token * z_stride + e).to(tl.float32)
        share = sigmoid(z_t)
        out = tl.sum(after * C_t, 0) + skip * u_t
        slope = upper * out * share * (1.0 + z_t * (1.0 - share))
        if DZ_SUM:
            slope += tl.load(dz + token * channels + e)
        store_row(dz + token * channels, e, slope, live, EVEN)
        upper = upper * (z_t * share)
    if not EVEN:
        upper = tl.where(live, upper, 0.0)
    store_states(dC + row * STATES, tl.sum(upper[None, :] * after, 1), STATES, N)
    dh += upper[None, :] * C_t
    store_states(dB + row * STATES, tl.sum(dh * (delta_t * u_t)[None, :], 1), STATES, N)
    dinput = tl.sum(dh * B_t, 0)
    dh *= tl.exp2(decay[None, :] * a)
    through = dh * before
    dA += through * decay[None, :]
    ddecay = tl.sum(through * a, 0) * (1.0 / LOG2_E)
    store_row(du + token * channels, e, dinput * delta_t + upper * skip, live, EVEN)
    dD += upper * u_t
    if gap is not None:
        store_row(dgap + row * channels, e, ddecay, live, EVEN)
    slope = ddecay + dinput * u_t
    if SOFTPLUS:
        slope *= sigmoid(raw.to(tl.float32) + bias)
    dbias += slope
    store_row(ddelta + row * channels, e, slope, live, EVEN)
    return dh, dA, dD, dbias


@triton.jit
def backward_path(
    u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, dy,
    du, ddelta, dA, dB, dC, dD, dbias, dgap, dz, entering,
    path, b, e, columns, live, length, channels, state_stride, z_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, DZ_SUM: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one path of `scan_backward`."""
    n = tl.arange(0, N)[:, None]
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    C += first_row * state_stride
    dy += first_row * channels
    du += first_row * channels
    ddelta += first_row * channels
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    if gap is not None:
        dgap += first_row * channels
    if z is not None:
        z += first_row * z_stride
        dz += first_row * channels
    chunks = tl.cdiv(length, CHUNK)
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    skip, bias, gap_delta = optional_load(D, e), optional_load(bias, e), optional_load(gap_delta, e)
    state_block = n * channels + e[None, :]

    h = tl.zeros([N, BLOCK], tl.float32)
    for i in range(length):
        if i % CHUNK == 0:
            tl.store(entering + tl.cast(i // CHUNK, tl.int64) * N * channels + state_block, h, mask=live[None, :])
        row = row_of(i, 0, length, REVERSE)
        token = token_of(row, order)
        u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                   channels, state_stride, STATES, N)  # fmt: skip
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
    tl.debug_barrier()

    dh = tl.zeros([N, BLOCK], tl.float32)
    dA_sum = tl.zeros([N, BLOCK], tl.float32)
    dD_sum = tl.zeros([BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)
    for c_back in range(chunks):
        c = chunks - 1 - c_back
        h = tl.load(entering + tl.cast(c, tl.int64) * N * channels + state_block)
        states = (h,)
        for j in tl.static_range(CHUNK):
            # Steps past the last token repeat it; their states are never read.
            row = row_of(tl.minimum(c * CHUNK + j, length - 1), 0, length, REVERSE)
            token = token_of(row, order)
            u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                       channels, state_stride, STATES, N)  # fmt: skip
            delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
            h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
            states = states + (h,)
        for j in tl.static_range(CHUNK):
            i = c * CHUNK + (CHUNK - 1 - j)
            if i < length:
                row = row_of(i, 0, length, REVERSE)
                token = token_of(row, order)
                dh, dA_sum, dD_sum, dbias_sum = backward_step(
                    u, delta, B, C, steps, gap, z, dy, du, ddelta, dB, dC, dgap, dz, a, skip, bias, gap_delta,
                    states[CHUNK - 1 - j], states[CHUNK - j], dh, dA_sum, dD_sum, dbias_sum,
                    token, row, e, live, n, channels, state_stride, z_stride, SOFTPLUS, DZ_SUM, STATES, N, EVEN,
                )  # fmt: skip
    where = dA + (b * channels + e[None, :]) * STATES + n
    tl.store(where, dA_sum, mask=live[None, :] & (n < STATES))
    if D is not None:
        store_row(dD + b * channels, e, dD_sum, live, EVEN)
    if bias is not None and dbias is not None:
        store_row(dbias + b * channels, e, dbias_sum, live, EVEN)


@triton.jit(do_not_specialize=["length", "order_stride", "stride"])
def scan_backward(
    us, deltas, A, Bs, Cs, Ds, biases, steps, gap_deltas, gaps, orders, z, dy,
    dus, ddeltas, dAs, dBs, dCs, dDs, dbiases, dgaps, dz, entering,
    length, channels, state_stride, z_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of all inputs of `scan_forward`. Grid: images x tiles of channels.

    A first pass stores the state before every CHUNK tokens in `entering` (images, chunks, N, channels). A second pass
    runs over the chunks from the last to the first, recomputes the states of each and keeps them in registers. Sums
    over images or channels are partial: dAs (images, channels, STATES), dDs, dbiases (images, channels), dBs, dCs
    (images, tiles, length, STATES).
    """
    program = tl.program_id(0)
    b, e, columns, live = place(program, channels, False, EVEN, BLOCK)
    parts = program.to(tl.int64) * length * STATES
    entering += b * tl.cdiv(length, CHUNK) * N * channels
    for p in tl.static_range(PATHS):
        backward_path(
            us[p], deltas[p], A, Bs[p], Cs[p], Ds[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p], z,
            dy, dus[p], ddeltas[p], dAs[p], dBs[p] + parts, dCs[p] + parts, dDs[p], dbiases[p], dgaps[p], dz, entering,
            p, b, e, columns, live, length, channels, state_stride, z_stride, order_stride, stride,
            REVERSE[p], SOFTPLUS, p > 0, CHUNK, STATES, N, EVEN, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
