"""RMS normalisation of rows, forward only: x (1, rows, channels) and y are float32, or bfloat16 held as uint16."""

from __future__ import annotations

import numpy as np
from numba import uint64

from .arguments import next_item
from .vector import LANES, kernel, lane_sum, load, splat, store

ZERO = uint64(0)
WIDTH = uint64(LANES)
# Number of rows that one thread processes at a time.
ROWS = uint64(32)


@kernel
def norm_forward(table, x, weight, eps, y):
    """Compute y = x / sqrt(mean(x^2) + eps) * weight, with weight (1, 1, channels) and eps (1, 1, 1) float32."""
    rows, channels = uint64(x.shape[1]), uint64(x.shape[2])
    stretch = next_item(table)
    while stretch * ROWS < rows:
        for row in range(stretch * ROWS, min((stretch + uint64(1)) * ROWS, rows)):
            squares = splat(0.0)
            for c in range(ZERO, channels, WIDTH):
                x_c = load(x, (ZERO, row, c), min(WIDTH, channels - c))
                squares = squares + x_c * x_c
            scale = np.float32(1) / np.sqrt(lane_sum(squares) / np.float32(channels) + eps[ZERO, ZERO, ZERO])
            for c in range(ZERO, channels, WIDTH):
                count = min(WIDTH, channels - c)
                x_c, weight_c = load(x, (ZERO, row, c), count), load(weight, (ZERO, ZERO, c), count)
                store(y, (ZERO, row, c), count, x_c * scale * weight_c)
        stretch = next_item(table)
