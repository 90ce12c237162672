"""Selection of the best weights by the recipe's objective on held-out images."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ... import processes
from ...evaluation.measure import measure
from ...models.base import TokenModel


class BestWeights:
    """The weights with the best score on the held-out images so far; without such images, the last weights.

    Args:
        held_out: batches of images, or None. dense: the dense model, or None.
        teacher_weight: weight of the teacher in the score; the labels have the remaining weight.

    Attributes:
        weights: a state dict on the CPU; None before the first candidate.
        score: their score, lower is better. epoch: their epoch; 0: the initial weights.
        averaged: whether they are the moving average.
    """

    def __init__(self, held_out: Any, dense: nn.Module | None, teacher_weight: float):
        self.held_out, self.dense, self.teacher_weight = held_out, dense, teacher_weight
        self.weights: dict[str, Tensor] | None = None
        self.score, self.epoch, self.averaged = math.inf, 0, False

    def update(self, candidates: dict[str, TokenModel], epoch: int) -> tuple[str, dict[str, Any] | None]:
        """Evaluate candidates, and keep the weights of the best one unless earlier weights were better.

        Args:
            candidates: models by name, "weights" or "average".

        Returns:
            The name of the best candidate, and its metrics; None without held-out images.
        """
        figures: dict[str, dict[str, Any]] = {}
        if self.held_out is not None:
            models = candidates | ({"dense": self.dense} if self.dense is not None else {})
            results = measure(models, self.held_out, distributed=processes.count() > 1)
            figures = {name: results[name].to_dict() for name in candidates}
        scores = {name: self._compute_score(figures.get(name)) for name in candidates}
        name = min(scores, key=scores.__getitem__)
        if scores[name] < self.score or self.weights is None or self.held_out is None:
            self.score, self.epoch, self.averaged = scores[name], epoch, name == "average"
            self.weights = {k: v.detach().cpu().clone() for k, v in candidates[name].state_dict().items()}
        return name, figures.get(name)

    def _compute_score(self, figures: dict[str, Any] | None) -> float:
        """Return the recipe's objective on the held-out images, without augmentation."""
        if figures is None:
            return -math.inf
        weight = self.teacher_weight
        score = (weight * figures["kl"] if weight else 0.0) + ((1 - weight) * figures["loss"] if weight < 1 else 0.0)
        return score if math.isfinite(score) else math.inf
