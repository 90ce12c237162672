"""Tokens: the kept features of a batch and where they stand, the one value that flows through a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import gather_tokens
from .alignment import Alignment, KeptPath, ScanOrder


@dataclass(frozen=True)
class Tokens:
    """Kept tokens of a batch of images, always in their original order.

    Attributes:
        features: (batch, kept, d_model), the residual stream.
        length: number of tokens before any pruning; positions count from 0 to length - 1.
        protected: position of the token that is never pruned (the class token), or None.
        positions: (batch, kept) int64, strictly increasing; None while nothing is pruned.
        scores: (batch, kept) importance, where the last block was asked for it; else None.
        alignment: which ops of the blocks make up for pruned positions.
        pruned_sum: (batch, d_model) sum over the pruned tokens of what a model remembers of each; where it needs that,
            else None.
        sizes: (batch, kept) how many tokens each one stands for, where tokens were merged by it; else None.
        orders: the scan paths of the model, over all positions.
        paths: the same over the kept tokens; made from `positions`, once for all blocks up to the next stage.
    """

    features: Tensor
    length: int
    protected: int | None = None
    positions: Tensor | None = None
    scores: Tensor | None = None
    alignment: Alignment = Alignment()
    pruned_sum: Tensor | None = None
    sizes: Tensor | None = None
    orders: tuple[ScanOrder, ...] = ()
    paths: tuple[KeptPath, ...] | None = None

    def __post_init__(self) -> None:
        if self.paths is None:
            object.__setattr__(self, "paths", tuple(order.over(self.positions) for order in self.orders))

    def updated(self, features: Tensor, scores: Tensor | None = None) -> Tokens:
        """The same tokens with new features (and scores)."""
        return replace(self, features=features, scores=scores)

    def explicit_positions(self) -> Tensor:
        """Positions (batch, kept), spelt out also where nothing is pruned yet."""
        if self.positions is not None:
            return self.positions
        everything = torch.arange(self.features.shape[1], device=self.features.device)
        return everything.expand(self.features.shape[0], -1)

    def keep(self, index: Tensor) -> Tokens:
        """The tokens at `index` (batch, kept'), ascending indices into the kept ones."""
        features = gather_tokens(self.features, index)
        positions = self.explicit_positions().gather(1, index)
        sizes = None if self.sizes is None else self.sizes.gather(1, index)
        return replace(self, features=features, positions=positions, paths=None, scores=None, sizes=sizes)

    def remembering(self, before: Tokens, memory: Callable[[Tensor], Tensor]) -> Tokens:
        """These tokens with `pruned_sum`, where `before` are those that they were kept of.

        Args:
            memory: features (batch, tokens, d_model) -> what is remembered of each.
        """
        lost = memory(before.features).sum(1) - memory(self.features).sum(1)
        return replace(self, pruned_sum=lost if before.pruned_sum is None else before.pruned_sum + lost)

    def pruned_mean(self) -> Tensor:
        """(batch, d_model) mean of what is remembered of the pruned tokens; zero while there are none."""
        return self.pruned_sum / max(1, self.length - self.features.shape[1])

    def protected_index(self) -> Tensor:
        """(batch,) index of the protected token among the kept ones, which are ordered by position."""
        return (self.explicit_positions() < self.protected).sum(1)
