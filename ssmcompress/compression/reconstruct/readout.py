"""Refit of the readout: the classifier and, with mean pooling, the correction of the logits.

With mean pooling, pruned tokens can stay in the mean with their last features, and a summary of all tokens
(`Tokens.summarise`), which contains more information than their mean, can correct the logits. Every variant is fitted,
and the one closest to the dense model on the held-out images is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...models.base import TokenModel
from ...models.class_corrections import max_readout_rank
from ...models.records import Fit
from ...pruning.tokens import Tokens
from .linear import LinearSums, full_rank
from .recording import find_name, record


@dataclass
class Way:
    """A variant of the readout.

    Attributes:
        pool: `Alignment.pool`. sums: rows of the classifier. fit: the record of its fit.
        weights: weights of the fitted classifier. correction: the correction of its logits, or None.
        kl: its divergence from the dense model in nats, summed over the held-out images.
    """

    pool: bool
    sums: LinearSums
    fit: Fit | None = None
    weights: dict[str, Tensor] | None = None
    correction: nn.Sequential | None = None
    kl: Tensor | None = None


class ReadoutRefit:
    """Refits the classifier of a pruned model, in place, to dense logits.

    Args:
        corrected: whether a correction of the logits is also fitted. The model must already have one, which may be zero
            (`zero_map`), so that its tokens carry the required sums.
    """

    def __init__(self, model: TokenModel, device: torch.device, corrected: bool = False):
        self.model, self.classifier = model, model.classifier
        self.name = find_name(model, self.classifier)
        self.old = model.readout_correction if corrected else None
        alignment = model.alignment
        # A plan without any alignment keeps its readout.
        choose = model.pools and bool(model.plan.stages) and (alignment.conv or alignment.scan)
        self.ways = []
        for pool in (False, True) if choose else (alignment.pool,):
            self.ways.append(Way(pool, LinearSums(self.classifier, device)))
            if corrected:
                matrix = full_rank(self.old)
                most = max_readout_rank(matrix.out_features, matrix.in_features)
                self.ways.append(Way(pool, LinearSums(self.classifier, device, matrix, most=most)))

    def add(self, logits: Tensor, tokens: Tokens, held: Tensor) -> None:
        """Add the rows of images.

        Args:
            logits: (images, classes) of the dense model. tokens: the pruned model's tokens after its last layer.
            held: (images,), whether an image is held out.
        """
        ones, inputs = torch.ones_like(logits[:, :1]), {}
        for pool in {way.pool for way in self.ways}:
            with record(self.model, [self.name]) as records:
                self.model.readout(set_pool(tokens, pool))
            inputs[pool] = records[self.name][0][:, None]
        summary = None if self.old is None else tokens.summarise(self.model.segments)
        for way in self.ways:
            read = None if way.sums.correction is None else summary
            way.sums.add(inputs[way.pool], logits[:, None], ones, held, read)

    def solve(self, all_reduce_sum: Callable[..., None]) -> None:
        """Fit the classifier for each variant of the readout."""
        old = copy.deepcopy(self.classifier.state_dict())
        for way in self.ways:
            all_reduce_sum(*way.sums.rows.sums())
            self.classifier.load_state_dict(old)
            result = way.sums.refit()
            way.fit = result.to_record(self.name)
            way.weights, way.correction = copy.deepcopy(self.classifier.state_dict()), way.sums.new_correction
            way.kl = torch.zeros((), dtype=torch.float64, device="cpu")
            if way.correction is None and way.sums.correction is not None:
                way.correction = self.old if any(linear.weight.any() for linear in self.old) else None

    def use(self, way: Way) -> None:
        """Install this variant of the readout."""
        self.classifier.load_state_dict(way.weights)
        self.model.readout_correction = way.correction

    def measure(self, logits: Tensor, tokens: Tokens, held: Tensor) -> None:
        """Compare each variant with the dense logits on the held-out images; arguments as for `add`."""
        for way in self.ways:
            self.use(way)
            outputs = self.model.readout(set_pool(tokens, way.pool))
            way.kl += self.model.task.total_distance(logits[held], outputs[held])

    def choose(self, all_reduce_sum: Callable[..., None]) -> tuple[Fit, float]:
        """Install the best variant; return its fit and its divergence in nats, summed over all held-out images."""
        kl = torch.stack([way.kl for way in self.ways])
        all_reduce_sum(kl)
        best = int(kl.argmin())
        way = self.ways[best]
        self.use(way)
        self.model.alignment = replace(self.model.alignment, pool=way.pool)
        self.model.plan = replace(self.model.plan, alignment=self.model.alignment)
        return way.fit, float(kl[best])


def set_pool(tokens: Tokens, pool: bool) -> Tokens:
    """Return the same tokens with another `Alignment.pool`."""
    return replace(tokens, alignment=replace(tokens.alignment, pool=pool))
