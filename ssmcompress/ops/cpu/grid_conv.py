"""The convolution on a grid of `ssmcompress.ops`, forward and backward, at the kept tokens.

Arrays have three axes, as in `scan`: x and y (batch, length, channels) are float32, or bfloat16 held as uint16; weight
(1, channels, height * width) and bias (1, 1, channels), empty if there is none, are float32; positions (1, batch,
length) are int64.
"""

from __future__ import annotations

import numpy as np
from numba import int64, uint64

from .arguments import next_item
from .lane_functions import sigmoid
from .vector import LANES, helper, kernel, load, scratch, splat, store

ZERO = uint64(0)
ONE = uint64(1)
WIDTH = uint64(LANES)
# Number of channel vectors accumulated in parallel: a single sum would wait for the latency of each addition.
ABREAST = uint64(4)
# Number of tokens that one thread processes at a time in the forward pass.
ROWS = uint64(16)
# Number of channels that one thread processes at a time in the backward pass.
BLOCK = ABREAST * WIDTH


@kernel
def grid_conv_forward(table, with_silu, rows, columns, height, width, x, weight, bias, positions, y):
    """Compute y (batch, length, channels) for each range of tokens that this thread takes from `table`."""
    length, channels = uint64(x.shape[1]), uint64(x.shape[2])
    stretches = (length + ROWS - ONE) // ROWS
    vectors = (channels + WIDTH - ONE) // WIDTH
    blocks = channels // (ABREAST * WIDTH) * (ABREAST * WIDTH)
    taps = _taps(weight)
    token_at = np.empty(rows * columns, np.int64)
    sources, places = np.empty(height * width, np.uint64), np.empty(height * width, np.uint64)
    stretch = next_item(table)
    while stretch < uint64(x.shape[0]) * stretches:
        b, start = stretch // stretches, stretch % stretches * ROWS
        _place(positions, b, token_at)
        for t in range(start, min(start + ROWS, length)):
            count = _neighbours(token_at, positions[ZERO, b, t], rows, columns, height, width, sources, places)
            for e in range(ZERO, blocks, ABREAST * WIDTH):
                v = e // WIDTH
                y0, y1, y2, y3 = (
                    _offset(bias, e, WIDTH),
                    _offset(bias, e + WIDTH, WIDTH),
                    _offset(bias, e + uint64(2) * WIDTH, WIDTH),
                    _offset(bias, e + uint64(3) * WIDTH, WIDTH),
                )
                for k in range(count):
                    s, row = sources[k], places[k] * vectors + v
                    y0 = y0 + load(taps, (row, ZERO), WIDTH) * load(x, (b, s, e), WIDTH)
                    y1 = y1 + load(taps, (row + ONE, ZERO), WIDTH) * load(x, (b, s, e + WIDTH), WIDTH)
                    y2 = y2 + load(taps, (row + uint64(2), ZERO), WIDTH) * load(x, (b, s, e + uint64(2) * WIDTH), WIDTH)
                    y3 = y3 + load(taps, (row + uint64(3), ZERO), WIDTH) * load(x, (b, s, e + uint64(3) * WIDTH), WIDTH)
                store(y, (b, t, e), WIDTH, y0 * sigmoid(y0) if with_silu else y0)
                store(y, (b, t, e + WIDTH), WIDTH, y1 * sigmoid(y1) if with_silu else y1)
                store(y, (b, t, e + uint64(2) * WIDTH), WIDTH, y2 * sigmoid(y2) if with_silu else y2)
                store(y, (b, t, e + uint64(3) * WIDTH), WIDTH, y3 * sigmoid(y3) if with_silu else y3)
            for e in range(blocks, channels, WIDTH):
                lanes = min(WIDTH, channels - e)
                y_t = _offset(bias, e, lanes)
                for k in range(count):
                    row = (places[k] * vectors + e // WIDTH, ZERO)
                    y_t = y_t + load(taps, row, WIDTH) * load(x, (b, sources[k], e), lanes)
                store(y, (b, t, e), lanes, y_t * sigmoid(y_t) if with_silu else y_t)
        stretch = next_item(table)


@kernel
def grid_conv_backward(
    table, with_silu, rows, columns, height, width, x, weight, bias, positions, dy, dx, dweight, dbias
):  # fmt: skip
    """Compute the gradients from dy (batch, length, channels) for each block of channels that this thread takes.

    dweight (batch, channels, height * width) and dbias (1, batch, channels) are partial sums, which the caller adds up
    in a deterministic order. The window has odd sides.
    """
    length, channels, window = uint64(x.shape[1]), uint64(x.shape[2]), uint64(height * width)
    blocks, most = (channels + BLOCK - ONE) // BLOCK, ABREAST
    vectors = (channels + WIDTH - ONE) // WIDTH
    taps, dsum, dtap, doffset = _taps(weight), scratch(length * most), scratch(window * most), scratch(most)
    token_at = np.empty(rows * columns, np.int64)
    sources, places = np.empty(window, np.uint64), np.empty(window, np.uint64)
    block = next_item(table)
    while block < uint64(x.shape[0]) * blocks:
        b, start = block // blocks, block % blocks * BLOCK
        end = min(start + BLOCK, channels)
        dtap[:] = np.float32(0)
        doffset[:] = np.float32(0)
        _place(positions, b, token_at)
        for t in range(length):
            count = _neighbours(token_at, positions[ZERO, b, t], rows, columns, height, width, sources, places)
            for e in range(start, end, WIDTH):
                v, lanes = (e - start) // WIDTH, min(WIDTH, end - e)
                g = load(dy, (b, t, e), lanes)
                if with_silu:
                    y_t = _offset(bias, e, lanes)
                    for k in range(count):
                        tap = load(taps, (places[k] * vectors + e // WIDTH, ZERO), WIDTH)
                        y_t = y_t + tap * load(x, (b, sources[k], e), lanes)
                    share = sigmoid(y_t)
                    g = g * (share * (1.0 + y_t * (1.0 - share)))
                store(dsum, (t * most + v, ZERO), WIDTH, g)
                store(doffset, (v, ZERO), WIDTH, load(doffset, (v, ZERO), WIDTH) + g)
                for k in range(count):
                    row = (places[k] * most + v, ZERO)
                    store(dtap, row, WIDTH, load(dtap, row, WIDTH) + g * load(x, (b, sources[k], e), lanes))
        # x at t contributes to each y in the window around t, through the tap at the opposite position.
        for t in range(length):
            count = _neighbours(token_at, positions[ZERO, b, t], rows, columns, height, width, sources, places)
            for e in range(start, end, WIDTH):
                v = (e - start) // WIDTH
                dx_t = splat(0.0)
                for k in range(count):
                    tap = load(taps, ((window - ONE - places[k]) * vectors + e // WIDTH, ZERO), WIDTH)
                    dx_t = dx_t + tap * load(dsum, (sources[k] * most + v, ZERO), WIDTH)
                store(dx, (b, t, e), min(WIDTH, end - e), dx_t)
        for e in range(start, end):
            v, lane = (e - start) // WIDTH, (e - start) % WIDTH
            for place in range(window):
                dweight[b, e, place] = dtap[place * most + v, lane]
            if bias.size:
                dbias[ZERO, b, e] = doffset[v, lane]
        block = next_item(table)


@helper
def _place(positions, b, token_at):
    """Write the token at each grid position, or -1, to `token_at`."""
    token_at[:] = -1
    for t in range(uint64(positions.shape[2])):
        position = positions[ZERO, b, t]
        if 0 <= position < len(token_at):
            token_at[position] = int64(t)


@helper
def _neighbours(token_at, position, rows, columns, height, width, sources, places):
    """Return the number of tokens in the window around `position`; write them to `sources`, their taps to `places`."""
    count = ZERO
    for i in range(height):
        row = position // columns + i - height // 2
        for j in range(width):
            column = position % columns + j - width // 2
            if 0 <= row < rows and 0 <= column < columns and token_at[row * columns + column] >= 0:
                sources[count] = uint64(token_at[row * columns + column])
                places[count] = uint64(i * width + j)
                count += ONE
    return count


@helper
def _offset(bias, e, lanes):
    return load(bias, (ZERO, ZERO, e), lanes) if bias.size else splat(0.0)


@kernel
def _taps(weight):
    """Return (height * width * vectors, 16): for each window position, a row with the taps of all channels."""
    channels, window = uint64(weight.shape[1]), uint64(weight.shape[2])
    vectors = (channels + WIDTH - ONE) // WIDTH
    taps = scratch(window * vectors)
    taps[:] = np.float32(0)
    for e in range(channels):
        for place in range(window):
            taps[place * vectors + e // WIDTH, e % WIDTH] = weight[ZERO, e, place]
    return taps
