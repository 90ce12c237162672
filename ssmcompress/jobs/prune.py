"""The main job: prune a dense model, or a pruned one further, and write it to a folder with its report."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.reconstruct.layerwise import RefitOptions
from ..compression.remember import forget_results, keep_results
from ..compression.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from ..compression.trim.trims import Trims, build_trimmed, find_trims
from ..errors import BudgetError, InputError
from ..evaluation.flops import flops, flops_as_run
from ..models.base import TokenModel
from ..models.continuation import check_fewer, is_pruned, make_ready
from ..models.learnt import add_learnt, learnt_from
from ..models.modes import runs_in_eval_mode
from ..models.records import MadeBy
from ..models.rewrite import check_plan, install
from ..models.saved import versions
from ..pruning.plan import Plan
from .continuation import Start, check_request, find_start
from .find_plan import FoundPlan, find_plan
from .finetune import FinetuneTarget, tune_folder
from .folder import Target, write_folder
from .images import CalibrationImages, choose_images
from .measuring import measure_models, name_columns
from .pipeline import Context, run_steps
from .prune_request import CompressOptions, PruneRequest
from .report import describe_as_run, describe_calibration, describe_reconstruction, list_stages, make_report
from .steps import Reconstruct, pruning_steps, trimming_steps
from .trim_sizes import TRIMMED, describe_dense, describe_trims

# Work that takes longer than this, in seconds, is saved so that it can be resumed after a failure or an interrupt.
WORTH_KEEPING = 20.0


def prune_model(
    model: TokenModel, request: PruneRequest, target: FinetuneTarget, dense: str | None = None
) -> dict[str, Any]:
    """Find the requested plan and compress the model with it; return the report of the folder.

    An already compressed model, given by `target.inside`, is pruned further: it keeps its weights, and budgets refer to
    the dense model, which is `dense` or the one that it names.

    Results of the search and the reconstruction are kept in `target.results` until the folder is written. With
    `target.resume`, an interrupted run continues from these results and produces the same weights.

    Raises:
        BudgetError: a budget that cannot be reached. InputError: data, plan or output that cannot be used.
    """
    start = find_start(model, dense, target.inside)
    check_request(start, request.plan)
    check_options(model, request.options)
    if request.plan.searches:  # before the long work
        if request.plan.sensitivity is not None:
            Sensitivity.read(request.plan.sensitivity)
        target.check(model, request.options.data)
    target.prepare_results()
    began = time.perf_counter()
    with keep_results(target.results, next(model.parameters()).device):
        try:
            return _compress(start, find_plan(start, request), target, request.options)
        except BaseException as error:
            # A request that cannot succeed leaves nothing to resume; a full disk may have space at the next attempt.
            hopeless = isinstance(error, (BudgetError, InputError)) and not isinstance(error.__cause__, OSError)
            if not target.resume and (hopeless or time.perf_counter() - began < WORTH_KEEPING):
                forget_results()
            raise


def check_options(model: TokenModel, options: CompressOptions) -> None:
    """Raise an InputError, before the long work, for a recipe of another task, or for views of images."""
    model.check_views(options.measure.views)
    if options.finetune is not None:
        options.finetune.recipe.check_task(model.task)


def preview_request(model: TokenModel, request: PruneRequest, dense: str | None = None) -> dict[str, Any]:
    """Return the effect of the requested plan, as `preview` does, with the `search` that found it."""
    start = find_start(model, dense)
    found = find_plan(start, request)
    value = preview(start, found.plan, found.trims)
    return value if found.search is None else {**value, "search": found.search.record}


@runs_in_eval_mode
def compress(
    model: TokenModel,
    plan: Plan,
    output: str | Path,
    options: CompressOptions = CompressOptions(),
    *,
    dense: TokenModel | None = None,
    command: str = "",
    force: bool = False,
    found: FoundPlan | None = None,
) -> dict[str, Any]:
    """Calibrate, prune, reconstruct, measure and write a folder; with `options.finetune`, fine-tune and write it again.

    In several processes (`ssmcompress.processes`), each works on its shard of the images, and the main one writes.

    Args:
        model: from `load`, dense or compressed. A compressed one keeps its weights and is pruned further.
        plan: from `make_plan`, `plan_for_budget`, a search or a file.
        output: the folder to write; nothing is left there if anything fails before it is complete.
        dense: the dense model that a compressed `model` was made from; None: the file that it names.
        command: recorded as the command that created it.
        force: replace `output` if ssmcompress wrote it.
        found: how the plan was found, for the report; its images are used.

    Returns:
        The report of the folder.

    Raises:
        InputError: data, plan or output that cannot be used.
    """
    start, found = find_start(model, dense), found or FoundPlan(plan)
    check_options(model, options)
    if start.input is not None and (found.trims or found.search is not None):
        raise InputError(
            "`found` trims or comes from a search, but a compressed model can only drop tokens: pass the dense model"
        )
    return _compress(start, replace(found, plan=plan), Target(Path(output), force, command), options)


def _compress(start: Start, found: FoundPlan, target: Target, options: CompressOptions) -> dict[str, Any]:
    """Implement `compress`."""
    model, plan = start.model, found.plan
    if plan.stages or (not found.trims and found.search is None):
        plan = check_plan(model, plan, {}, found.trims.apply_to(model.config).depth)
        check_fewer(model, plan)
    found = replace(found, plan=plan)
    target.check(model, options.data)
    images = found.images or choose_images(model, options.data, options.finetune is not None)
    snapshots, report = _prune_folder(start, found, images, target, options)
    forget_results()
    if options.finetune is None:
        return report
    processes.barrier()  # wait for the main process: if fine-tuning is killed, the pruned folder is complete
    again = FinetuneTarget(target.path, True, target.command, target.recipe, inside=target.path)
    name, pruned = snapshots.popitem()
    parts = {"dense": start.dense, "earlier": report, "name": name if options.steps else None}
    return tune_folder(pruned, again, options.finetune, options.data, options.measure, **parts)


def _prune_folder(
    start: Start,
    found: FoundPlan,
    images: CalibrationImages,
    target: Target,
    options: CompressOptions,
) -> tuple[dict[str, TokenModel], dict[str, Any]]:
    """Write the pruned folder; return the snapshots, of which the last one is written, and its report."""
    model, calibration, together = start.model, images.calibration, processes.count() > 1
    plan, search = found.plan, found.search
    plan = replace(plan, gap=images.gap_source(options.gap, plan.gap), calibration=None)
    refit, levels = None, bool(model.levels) and images.wants_reconstruction(None)
    if images.wants_reconstruction(options.reconstruct):
        # Corrections of the class token cost few FLOPs but some time; the search for a latency did not include them.
        timed = search is not None and search.record["asked"]["latency"] is not None
        refit = Reconstruct(bool(options.reconstruct), RefitOptions(class_corrections=not timed))
    context = Context(start.dense, calibration, seed=options.data.seed, distributed=together, command=target.command)
    trimming = trimming_steps(found.trims, search.chains if search is not None else {})
    steps = [*trimming, *pruning_steps(plan, refit, levels)]
    # The steps before reconstruction share one column for a trimmed model: one for each step would not fit.
    before = [step.name for step in steps if not isinstance(step, Reconstruct)][-1:]
    keep = [*before, Reconstruct.name, *(step.name for step in options.steps)] if trimming else None
    snapshots = run_steps([*steps, *options.steps], context, model, keep)
    if trimming and before[0] == trimming[-1].name:
        snapshots = {TRIMMED if name == before[0] else name: trimmed for name, trimmed in snapshots.items()}
    if not snapshots:
        snapshots = {"unchanged": mark_unchanged(model)}
    columns = name_columns(start.dense, {**start.columns, **snapshots})
    measured = measure_models(columns, images.measured, options.measure, together)
    pruned = measured.models["pruned"]
    pruned.made_by = MadeBy(target.command, versions())
    sections = {
        "calibration": describe_calibration(pruned, calibration),
        "reconstruction": describe_reconstruction(pruned, context.seconds.get("reconstructed", 0.0)),
    }
    files = dict(context.files)
    if search is not None:
        sections["search"] = search.record
        files[SENSITIVITY_FILE] = search.sensitivity.to_json().encode()
        add_learnt(pruned, [search.sensitivity.digests])
    sections["files"] = sorted(files)
    overlap = learnt_from(pruned).count(images.measured)
    report = make_report(measured, overlap, sections, target.command)
    write_folder(target, measured, report, files)
    return snapshots, report


def mark_unchanged(model: TokenModel) -> TokenModel:
    """Return a copy of a dense model that is marked as compressed, since it already meets the budget."""
    unchanged = copy.deepcopy(model)
    unchanged.learnt = learnt_from(model)
    unchanged.mark_compressed()
    return unchanged


def preview(model: TokenModel | Start, plan: Plan, trims: Trims = Trims()) -> dict[str, Any]:
    """Return the effect of a plan on a model, without images: a JSON object that can itself be read as a plan.

    For a model that is pruned further, it includes `input`, the FLOPs of the original model.
    """
    start = model if isinstance(model, Start) else find_start(model)
    model, dense = start.model, flops(start.dense)
    ready = make_ready(model, plan) if is_pruned(model) else model
    pruned = build_trimmed(model, trims) if trims else mark_unchanged(ready)
    install(pruned, replace(plan, gap=None, calibration=None))
    trims = find_trims(model.steps) if start.input is not None else trims
    return {
        "plan": plan.to_dict(),
        **({"trims": describe_trims(pruned, trims)} if trims else {}),
        "stages": list_stages(pruned),
        "dense": {
            "flops": dense,
            **describe_as_run(dense["full"], flops_as_run(start.dense)["full"]),
            "sizes": describe_dense(start.dense),
        },
        **{name: {"flops": flops(column)} for name, column in start.columns.items()},
        "pruned": {"flops": flops(pruned)},
    }
