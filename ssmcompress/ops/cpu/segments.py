"""Sums of normalised tokens over segments, forward only: x is float32, or bfloat16 held as uint16, the sums float32."""

from __future__ import annotations

import numpy as np
from numba import uint64

from .arguments import next_item
from .vector import LANES, kernel, lane_sum, load, splat, store

ZERO = uint64(0)
WIDTH = uint64(LANES)


@kernel
def segment_sums(table, segments, sign, x, index, sums, eps, y):
    """Compute y (1, batch, segments * (channels + 1)) for each image that this thread takes from `table`.

    x is (batch, tokens, channels), index (1, batch, tokens) int64, eps (1, 1, 1); sums, shaped like y, has no elements
    if it is missing. A token whose index is not a segment is ignored.
    """
    tokens, channels = uint64(x.shape[1]), uint64(x.shape[2])
    length = segments * channels
    b = next_item(table)
    while b < uint64(x.shape[0]):
        for c in range(ZERO, length, WIDTH):
            count = min(WIDTH, length - c)
            store(y, (ZERO, b, c), count, load(sums, (ZERO, b, c), count) if sums.size else splat(0.0))
        for s in range(ZERO, segments):
            y[ZERO, b, length + s] = np.float32(0)
        for t in range(ZERO, tokens):
            squares = splat(0.0)
            for c in range(ZERO, channels, WIDTH):
                x_c = load(x, (b, t, c), min(WIDTH, channels - c))
                squares = squares + x_c * x_c
            scale = np.float32(sign) / np.sqrt(lane_sum(squares) / np.float32(channels) + eps[ZERO, ZERO, ZERO])
            s = uint64(index[ZERO, b, t])
            if s < segments:
                y[ZERO, b, length + s] += np.float32(1)
                for c in range(ZERO, channels, WIDTH):
                    count, place = min(WIDTH, channels - c), (ZERO, b, s * channels + c)
                    store(y, place, count, load(y, place, count) + load(x, (b, t, c), count) * scale)
        b = next_item(table)
