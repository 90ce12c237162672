"""The input and output type of every block: the features of the kept tokens of a batch and their positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import gather_tokens, segment_sums, topk_tokens
from .alignment import Alignment, KeptPath, ScanOrder

# Added to a mean square, as in the norms of the layers.
EPSILON = 1e-5


class Layout(NamedTuple):
    """The assignment of the kept tokens to segments, which are equal parts of all positions.

    Attributes:
        index: (batch, kept) segment of each token.
        place: (batch, 1, d_model) index of the protected token, for `gather` and `scatter`; None if there is none.
    """

    index: Tensor
    place: Tensor | None


class Dropped(NamedTuple):
    """The tokens dropped by a stage, with their last features.

    Attributes:
        positions: (batch, dropped) int64, strictly increasing.
        features: (batch, dropped, d_model), the residual stream.
        values: (batch, dropped, d_model), the value in output levels: the residual stream, or the last `update`.
    """

    positions: Tensor
    features: Tensor
    values: Tensor

    def __bool__(self) -> bool:
        """Whether there are any dropped tokens; there may be none in images with few tokens."""
        return self.positions.shape[1] > 0


class Level(NamedTuple):
    """The values of an output level, in groups: the kept tokens, and the tokens dropped by each stage.

    Attributes:
        positions: (batch, kept) int64; None while nothing is pruned. values: (batch, kept, d_model).
        dropped: the groups of dropped tokens, one for each stage, which may be empty.
    """

    positions: Tensor | None
    values: Tensor
    dropped: tuple[Dropped, ...] = ()

    def groups(self) -> list[Tensor]:
        """Return the values (batch, tokens, d_model) of each group, with the kept tokens last."""
        return [*(group.values for group in self.dropped), self.values]

    def fill(self, values: Sequence[Tensor] | None = None) -> Tensor:
        """Return the level at all positions, (batch, length, d_model).

        Args:
            values: replacement values of the groups, in the order of `groups`; None: their own values.
        """
        *others, kept = self.groups() if values is None else values
        filled = [(x, group.positions) for x, group in zip(others, self.dropped, strict=True) if group]
        if not filled:
            return kept
        filled.append((kept, self.positions))
        return place_tokens(*(torch.cat(parts, dim=1) for parts in zip(*filled, strict=True)))


def place_tokens(values: Tensor, positions: Tensor) -> Tensor:
    """Sort values (batch, length, width) by their positions (batch, length), which are a permutation."""
    index = positions[..., None].expand_as(values)
    return torch.zeros_like(values).scatter(1, index, values)


@dataclass(frozen=True)
class Tokens:
    """Kept tokens of a batch of images, always in their original order.

    Attributes:
        features: (batch, kept, d_model), the residual stream.
        length: number of tokens before any pruning; positions count from 0 to length - 1.
        protected: position of the token that is never pruned (the class token), or None.
        positions: (batch, kept) int64, strictly increasing; None while nothing is pruned. Fused tokens, which have no
            position, are numbered from `length` on.
        scores: (batch, kept), importance, if requested from the last block; else None.
        keys: (batch, kept, width), the mean key over the attention heads, if requested from the last block.
        alignment: which ops of the blocks compensate for pruned positions.
        pruned_sum: (batch, d_model), sum of the stored values of pruned tokens, if the model needs it; else None.
        pruned_segments: sums over the pruned tokens, in the form of `segment_sums`, with the counts of kept tokens, if
            the model needs them; else None.
        summary: the cached result of `summarise` for the current features; else None.
        layout: the layout of the kept tokens for the current positions, if the model needs it; else None.
        sizes: (batch, kept), number of tokens that each one represents, if merging needs it; else None.
        ranks: (batch, kept) int64, distinct; they give the order of the tokens in ToMe's sequence. None: the current
            order.
        prefix: number of tokens from `protected` on that are never pruned.
        fused: number of fused tokens that stages have added so far, some of which may have been pruned again.
        orders: the scan paths of the model over all positions.
        paths: the scan paths over the kept tokens, computed once from `positions` for all blocks up to the next stage.
        grid: (rows, columns) of the patches of these images, if it can differ from the model's; else None.
        levels: the output levels so far, in a model that reads out several.
        dropped: the tokens dropped by each stage so far, if the model also reads them out; else None.
        update: (batch, kept, d_model), the last block's update of the residual stream, if the model needs it; else
            None.
    """

    features: Tensor
    length: int
    protected: int | None = None
    positions: Tensor | None = None
    scores: Tensor | None = None
    keys: Tensor | None = None
    alignment: Alignment = Alignment()
    pruned_sum: Tensor | None = None
    pruned_segments: Tensor | None = None
    summary: Tensor | None = None
    layout: Layout | None = None
    sizes: Tensor | None = None
    ranks: Tensor | None = None
    prefix: int = 1
    fused: int = 0
    orders: tuple[ScanOrder, ...] = ()
    paths: tuple[KeptPath, ...] | None = None
    grid: tuple[int, int] | None = None
    levels: tuple[Level, ...] = ()
    dropped: tuple[Dropped, ...] | None = None
    update: Tensor | None = None

    def __post_init__(self) -> None:
        if self.paths is None:
            object.__setattr__(self, "paths", tuple(order.over(self.positions) for order in self.orders))

    def updated(self, features: Tensor, scores: Tensor | None = None, update: Tensor | None = None) -> Tokens:
        """Return the same tokens with new features (and scores, and `update`)."""
        return self._with(features=features, scores=scores, keys=None, update=update, summary=None)

    def corrected(self, features: Tensor) -> Tokens:
        """Return the same tokens with corrected features; `update` changes by the same amount."""
        update = None if self.update is None else self.update + (features - self.features)
        return self._with(features=features, update=update, summary=None)

    def _with(self, **changed) -> Tokens:
        """Copy with changed fields but the same `paths`; five times as fast as `dataclasses.replace` (20 us)."""
        if torch.compiler.is_compiling():
            return replace(self, **changed)
        tokens = object.__new__(type(self))
        tokens.__dict__.update(self.__dict__)
        tokens.__dict__.update(changed)
        return tokens

    def explicit_positions(self) -> Tensor:
        """Return the positions (batch, kept), even if nothing has been pruned yet."""
        if self.positions is not None:
            return self.positions
        positions = torch.arange(self.features.shape[1], device=self.features.device)
        return positions.expand(self.features.shape[0], -1)

    def keep(self, index: Tensor) -> Tokens:
        """Return the tokens at `index` (batch, kept'), ascending indices into the current tokens."""
        features = gather_tokens(self.features, index)
        positions = self.explicit_positions().gather(1, index)
        changed = {"features": features, "positions": positions, "scores": None, "keys": None}
        changed |= {k: v.gather(1, index) for k in ("sizes", "ranks") if (v := getattr(self, k)) is not None}
        if self.update is not None:
            changed["update"] = gather_tokens(self.update, index)
        if self.dropped is not None:
            changed["dropped"] = (*self.dropped, self._drop(index, int(self.features.shape[1] - index.shape[1])))
        return replace(self, **changed, paths=None, summary=None, layout=None)

    def with_fused(self, features: Tensor) -> Tokens:
        """Append a fused token without a position, features (batch, 1, d_model), in a model without scans."""
        positions = torch.full_like(self.positions[:, :1], self.length + self.fused)
        changed = {
            "features": torch.cat([self.features, features], dim=1),
            "positions": torch.cat([self.positions, positions], dim=1),
            "fused": self.fused + 1,
        }
        if self.sizes is not None:
            changed["sizes"] = torch.cat([self.sizes, torch.ones_like(self.sizes[:, :1])], dim=1)
        if self.ranks is not None:
            changed["ranks"] = torch.cat([self.ranks, self.ranks.amax(1, keepdim=True) + 1], dim=1)
        return replace(self, **changed, paths=None, summary=None, layout=None)

    def keep_all(self) -> Tokens:
        """Return the tokens after a stage that keeps all of them."""
        if self.dropped is None:
            return replace(self, scores=None, keys=None)
        nothing = self.features[:, :0]
        empty = Dropped(self.explicit_positions()[:, :0], nothing, nothing)
        return replace(self, scores=None, keys=None, dropped=(*self.dropped, empty))

    def _drop(self, kept: Tensor, count: int) -> Dropped:
        """Return the `count` tokens that are not at indices `kept`."""
        gone = torch.ones(self.features.shape[:2], device=kept.device).scatter(1, kept, torch.zeros_like(kept).float())
        index = topk_tokens(gone, count)
        features = gather_tokens(self.features, index)
        values = features if self.update is None else gather_tokens(self.update, index)
        return Dropped(self.explicit_positions().gather(1, index), features, values)

    def rejoin(self) -> Tokens:
        """Return all tokens, with the last features of the dropped ones, which must have been stored in `dropped`."""
        groups = [group for group in self.dropped if group]
        if not groups:
            return replace(self, dropped=())
        features = torch.cat([*(group.features for group in groups), self.features], dim=1)
        positions = torch.cat([*(group.positions for group in groups), self.positions], dim=1)
        changed = {"features": place_tokens(features, positions), "positions": None, "dropped": ()}
        changed |= dict.fromkeys(("sizes", "ranks", "scores", "keys", "update", "summary", "layout"))
        return replace(self, **changed, paths=None)

    def level(self) -> Level:
        """Return the output level of the tokens: `update` if it is stored, else the residual stream."""
        values = self.features if self.update is None else self.update
        return Level(self.positions, values, self.dropped or ())

    def with_pruned_sum(self, before: Tokens, memory: Callable[[Tensor], Tensor]) -> Tokens:
        """Return these tokens with an updated `pruned_sum`.

        Args:
            before: the tokens from which these were selected.
            memory: function from features (batch, tokens, d_model) to the values to store, of the same shape.
        """
        dtype = before.features.dtype  # the stored values may have a narrower dtype
        total = memory(before.features).sum(1, dtype=dtype) - memory(self.features).sum(1, dtype=dtype)
        return replace(self, pruned_sum=total if before.pruned_sum is None else before.pruned_sum + total)

    def with_pruned_segments(self, before: Tokens, segments: int) -> Tokens:
        """Return these tokens, which were selected from `before`, with an updated `pruned_segments`."""
        layout, seen = self.find_layout(segments), before.summarise(segments)
        pruned = segment_sums(self.features, layout.index, segments, EPSILON, seen, sign=-1)
        # The sums over all tokens are unchanged; only the counts of kept tokens change.
        sums = segments * self.features.shape[-1]
        summary = torch.cat([seen[:, :sums], pruned[:, sums:]], dim=1)
        return replace(self, layout=layout, pruned_segments=pruned, summary=summary)

    def with_sum_of_segments(self, segments: int) -> Tokens:
        """Return these tokens with `pruned_sum` derived from `pruned_segments`, if features are stored."""
        batch, width = self.features.shape[0], self.features.shape[-1]
        sums = self.pruned_segments[:, : segments * width].view(batch, segments, width)
        return replace(self, pruned_sum=sums.sum(1))

    def find_layout(self, segments: int) -> Layout:
        """Return the layout of the kept tokens in `segments` equal parts of all positions."""
        if self.layout is not None:
            return self.layout
        index = self._find_segments(segments)
        if self.protected is None:
            return Layout(index, None)
        return Layout(index, self.protected_index()[:, None, None].expand(-1, 1, self.features.shape[-1]))

    def summarise(self, segments: int) -> Tensor:
        """Return a summary of all tokens, (batch, segments * (d_model + 1)).

        For each segment of the positions it has the sum of the tokens' scaled features, with the last features of
        pruned tokens, and the number of kept tokens.
        """
        if self.summary is not None:
            return self.summary
        index = self._find_segments(segments) if self.layout is None else self.layout.index
        return segment_sums(self.features, index, segments, EPSILON, self.pruned_segments)

    def _find_segments(self, segments: int) -> Tensor:
        """Return the segment (batch, kept) of each token."""
        if self.positions is not None:
            index = self.positions * segments // self.length
            return index.clamp(max=segments - 1) if self.fused else index
        every = torch.arange(self.length, device=self.features.device) * segments // self.length
        return every.expand(self.features.shape[0], -1)

    def pruned_mean(self) -> Tensor:
        """Return the mean (batch, d_model) of the stored values of pruned tokens; zero if there are none."""
        return self.pruned_sum / max(1, self.length - self.features.shape[1])

    def protected_index(self) -> Tensor:
        """Return the index (batch,) of the protected token among the kept ones, which are ordered by position."""
        return (self.explicit_positions() < self.protected).sum(1)

    @property
    def protected_count(self) -> int:
        """The number of tokens that are never pruned."""
        return 0 if self.protected is None else self.prefix

    def is_protected(self, positions: Tensor) -> Tensor:
        """Return whether positions belong to protected tokens; there must be one."""
        if self.prefix == 1:
            return positions == self.protected
        return (positions >= self.protected) & (positions < self.protected + self.prefix)

    def span_to_protected(self, reverse: bool) -> tuple[Tokens, int]:
        """Return the tokens of a raster path up to the protected token, and the index of the first of them.

        The images of a batch keep different numbers of tokens on either side, so the span ends at the last of their
        protected tokens: scans are causal, so later tokens on the path do not change the result. Where shapes must not
        depend on values (under torch.compile and torch.export, and on a GPU, where it would force a synchronisation),
        the span is the longest that any image can have.
        """
        lowest, highest = self._protected_range()
        rows = slice(lowest, None) if reverse else slice(0, highest + 1)
        paths = tuple(replace(p, gaps=None if p.gaps is None else p.gaps[:, rows]) for p in self.paths)
        positions = None if self.positions is None else self.positions[:, rows]
        part = replace(self, features=self.features[:, rows], positions=positions, paths=paths, scores=None, sizes=None)
        return part, lowest if reverse else 0

    def _protected_range(self) -> tuple[int, int]:
        """Return the lowest and the highest index of the protected token over the images."""
        if self.positions is None:
            return self.protected, self.protected
        count = int(self.features.shape[1])
        by_value = type(self.positions) is Tensor and self.positions.device.type == "cpu" and count > 0
        if by_value and len(self.positions) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            index = self.protected_index()
            return int(index.min()), int(index.max())
        return max(0, count - (self.length - self.protected)), min(self.protected, count - 1)
