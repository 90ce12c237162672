"""The aligned causal convolution of `ssmcompress.ops`, forward and backward, sixteen channels at a time.

Arrays have three axes, as in `scan`: x, y and their gradients (batch, length, channels) are float32, or bfloat16 held
as uint16; weight (1, channels, width), whose last tap is for the token itself, and bias (1, 1, channels) are float32;
positions (1, batch, length) are int64. A missing optional array has no elements.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from .arguments import next_item
from .lane_functions import sigmoid
from .vector import LANES, helper, kernel, load, prefetch, scratch, splat, store

ZERO = uint64(0)
ONE = uint64(1)
WIDTH = uint64(LANES)
# Number of tokens that one thread processes at a time in the forward pass, which runs along the rows.
ROWS = uint64(32)
# Number of tokens to prefetch ahead: (8, 197, 384) takes 0.25 ms with prefetching and 0.37 without.
AHEAD = uint64(2)
# Number of channels of a tile, which one thread processes at a time in the backward pass.
BLOCK = uint64(64)


@kernel
def conv_forward(table, with_silu, reverse, x, weight, bias, positions, y):
    """Compute y (batch, length, channels) for each range of tokens that this thread takes from `table`."""
    length, channels, width = uint64(x.shape[1]), uint64(x.shape[2]), uint64(weight.shape[2])
    stretches = (length + ROWS - ONE) // ROWS
    vectors = (channels + WIDTH - ONE) // WIDTH
    taps, sums = _taps(weight), scratch(vectors)
    stretch = next_item(table)
    while stretch < uint64(x.shape[0]) * stretches:
        b, start = stretch // stretches, stretch % stretches * ROWS
        for t in range(start, min(start + ROWS, length)):
            # Four taps at a time, unrolled: in a Vim-tiny a call takes 0.7 ms, and 1.15 with a loop over the taps.
            for back in range(ZERO, width, uint64(4)):
                s0, d0 = _source(positions, reverse, b, t, back, length, width)
                s1, d1 = _source(positions, reverse, b, t, back + uint64(1), length, width)
                s2, d2 = _source(positions, reverse, b, t, back + uint64(2), length, width)
                s3, d3 = _source(positions, reverse, b, t, back + uint64(3), length, width)
                for e in range(ZERO, channels, WIDTH):
                    count = min(WIDTH, channels - e)
                    v = e // WIDTH
                    prefetch(x, (b, t + width + ONE if reverse else t + AHEAD, e))
                    prefetch(y, (b, t + AHEAD, e))
                    y_t = splat(0.0)
                    if back:
                        y_t = load(sums, (v, ZERO), WIDTH)
                    elif bias.size:
                        y_t = load(bias, (ZERO, ZERO, e), count)
                    y_t = y_t + load(taps, (d0 * vectors + v, ZERO), WIDTH) * load(x, (b, s0, e), count)
                    y_t = y_t + load(taps, (d1 * vectors + v, ZERO), WIDTH) * load(x, (b, s1, e), count)
                    y_t = y_t + load(taps, (d2 * vectors + v, ZERO), WIDTH) * load(x, (b, s2, e), count)
                    y_t = y_t + load(taps, (d3 * vectors + v, ZERO), WIDTH) * load(x, (b, s3, e), count)
                    if back + uint64(4) < width:
                        store(sums, (v, ZERO), WIDTH, y_t)
                    else:
                        store(y, (b, t, e), count, y_t * sigmoid(y_t) if with_silu else y_t)
        stretch = next_item(table)


@kernel
def conv_backward(table, with_silu, reverse, x, weight, bias, positions, dy, dx, dweight, dbias):
    """Compute the gradients from dy (batch, length, channels) for each tile of channels that this thread takes.

    dweight (batch, channels, width) and dbias (1, batch, channels) are partial sums, which the caller adds up in a
    deterministic order.
    """
    length, channels, width = uint64(x.shape[1]), uint64(x.shape[2]), uint64(weight.shape[2])
    blocks = (channels + BLOCK - ONE) // BLOCK
    most = BLOCK // WIDTH
    vectors = (channels + WIDTH - ONE) // WIDTH
    taps, dsum, dtap, doffset = _taps(weight), scratch(length * most), scratch((width + ONE) * most), scratch(most)
    source, distance = np.empty(width, np.uint64), np.empty(width, np.uint64)
    block = next_item(table)
    while block < uint64(x.shape[0]) * blocks:
        b, start = block // blocks, block % blocks * BLOCK
        end = min(start + BLOCK, channels)
        dtap[:] = np.float32(0)
        doffset[:] = np.float32(0)
        for t in range(length):
            for back in range(width):
                source[back], distance[back] = _source(positions, reverse, b, t, back, length, width)
            for e in range(start, end, WIDTH):
                v, count = (e - start) // WIDTH, min(WIDTH, end - e)
                g = load(dy, (b, t, e), count)
                if with_silu:
                    y_t = load(bias, (ZERO, ZERO, e), count) if bias.size else splat(0.0)
                    for back in range(width):
                        tap = load(taps, (distance[back] * vectors + e // WIDTH, ZERO), WIDTH)
                        y_t = y_t + tap * load(x, (b, source[back], e), count)
                    share = sigmoid(y_t)
                    g = g * (share * (1.0 + y_t * (1.0 - share)))
                store(dsum, (t * most + v, ZERO), WIDTH, g)
                store(doffset, (v, ZERO), WIDTH, load(doffset, (v, ZERO), WIDTH) + g)
                for back in range(width):
                    # Tokens out of range are added to a row past the taps, which is never read.
                    row = (distance[back] * most + v, ZERO)
                    store(dtap, row, WIDTH, load(dtap, row, WIDTH) + g * load(x, (b, source[back], e), count))
        # x at t contributes to each y that has t as a source: the same lookup in the opposite direction.
        for t in range(length):
            for ahead in range(width):
                source[ahead], distance[ahead] = _source(positions, not reverse, b, t, ahead, length, width)
            for e in range(start, end, WIDTH):
                v, count = (e - start) // WIDTH, min(WIDTH, end - e)
                dx_t = splat(0.0)
                for ahead in range(width):
                    tap = load(taps, (distance[ahead] * vectors + e // WIDTH, ZERO), WIDTH)
                    dx_t = dx_t + tap * load(dsum, (source[ahead] * most + v, ZERO), WIDTH)
                store(dx, (b, t, e), count, dx_t)
        for e in range(start, end, WIDTH):
            v, count = (e - start) // WIDTH, min(WIDTH, end - e)
            for lane in range(count):
                for d in range(width):
                    dweight[b, e + lane, width - ONE - d] = dtap[d * most + v, lane]
            if bias.size:
                store(dbias, (ZERO, b, e), count, load(doffset, (v, ZERO), WIDTH))
        block = next_item(table)


@helper
def _source(positions, reverse, b, t, back, length, width):
    """Return (token, distance) of the kept token `back` before t; (t, width), the zero tap, if out of range."""
    if back >= min(width, (length - t if reverse else t + ONE)):
        return t, width
    source = t + back if reverse else t - back
    # Kept tokens are ordered, so only the width - 1 preceding tokens can be in range.
    distance = _distance(positions, b, t, source, back)
    return (source, distance) if distance < width else (t, width)


@helper
def _distance(positions, b, t, source, back):
    """Return the steps on the original path between two kept tokens that are `back` kept tokens apart."""
    if positions.size:
        return uint64(abs(positions[ZERO, b, t] - positions[ZERO, b, source]))
    return back


@kernel
def _taps(weight):
    """Return ((width + 1) * vectors, 16): for each distance a row of the taps of all channels, then a row of zeros."""
    channels, width = uint64(weight.shape[1]), uint64(weight.shape[2])
    vectors = (channels + WIDTH - ONE) // WIDTH
    taps = scratch((width + ONE) * vectors)
    taps[:] = np.float32(0)
    for e in range(channels):
        for d in range(width):
            taps[d * vectors + e // WIDTH, e % WIDTH] = weight[ZERO, e, width - ONE - d]
    return taps
