"""From a budget to a plan: measure sensitivities, search, and run the best few plans to choose one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..compression.search.propose import propose, prune_most
from ..compression.search.sensitivity import METRICS, NO_DIGESTS, Sensitivity, candidate_layers, measure_sensitivity
from ..compression.trim.trims import Trims
from ..data.batches import LabelledBatch
from ..data.content import different
from ..errors import BudgetError, InputError
from ..evaluation.flops import corrections_share, remaining_share, smallest_share
from ..models.base import TokenModel
from ..progress import line, note, track
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import Plan, Stage
from .images import CalibrationImages
from .requests import DataOptions
from .trial import SearchRequest, Trial

# Number of plans that are run before one is chosen.
RUN = 12
# Attempts to meet a latency, and the target as a fraction of the request: timings differ by a few percent.
ATTEMPTS = 8
SLACK = (0.955, 0.99)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search, the sensitivities used, and a JSON object that describes the search.

    Attributes:
        plan: what to do with tokens; no stages if nothing. trims: what else is trimmed.
        chains: reused by the steps of the trims, by step name.
    """

    plan: Plan
    sensitivity: Sensitivity
    record: dict[str, Any] = field(repr=False)
    trims: Trims = Trims()
    chains: Mapping[str, Any] = field(default_factory=dict, repr=False)


def search_plan(
    model: TokenModel,
    request: SearchRequest,
    images: CalibrationImages,
    data: DataOptions,
    *,
    gap: str,
    reconstruct: bool,
) -> SearchResult:
    """Search for the plan with the smallest expected loss within a budget.

    Sensitivities (`ssmcompress.compression.search.sensitivity`) are measured on every second calibration image; gap
    deltas and probes are computed on the others. The best plans of the search are then run on the same images as the
    sensitivities, as are other metrics at the stages of the best one. All of this happens before reconstruction, see
    `ssmcompress.compression.search.proxy_loss`.

    Args:
        images: the calibration images. data: how they were chosen and are read.
        gap: gap source. reconstruct: whether the model will be reconstructed, for which the budget leaves room.

    Raises:
        BudgetError: the budget is out of reach. InputError: a request or a file that cannot be used.
    """
    begin = time.perf_counter()
    sensitivity = read_sensitivity(model, request, reconstruct) if request.sensitivity is not None else None
    layers = choose_layers(model, request, sensitivity)
    reserve = corrections_share(model, layers, reconstruct)
    lowest = smallest_share(model, layers) + reserve
    if request.flops is not None:
        highest = remaining_share(model, ())
        line(f"reachable: {lowest:.1%} to {highest:.1%} of the FLOPs")
        _check_range(request.flops, lowest, "FLOPs")
    trial = Trial(model, request, images, data, gap=gap, refit=reconstruct)
    plan, sensitivity, measured = measure_tokens(trial, layers, sensitivity)
    usable = sensitivity.select(request.stages, (request.importance,) if request.importance else None)
    if request.flops is not None and request.flops >= highest:
        return nothing_to_do(request, sensitivity, highest, lowest)
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
    stages = tuple(Stage(**stage) for stage in best["stages"])
    alignment, aligned = trial.choose_alignment(replace(plan, stages=stages))
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
        "alignments": aligned,
        "seconds": {"sensitivity": round(measured, 2), "all": round(time.perf_counter() - begin, 2)},
    }
    return SearchResult(Plan(stages, alignment, seed=data.seed), sensitivity, record)


def nothing_to_do(request: SearchRequest, sensitivity: Sensitivity, share: float, lowest: float) -> SearchResult:
    """Return the result if the model already meets the budget: no tokens are dropped."""
    note(f"the model takes {share:.1%} of its published FLOPs as it is run: nothing needs to be dropped")
    record = {
        "asked": {"flops": request.flops, "latency": request.latency},
        "reachable": {"flops": lowest, "latency": None},
        "objective": sensitivity.objective,
        "refit": sensitivity.refit,
        "data": sensitivity.data,
        **{"loss": 0.0, "expected": 0.0, "flops": share, "latency": None, "tried": []},
        "seconds": {"sensitivity": 0.0, "all": 0.0},
    }
    return SearchResult(Plan((), request.alignment), sensitivity, record)


