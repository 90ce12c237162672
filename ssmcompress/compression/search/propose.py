"""Plans for a budget from sensitivities: an exact search in an additive model of the loss.

The expected loss of a plan is the sum of the contributions of its stages: for a stage after layer l, from n tokens to
m, loss_l(m) - loss_l(n). Here loss_l is the sensitivity of that layer with its best metric, interpolated between the
measured counts (its square root is interpolated, which is nearly linear in the count). FLOPs are also a sum, over the
layers, of any function of the number of tokens. So dynamic programming over (layer, tokens, budget left) finds the
optimal plan of this additive model for each number of stages and each first layer; the caller validates it by running
the best few plans.

In a model with several sections (`TokenModel.sections`) all tokens are restored at the start of each section. Token
counts refer to the first section and stand for the same share of the tokens in any other section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...evaluation.flops import dense_flops, remaining_share
from ...models.base import TokenModel
from ...pruning.plan import MAX_RATIO, Stage, kept_count, share_removed
from .sensitivity import Sensitivity

MOST_STAGES = 3
# Number of steps of a budget. Rounding loses at most four of them for three stages; `fill_budget` recovers them.
STEPS = 1000
# Token counts on the grid, in addition to those at which the sensitivity was measured.
COUNTS = 40


@dataclass(frozen=True)
class Candidate:
    """The stages of a plan, and its expected loss according to the sensitivities."""

    stages: tuple[Stage, ...]
    expected: float


def propose(model: TokenModel, sensitivity: Sensitivity, budget: float, most: int = 12) -> list[Candidate]:
    """Return the plans with the lowest expected loss that leave at most `budget` of the dense FLOPs, best first.

    There is one for each first layer, number of tokens kept there (the three best) and number of later stages, at most
    `most` in total. The list is empty if the budget cannot be reached.
    """
    grid = _Grid(model, sensitivity, budget)
    losses: dict[tuple[Stage, ...], float] = {}
    for later in range(MOST_STAGES + len(model.sections) - 1):
        for first in range(len(grid.layers)):
            for path in grid.best_paths(first, later):
                stages = fill_budget(model, grid.stages(path), budget)
                if stages is not None:
                    losses[stages] = grid.expected_loss(stages)
    ranked = sorted(losses.items(), key=lambda item: (item[1], [s.after for s in item[0]], [s.ratio for s in item[0]]))
    return [Candidate(stages, loss) for stages, loss in ranked[:most]]


def prune_most(model: TokenModel, layers: Sequence[int], importance: str = "clip") -> tuple[Stage, ...]:
    """Return the stages after these layers that drop the most tokens: after the first one of each section."""
    found = (min((x for x in layers if s.first <= x <= s.last), default=None) for s in model.sections)
    return tuple(Stage(layer, MAX_RATIO, importance) for layer in found if layer is not None)


def list_before(model: TokenModel, stages: Sequence[Stage], kept: Sequence[int]) -> list[int]:
    """Return the number of tokens before each stage, given the numbers kept after each."""
    before: list[int] = []
    for index, stage in enumerate(stages):
        section = model.section_of(stage.after)
        follows = index > 0 and stages[index - 1].after >= section.first
        before.append(kept[index - 1] if follows else section.length)
    return before


def fill_budget(model: TokenModel, stages: Sequence[Stage], budget: float) -> tuple[Stage, ...] | None:
    """Scale the token counts of stages to fill the budget; None if the budget is too small for these stages."""
    protected, kept = model.protected_count, count_kept(model, stages)

    def scale(factor: float) -> tuple[Stage, ...]:
        scaled, counts = [], [max(2, protected + 1, int(count * factor)) for count in kept]
        for index, stage in enumerate(stages):
            before = list_before(model, stages, counts)[index]
            counts[index] = min(before, counts[index])
            if counts[index] < before:  # a stage that removes nothing is omitted
                scaled.append(Stage(stage.after, share_removed(before, counts[index], protected), stage.importance))
        return tuple(scaled)

    low, high = 1.0, 1.5
    if remaining_share(model, scale(low)) > budget:
        low, high = 0.5, 1.0
        if remaining_share(model, scale(low)) > budget:
            return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if remaining_share(model, scale(middle)) <= budget else (low, middle)
    best = scale(low)
    # The remaining budget is less than one token per stage: add tokens to one stage at a time, the last first.
    while (more := _add_token(model, best, budget)) is not None:
        best = more
    return best or None


def _add_token(model: TokenModel, stages: Sequence[Stage], budget: float) -> tuple[Stage, ...] | None:
    """Add one token to the last stage where the budget and the stage before allow it; None if there is none."""
    protected, counts = model.protected_count, count_kept(model, stages)
    for index in reversed(range(len(stages))):
        kept = list(counts)
        kept[index] += 1
        before = list_before(model, stages, kept)
        if kept[index] >= before[index]:
            continue
        candidate = tuple(
            replace(stage, ratio=share_removed(many, few, protected))
            for stage, many, few in zip(stages, before, kept, strict=True)
        )
        if remaining_share(model, candidate) <= budget:
            return candidate
    return None


def count_kept(model: TokenModel, stages: Sequence[Stage]) -> list[int]:
    """Return the number of tokens kept after each stage."""
    counts = model.counts_for(stages)
    return [counts[model.count_index(stage.after) + 1] for stage in stages]


class _Grid:
    """The dynamic program for one model, sensitivity and budget."""

    def __init__(self, model: TokenModel, sensitivity: Sensitivity, budget: float):
        self.model, self.sensitivity = model, sensitivity
        self.layers = sensitivity.layers
        length = model.length
        fewest = max(2, model.protected_count + 1)
        span = np.linspace(length - 1, fewest, max(0, min(COUNTS, length - fewest)))
        extra = span.round().astype(int).tolist()
        self.counts = sorted({*sensitivity.kept, *extra}, reverse=True)
        self.loss = np.stack([self._interpolate(row.numpy()) for row in sensitivity.loss])  # (layers, metrics, counts)
        self.least = self.loss.min(1)
        self.totals, fixed = self._measure_costs()
        self.unit = max(budget - fixed, 1e-9) / STEPS
        self.tables: dict[tuple[int, int], np.ndarray] = {}

    def _measure_costs(self) -> tuple[np.ndarray, float]:
        """Return the costs of token counts, and the cost independent of them, as shares of the dense FLOPs.

        The first is (places + 1, counts + 1): row i has the cost of the first i entries of `token_counts` for all
        tokens (column 0) and for each of `counts`. FLOPs must be a sum over these entries; each term need not be
        linear.
        """
        full, dense = self.model.counts_for(()), dense_flops(self.model)["full"] * 1e9

        def total(place: int, count: int) -> float:
            counts = [*full[:place], count, *full[place + 1 :]]
            return sum(self.model.flops_by_part(counts, "full").values()) / dense

        run, rows = total(0, full[0]), []
        for place, length in enumerate(full):
            # For a layer with linear FLOPs, the cost per token.
            each, counts = run - total(place, length - 1), [self.count_in(length, count) for count in self.counts]
            rows.append([each * length, *(total(place, count) - run + each * length for count in counts)])
        costs = np.array(rows)
        return np.concatenate([np.zeros((1, costs.shape[1])), costs.cumsum(0)]), run - costs[:, 0].sum()

    def count_in(self, length: int, count: int) -> int:
        """Return the token count of a section of `length` that keeps the same share as `count` in the first section."""
        protected = self.model.protected_count
        return kept_count(length, share_removed(self.model.length, count, protected), protected)

    def _interpolate(self, loss: np.ndarray) -> np.ndarray:
        """Interpolate losses (metrics, measured counts) -> (metrics, counts), made monotone in the removed tokens."""
        measured = np.array([self.model.length, *self.sensitivity.kept], dtype=float)
        roots = np.sqrt(np.maximum(np.concatenate([np.zeros((len(loss), 1)), loss], 1), 0))
        roots = np.maximum.accumulate(roots, 1)
        return np.stack([np.interp(-np.array(self.counts, dtype=float), -measured, row) ** 2 for row in roots])

    def cost(self, start: int, stop: int | None, row: int | None) -> int:
        """Return the cost of layers start + 1 to stop in steps of the budget, rounded up.

        Args:
            stop: None: to the end, including the readout. row: the row of the token count, up to the end of the section
                of layer `start`; None: all tokens.
        """
        model, column = self.model, 0 if row is None else row + 1
        first = model.count_index(start) + 1 if start else 0
        last = len(self.totals) - 1 if stop is None else model.count_index(stop) + 1
        end = model.count_index(model.section_of(max(1, start)).last) + 2  # include the tokens after the last layer
        middle = max(first, min(last, end))
        spent = self.totals[middle, column] - self.totals[first, column] + self.totals[last, 0] - self.totals[middle, 0]
        return int(np.ceil(spent / self.unit - 1e-9))

    def rows_after(self, place: int, after: int, row: int) -> tuple[slice, float]:
        """Return the counts that a stage at candidate index `after` can leave, and the loss before it.

        Args:
            place, row: candidate index of the stage before it, and the row of the count that it leaves.
        """
        section = self.model.section_of(self.layers[after])
        if self.layers[place] >= section.first:
            return slice(row + 1, None), float(self.least[after, row])
        return slice(0, None), 0.0

    def table(self, place: int, later: int) -> np.ndarray:
        """Return (counts, steps + 1): the minimum additional loss with at most `later` more stages.

        Rows are token counts after the layer at candidate index `place`, columns the remaining steps of the budget.
        """
        if (place, later) in self.tables:
            return self.tables[place, later]
        least = np.full((len(self.counts), STEPS + 1), np.inf)
        for row in range(len(self.counts)):
            rest = self.cost(self.layers[place], None, row)
            if rest <= STEPS:
                least[row, rest:] = 0
            if not later:
                continue
            for after in range(place + 1, len(self.layers)):
                spent = self.cost(self.layers[place], self.layers[after], row)
                rows, lost = self.rows_after(place, after, row)
                if spent > STEPS or rows.start >= len(self.counts):
                    continue
                added = np.maximum(0, self.least[after, rows] - lost)
                tail = self.table(after, later - 1)[rows, : STEPS + 1 - spent]
                best = (added[:, None] + tail).min(0)
                least[row, spent:] = np.minimum(least[row, spent:], best)
        self.tables[place, later] = least
        return least

    def best_paths(self, first: int, later: int) -> list[list[tuple[int, int]]]:
        """Return paths [(place, row of the count)] from a first layer, for the three best token counts there."""
        spent = self.cost(0, self.layers[first], None)
        if spent > STEPS:
            return []
        total = self.least[first] + self.table(first, later)[:, STEPS - spent]
        rows = [int(row) for row in np.argsort(total, kind="stable")[:3] if np.isfinite(total[row])]
        return [self._backtrack(first, row, STEPS - spent, later) for row in rows]

    def _backtrack(self, place: int, row: int, left: int, later: int) -> list[tuple[int, int]]:
        """Return the path with the lowest loss from a table entry."""
        target = self.table(place, later)[row, left]
        if target > 0 or self.cost(self.layers[place], None, row) > left:
            for after in range(place + 1, len(self.layers)) if later else ():
                rest = left - self.cost(self.layers[place], self.layers[after], row)
                if rest < 0:
                    continue
                rows, lost = self.rows_after(place, after, row)
                added = np.maximum(0, self.least[after, rows] - lost)
                totals = added + self.table(after, later - 1)[rows, rest]
                if len(totals) and np.isfinite(target) and totals.min() <= target + 1e-12:
                    return [(place, row), *self._backtrack(after, rows.start + int(totals.argmin()), rest, later - 1)]
        return [(place, row)]

    def stages(self, path: Sequence[tuple[int, int]]) -> list[Stage]:
        """Convert a path to stages, each with the best metric for its layer and count."""
        protected, made = self.model.protected_count, []
        for place, row in path:
            metric = self.sensitivity.metrics[int(self.loss[place, :, row].argmin())]
            made.append(Stage(self.layers[place], 0.0, metric))
        lengths = [self.model.section_of(stage.after).length for stage in made]
        kept = [self.count_in(length, self.counts[row]) for length, (_, row) in zip(lengths, path, strict=True)]
        before = list_before(self.model, made, kept)
        return [
            replace(stage, ratio=share_removed(many, min(few, many), protected))
            for stage, many, few in zip(made, before, kept, strict=True)
        ]

    def expected_loss(self, stages: Sequence[Stage]) -> float:
        """Return the expected loss of stages, whose counts may lie between those of the grid."""
        kept = count_kept(self.model, stages)
        grid = -np.array([self.model.length, *self.counts], dtype=float)
        total = 0.0
        for stage, many, few in zip(stages, list_before(self.model, stages, kept), kept, strict=True):
            curve = np.concatenate([[0.0], self.least[self.layers.index(stage.after)]])
            scale = self.model.length / self.model.section_of(stage.after).length
            n, m = np.interp([-many * scale, -few * scale], grid, curve)
            total += max(0.0, m - n)
        return float(total)
