"""Combinations of axes applied on the images of a search: trimmed, pruned, reconstructed, measured, timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..compression.calibrate import calibrate
from ..compression.reconstruct import reconstruct
from ..compression.remember import hash_of, remembered
from ..compression.search.axes import run
from ..compression.search.combine import Combination
from ..compression.search.propose import fill_budget
from ..compression.trim.channels import channel_chains, cut_channels
from ..compression.trim.layers import drop_directions, drop_layers
from ..compression.trim.states import cut_states, state_chains
from ..compression.trim.trims import Trims, build_trimmed, fit_counts
from ..data.content import different
from ..evaluation.flops import corrections_share, flops, flops_as_run
from ..evaluation.latency import latency
from ..models.base import TokenModel
from ..models.rewrite import prune
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan, Stage
from ..tasks.base import mean_loss
from .steps import CHANNEL_IMAGES, STATE_IMAGES
from .trial import ALIGNMENTS, REPEATS, Trial

# Images for the reconstruction of a combination, and images for the metrics of a model that is only timed.
FIT_IMAGES, PROBE_IMAGES = 256, 64


@dataclass(frozen=True)
class Run:
    """A combination that was run.

    Attributes:
        combination: with the stages that fill the budget. flops: share of the dense FLOPs, corrections included.
        loss: on the images of the search, in nats.
    """

    combination: Combination
    flops: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "trims": self.combination.trims.to_dict(),
            "stages": [stage.to_dict() for stage in self.combination.stages],
            "loss": round(self.loss, 6),
            "expected": round(self.combination.expected, 6),
            "flops": round(self.flops, 6),
        }


# Key of a combination: two token plans may become the same stages when they fill a budget.
Key = tuple[Trims, tuple[Stage, ...]]


def key_of(combination: Combination) -> Key:
    """Return the key that identifies a combination of `AxesTrial.fill`."""
    return combination.trims, combination.stages


class AxesTrial:
    """Applies combinations on the images of a `Trial`, and caches what several of them need.

    Args:
        trial: the images, and the dense model. repair: whether models are reconstructed.
    """

    def __init__(self, trial: Trial, repair: bool):
        self.trial, self.repair = trial, repair
        self.model, self.request = trial.model, trial.request
        self.digests = different(trial.read.digests)
        self.chains: dict[tuple[str, Trims], Any] = {}
        self.dense_logits: Tensor | None = None
        self.sizes: dict[Trims, TokenModel] = {}
        self.tried: dict[Key, Run] = {}
        self.models: dict[Key, TokenModel] = {}
        self.latencies: dict[Key, float] = {}

    def reserve(self, combination: Combination) -> float:
        """Return the share of the FLOPs to reserve for the corrections of a combination."""
        if not combination.stages:
            return 0.0
        return corrections_share(self.model, [stage.after for stage in combination.stages], self.repair)

    def fill(self, combination: Combination, budget: float) -> Combination | None:
        """Return a combination with the stages that fill the budget; None if it cannot meet the budget."""
        if not combination.stages:
            return combination
        if combination.trims not in self.sizes:
            self.sizes[combination.trims] = build_trimmed(self.model, combination.trims)
        sizes = self.sizes[combination.trims]
        stages = fill_budget(sizes, combination.stages, budget - self.reserve(combination))
        return replace(combination, stages=stages) if stages else None

    def run(self, combination: Combination, budget: float) -> Run | None:
        """Apply a combination of `fill` and measure its loss, once; None if it exceeds the budget."""
        key = key_of(combination)
        if key not in self.tried:

            def carry_out() -> tuple[float, float]:
                model = self.models[key] = self.compress(combination)
                share = flops_as_run(model)["full"] / flops(self.model)["full"]
                return share, self.measure(model)

            share, loss = remembered(lambda: hash_of("combination", self.trial.key, *key), carry_out)
            self.tried[key] = Run(combination, share, loss)
        return self.tried[key] if self.tried[key].flops <= budget else None

    def model_of(self, combination: Combination) -> TokenModel:
        """Return the compressed model of a combination, rebuilt if it was not kept."""
        key = key_of(combination)
        return self.models[key] if key in self.models else self.compress(combination)

    def keep_models(self, combinations: Sequence[Combination]) -> None:
        """Free the models of all other runs, which may be large; the losses are kept."""
        kept = set(map(key_of, combinations))
        self.models = {key: model for key, model in self.models.items() if key in kept}

    def choose_alignment(self, best: Run) -> tuple[Alignment, list[dict[str, Any]]]:
        """Return the alignment with the smallest loss for a run's stages, and the losses of all as a JSON value."""
        if not self.request.choose_alignment or not best.combination.stages:
            return self.request.alignment, []
        losses = []
        for alignment in ALIGNMENTS:
            loss = best.loss
            if alignment != self.request.alignment:
                values = "alignment", self.trial.key, *key_of(best.combination), alignment
                loss = remembered(
                    partial(hash_of, *values),
                    lambda alignment=alignment: self.measure(self.compress(best.combination, alignment)),
                )
            losses.append((loss, alignment))
        chosen = min(losses, key=lambda pair: pair[0])[1]
        return chosen, [{"conv": a.conv, "scan": a.scan, "loss": round(loss, 6)} for loss, a in losses]

    def measure(self, model: TokenModel) -> float:
        """Return the mean loss of a model on the search images."""
        return mean_loss(self.model.task, run(model, self.trial.images), self.dense(), self.trial.labels)

    def compress(self, combination: Combination, alignment: Alignment | None = None) -> TokenModel:
        """Return the trimmed model, pruned, and reconstructed on a subset of the images.

        Args:
            alignment: None: that of the request.
        """
        trims, stages = combination.trims, combination.stages
        fitted, model = self.trial.others[:FIT_IMAGES], self.trim(trims)
        if stages:
            plan = Plan(stages, alignment or self.request.alignment, self.trial.gap, self.trial.seed)
            model = prune(model, calibrate(model, fitted, plan, gap=self.trial.gap))
        if not self.repair or (not trims and not stages):
            return model
        uncut = self.trim(replace(trims, channels=None))
        return reconstruct(model, self.model, fitted, reference=uncut if trims else None)

    def trim(self, trims: Trims) -> TokenModel:
        """Return the trimmed model before reconstruction."""
        if not trims:  # also works for a model whose layers cannot be trimmed
            return self.model
        model = drop_layers(drop_directions(self.model, dict(trims.directions)), trims.layers)
        if trims.states is not None:
            n = fit_counts(trims.states, [block.d_state for block in model.blocks])
            model = cut_states(model, self.state_chains(trims), n)
        if trims.channels is not None:
            e = fit_counts(trims.channels, [block.d_inner for block in model.blocks])
            model = cut_channels(model, self.channel_chains(trims), e)
        return model

    def state_chains(self, trims: Trims) -> Any:
        """Return the chains of the states of a model without what `trims` drops."""
        key = ("states", replace(trims, states=None, channels=None))
        if key not in self.chains:
            chains = state_chains(self.trim(key[1]), self.trial.others[:STATE_IMAGES])
            self.chains[key] = replace(chains, batches=self.digests)
        return self.chains[key]

    def channel_chains(self, trims: Trims) -> Any:
        """Return the chains of the channels of a model without what `trims` drops, its states included."""
        key = ("channels", replace(trims, channels=None))
        if key not in self.chains:
            chains = channel_chains(self.trim(key[1]), self.trial.others[:CHANNEL_IMAGES])
            self.chains[key] = replace(chains, batches=self.digests)
        return self.chains[key]

    def chains_of(self, trims: Trims) -> dict[str, Any]:
        """Return the chains for the steps of these trims, by step name.

        The steps must not compute their own chains, because they run on other images.
        """
        chains = {} if trims.states is None else {"states": self.state_chains(trims)}
        return chains if trims.channels is None else {**chains, "channels": self.channel_chains(trims)}

    def dense(self) -> Tensor:
        """Return the dense model's logits of the images to search on."""
        if self.dense_logits is None:
            self.dense_logits = run(self.model, self.trial.images)
        return self.dense_logits

    def latency_share(self, combination: Combination) -> float:
        """Return the latency at batch 1 of a combination of `fill`, as a share of the dense model's.

        It is measured without reconstruction, and once for each combination.
        """
        key = key_of(combination)
        if key not in self.latencies:
            model = self.trim(combination.trims)
            if combination.stages:
                plan = Plan(combination.stages, self.request.alignment, "bias", self.trial.seed)
                model = prune(model, calibrate(model, self.trial.others[:PROBE_IMAGES], plan, gap="bias"))
            models, image = {"dense": self.model, "pruned": model}, self.trial.images[:1].to(self.trial.device)
            times = latency(models, image, REPEATS)
            self.latencies[key] = times["pruned"] / times["dense"]
        return self.latencies[key]
