"""The module of a stage: it selects the tokens to keep after a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import topk_tokens
from .importance import IMPORTANCES, draw_random
from .merging import MERGED_BY, link_tokens, merge_into_kept
from .plan import kept_count
from .tokens import Tokens


class Ranking(NamedTuple):
    """The scores (batch, tokens) by which tokens are ranked, and the partner of each for a merge, if known."""

    scores: Tensor
    partner: Tensor | None = None


class TokenPruner(nn.Module):
    """Keeps the tokens with the highest scores in each image; their number depends only on the number of input tokens.

    Args:
        ratio: share of the tokens to remove. metric: one of `IMPORTANCES`.
        length: number of tokens before any pruning. seed: seed of the metric `random`.
        probe: (d_model + length,), the predictor of the metric `saliency`, else None.
        merge: the method to merge the other tokens into the kept ones; None: they are dropped.
        grid: (rows, columns) of the positions of `draw` and `probe`, if images can have another grid; else None.
    """

    def __init__(
        self,
        ratio: float,
        metric: str,
        length: int,
        seed: int,
        probe: Tensor | None = None,
        merge: str | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.ratio = ratio
        self.metric = metric
        self.merge = merge
        self.grid = grid
        draw = draw_random(length, seed) if IMPORTANCES[metric].draw else None
        self.register_buffer("draw", draw, persistent=False)
        self.register_buffer("probe", probe)

    @property
    def block_metric(self) -> str | None:
        """The metric that the preceding block must compute; None if the pruner computes its own scores."""
        return IMPORTANCES[self.metric].block_metric

    def forward(self, tokens: Tokens, ranking: Ranking | None = None) -> Tokens:
        """Select the tokens to keep; `tokens` carry scores of `block_metric`. The protected token is always kept.

        Args:
            ranking: the result of `rank` for these tokens; None: it is computed here.
        """
        count = kept_count(int(tokens.features.shape[1]), self.ratio, tokens.protected_count)
        if count == tokens.features.shape[1]:  # bitwise equal: explicit positions change the rounding of a convolution
            return tokens.keep_all()
        positions = tokens.explicit_positions()
        scores, partner = self.rank(tokens) if ranking is None else ranking
        if tokens.protected is not None:
            # A NaN, from an image that is not finite, would rank above infinity.
            scores = scores.masked_fill(scores.isnan(), -torch.inf)
            scores = scores.masked_fill(tokens.is_protected(positions), torch.inf)
        index = topk_tokens(scores, count)
        return tokens.keep(index) if self.merge is None else merge_into_kept(tokens, index, scores, self.merge, partner)

    def rank(self, tokens: Tokens) -> Ranking:
        """Return the scores of the tokens, and the partner of each if they are scored by a match for this merge."""
        if self.merge is not None and MERGED_BY.get(self.metric) == self.merge:
            return Ranking(*link_tokens(tokens, self.merge))
        return Ranking(IMPORTANCES[self.metric].score(tokens, self))

    def table_positions(self, tokens: Tokens) -> Tensor:
        """Return the indices (batch, kept) of the tokens in per-position tables, on another grid the nearest ones."""
        positions = tokens.explicit_positions()
        if self.grid is None or tokens.grid in (None, self.grid):
            return positions
        (rows, columns), (ours, width) = tokens.grid, self.grid
        return positions // columns * ours // rows * width + positions % columns * width // columns

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, metric={self.metric!r}"
