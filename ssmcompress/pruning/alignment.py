"""Pruning-aware alignment: scan paths that account for pruned positions.

ToP-ViM (arXiv 2409.18962) section 4: a pruned position still decays the hidden state but adds no input. On a path
whose kept tokens are at positions q_1 < q_2 < ..., g_j = q_j - q_{j-1} - 1 positions are missing just before token j,
and their delta is added to the decay exponent of token j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..ops.orders import invert_order

GAP_SOURCES = ("calibrated", "bias")


@dataclass(frozen=True)
class Alignment:
    """Which ops are aligned to pruned positions; with all off, pruning is a plain gather.

    Attributes:
        conv, scan: whether these ops of the blocks are aligned. `scan` also applies to attention, in which merged
            tokens are weighted by the number of tokens they represent.
        pool: whether the pooled mean includes pruned tokens, with their last features.
    """

    conv: bool = True
    scan: bool = True
    pool: bool = False


# Plain pruning: the kept tokens are gathered, and pruned positions are ignored.
UNALIGNED = Alignment(conv=False, scan=False)


@dataclass(frozen=True, eq=False)
class ScanOrder:
    """The order in which a scan path visits all positions.

    Attributes:
        visits: (length,) int64, the position visited at each step; None: from the first position to the last, or with
            `reverse` from the last to the first.
        labels: (length,) int64, the kind of each step, for paths that distinguish kinds of steps; else None.
    """

    visits: Tensor | None = None
    reverse: bool = False
    labels: Tensor | None = None

    def over(self, positions: Tensor | None) -> KeptPath:
        """Return this path over the tokens at `positions` (batch, kept), strictly increasing; None: over all tokens."""
        if positions is None:
            return KeptPath(self.visits, self.reverse, self.labels, None)
        if self.visits is None:
            return KeptPath(None, self.reverse, None, gap_steps(positions, self.reverse).float())
        steps, order = invert_order(self.visits)[positions].sort(1)
        labels = None if self.labels is None else self.labels[steps]
        return KeptPath(order, False, labels, gap_steps(steps).float())


@dataclass(frozen=True, eq=False)
class KeptPath:
    """A scan path over the kept tokens.

    Attributes:
        order: (kept,) or (batch, kept) int64, the kept token that each step visits; None: from the first token to the
            last, or with `reverse` from the last to the first.
        labels: (kept,) or (batch, kept), the labels of the steps on the original path.
        gaps: (batch, kept) float32, the number of pruned positions just before each step; None while nothing is
            pruned. They are in the order of the steps if there is an `order`, else in token order.
    """

    order: Tensor | None
    reverse: bool
    labels: Tensor | None
    gaps: Tensor | None


def gap_steps(positions: Tensor, reverse: bool = False) -> Tensor:
    """Return the number of pruned positions just before each kept token on a path.

    Args:
        positions: (batch, kept) strictly increasing ranks of the kept tokens, counted on the full path.
        reverse: the path runs from the last position to the first; the result stays in token order.

    Returns:
        (batch, kept) of the same dtype. The path's first token gets 0: the state before it is zero.
    """
    missing = positions[:, 1:] - positions[:, :-1] - 1
    return F.pad(missing, (0, 1) if reverse else (1, 0))
