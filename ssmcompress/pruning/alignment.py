"""Pruning-aware alignment: what a scan path needs to know of the positions that were pruned.

ToP-ViM (arXiv 2409.18962) section 4: a pruned position takes part in the decay of the hidden state but brings
no input. On a path whose kept tokens stand at q_1 < q_2 < ..., g_j = q_j - q_{j-1} - 1 positions are missing
just before token j, and their delta joins the decay exponent of token j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

GAP_SOURCES = ("calibrated", "bias")


@dataclass(frozen=True)
class Alignment:
    """Which ops are aligned to pruned positions; both off is plain gather-pruning."""

    conv: bool = True
    scan: bool = True


def gap_steps(positions: Tensor, reverse: bool = False) -> Tensor:
    """Number of pruned positions just before each kept token on a path.

    Args:
        positions: (batch, kept) strictly increasing ranks of the kept tokens, counted on the full path.
        reverse: the path runs from the last position to the first; the result stays in token order.

    Returns:
        (batch, kept) of the same dtype. The path's first token gets 0: the state before it is zero.
    """
    missing = positions[:, 1:] - positions[:, :-1] - 1
    return F.pad(missing, (0, 1) if reverse else (1, 0))
