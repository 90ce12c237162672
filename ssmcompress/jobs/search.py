"""A budget in, a plan out: measures sensitivities, searches, and runs the best few plans to choose one."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..compression.calibrate import gap_deltas
from ..compression.saliency import fit_probes
from ..compression.search.propose import Candidate, propose
from ..compression.search.proxy_loss import Collector, average_losses, sum_losses
from ..compression.search.sensitivity import METRICS, Sensitivity, candidate_layers, measure_sensitivity
from ..data.batches import Batches, LabelledBatch, sample_indices
from ..data.content import different
from ..errors import BudgetError, InputError
from ..evaluation.flops import corrections_share, remaining_share, smallest_share
from ..evaluation.latency import latency
from ..models.base import TokenModel
from ..models.rewrite import prune
from ..progress import line, track
from ..pruning.alignment import Alignment
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import MAX_RATIO, Calibration, Plan, Stage
from .images import CalibrationImages
from .requests import SEARCH_IMAGES, DataOptions

# Plans that are run before one is chosen.
RUN = 12
# Tries to meet a latency, and where in the request it is to come out: timings differ by a few percent.
ATTEMPTS = 8
REPEATS = 31
SLACK = (0.955, 0.99)


@dataclass(frozen=True)
class SearchRequest:
    """What a search is asked for.

    Attributes:
        flops, latency: share of the dense model's to keep; exactly one of them.
        stages, importance: the layers and the metric to choose from; None: all.
        alignment: as in a plan. labels: judge by labels, not by the dense model's outputs.
        sensitivity: file measured earlier, or None. images: to measure on at most.
    """

    flops: float | None = None
    latency: float | None = None
    stages: tuple[int, ...] | None = None
    importance: str | None = None
    alignment: Alignment = Alignment()
    labels: bool = False
    sensitivity: str | None = None
    images: int = SEARCH_IMAGES


@dataclass(frozen=True)
class SearchResult:
    """A plan, the sensitivities that it was found with, and a JSON object that describes the search."""

    plan: Plan
    sensitivity: Sensitivity
    record: dict[str, Any] = field(repr=False)


def search_plan(
    model: TokenModel,
    request: SearchRequest,
    images: CalibrationImages,
    data: DataOptions,
    *,
    gap: str,
    reconstruct: bool,
) -> SearchResult:
    """Search for the plan that is expected to lose least within a budget.

    Sensitivities (`ssmcompress.compression.search.sensitivity`) are measured on every second of the calibration images;
    gap deltas and probes come from the others. The best plans of the search are then run on the former, and so are
    other metrics at the stages of the best one. All of this happens before reconstruction, see
    `ssmcompress.compression.search.proxy_loss`.

    Args:
        images: the images to calibrate on. data: how they were chosen and are read.
        gap: gap source. reconstruct: whether the model will be reconstructed, for which a budget leaves room.

    Raises:
        BudgetError: the budget is out of reach. InputError: a request or a file that cannot be used.
    """
    begin = time.perf_counter()
    sensitivity = _read_sensitivity(model, request, reconstruct) if request.sensitivity is not None else None
    depth = len(model.blocks)
    candidates = sensitivity.layers if sensitivity else candidate_layers(depth)
    layers = tuple(request.stages or candidates)
    if not layers:
        raise InputError(f"a model of {depth} layer has no place to prune: nothing comes after it")
    Plan(tuple(Stage(a, 0.0, request.importance or "clip") for a in layers), request.alignment).validate(depth)
    metrics = (request.importance,) if request.importance else sensitivity.metrics if sensitivity else METRICS
    reserve = corrections_share(model, layers) if reconstruct else 0.0
    lowest = smallest_share(model, layers) + reserve
    if request.flops is not None:
        line(f"reachable: {lowest:.1%} to 100% of the FLOPs")
        _check_range(request.flops, lowest, "FLOPs")
    trial = _Trial(model, request, images, data, gap=gap, refit=reconstruct)
    line(f"{sensitivity.data['images'] if sensitivity else len(trial.images)} images to search on, of {trial.name}")
    plan = trial.fit(layers if any(IMPORTANCES[metric].probe for metric in metrics) else ())
    measuring = time.perf_counter()
    if sensitivity is None:
        sensitivity = measure_sensitivity(
            model,
            LabelledBatch(trial.images, trial.labels),
            plan=plan,
            layers=layers,
            metrics=metrics,
            refit=reconstruct,
            name=trial.name,
            distributed=trial.several,
        )
        trial.read.sync()
        sensitivity = replace(sensitivity, digests=different(trial.read.digests))
        line(f"sensitivity measured in {time.perf_counter() - measuring:.0f} s")
    measured = time.perf_counter() - measuring
    usable = sensitivity.select(request.stages, (request.importance,) if request.importance else None)
    latency_range = None
    if request.flops is not None:
        budget = request.flops - reserve
        trials = trial.run(propose(model, usable, budget, RUN), plan, usable.metrics, budget)
    else:
        budget = request.latency
        trials, latency_range = _for_latency(model, usable, plan, request.latency, lowest, trial)
    if not trials:
        raise BudgetError(f"no plan with stages after {','.join(map(str, layers))} comes close to {budget:.1%}")
    best = trials[0]
    record = {
        "asked": {"flops": request.flops, "latency": request.latency},
        "reachable": {"flops": lowest, "latency": latency_range["lowest"] if latency_range else None},
        "objective": usable.objective,
        "refit": usable.refit,
        "data": sensitivity.data,
        "loss": best["loss"],
        "expected": best["expected"],
        "flops": best["flops"],
        "latency": latency_range["reached"] if latency_range else None,
        "tried": trials,
        "seconds": {"sensitivity": round(measured, 2), "all": round(time.perf_counter() - begin, 2)},
    }
    stages = tuple(Stage(**stage) for stage in best["stages"])
    return SearchResult(Plan(stages, request.alignment, seed=data.seed), sensitivity, record)


def _read_sensitivity(model: TokenModel, request: SearchRequest, refit: bool) -> Sensitivity:
    """The sensitivity of a file, if it was measured for what is asked for now."""
    sensitivity = Sensitivity.read(request.sensitivity)
    sensitivity.check_model(model)
    objective = "labels" if request.labels else "kl"
    for what, ours, theirs in (
        ("alignment", request.alignment, sensitivity.alignment),
        ("objective", objective, sensitivity.objective),
        ("choice about reconstruction", refit, sensitivity.refit),
    ):
        if ours != theirs:
            raise InputError(f"{request.sensitivity} was measured with another {what}: leave it out to measure anew")
    return sensitivity


def _check_range(share: float, lowest: float, what: str) -> None:
    if not lowest <= share < 1:
        raise BudgetError(f"{share:.1%} of the {what} is out of reach: pruning leaves from {lowest:.1%} to below 100%")


class _Trial:
    """The images of a search, and plans run on them."""

    def __init__(
        self,
        model: TokenModel,
        request: SearchRequest,
        images: CalibrationImages,
        data: DataOptions,
        *,
        gap: str,
        refit: bool,
    ):
        self.model, self.seed, self.request, self.refit = model, data.seed, request, refit
        self.several = processes.count() > 1
        if self.several and request.latency is not None:
            raise InputError("a latency is searched for in one process: start ssmcompress without a launcher")
        if images.count < processes.count():
            raise InputError(f"{images.count} images to search on in {processes.count()} processes: expected one each")
        self.name = images.source.name
        if request.labels and images.source.labels is None:
            raise InputError(f"{self.name} has no labels to judge by")
        index = images.calibration.index
        chosen = sample_indices(len(index), min(len(index), 2 * request.images), data.seed)[0]
        self.read = replace(images.calibration, index=[index[i] for i in chosen], unreadable=set())
        pictures, labels = _read(self.read)
        measured = slice(0, None, 2)
        self.images = pictures[measured][: request.images]
        self.labels = labels[measured][: request.images] if request.labels else None
        self.others = pictures[1::2] if len(pictures) > 1 else pictures
        self.gap = gap if request.alignment.scan else "bias"
        self.dense: Tensor | None = None
        self.device, self.size = next(model.parameters()).device, model.chunk_size()

    def fit(self, layers: Sequence[int]) -> Plan:
        """A plan without stages, calibrated on the images that are not measured on."""
        model = self.model
        deltas = gap_deltas(model, self.others, self.gap, self.several)
        probes = fit_probes(model, self.others, layers, distributed=self.several) if layers else ()
        calibration = Calibration(self.name, len(self.others), deltas, probes=probes)
        return Plan((), self.request.alignment, self.gap, self.seed, calibration)

    @torch.no_grad()
    def loss(self, plan: Plan) -> float:
        """Mean loss of a plan that is run."""
        if self.dense is None:
            self.dense = torch.cat([self.model(part.to(self.device)).cpu() for part in self.images.split(self.size)])
        pruned = prune(self.model, plan)
        with Collector(pruned) as received:
            for part in self.images.split(self.size):
                pruned(part.to(self.device))
        add = functools.partial(processes.all_reduce_sum, device=self.device) if self.several else None
        features = received.take()
        total = sum_losses(pruned.classifier, features, self.dense, self.labels, refit=self.refit, add=add)
        return float(average_losses([total], len(self.images), add)[0])

    def run(
        self, proposed: Sequence[Candidate], plan: Plan, metrics: Sequence[str], budget: float
    ) -> list[dict[str, Any]]:
        """The plans with their loss on the images, the best first: those proposed, then other metrics for the best."""
        results: dict[tuple[Stage, ...], dict[str, Any]] = {}

        def try_plan(stages: tuple[Stage, ...], expected: float | None) -> None:
            if stages not in results and remaining_share(self.model, stages) <= budget:
                results[stages] = {
                    "stages": [stage.to_dict() for stage in stages],
                    "loss": round(self.loss(replace(plan, stages=stages)), 6),
                    "expected": None if expected is None else round(expected, 6),
                    "flops": round(remaining_share(self.model, stages), 6),
                }

        def best() -> tuple[Stage, ...]:
            return min(results, key=lambda stages: results[stages]["loss"])

        for candidate in track(proposed, "running the best plans", len(proposed)):
            try_plan(candidate.stages, candidate.expected)
        if not results:
            return []
        for index in range(len(best())):
            stages = best()
            for metric in metrics:
                changed = list(stages)
                if index < len(changed):
                    changed[index] = replace(changed[index], importance=metric)
                    try_plan(tuple(changed), None)
        return sorted(results.values(), key=lambda value: value["loss"])

    def latency_share(self, plan: Plan) -> float:
        """Latency of a plan's model over the dense one's at batch 1, medians of interleaved runs."""
        models = {"dense": self.model, "pruned": prune(self.model, plan)}
        times = latency(models, self.images[:1].to(self.device), REPEATS)
        return times["pruned"] / times["dense"]


def _read(batches: Batches) -> tuple[Tensor, Tensor | None]:
    """All images, prepared, and their labels."""
    read = list(batches)
    labels = None if read[0].labels is None else torch.cat([batch.labels for batch in read])
    return torch.cat([batch.images for batch in read]), labels


# ------------------------------------------------------------------------------------------------------ latency


def _for_latency(
    model: TokenModel, sensitivity: Sensitivity, plan: Plan, wanted: float, lowest: float, trial: _Trial
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The plans run for the share of the FLOPs at which the best of them has the wanted latency; and its latency."""
    fewest = Stage(sensitivity.layers[0], MAX_RATIO, sensitivity.metrics[0])
    least = trial.latency_share(replace(plan, stages=(fewest,)))
    line(f"reachable: {least:.1%} to 100% of the latency at batch 1")
    _check_range(wanted, least, "latency")
    low, high = lowest, 1.0
    chosen: list[dict[str, Any]] = []
    reached = 0.0
    budget = lowest + (1 - lowest) * (wanted - least) / (1 - least)  # were latency a straight line in the FLOPs
    for _ in track(range(ATTEMPTS), "searching for the latency", ATTEMPTS):
        trials = trial.run(propose(model, sensitivity, budget, RUN // 4), plan, sensitivity.metrics, budget)
        share = None
        if trials:
            stages = tuple(Stage(**stage) for stage in trials[0]["stages"])
            share = trial.latency_share(replace(plan, stages=stages))
        if share is not None and reached < share <= wanted:
            chosen, reached = trials, share
        if share is not None and SLACK[0] * wanted <= share <= SLACK[1] * wanted:
            break
        low, high = (low, budget) if share is not None and share > wanted else (budget, high)
        budget = (low + high) / 2
    if not chosen:
        raise BudgetError(f"no plan was found that takes {wanted:.1%} of the latency; the machine may be busy")
    return chosen, {"lowest": least, "reached": reached}
