"""Closed-form refit of a linear layer: sums over rows, and ridge regression from these sums.

A row is an input x (inputs,) of a layer and its target t (outputs,), with a weight w. The regression needs only the
sums in `Rows`, so memory does not depend on the number of rows, and sums of several processes can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import NOT_FINITE, InputError
from ...models.class_corrections import max_rank
from ...models.records import Fit

# Candidate ridge strengths, relative to the inputs' mean power. For small Vims on 1,024 images, 1e-6 to 1 were chosen.
RIDGES = tuple(10.0**exponent for exponent in range(-6, 2))
# A layer is not refitted if its error is below this share of the targets' power, which is float32 rounding over several
# layers. On two trained Vims without pruning the error was up to 7e-14.
NEGLIGIBLE = 1e-10
# A ridge so strong that a weight keeps its old value.
FROZEN = 1e12
# The share of a refit's gain on the held-out rows that must remain after a low-rank approximation of part of the
# weight.
KEPT_GAIN = 0.98


@dataclass
class Rows:
    """Sums over rows, in float64.

    Attributes:
        gram: (inputs, inputs), sum of w x x^T. cross: (inputs, outputs), sum of w x t^T. power: (), sum of w |t|^2.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Rows:
        """Return empty sums on `device`, or on the CPU if the device has no float64, like Apple GPUs."""
        options = {"dtype": torch.float64, "device": "cpu" if torch.device(device).type == "mps" else device}
        return cls(*(torch.zeros(shape, **options) for shape in ((inputs, inputs), (inputs, outputs), ())))

    def add(self, x: Tensor, t: Tensor, w: Tensor) -> None:
        """Add rows x (rows, inputs), t (rows, outputs) with weights w (rows,)."""
        x, t, w = (value.to(self.gram.device).double() for value in (x, t, w))
        weighted = x * w[:, None]
        self.gram += weighted.T @ x
        self.cross += weighted.T @ t
        self.power += (w[:, None] * t.square()).sum()

    def include(self, other: Rows) -> None:
        """Add the sums over other rows, in place."""
        for total, value in zip(self.values(), other.values(), strict=True):
            total += value

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums, which may be changed in place."""
        return self.gram, self.cross, self.power

    def error(self, weight: Tensor) -> float:
        """Return the sum of w |weight x - t|^2 for a weight (outputs, inputs)."""
        W = weight.T
        return max(0.0, float((W * (self.gram @ W - 2 * self.cross)).sum() + self.power))


@dataclass(frozen=True)
class Refit:
    """The result of refitting a layer's weight.

    Attributes:
        weight: (outputs, inputs), float64; the old weight if no new one is better.
        ridges: for each group of inputs, the strength of the ridge towards the old weight, relative to the group's mean
            power; None for a group that keeps its old weight; empty if all groups do.
        before, after: error of the old weight and of `weight` on the held-out rows, relative to the targets' power.
        half: the error of a weight fitted in the same way on half of the images, with the same ridges and rank; None:
            not measured, or nothing was refitted.
    """

    weight: Tensor
    ridges: tuple[float | None, ...]
    before: float
    after: float
    half: float | None = None

    def to_record(self, name: str) -> Fit:
        """Return the record of this refit of the weight `name`."""
        return Fit(name, self.ridges, self.before, self.after, self.half)


def ridge_regression(rows: Rows, weight: Tensor, penalty: Tensor) -> Tensor:
    """Return the W that minimises sum w |W x - t|^2 + sum penalty * (W - weight)^2.

    Args:
        weight: (outputs, inputs). penalty: (inputs,), one for each column.

    Returns:
        (outputs, inputs).
    """
    matrix, target = rows.gram + penalty.diag(), rows.cross - rows.gram @ weight.T
    factor, failed = torch.linalg.cholesky_ex(matrix)  # twice as fast as a solver for any matrix
    return weight + (torch.linalg.solve(matrix, target) if failed else torch.cholesky_solve(target, factor)).T


def refit(fitted: Rows, held_out: Rows, weight: Tensor, groups: Sequence[int] | None = None) -> Refit:
    """Fit a ridge regression to the fitted rows, with ridges chosen on the held-out rows; keep it if it beats `weight`.

    Args:
        weight: (outputs, inputs).
        groups: sizes of consecutive groups of inputs that share a ridge; None: one group. Ridges are chosen group by
            group, while later groups keep their old weight.

    Raises:
        InputError: the rows are not finite.
    """
    for rows in (fitted, held_out):
        if not all(value.isfinite().all() for value in rows.values()):
            raise InputError(NOT_FINITE)
    old = weight.to(fitted.gram)
    power = float(held_out.power)
    error = held_out.error(old)
    unchanged = best = Refit(old, (), error / power if power else 0.0, error / power if power else 0.0)
    if not power or error <= NEGLIGIBLE * power:  # nothing to gain
        return unchanged
    groups = groups or [weight.shape[1]]
    for group in range(len(groups)):
        chosen = best.ridges or (None,) * len(groups)
        for ridge in RIDGES:
            ridges = (*chosen[:group], ridge, *chosen[group + 1 :])
            candidate = refit_with(fitted, old, groups, ridges)
            after = held_out.error(candidate) / power
            if after < best.after:
                best = Refit(candidate, ridges, unchanged.before, after)
    return best


def refit_with(rows: Rows, weight: Tensor, groups: Sequence[int], ridges: Sequence[float | None]) -> Tensor:
    """Return the ridge regression of the rows with a ridge for each group of inputs, as in `Refit`."""
    units = [part.mean().expand(len(part)) for part in rows.gram.diagonal().split(list(groups))]
    units = [torch.where(unit > 0, unit, 1) for unit in units]  # inputs that are always zero
    penalty = [(FROZEN if r is None else r) * unit for r, unit in zip(ridges, units, strict=True)]
    return ridge_regression(rows, weight, torch.cat(penalty))


def reduce_rank(
    full: Refit, fitted: Rows, held_out: Rows, columns: int, base: Tensor | None = None, most: int | None = None
) -> tuple[Refit, Tensor, Tensor]:
    """Replace the last columns of a refit's weight by the product of two low-rank factors, added to `base` if given.

    The rank is the first of 1, 2, 4, ... that keeps most of the gain on the held-out rows, or the largest allowed rank.
    The factors span the principal directions of the columns' contribution to the outputs.

    Args:
        most: the largest rank; None: `max_rank` of the columns.

    Returns:
        The refit with the product in its weight, then the factors, (outputs, rank) and (rank, columns).
    """
    rank, most = 1, most or max_rank(len(full.weight), columns)
    directions = principal_directions(full.weight, fitted, columns, base)
    while True:
        weight, outwards, inwards = project(full.weight, directions[:, :rank], columns, base)
        after = held_out.error(weight) / float(held_out.power)
        if rank == most or full.before - after >= KEPT_GAIN * (full.before - full.after):
            return replace(full, weight=weight, after=after), outwards, inwards
        rank = min(2 * rank, most)


def principal_directions(weight: Tensor, rows: Rows, columns: int, base: Tensor | None = None) -> Tensor:
    """Return the principal directions (outputs, outputs) of the contribution of the last columns, minus `base`.

    They are the columns of the result, sorted by decreasing power over the rows.
    """
    part = weight[:, -columns:] if base is None else weight[:, -columns:] - base
    return torch.linalg.eigh(part @ rows.gram[-columns:, -columns:] @ part.T).eigenvectors.flip(1)


def project(
    weight: Tensor, directions: Tensor, columns: int, base: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the last columns of a weight, minus `base`, on directions (outputs, rank); return it and the factors."""
    part = weight[:, -columns:]
    base = torch.zeros_like(part) if base is None else base
    inwards = directions.T @ (part - base)
    return torch.cat([weight[:, :-columns], base + directions @ inwards], dim=1), directions, inwards