def choose_layers(model: TokenModel, request: SearchRequest, sensitivity: Sensitivity | None) -> tuple[int, ...]:
    """Return the layers after which a search may drop tokens.

    Raises:
        InputError: there are none, or those requested are not layers of the model.
    """
    depth = len(model.blocks)
    layers = tuple(request.stages or (sensitivity.layers if _has_tokens(sensitivity) else candidate_layers(depth)))
    if not layers:
        raise InputError(f"a model of {depth} layer has no place to prune: nothing comes after it")
    metric = request.importance or model.default_importance
    model.check_plan(Plan(tuple(Stage(layer, 0.0, metric) for layer in layers), request.alignment))
    return layers


def measure_tokens(
    trial: Trial, layers: tuple[int, ...], sensitivity: Sensitivity | None, most: int | None = None
) -> tuple[Plan, Sensitivity, float]:
    """Measure the sensitivity of tokens unless already done; return a plan without stages, the sensitivity and seconds.

    Args:
        most: maximum number of images to measure on; None: all of the trial.
    """
    request = trial.request
    available = tuple(metric for metric in METRICS if metric in trial.model.importances)
    known = sensitivity.metrics if _has_tokens(sensitivity) else available
    metrics = (request.importance,) if request.importance else known
    images = sensitivity.data["images"] if _has_tokens(sensitivity) else len(trial.images[:most])
    line(f"{images} images to search on, of {trial.name}")
    plan = trial.fit(layers if any(IMPORTANCES[metric].probe for metric in metrics) else ())
    measuring = time.perf_counter()
    if not _has_tokens(sensitivity):
        known, seen = (sensitivity.axes, sensitivity.digests) if sensitivity is not None else ((), NO_DIGESTS)
        sensitivity = measure_sensitivity(
            trial.model,
            LabelledBatch(trial.images[:most], None if trial.labels is None else trial.labels[:most]),
            plan=plan,
            layers=layers,
            metrics=metrics,
            refit=trial.refit,
            name=trial.name,
            distributed=trial.several,
        )
        trial.read.sync()
        sensitivity = replace(sensitivity, axes=known, digests=seen).seen(different(trial.read.digests))
        line(f"sensitivity measured in {time.perf_counter() - measuring:.0f} s")
    else:  # plans are run on these images and chosen by them
        trial.read.sync()
        sensitivity = sensitivity.seen(different(trial.read.digests))
    return plan, sensitivity, time.perf_counter() - measuring


def _has_tokens(sensitivity: Sensitivity | None) -> bool:
    """Return whether a sensitivity includes losses of tokens, not only of other axes."""
    return sensitivity is not None and bool(sensitivity.layers)


def read_sensitivity(model: TokenModel, request: SearchRequest, refit: bool) -> Sensitivity:
    """Read a sensitivity from a file, checking that it was measured for the current request."""
    sensitivity = Sensitivity.read(request.sensitivity)
    sensitivity.check_model(model)
    objective = "labels" if request.labels else "kl"
    for what, ours, theirs in (
        ("alignment", request.alignment, sensitivity.alignment),
        ("objective", objective, sensitivity.objective),
        ("choice about reconstruction", refit, sensitivity.refit),
    ):
        if ours != theirs:
            raise InputError(f"{request.sensitivity} was measured with another {what}: leave it out to measure again")
    return sensitivity


def _check_range(share: float, lowest: float, what: str) -> None:
    if not lowest <= share < 1:
        raise BudgetError(f"{share:.1%} of the {what} is out of reach: pruning leaves from {lowest:.1%} to below 100%")


# ------------------------------------------------------------------------------------------------------ latency


def _for_latency(
    model: TokenModel, sensitivity: Sensitivity, plan: Plan, wanted: float, lowest: float, trial: Trial
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Search for the share of the FLOPs whose best plan has the wanted latency; return its plans and latency."""
    fewest = prune_most(model, sensitivity.layers, sensitivity.metrics[0])
    least = trial.latency_share(replace(plan, stages=fewest))
    line(f"reachable: {least:.1%} to 100% of the latency at batch 1")
    _check_range(wanted, least, "latency")
    low, high = lowest, 1.0
    chosen: list[dict[str, Any]] = []
    reached = 0.0
    budget = lowest + (1 - lowest) * (wanted - least) / (1 - least)  # assumes that latency is linear in the FLOPs
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
