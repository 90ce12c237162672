"""Refitting a linear layer in closed form: sums over rows, and the ridge regression that they determine.

Rows are pairs of what a layer receives, x (inputs,), and what it should give, t (outputs,), with a weight each. All
that regression needs of them are the sums in `Rows`, so their number does not matter for memory, and sums of several
processes add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import NOT_FINITE, InputError

# Shares of the inputs' mean power. Small Vims on 1,024 images chose 1e-6 to 1.
RIDGES = tuple(10.0**exponent for exponent in range(-6, 2))
# A layer whose outputs miss their targets by less than this share of the targets' power, the rounding of float32 over
# some layers, has nothing to gain. Found on two trained Vims that prune nothing: up to 7e-14.
NEGLIGIBLE = 1e-10
# A ridge that holds a weight where it is.
HELD = 1e12
# Of what a refit gains on held-out rows, the share that is left when a part of the weight is brought to a lower rank.
KEPT_GAIN = 0.98


@dataclass
class Rows:
    """Sums over rows, float64.

    Attributes:
        gram: (inputs, inputs), sum of w x x^T. cross: (inputs, outputs), sum of w x t^T. power: (), sum of w |t|^2.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def none(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Rows:
        """No rows yet; on `device`, or on the CPU where that has no float64, as Apple's GPUs."""
        options = {"dtype": torch.float64, "device": "cpu" if torch.device(device).type == "mps" else device}
        return cls(*(torch.zeros(shape, **options) for shape in ((inputs, inputs), (inputs, outputs), ())))

    def add(self, x: Tensor, t: Tensor, w: Tensor) -> None:
        """Take in rows x (rows, inputs), t (rows, outputs) of weights w (rows,)."""
        x, t, w = (value.to(self.gram.device).double() for value in (x, t, w))
        weighted = x * w[:, None]
        self.gram += weighted.T @ x
        self.cross += weighted.T @ t
        self.power += (w[:, None] * t.square()).sum()

    def error(self, weight: Tensor) -> float:
        """Sum of w |weight x - t|^2, for a weight (outputs, inputs)."""
        W = weight.T
        return max(0.0, float((W * (self.gram @ W - 2 * self.cross)).sum() + self.power))


@dataclass(frozen=True)
class Refit:
    """What became of a layer's weight.

    Attributes:
        weight: (outputs, inputs), float64; the old one where no new one is better.
        ridges: per group of inputs, the share of their mean power that the new weight was held to the old one with,
            None for a group that is better left alone; empty if all of the old weight is kept.
        before, after: error of the old weight and of this one on the held-out rows, as shares of the targets' power.
    """

    weight: Tensor
    ridges: tuple[float | None, ...]
    before: float
    after: float


def ridge_regression(rows: Rows, weight: Tensor, penalty: Tensor) -> Tensor:
    """The W that minimises sum w |W x - t|^2 + sum penalty * (W - weight)^2.

    Args:
        weight: (outputs, inputs). penalty: (inputs,), of each column.

    Returns:
        (outputs, inputs).
    """
    return weight + torch.linalg.solve(rows.gram + penalty.diag(), rows.cross - rows.gram @ weight.T).T


def refit(fitted: Rows, held_out: Rows, weight: Tensor, groups: Sequence[int] | None = None) -> Refit:
    """The ridge regression of the fitted rows with the ridges that do best on the held-out ones, if it beats `weight`.

    Args:
        weight: (outputs, inputs). groups: how many inputs, from the first to the last, have a ridge in common; they
            are chosen one after the other, a group whose turn has not come being held to its old weight. None: all.

    Raises:
        InputError: rows that are not finite.
    """
    for rows in (fitted, held_out):
        if not all(value.isfinite().all() for value in (rows.gram, rows.cross, rows.power)):
            raise InputError(NOT_FINITE)
    old = weight.to(fitted.gram)
    power = float(held_out.power)
    error = held_out.error(old)
    kept = best = Refit(old, (), error / power if power else 0.0, error / power if power else 0.0)
    if not power or error <= NEGLIGIBLE * power:  # nothing to gain
        return kept
    groups = groups or [weight.shape[1]]
    units = [part.mean().expand(len(part)) for part in fitted.gram.diagonal().split(list(groups))]
    units = [torch.where(unit > 0, unit, 1) for unit in units]  # inputs that are always zero
    for group in range(len(groups)):
        chosen = best.ridges or (None,) * len(groups)
        for ridge in RIDGES:
            ridges = (*chosen[:group], ridge, *chosen[group + 1 :])
            penalty = [(HELD if r is None else r) * unit for r, unit in zip(ridges, units, strict=True)]
            found = ridge_regression(fitted, old, torch.cat(penalty))
            after = held_out.error(found) / power
            if after < best.after:
                best = Refit(found, ridges, kept.before, after)
    return best


def reduce_rank(found: Refit, fitted: Rows, held_out: Rows, columns: int) -> tuple[Refit, Tensor, Tensor]:
    """A refit whose last columns are the product of two thin matrices.

    Of the ranks 1, 2, 4, ... up to half the columns (more would cost more than the whole matrix) it is the first that
    keeps most of the gain on the held-out rows; the directions are those that the columns add most along.

    Returns:
        The refit with the product in its weight, then its factors, (outputs, rank) and (rank, columns).
    """
    part, gram = found.weight[:, -columns:], fitted.gram[-columns:, -columns:]
    directions = torch.linalg.eigh(part @ gram @ part.T).eigenvectors.flip(1)
    rank, most = 1, max(1, columns // 2)
    while True:
        outwards = directions[:, :rank]
        inwards = outwards.T @ part
        weight = torch.cat([found.weight[:, :-columns], outwards @ inwards], dim=1)
        after = held_out.error(weight) / float(held_out.power)
        if rank == most or found.before - after >= KEPT_GAIN * (found.before - found.after):
            return replace(found, weight=weight, after=after), outwards, inwards
        rank = min(2 * rank, most)
