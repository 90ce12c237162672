"""A budget over several axes: measure the cost of each axis once, then run the best few combinations and choose one.

A combination is run in full, on fewer images: its states and channels are trimmed, its tokens pruned, and the result
is reconstructed. Its loss is measured on images that nothing was fitted to. A single axis that meets the budget, such
as tokens alone, is also run if its expected loss is close to that of the best combination.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..compression.remember import hash_of, remembered
from ..compression.search.axes import Option, list_axes, measure_axes, run
from ..compression.search.combine import Combination, combine
from ..compression.search.propose import Candidate, propose, prune_most
from ..compression.search.sensitivity import Sensitivity, identify
from ..compression.trim.trims import Trims
from ..data.batches import Batches, LabelledBatch
from ..data.content import different
from ..errors import BudgetError, InputError
from ..evaluation.flops import corrections_share, remaining_share, smallest_share
from ..models.base import TokenModel
from ..progress import line, note, track
from ..pruning.plan import Plan
from ..tasks import Evaluation, Task
from .axes_trial import AxesTrial, Key, Run, key_of
from .images import CalibrationImages
from .requests import AXES, DataOptions
from .search import SearchResult, choose_layers, measure_tokens, read_sensitivity
from .trial import SearchRequest, Trial

# Number of different images that a search needs.
LEAST_IMAGES = 16
# Combinations that are run for a budget.
RUN = 3
# A single axis is run if its expected loss is at most CLOSE times that of the best combination, or negligible (in
# nats): the expected losses of the bundled model at 50 % were within a factor of 1.3 of the measured ones.
CLOSE, NEGLIGIBLE = 4.0, 1e-3
# Number of images to measure an axis on; the second number is for tokens if they are one of several axes, since they
# take most of the measuring time.
AXIS_IMAGES, TOKEN_IMAGES = 256, 128
# Budgets at which token plans are proposed, as fractions of the range.
TOKEN_BUDGETS = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15)
# Bisection steps for a loss and for a latency.
DROP_STEPS = 5
LATENCY_STEPS = 6


def choose_axes(model: TokenModel, asked: Sequence[str] | None, images: CalibrationImages) -> tuple[str, ...]:
    """Return the axes of a search: those requested, otherwise all axes of the model.

    By default, only tokens are trimmed if there are several processes or too few images to refit on: sample images
    instead of the user's own, or fewer than LEAST_IMAGES.

    Raises:
        InputError: the model does not have an axis, or several processes are used for more than tokens.
    """
    tokens = ("tokens",) if len(model.blocks) > 1 else ()
    possible = (*list_axes(model), *tokens)
    if processes.count() > 1 and not tokens:
        raise InputError("in several processes, only tokens are searched for, and this model has one layer")
    if asked is None:
        few = images.source.stand_in or images.count < LEAST_IMAGES
        return tokens if tokens and (few or processes.count() > 1) else possible
    for axis in asked:
        if axis not in possible:
            raise InputError(f"`axes`: this model has no {axis} to trim; expected some of {', '.join(possible)}")
    if processes.count() > 1 and tuple(asked) != ("tokens",):
        raise InputError(f"`axes` {', '.join(asked)}: in several processes, only tokens are searched for")
    return tuple(axis for axis in AXES if axis in asked)


def search_axes(
    model: TokenModel,
    request: SearchRequest,
    images: CalibrationImages,
    data: DataOptions,
    *,
    gap: str,
    repair: bool,
) -> SearchResult:
    """Search over the requested axes for the smallest loss within a budget, or the largest saving within a loss.

    Args:
        images: the images to calibrate on. data: how they were chosen and are read.
        gap: gap source. repair: whether the model will be reconstructed.

    Raises:
        BudgetError: the budget is out of reach. InputError: a request or a file that cannot be used.
    """
    begin = time.perf_counter()
    search = AxesSearch(Trial(model, request, images, data, gap=gap, refit=repair), images.judged)
    seconds = search.measure()
    lowest, highest = search.range()
    if request.flops is not None:
        line(f"reachable with {', '.join(request.axes)}: {lowest:.1%} to {highest:.1%} of the FLOPs")
        if not lowest <= request.flops < 1:
            raise BudgetError(
                f"{request.flops:.1%} of the FLOPs is out of reach: {', '.join(request.axes)} leave from "
                f"{lowest:.1%} to below 100%"
            )
        runs, found = search.for_flops(request.flops), {}
    elif request.latency is not None:
        runs, found = search.for_latency(request.latency, lowest, highest)
    else:
        runs, found = search.for_drop(request.max_drop, lowest, highest)
    best = min(runs, key=lambda run: run.loss)
    search.tell(best)
    trims, stages = best.combination.trims, best.combination.stages
    # A requested loss was judged with this alignment.
    alignment, aligned = (request.alignment, []) if request.max_drop is not None else search.runs.choose_alignment(best)
    record = {
        "asked": {"flops": request.flops, "latency": request.latency, "max_drop": request.max_drop},
        "reachable": {"flops": lowest, "latency": found.get("lowest")},
        "objective": "labels" if request.labels else "kl",
        "refit": repair,
        "data": {"name": search.trial.name, "images": len(search.trial.images)},
        "axes": [option.to_dict() for option in search.options] + search.describe_tokens(),
        "trims": trims.to_dict(),
        "loss": best.loss,
        "expected": best.combination.expected,
        "flops": best.flops,
        "latency": found.get("reached"),
        "drop": found.get("drop"),
        "tried": [run.to_dict() for run in sorted(runs, key=lambda run: run.loss)],
        "alignments": aligned,
        "seconds": {"sensitivity": round(seconds, 2), "all": round(time.perf_counter() - begin, 2)},
    }
    chains = search.runs.chains_of(trims)
    return SearchResult(Plan(stages, alignment, seed=data.seed), search.sensitivity, record, trims, chains)


class AxesSearch:
    """A single search: its images, its measurements, and results of the combinations run so far.

    Args:
        trial: the model, the request, and the images to search on. judged: images to judge a loss by, or None.

    Raises:
        InputError: too few images, or token options although tokens are not among the axes.
    """

    def __init__(self, trial: Trial, judged: Batches | None):
        self.trial, self.judged = trial, judged
        model, request = trial.model, trial.request
        self.model, self.request, self.repair = model, request, trial.refit
        read = read_sensitivity(model, request, trial.refit) if request.sensitivity is not None else None
        self.runs = AxesTrial(trial, trial.refit)
        if (count := len(self.runs.digests)) < LEAST_IMAGES:
            raise InputError(
                f"{count} different images to search on: expected at least {LEAST_IMAGES}; give more images"
                + ("" if request.max_drop is not None else ", or only drop tokens (`axes`)")
            )
        of_tokens = {"`stages`": request.stages, "`importance`": request.importance}
        if "tokens" not in request.axes and (extra := [k for k, v in of_tokens.items() if v is not None]):
            raise InputError(
                f"{' and '.join(extra)}: only for tokens, but the search is over {', '.join(request.axes)}"
            )
        self.layers = choose_layers(model, request, read) if "tokens" in request.axes else ()
        self.sensitivity: Sensitivity | None = read
        self.options: tuple[Option, ...] = ()
        self.plans: list[Candidate] = []

    # ------------------------------------------------------------------------------------------------- measuring

    def measure(self) -> float:
        """Measure the cost of each axis, except what was loaded from a file; return the seconds."""
        start, trial, axes = time.perf_counter(), self.trial, self.request.axes
        if "tokens" in axes:
            most = TOKEN_IMAGES if len(axes) > 1 else None
            _, self.sensitivity, _ = measure_tokens(trial, self.layers, self.sensitivity, most)
        if self.sensitivity is None:
            source = {"name": trial.name, "images": len(trial.images)}
            objective = "labels" if self.request.labels else "kl"
            self.sensitivity = Sensitivity.empty(
                identify(self.model), source, objective, self.repair, self.request.alignment, trial.gap
            )
        known = self.sensitivity.axes
        wanted = [axis for axis in axes if axis != "tokens"]
        if missing := [axis for axis in wanted if not any(option.axis == axis for option in known)]:
            few = slice(0, AXIS_IMAGES)
            batch = LabelledBatch(trial.images[few], None if trial.labels is None else trial.labels[few])
            key = self.trial.key
            known += measure_axes(self.model, batch, missing, self.chains_for_axis, refit=self.repair, key=key)
        # Needed even if all measurements come from a file: combinations are run on these images and chosen by them.
        self.sensitivity = replace(self.sensitivity, axes=known).seen(self.runs.digests)
        self.options = tuple(option for option in known if option.axis in wanted)
        if "tokens" in axes:
            self.plans = self.propose_tokens()
        return time.perf_counter() - start

    def chains_for_axis(self, axis: str) -> Any:
        """Return the chains of the dense model for an axis."""
        return self.runs.state_chains(Trims()) if axis == "states" else self.runs.channel_chains(Trims())

    def propose_tokens(self) -> list[Candidate]:
        """Return the best token plan of the dense model for each of several budgets."""
        usable = self.usable()
        lowest, highest = smallest_share(self.model, self.layers), remaining_share(self.model, ())
        budgets = [lowest + share * (highest - lowest) for share in TOKEN_BUDGETS]
        return [best[0] for budget in budgets if (best := propose(self.model, usable, budget, 1))]

    def usable(self) -> Sensitivity:
        """Return the sensitivity restricted to the layers and the metric that may be used."""
        request = self.request
        return self.sensitivity.select(request.stages, (request.importance,) if request.importance else None)

    def range(self) -> tuple[float, float]:
        """Return the lowest and highest reachable share of the FLOPs."""
        lowest = min(combination.flops for combination in combine(self.model, self.options, []))
        if self.layers:
            most = prune_most(self.model, self.layers)
            fewest = [c for c in combine(self.model, self.options, [Candidate(most, 0.0)]) if c.stages]
            lowest = min([lowest, *(c.flops + self.runs.reserve(c) for c in fewest)])
        return lowest, remaining_share(self.model, ())

    # --------------------------------------------------------------------------------------------------- running

    def best_for(self, budget: float) -> list[Combination]:
        """Return the combinations to run for a budget: the best few, and single axes that come close.

        Their stages fill the budget, and no two of them are identical.
        """
        within = [c for c in combine(self.model, self.options, self.plans) if c.flops + self.runs.reserve(c) <= budget]
        extra = [self.fill_tokens(budget)] if self.layers else []
        within = sorted([*within, *(c for c in extra if c is not None)], key=lambda c: (c.expected, c.flops))
        filled = (found for c in within if (found := self.runs.fill(c, budget)) is not None)
        chosen: dict[Key, Combination] = {}
        while len(chosen) < RUN and (found := next(filled, None)) is not None:
            chosen.setdefault(key_of(found), found)
        if not chosen:
            return []
        most = CLOSE * next(iter(chosen.values())).expected + NEGLIGIBLE
        for axis in self.request.axes:
            near = (c for c in within if c.axes == (axis,) and c.expected <= most)
            alone = next((found for c in near if (found := self.runs.fill(c, budget)) is not None), None)
            if alone is not None:
                chosen.setdefault(key_of(alone), alone)
        return list(chosen.values())

    def fill_tokens(self, budget: float) -> Combination | None:
        """Return the best plan for tokens alone at this budget, if it is within reach."""
        budget -= corrections_share(self.model, self.layers, self.repair)
        best = propose(self.model, self.usable(), budget, 1) if budget > 0 else []
        if not best:
            return None
        share = remaining_share(self.model, best[0].stages)
        return Combination(Trims(), best[0].stages, share, best[0].expected)

    def for_flops(self, budget: float) -> list[Run]:
        """Run the best combinations for a budget."""
        chosen = self.best_for(budget)
        self.runs.keep_models(chosen)
        if not chosen:
            raise BudgetError(f"no combination of {', '.join(self.request.axes)} reaches {budget:.1%} of the FLOPs")
        if new := [c for c in chosen if key_of(c) not in self.runs.tried]:
            for combination in track(new, "running the best combinations", len(new)):
                self.runs.run(combination, budget)
        tried = [self.runs.run(c, budget) for c in chosen]
        if not (within := [run for run in tried if run is not None]):
            raise BudgetError(f"no combination that was run reaches {budget:.1%} of the FLOPs, corrections included")
        return within

    # ---------------------------------------------------------------------------------------- latency and loss

    def for_latency(self, wanted: float, lowest: float, highest: float) -> tuple[list[Run], dict[str, Any]]:
        """Find the share of the FLOPs whose best combination takes at most the wanted share of the latency."""
        low, high, budget = lowest, highest, lowest + wanted * (highest - lowest)
        least, found, kept = 1.0, None, highest
        for _ in track(range(LATENCY_STEPS), "searching for the latency", LATENCY_STEPS):
            if not (best := self.best_for(budget)):
                low = budget
                budget = (low + high) / 2
                continue
            share = self.runs.latency_share(best[0])
            least = min(least, share)
            if share <= wanted and (found is None or share > found):
                found, kept = share, budget
            low, high = (budget, high) if share <= wanted else (low, budget)
            budget = (low + high) / 2
        if found is None:
            raise BudgetError(
                f"{wanted:.1%} of the latency is out of reach: the lowest found is {least:.1%}; the machine may be busy"
            )
        timed = self.runs.run(self.best_for(kept)[0], kept)
        if timed is None:
            raise BudgetError(f"no combination that was timed fits {kept:.1%} of the FLOPs, corrections included")
        return [timed], {"lowest": least, "reached": found}

    def for_drop(self, most: float, lowest: float, highest: float) -> tuple[list[Run], dict[str, Any]]:
        """Find the fewest FLOPs that lose at most `most` percentage points on images that nothing was fitted on."""
        source = self.judged if self.judged is not None else (self.trial.images, self.trial.all_labels)
        dense, labels = run_all(self.model, source)
        if self.judged is not None:  # the result is selected on them
            self.sensitivity = self.sensitivity.seen(different(self.judged.digests))
        good: tuple[Run, float] | None = None
        drops: dict[Key, float] = {}
        low, high = lowest, highest
        for _ in track(range(DROP_STEPS), "searching for the loss", DROP_STEPS):
            budget = (low + high) / 2
            try:
                best = min(self.for_flops(budget), key=lambda run: run.loss)
            except BudgetError:
                best = None
            # Several budgets can have the same best combination, for instance below what the axes can reach.
            if best is not None and (key := key_of(best.combination)) not in drops:
                known = partial(hash_of, "drop", self.trial.key, *key, dense, labels)
                drops[key] = remembered(known, partial(self.measure_drop, best.combination, source, dense, labels))
                line(f"{best.flops:.1%} of the FLOPs lose {drops[key]:.2f} points on {len(dense)} images")
            drop = None if best is None else drops[key_of(best.combination)]
            if drop is not None and drop <= most:
                if good is None or best.flops < good[0].flops:
                    good = best, drop
                high = budget
            else:
                low = budget
        if good is None:
            shown = f"the smallest loss was {min(drops.values()):.2f} points" if drops else "nothing could be run"
            raise BudgetError(
                f"a loss of at most {most:g} points is out of reach below {high:.1%} of the FLOPs: {shown}"
            )
        return [good[0]], {"drop": {"points": round(good[1], 4), "images": len(dense), "labels": labels is not None}}

    def measure_drop(self, combination: Combination, source: Any, dense: Tensor, labels: Tensor | None) -> float:
        """Return the drop of a combination in percentage points on the images of `run_all`."""
        logits, _ = run_all(self.runs.model_of(combination), source)
        return drop_of(self.model.task, logits, dense, labels)

    # --------------------------------------------------------------------------------------------------- telling

    def describe_tokens(self) -> list[dict[str, Any]]:
        """Return the cost of tokens alone, in the same form as the options of the other axes."""
        return [
            {
                "axis": "tokens",
                "stages": [stage.to_dict() for stage in plan.stages],
                "flops": round(remaining_share(self.model, plan.stages), 6),
                "loss": round(plan.expected, 7),
            }
            for plan in self.plans
        ]

    def tell(self, best: Run) -> None:
        """Log which axes were used, and which of the requested ones did not help."""
        used = best.combination.axes
        line(f"chosen: {describe_combination(best.combination)}, {best.flops:.1%} of the FLOPs")
        unused = [axis for axis in self.request.axes if axis not in used]
        if unused and len(used) == 1:
            others = " and ".join([", ".join(unused[:-1]), unused[-1]] if len(unused) > 1 else unused)
            note(f"on this model, {used[0]} alone lose least at {best.flops:.1%} of the FLOPs; {others} are unchanged")


def describe_combination(combination: Combination) -> str:
    """Describe a combination in words."""
    trims, parts = combination.trims, []
    if trims.states is not None:
        parts.append(f"{trims.states} states")
    if trims.channels is not None:
        parts.append(f"{trims.channels} channels")
    if trims.layers:
        parts.append(f"without layers {','.join(map(str, trims.layers))}")
    if trims.directions:
        parts.append(f"without {sum(len(paths) for _, paths in trims.directions)} scan directions")
    if combination.stages:
        parts.append(f"tokens dropped after {','.join(str(stage.after) for stage in combination.stages)}")
    return ", ".join(parts) or "nothing trimmed"


def run_all(model: TokenModel, source: Batches | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Return the logits (images, classes) of all images, and their labels if they have any."""
    if isinstance(source, tuple):
        return run(model, source[0]), source[1]
    logits, labels = zip(*((run(model, batch.images), batch.labels) for batch in source), strict=True)
    return torch.cat(logits), None if labels[0] is None else torch.cat(labels)


def drop_of(task: Task, logits: Tensor, dense: Tensor, labels: Tensor | None) -> float:
    """Return the drop in percentage points: of the task's quality with labels, or of similarity to the dense model."""

    def measure(output: Tensor) -> Evaluation:
        meter = task.meter(output.shape[1])
        meter.add(output, labels, dense)
        return meter.result()

    if labels is None:
        return 100.0 - measure(logits).figures[task.likeness]
    return measure(dense).figures[task.quality] - measure(logits).figures[task.quality]
