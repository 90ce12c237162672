"""Tokens: the kept features of a batch and their positions, the value that every block takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import gather_tokens
from ..ops.dispatch import full_precision
from .alignment import Alignment, KeptPath, ScanOrder


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
        pruned_segments: (batch, segments, d_model) the same for each segment of the positions; see `segment_sums`.
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
        return replace(self, features=features, positions=positions, paths=None, scores=None, sizes=sizes)

    def with_pruned_sum(self, before: Tokens, memory: Callable[[Tensor], Tensor]) -> Tokens:
        """Return these tokens with an updated `pruned_sum`.

        Args:
            before: the tokens that these were selected from.
            memory: function from features (batch, tokens, d_model) to the values to remember, of the same shape.
        """
        dtype = before.features.dtype  # the remembered values may be narrower
        total = memory(before.features).sum(1, dtype=dtype) - memory(self.features).sum(1, dtype=dtype)
        return replace(self, pruned_sum=total if before.pruned_sum is None else before.pruned_sum + total)

    def with_pruned_segments(self, before: Tokens, memory: Callable[[Tensor], Tensor], segments: int) -> Tokens:
        """Return these tokens with an updated `pruned_segments`; arguments as for `with_pruned_sum`."""
        total = before.segment_sums(memory, segments)[0] - self.segment_sums(memory, segments)[0]
        return replace(
            self, pruned_segments=total if before.pruned_segments is None else before.pruned_segments + total
        )

    def segment_sums(self, memory: Callable[[Tensor], Tensor], segments: int) -> tuple[Tensor, Tensor]:
        """Sum the remembered values of the tokens over each of `segments` equal parts of all positions.

        Returns:
            The sums (batch, segments, d_model) and the numbers of tokens (batch, segments), in the dtype of the
            features.
        """
        # A product with a matrix of zeros and ones: it adds in the same order on every run, and exports to ONNX.
        index, dtype = self.explicit_positions() * segments // self.length, self.features.dtype
        member = (index[:, None] == torch.arange(segments, device=index.device)[:, None]).to(dtype)
        values = memory(self.features).to(dtype)
        with full_precision(index.device):
            return member @ values, member.sum(-1)

    def summarise(self, memory: Callable[[Tensor], Tensor], segments: int) -> Tensor:
        """Return what is known of all tokens, (batch, segments * (d_model + 1)).

        For each segment of the positions that is the sum of the tokens' remembered values, the pruned ones as they
        were last seen, and the number of tokens that are kept.
        """
        sums, counts = self.segment_sums(memory, segments)
        if self.pruned_segments is not None:
            sums = sums + self.pruned_segments
        return torch.cat([sums.flatten(1), counts], dim=1)

    def pruned_mean(self) -> Tensor:
        """Return the mean (batch, d_model) of the remembered values of the pruned tokens; zero if there are none."""
        return self.pruned_sum / max(1, self.length - self.features.shape[1])

    def protected_features(self) -> Tensor:
        """Return the features (batch, d_model) of the protected token."""
        return gather_tokens(self.features, self.protected_index()[:, None])[:, 0]

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
