"""Tokens: the kept features of a batch and their positions, the value that every block takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import gather_tokens
from ..ops.dispatch import full_precision
from .alignment import Alignment, KeptPath, ScanOrder

# Added to a mean square, as the norms of the layers do.
EPSILON = 1e-5


@dataclass(frozen=True)
class Tokens:
    """Kept tokens of a batch of images, always in their original order.

    Attributes:
        features: (batch, kept, d_model), the residual stream.
        length: number of tokens before any pruning; positions count from 0 to length - 1.
        protected: position of the token that is never pruned (the class token), or None.
        positions: (batch, kept) int64, strictly increasing; None while nothing is pruned.
        scores: (batch, kept) importance, if the last block was asked for it; else None.
        alignment: which ops of the blocks compensate for pruned positions.
        pruned_sum: (batch, d_model) sum of the remembered values of pruned tokens, if the model needs it; else None.
        pruned_segments: (batch, segments, d_model) sums over the pruned tokens as `segment_sums` has them, if the model
            needs them; else None.
        members: (batch, segments, kept) whether each segment has each token, for as long as the positions are these.
        sizes: (batch, kept) number of tokens that each one stands for, if merging needs it; else None.
        orders: the scan paths of the model, over all positions.
        paths: the same over the kept tokens; computed from `positions` once for all blocks up to the next stage.
    """

    features: Tensor
    length: int
    protected: int | None = None
    positions: Tensor | None = None
    scores: Tensor | None = None
    alignment: Alignment = Alignment()
    pruned_sum: Tensor | None = None
    pruned_segments: Tensor | None = None
    members: Tensor | None = None
    sizes: Tensor | None = None
    orders: tuple[ScanOrder, ...] = ()
    paths: tuple[KeptPath, ...] | None = None

    def __post_init__(self) -> None:
        if self.paths is None:
            object.__setattr__(self, "paths", tuple(order.over(self.positions) for order in self.orders))

    def updated(self, features: Tensor, scores: Tensor | None = None) -> Tokens:
        """Return the same tokens with new features (and scores)."""
        return replace(self, features=features, scores=scores)

    def explicit_positions(self) -> Tensor:
        """Return the positions (batch, kept), also if nothing is pruned yet."""
        if self.positions is not None:
            return self.positions
        positions = torch.arange(self.features.shape[1], device=self.features.device)
        return positions.expand(self.features.shape[0], -1)

    def keep(self, index: Tensor) -> Tokens:
        """Return the tokens at `index` (batch, kept'), ascending indices into the current tokens."""
        features = gather_tokens(self.features, index)
        positions = self.explicit_positions().gather(1, index)
        sizes = None if self.sizes is None else self.sizes.gather(1, index)
        changed = {"features": features, "positions": positions, "sizes": sizes}
        return replace(self, **changed, paths=None, scores=None, members=None)

    def with_pruned_sum(self, before: Tokens, memory: Callable[[Tensor], Tensor]) -> Tokens:
        """Return these tokens with an updated `pruned_sum`.

        Args:
            before: the tokens that these were selected from.
            memory: function from features (batch, tokens, d_model) to the values to remember, of the same shape.
        """
        dtype = before.features.dtype  # the remembered values may be narrower
        total = memory(before.features).sum(1, dtype=dtype) - memory(self.features).sum(1, dtype=dtype)
        return replace(self, pruned_sum=total if before.pruned_sum is None else before.pruned_sum + total)

    def with_pruned_segments(self, before: Tokens, segments: int) -> Tokens:
        """Return these tokens, which were selected from `before`, with an updated `pruned_segments`."""
        kept = replace(self, members=self.find_members(segments))
        total = before.segment_sums(segments)[0] - kept.segment_sums(segments)[0]
        total = total if before.pruned_segments is None else before.pruned_segments + total
        return replace(kept, pruned_segments=total)

    def find_members(self, segments: int) -> Tensor:
        """Return (batch, segments, kept) whether each segment has each token, as zeros and ones."""
        index = self.explicit_positions() * segments // self.length
        member = index[:, None] == torch.arange(segments, device=index.device)[:, None]
        return member.to(self.features.dtype)

    def segment_sums(self, segments: int) -> tuple[Tensor, Tensor]:
        """Sum the features, scaled to a mean square of 1, over each of `segments` equal parts of all positions.

        Returns:
            The sums (batch, segments, d_model) and the numbers of tokens (batch, segments), in the dtype of the
            features.
        """
        # A product with a matrix of scales and zeros: it adds in the same order on every run, exports to ONNX, and
        # needs no scaled copy of the features, which took as long as the rest.
        members = self.find_members(segments) if self.members is None else self.members
        with full_precision(members.device):
            scale = torch.rsqrt(self.features.square().mean(-1) + EPSILON)
            return (members * scale[:, None]) @ self.features, members.sum(-1)

    def summarise(self, segments: int) -> Tensor:
        """Return what is known of all tokens, (batch, segments * (d_model + 1)).

        For each segment of the positions that is the sum of the tokens' scaled features, the pruned ones as they were
        last seen, and the number of tokens that are kept.
        """
        sums, counts = self.segment_sums(segments)
        if self.pruned_segments is not None:
            sums = sums + self.pruned_segments
        return torch.cat([sums.flatten(1), counts], dim=1)

    def pruned_mean(self) -> Tensor:
        """Return the mean (batch, d_model) of the remembered values of the pruned tokens; zero if there are none."""
        return self.pruned_sum / max(1, self.length - self.features.shape[1])

    def protected_index(self) -> Tensor:
        """Return the index (batch,) of the protected token among the kept ones, which are ordered by position."""
        return (self.explicit_positions() < self.protected).sum(1)

    def span_to_protected(self, reverse: bool) -> tuple[Tokens, int]:
        """Return the tokens of a raster path up to the protected one, and the index of the first of them.

        Images of a batch keep different numbers of tokens on either side, so the span ends at the last of their
        protected tokens; a scan is causal, and what comes later on the path does not change its result. Where shapes
        must not depend on values (under torch.compile and torch.export, and on a GPU, which would have to be waited
        for), the span is the longest that any image can have.
        """
        lowest, highest = self._protected_range()
        rows = slice(lowest, None) if reverse else slice(0, highest + 1)
        paths = tuple(replace(p, gaps=None if p.gaps is None else p.gaps[:, rows]) for p in self.paths)
        positions = None if self.positions is None else self.positions[:, rows]
        part = replace(self, features=self.features[:, rows], positions=positions, paths=paths, scores=None, sizes=None)
        return part, lowest if reverse else 0

    def _protected_range(self) -> tuple[int, int]:
        """Return the lowest and the highest index that the protected token of an image has."""
        if self.positions is None:
            return self.protected, self.protected
        count = int(self.features.shape[1])
        by_value = type(self.positions) is Tensor and self.positions.device.type == "cpu" and count > 0
        if by_value and len(self.positions) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            index = self.protected_index()
            return int(index.min()), int(index.max())
        return max(0, count - (self.length - self.protected)), min(self.protected, count - 1)
