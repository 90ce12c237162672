"""The stage behind a layer: scores in, the tokens that are kept out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import topk_tokens
from .importance import pair_distances, predicted_saliency, random_scores
from .merging import merge_into_kept
from .plan import kept_count
from .tokens import Tokens


class TokenPruner(nn.Module):
    """Keeps the tokens that score highest, each image its own; the count is fixed by the incoming length.

    Args:
        length: tokens before any pruning. seed: of the metric `random`.
        probe: (d_model + length,) of the metric `saliency`, else None.
        merge: how the others are merged into those kept; None: they are dropped.
    """

    def __init__(
        self,
        ratio: float,
        metric: str,
        length: int,
        seed: int,
        probe: Tensor | None = None,
        merge: str | None = None,
    ):
        super().__init__()
        self.ratio = ratio
        self.metric = metric
        self.merge = merge
        draw = random_scores(length, seed) if metric == "random" else None
        self.register_buffer("draw", draw, persistent=False)
        self.register_buffer("probe", probe)

    @property
    def asks_for(self) -> str | None:
        """The scores that the block before it is to give; None where the pruner has its own."""
        return None if self.metric in ("random", "saliency", "similarity") else self.metric

    def forward(self, tokens: Tokens) -> Tokens:
        """The kept tokens of `tokens`, which carry the scores that it asks for; the protected token is always kept."""
        positions = tokens.explicit_positions()
        scores = self.scores(tokens)
        if tokens.protected is not None:
            scores = scores.masked_fill(positions == tokens.protected, torch.inf)
        count = kept_count(scores.shape[1], self.ratio, tokens.protected is not None)
        index = topk_tokens(scores, count)
        return tokens.keep(index) if self.merge is None else merge_into_kept(tokens, index, scores, self.merge)

    def scores(self, tokens: Tokens) -> Tensor:
        """(batch, kept) what tokens are ranked by."""
        if self.metric == "random":
            return self.draw[tokens.explicit_positions()]
        if self.metric == "saliency":
            return predicted_saliency(tokens.features, tokens.explicit_positions(), self.probe)
        if self.metric == "similarity":
            return pair_distances(tokens)[0]
        return tokens.scores

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, metric={self.metric!r}"
