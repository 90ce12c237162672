"""The selective scan of `ssmcompress.ops`, forward and backward, sixteen channels at a time.

All arrays have three axes and are in token order. `reverse` walks all of them from the last token to the first; an
`order` (1, batch or 1, length) int64 applies only to u, z, add, y and their gradients. These and delta (batch, length,
d_inner), in the forward pass also B and C (batch, length, d_state), are float32, or bfloat16 held as uint16. The rest
is float32: A (1, d_inner, d_state), D and bias (1, 1, d_inner), gap (batch, length, d_inner) or steps (1, batch,
length) with gap_delta (1, 1, d_inner). A missing optional array has no elements.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from .arguments import next_item
from .lane_functions import LOG2_E, exp2, sigmoid, softplus
from .vector import LANES, helper, kernel, lane_sum, load, number, prefetch, scratch, splat, store

ZERO = uint64(0)
ONE = uint64(1)
WIDTH = uint64(LANES)
# Number of channels of a tile, which one thread processes at a time. With 16 states, its states and decays take 8 KB.
# On an Intel Xeon with 48 KB of L1 cache and two threads, (8, 197, 768, 16) takes 2.5 ms with 48, 64 or 80 channels,
# and 3.3 with 384; (1, 197, 384, 16) takes 0.24 and 0.35.
BLOCK = uint64(64)
# Number of tokens to prefetch ahead.
AHEAD = uint64(4)
# Adding and subtracting it flushes numbers below 1e-37 to zero.
FLUSH = 1e-30
# Number of vectors of states and factors that the backward pass stores for one sequence: 512 KiB, half of a usual L2
# cache.
KEPT = uint64(1 << 13)


@kernel
def scan_forward(
    table, with_softplus, reverse, log_A, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, add, order, y,
    weight,
):  # fmt: skip
    """Compute y (batch, length, d_inner) for each tile of channels that this thread takes from `table`.

    With a `weight` (1, d_inner, rank), delta is (batch, length, rank), and their product is computed here, which is
    faster than reading it from memory. With `log_A`, A holds logarithms of -A.
    """
    length, d_inner, d_state = uint64(u.shape[1]), uint64(u.shape[2]), uint64(A.shape[2])
    rank = uint64(weight.shape[2])
    blocks = (d_inner + BLOCK - ONE) // BLOCK
    most = BLOCK // WIDTH
    h, a, w = scratch(most * d_state), scratch(most * d_state), scratch(most * rank)
    x, decay, out = scratch(most), scratch(most), scratch(most)
    skip, offset, spent = scratch(most), scratch(most), scratch(most)  # of D, bias and gap_delta; zeros if missing
    block = next_item(table)
    while block < uint64(u.shape[0]) * blocks:
        b, start = block // blocks, block % blocks * BLOCK
        end = min(start + BLOCK, d_inner)
        vectors = (end - start + WIDTH - ONE) // WIDTH
        for v in range(vectors):
            e = start + v * WIDTH
            count = min(WIDTH, end - e)
            store(skip, (v, ZERO), WIDTH, load(D, (ZERO, ZERO, e), count) if D.size else splat(0.0))
            store(offset, (v, ZERO), WIDTH, load(bias, (ZERO, ZERO, e), count) if bias.size else splat(0.0))
            store(spent, (v, ZERO), WIDTH, load(gap_delta, (ZERO, ZERO, e), count) if steps.size else splat(0.0))
            _load_rates(A, log_A, start + v * WIDTH, end, a, v * d_state)
            for r in range(rank):
                for lane in range(WIDTH):
                    w[v * rank + r, lane] = number(weight, (ZERO, e + lane, r)) if lane < count else np.float32(0)
        h[:] = np.float32(0)
        for k in range(length):
            t = length - ONE - k if reverse else k
            ahead = t - AHEAD if reverse else t + AHEAD
            token, coming = _token(order, b, t, length), _token(order, b, ahead, length)
            gap_steps = steps[ZERO, b, t] if steps.size else np.float32(0)
            # Three passes over the vectors of a tile: in a single pass, each scan would wait for its own softplus.
            for v in range(vectors):
                e = start + v * WIDTH
                count = min(WIDTH, end - e)
                prefetch(u, (b, coming, e))
                if rank:
                    raw = splat(0.0)
                    for r in range(rank):
                        raw = raw + load(w, (v * rank + r, ZERO), WIDTH) * number(delta, (b, t, r))
                else:
                    prefetch(delta, (b, ahead, e))
                    raw = load(delta, (b, t, e), count)
                raw = raw + load(offset, (v, ZERO), WIDTH)
                step = softplus(raw) if with_softplus else raw
                u_t = load(u, (b, token, e), count)
                store(x, (v, ZERO), WIDTH, step * u_t)
                more = load(gap, (b, t, e), count) if gap.size else load(spent, (v, ZERO), WIDTH) * gap_steps
                store(decay, (v, ZERO), WIDTH, step + more)
                store(out, (v, ZERO), WIDTH, load(skip, (v, ZERO), WIDTH) * u_t)
            for v in range(vectors):
                x_t, decay_t = load(x, (v, ZERO), WIDTH), load(decay, (v, ZERO), WIDTH)
                y_t = load(out, (v, ZERO), WIDTH)
                row = v * d_state
                for n in range(d_state):
                    factor = exp2(decay_t * load(a, (row + n, ZERO), WIDTH))
                    state = factor * load(h, (row + n, ZERO), WIDTH) + x_t * number(B, (b, t, n))
                    store(h, (row + n, ZERO), WIDTH, state)
                    y_t = y_t + state * number(C, (b, t, n))
                store(out, (v, ZERO), WIDTH, y_t)
            for v in range(vectors):
                e = start + v * WIDTH
                count = min(WIDTH, end - e)
                y_t = load(out, (v, ZERO), WIDTH)
                prefetch(y, (b, coming, e))
                if z.size:
                    prefetch(z, (b, coming, e))
                    z_t = load(z, (b, token, e), count)
                    y_t = y_t * (z_t * sigmoid(z_t))
                if add.size:
                    prefetch(add, (b, coming, e))
                    y_t = y_t + load(add, (b, token, e), count)
                store(y, (b, token, e), count, y_t)
        block = next_item(table)


@kernel
def scan_rows(
    table, with_softplus, reverse, delta, A, B, C, bias, steps, gap_delta, gap, spends, order, y
):  # fmt: skip
    """Add sums of rows of the matrix of a scan to y (batch, length, d_inner), tile by tile; see `ops.scan_rows`.

    The path is walked from its end; `spends` (1, batch, length) are factors of delta in the decays.
    """
    length, d_inner, d_state = uint64(delta.shape[1]), uint64(delta.shape[2]), uint64(A.shape[2])
    blocks = (d_inner + BLOCK - ONE) // BLOCK
    most = BLOCK // WIDTH
    h, a = scratch(most * d_state), scratch(most * d_state)
    x, decay, out = scratch(most), scratch(most), scratch(most)
    block = next_item(table)
    while block < uint64(delta.shape[0]) * blocks:
        b, start = block // blocks, block % blocks * BLOCK
        end = min(start + BLOCK, d_inner)
        vectors = (end - start + WIDTH - ONE) // WIDTH
        for v in range(vectors):
            _load_rates(A, False, start + v * WIDTH, end, a, v * d_state)
        h[:] = np.float32(0)
        decay[:] = np.float32(0)
        for k in range(length):
            t = k if reverse else length - ONE - k
            ahead = t + AHEAD if reverse else t - AHEAD
            token = _token(order, b, t, length)
            spend = spends[ZERO, b, t] if spends.size else np.float32(1)
            for v in range(vectors):
                e = start + v * WIDTH
                count = min(WIDTH, end - e)
                prefetch(delta, (b, ahead, e))
                step, _ = _step(load(delta, (b, t, e), count), bias, with_softplus, e, count)
                store(x, (v, ZERO), WIDTH, step)
            for v in range(vectors):
                decay_t, y_t, row = load(decay, (v, ZERO), WIDTH), splat(0.0), v * d_state
                for n in range(d_state):
                    factor = exp2(decay_t * load(a, (row + n, ZERO), WIDTH))
                    state = factor * load(h, (row + n, ZERO), WIDTH) + splat(C[b, t, n])
                    # Without inputs, states decay to denormal numbers, which are many times slower on processors where
                    # they cannot be flushed to zero (`flush_denormals`).
                    state = state + splat(FLUSH) - splat(FLUSH)
                    store(h, (row + n, ZERO), WIDTH, state)
                    y_t = y_t + state * B[b, t, n]
                store(out, (v, ZERO), WIDTH, y_t)
            for v in range(vectors):
                e = start + v * WIDTH
                count = min(WIDTH, end - e)
                step = load(x, (v, ZERO), WIDTH)
                store(decay, (v, ZERO), WIDTH, step * spend + _gap(steps, gap_delta, gap, b, t, e, count))
                y_t = load(y, (b, token, e), count) + load(out, (v, ZERO), WIDTH) * step
                store(y, (b, token, e), count, y_t)
        block = next_item(table)


@kernel
def scan_backward(
    table, with_softplus, reverse, u, delta, A, B, C, D, z, bias, steps, gap_delta, gap, order, dy,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dgap,
):  # fmt: skip
    """Compute the gradients of all inputs from dy (batch, length, d_inner) for each tile that this thread takes.

    dA (batch, d_inner, d_state), dD and dbias (1, batch, d_inner), dB and dC (blocks * batch, length, d_state), where
    `blocks` counts tiles, are partial sums for the caller to add up: no two threads add to the same element, and the
    order of summation is fixed. dgap is the gradient of `gap`; `steps` and `gap_delta` have none.

    The states are recomputed for as many tokens at a time as fit in the cache.
    """
    batch, length, d_inner, d_state = uint64(u.shape[0]), uint64(u.shape[1]), uint64(u.shape[2]), uint64(A.shape[2])
    blocks = (d_inner + BLOCK - ONE) // BLOCK
    most = BLOCK // WIDTH
    chunk = min(length, max(ONE, KEPT // (uint64(2) * max(ONE, d_state))))
    chunks = (length + chunk - ONE) // chunk
    a, dh, da = scratch(most * d_state), scratch(most * d_state), scratch(most * d_state)
    starts = scratch(chunks * most * d_state)  # the states at the start of each chunk
    h, factors = scratch((chunk + ONE) * d_state), scratch(chunk * d_state)
    x, decay, gated, y = scratch(most * chunk), scratch(most * chunk), scratch(most * chunk), scratch(most * chunk)
    dskip, doffset = scratch(most), scratch(most)
    dB_lanes, dC_lanes = scratch(length * d_state), scratch(length * d_state)
    block = next_item(table)
    while block < batch * blocks:
        b, start = block // blocks, block % blocks * BLOCK
        end = min(start + BLOCK, d_inner)
        vectors = (end - start + WIDTH - ONE) // WIDTH
        for v in range(vectors):
            _load_rates(A, False, start + v * WIDTH, end, a, v * d_state)
        for sums in (dh, da, dskip, doffset, dB_lanes, dC_lanes):
            sums[:] = np.float32(0)
        starts[: most * d_state] = np.float32(0)
        for part in range(chunks - ONE):
            now, later = part * most * d_state, (part + ONE) * most * d_state
            starts[later : later + most * d_state] = starts[now:later]
            for k in range(part * chunk, (part + ONE) * chunk):
                t = length - ONE - k if reverse else k
                token = _token(order, b, t, length)
                for v in range(vectors):
                    e = start + v * WIDTH
                    count = min(WIDTH, end - e)
                    step, _ = _step(load(delta, (b, t, e), count), bias, with_softplus, e, count)
                    x_t = step * load(u, (b, token, e), count)
                    decay_t = step + _gap(steps, gap_delta, gap, b, t, e, count)
                    for n in range(d_state):
                        row = (later + v * d_state + n, ZERO)
                        factor = exp2(decay_t * load(a, (v * d_state + n, ZERO), WIDTH))
                        store(starts, row, WIDTH, factor * load(starts, row, WIDTH) + x_t * B[b, t, n])
        for done in range(chunks):
            part = chunks - ONE - done
            first = part * chunk
            taken = min(chunk, length - first)
            # Values shared by all states are computed before and after the scans, one row of the tile at a time: inside
            # the scans they would add latency, and columns of 64 bytes evict each other from the cache.
            for k in range(taken):
                t = length - ONE - first - k if reverse else first + k
                ahead = t - AHEAD if reverse else t + AHEAD
                token, coming = _token(order, b, t, length), _token(order, b, ahead, length)
                for v in range(vectors):
                    e, row = start + v * WIDTH, (v * chunk + k, ZERO)
                    count = min(WIDTH, end - e)
                    prefetch(delta, (b, ahead, e))
                    prefetch(u, (b, coming, e))
                    prefetch(dy, (b, coming, e))
                    step, _ = _step(load(delta, (b, t, e), count), bias, with_softplus, e, count)
                    store(x, row, WIDTH, step * load(u, (b, token, e), count))
                    store(decay, row, WIDTH, step + _gap(steps, gap_delta, gap, b, t, e, count))
                    g = load(dy, (b, token, e), count)
                    if z.size:
                        prefetch(z, (b, coming, e))
                        z_t = load(z, (b, token, e), count)
                        g = g * (z_t * sigmoid(z_t))
                    store(gated, row, WIDTH, g)
            for v in range(vectors):
                top = (part * most + v) * d_state
                h[:d_state] = starts[top : top + d_state]
                for k in range(taken):
                    t = length - ONE - first - k if reverse else first + k
                    x_t, decay_t = load(x, (v * chunk + k, ZERO), WIDTH), load(decay, (v * chunk + k, ZERO), WIDTH)
                    for n in range(d_state):
                        row = k * d_state + n
                        factor = exp2(decay_t * load(a, (v * d_state + n, ZERO), WIDTH))
                        store(factors, (row, ZERO), WIDTH, factor)
                        state = factor * load(h, (row, ZERO), WIDTH) + x_t * B[b, t, n]
                        store(h, (row + d_state, ZERO), WIDTH, state)
                for back in range(taken):
                    k = taken - ONE - back
                    t = length - ONE - first - k if reverse else first + k
                    row_t = (v * chunk + k, ZERO)
                    x_t, decay_t, g = load(x, row_t, WIDTH), load(decay, row_t, WIDTH), load(gated, row_t, WIDTH)
                    dx_t, ddecay_t, y_t = splat(0.0), splat(0.0), splat(0.0)
                    for n in range(d_state):
                        row, own, lanes = k * d_state + n, (v * d_state + n, ZERO), (t * d_state + n, ZERO)
                        B_t, C_t = B[b, t, n], C[b, t, n]
                        state = load(h, (row + d_state, ZERO), WIDTH)
                        dstate = load(dh, own, WIDTH) + g * C_t
                        y_t = y_t + state * C_t
                        store(dC_lanes, lanes, WIDTH, load(dC_lanes, lanes, WIDTH) + g * state)
                        store(dB_lanes, lanes, WIDTH, load(dB_lanes, lanes, WIDTH) + dstate * x_t)
                        dx_t = dx_t + dstate * B_t
                        dstate = dstate * load(factors, (row, ZERO), WIDTH)
                        store(dh, own, WIDTH, dstate)
                        dexponent = dstate * load(h, (row, ZERO), WIDTH)
                        ddecay_t = ddecay_t + dexponent * load(a, own, WIDTH)
                        store(da, own, WIDTH, load(da, own, WIDTH) + dexponent * decay_t)
                    store(x, row_t, WIDTH, dx_t)  # overwrites x, which is no longer needed
                    store(decay, row_t, WIDTH, ddecay_t * LN_2)  # a is in units of log2
                    store(y, row_t, WIDTH, y_t)
            for k in range(taken):
                t = length - ONE - first - k if reverse else first + k
                ahead = t - AHEAD if reverse else t + AHEAD
                token, coming = _token(order, b, t, length), _token(order, b, ahead, length)
                for v in range(vectors):
                    e, row = start + v * WIDTH, (v * chunk + k, ZERO)
                    count = min(WIDTH, end - e)
                    prefetch(du, (b, coming, e))
                    prefetch(ddelta, (b, ahead, e))
                    step, raw = _step(load(delta, (b, t, e), count), bias, with_softplus, e, count)
                    u_t, y_t = load(u, (b, token, e), count), load(y, row, WIDTH)
                    dx_t, ddecay_t = load(x, row, WIDTH), load(decay, row, WIDTH)
                    du_t = dx_t * step
                    if D.size:
                        skip, g = load(D, (ZERO, ZERO, e), count), load(gated, row, WIDTH)
                        y_t = y_t + skip * u_t
                        du_t = du_t + skip * g
                        store(dskip, (v, ZERO), WIDTH, load(dskip, (v, ZERO), WIDTH) + g * u_t)
                    if z.size:
                        prefetch(dz, (b, coming, e))
                        z_t = load(z, (b, token, e), count)
                        share = sigmoid(z_t)
                        slope = share * (1.0 + z_t * (1.0 - share))
                        store(dz, (b, token, e), count, load(dy, (b, token, e), count) * y_t * slope)
                    if gap.size:
                        store(dgap, (b, t, e), count, ddecay_t)
                    dstep = dx_t * u_t + ddecay_t
                    if with_softplus:
                        dstep = dstep * sigmoid(raw)
                    store(doffset, (v, ZERO), WIDTH, load(doffset, (v, ZERO), WIDTH) + dstep)
                    store(du, (b, token, e), count, du_t)
                    store(ddelta, (b, t, e), count, dstep)
        for e in range(start, end):
            v, lane = (e - start) // WIDTH, (e - start) % WIDTH
            for n in range(d_state):
                dA[b, e, n] = da[v * d_state + n, lane]
            if D.size:
                dD[ZERO, b, e] = dskip[v, lane]
            if bias.size:
                dbias[ZERO, b, e] = doffset[v, lane]
        place = block % blocks * batch + b
        for t in range(length):
            for n in range(d_state):
                dB[place, t, n] = lane_sum(load(dB_lanes, (t * d_state + n, ZERO), WIDTH))
                dC[place, t, n] = lane_sum(load(dC_lanes, (t * d_state + n, ZERO), WIDTH))
        block = next_item(table)


LN_2 = np.float32(np.log(2))


@helper
def _token(order, b, step, length):
    """Return the token that a step of a sequence visits, the last token if the order points beyond it."""
    last = length - ONE
    if order.size:
        return min(uint64(order[ZERO, b if uint64(order.shape[1]) > ONE else ZERO, min(step, last)]), last)
    return step


@helper
def _step(raw, bias, with_softplus, e, count):
    """Return (delta after bias and softplus, delta after bias) of one token and sixteen channels."""
    if bias.size:
        raw = raw + load(bias, (ZERO, ZERO, e), count)
    return softplus(raw) if with_softplus else raw, raw


@helper
def _gap(steps, gap_delta, gap, b, t, e, count):
    """Return the gap that is added to the step in the decay, for one token and sixteen channels."""
    if steps.size:
        return load(gap_delta, (ZERO, ZERO, e), count) * steps[ZERO, b, t]
    return load(gap, (b, t, e), count) if gap.size else splat(0.0)


@helper
def _load_rates(A, log_A, e, end, a, row):
    """Load A of channels e.. into rows `row`.. of a (d_state, 16 channels), in units of log2: exp(x A) = 2^(x a)."""
    for n in range(uint64(A.shape[2])):
        for lane in range(WIDTH):
            a[row + n, lane] = A[ZERO, e + lane, n] * LOG2_E if e + lane < end else np.float32(0)
        if log_A:
            rates = exp2(load(a, (row + n, ZERO), WIDTH)) * -LOG2_E
            store(a, (row + n, ZERO), WIDTH, rates)
