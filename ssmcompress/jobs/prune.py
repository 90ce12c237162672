"""The main job: a dense model, or one to prune further, in; a pruned one with its report in a folder out."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.reconstruct.layerwise import RefitOptions
from ..compression.remember import forget_results, keep_results
from ..compression.search.equal import least_share, plan_for_budget
from ..compression.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from ..compression.trim.trims import Trims, build_trimmed, find_trims
from ..errors import BudgetError, InputError
from ..evaluation.flops import corrections_share, flops, flops_as_run, share_of_whole
from ..models.base import TokenModel
from ..models.continuation import check_fewer, has_corrections, remove_stages
from ..models.learnt import add_learnt, learnt_from
from ..models.records import MadeBy
from ..models.rewrite import check_plan, install, make_plan
from ..models.saved import read_plan, versions
from ..progress import line
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan
from ..pruning.schedules import tome_stages
from .axes_search import choose_axes, search_axes
from .continuation import Start, check_further, check_request, find_start, read_further_trims
from .finetune import FinetuneOptions, FinetuneTarget, tune_folder
from .folder import Target, folder_name, write_folder
from .images import CalibrationImages, choose_images
from .measuring import measure_models, name_columns
from .pipeline import Context, Step, run_steps
from .report import describe_as_run, describe_calibration, describe_reconstruction, list_stages, make_report
from .requests import DataOptions, MeasureOptions, PlanRequest
from .search import SearchRequest, SearchResult, search_plan
from .steps import Reconstruct, pruning_steps, trimming_steps
from .trim_sizes import TRIMMED, describe_dense, describe_trims

DEFAULT_RATIO = 0.3
# Seconds of work that leave something to go on with if they fail or are interrupted.
WORTH_KEEPING = 20.0


@dataclass(frozen=True)
class CompressOptions:
    """How a model is compressed, apart from the plan.

    Attributes:
        data: the images. measure: how models are measured.
        gap: "calibrated" or "bias"; None: as planned, else calibrated where the images are the user's own.
        reconstruct: whether to refit the later layers; None: where the images are the user's own and differ.
        steps: further steps after these, each with a column of its own in the report.
        finetune: how to fine-tune after that, on the images that are not measured on; None: not at all.
    """

    data: DataOptions = DataOptions()
    measure: MeasureOptions = MeasureOptions()
    gap: str | None = None
    reconstruct: bool | None = None
    steps: tuple[Step, ...] = ()
    finetune: FinetuneOptions | None = None


@dataclass(frozen=True)
class PruneRequest:
    """Everything that `prune` is asked for, apart from the model.

    Attributes:
        plan: which plan. options: what is done by it. loading: what changes the name of the folder besides, label ->
            text: how the model was loaded.
    """

    plan: PlanRequest = PlanRequest()
    options: CompressOptions = CompressOptions()
    loading: Mapping[str, str | None] = field(default_factory=dict)

    def check(self) -> None:
        """Check what is given before the model is loaded.

        Raises:
            InputError: arguments that do not go together.
        """
        self.plan.check()
        if self.options.finetune is not None and self.options.data.data is None:
            raise InputError("`finetune_epochs` needs images to learn from: give `data`")

    def folder(self, checkpoint: str) -> Path:
        """The default folder for the result: what differs from the defaults is in its name."""
        plan, options = self.plan, self.options
        searched = plan.file is None and bool(plan.budgets)
        chosen = plan.file is not None or searched or plan.merge is not None
        ratio = plan.ratio if chosen else plan.ratio or (DEFAULT_RATIO,)
        without_search = bool(plan.budgets) and not plan.search
        choices = {
            "plan": (Path(plan.file).resolve().name if Path(plan.file).is_dir() else Path(plan.file).stem)
            if plan.file
            else None,
            "f": plan.flops,
            "fb": plan.flops_backbone,
            "t": plan.latency,
            "d": plan.max_drop,
            "axes-": "+".join(plan.axes) if plan.axes else None,
            "r": ratio,
            "s": plan.stages,
            "": plan.importance if plan.importance != "clip" else None,
            "fuse": "" if plan.fuse else None,
            "merge": plan.merge,
            "no-align": "" if plan.align is False else None,
            "reenter": plan.reenter or None,
            "no-reconstruct": "" if options.reconstruct is False else None,
            "reconstruct": "" if options.reconstruct and options.data.data is None else None,
            "gap-": options.gap,
            "seed": options.data.seed or None,
            **self.loading,
            "ft": options.finetune.recipe.epochs if options.finetune else None,
            "no-search": "" if without_search else None,
            "by-labels": "" if plan.by_labels else None,
        }
        return Path("compressed", folder_name(checkpoint, choices))


@dataclass(frozen=True)
class FoundPlan:
    """What to do, the search that found it, and the images that were chosen for that; None where there were none.

    Attributes:
        plan: what to do with tokens; without stages, nothing. trims: what else is trimmed.
    """

    plan: Plan
    search: SearchResult | None = None
    images: CalibrationImages | None = None
    trims: Trims = Trims()


def find_plan(model: TokenModel | Start, request: PruneRequest) -> FoundPlan:
    """Make, read or search for the plan that is asked for.

    Args:
        model: the dense model, or what a compression goes on from.

    Raises:
        BudgetError: a budget that cannot be reached. InputError: a plan that does not fit the model.
    """
    start = model if isinstance(model, Start) else find_start(model)
    check_request(start, request.plan)
    found = _find_plan(start, request)
    check_further(start, request.plan, found.plan)
    return found


def _find_plan(start: Start, request: PruneRequest) -> FoundPlan:
    model, asked, options = start.model, request.plan, request.options
    if (share := asked.flops_backbone) is not None:
        whole = share_of_whole(start.dense, share)
        line(f"{share:.1%} of the FLOPs of the backbone are {whole:.1%} of all")
        changed = replace(request, plan=replace(asked, flops=whole, flops_backbone=None))
        try:
            return _find_plan(start, changed)
        except BudgetError as error:
            raise BudgetError(f"{share:.1%} of the FLOPs of the backbone, {whole:.1%} of all: {error}") from error
    if asked.file is not None:
        trims = read_further_trims(start, asked.file)
        depth = trims.apply_to(model.config).depth
        return FoundPlan(read_plan(asked.file).validate(depth, model.drops_inside), trims=trims)
    if asked.searches:
        images = choose_images(model, options.data, options.finetune is not None, asked.max_drop is not None)
        gap, reconstruct = images.gap_source(options.gap), images.wants_reconstruction(options.reconstruct)
        wanted = _search_request(asked, choose_axes(model, asked.axes, images))
        if wanted.axes == ("tokens",) and asked.max_drop is None:
            result = search_plan(model, wanted, images, options.data, gap=gap, reconstruct=reconstruct)
        else:
            result = search_axes(model, wanted, images, options.data, gap=gap, repair=reconstruct)
        return FoundPlan(result.plan, result, images, result.trims)
    if asked.merge is not None:
        model.check_importance("keys", 1)
        stages = tome_stages(len(model.blocks), model.length, model.protected_count, *asked.merge)
        alignment = Alignment(asked.align is not False, asked.align is not False)
        return FoundPlan(model.check_plan(Plan(stages, alignment, seed=options.data.seed)))
    parts = {"importance": asked.importance, "alignment": asked.align, "fuse": asked.fuse}
    parts |= {"stages": asked.stages, "seed": options.data.seed}
    if asked.flops is None:
        ratio = asked.ratio or (DEFAULT_RATIO,)
        plan = make_plan(model, ratio=ratio[0] if len(ratio) == 1 else ratio, **parts)
        if asked.reenter and not model.levels:
            raise InputError("`reenter` is for models that read out every position, as those for segmentation do")
        return FoundPlan(model.check_plan(replace(plan, reenter=asked.reenter or plan.reenter)))
    # Reports bad stages before the range is computed from them.
    stages = tuple(stage.after for stage in make_plan(model, **parts).stages)
    images = choose_images(model, options.data, options.finetune is not None)
    corrected = images.wants_reconstruction(options.reconstruct) or has_corrections(model)
    reserve = corrections_share(model, stages) if corrected else 0.0
    lowest = least_share(model, **parts) + reserve
    line(f"reachable with stages {','.join(map(str, stages))}: {lowest:.1%} to 100%")
    plan = plan_for_budget(model, asked.flops, reserve=reserve, **parts)
    return FoundPlan(replace(plan, reenter=0), images=images)


def _search_request(request: PlanRequest, axes: tuple[str, ...]) -> SearchRequest:
    """What the search for a plan is asked for."""
    aligned = request.align is not False
    return SearchRequest(
        flops=request.flops,
        latency=request.latency,
        stages=request.stages,
        importance=request.importance,
        alignment=Alignment(aligned, aligned),
        choose_alignment=request.align is None,
        labels=request.by_labels,
        sensitivity=request.sensitivity,
        images=request.search_images,
        axes=axes,
        max_drop=request.max_drop,
    )


def prune_model(
    model: TokenModel, request: PruneRequest, target: FinetuneTarget, dense: str | None = None
) -> dict[str, Any]:
    """Find the plan that is asked for and compress the model by it; returns the report in the folder.

    A model that is compressed already, which `target.inside` names, is pruned further: it keeps its weights, and what
    it is asked for counts from the dense model, `dense` or the one that it names.

    What the search and the reconstruction find is kept in `target.results` until the folder is written. With
    `target.resume`, a run that was stopped goes on with what it had found, and makes the same weights.

    Raises:
        BudgetError: a budget that cannot be reached. InputError: data, plan or output that cannot be used.
    """
    start = find_start(model, dense, target.inside)
    check_request(start, request.plan)
    check_recipe(model, request.options)
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
            # Nothing is left of what cannot be done; but a full disk may have room at the next try.
            hopeless = isinstance(error, (BudgetError, InputError)) and not isinstance(error.__cause__, OSError)
            if not target.resume and (hopeless or time.perf_counter() - began < WORTH_KEEPING):
                forget_results()
            raise


def check_recipe(model: TokenModel, options: CompressOptions) -> None:
    """Raise an InputError for a recipe of fine-tuning that is not for the task of the model, before the long work."""
    if options.finetune is not None:
        options.finetune.recipe.check_task(model.task)


def preview_request(model: TokenModel, request: PruneRequest, dense: str | None = None) -> dict[str, Any]:
    """What the plan that is asked for would do, as `preview` has it, with the `search` that found it."""
    start = find_start(model, dense)
    found = find_plan(start, request)
    value = preview(start, found.plan, found.trims)
    return value if found.search is None else {**value, "search": found.search.record}


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

    In several processes (`ssmcompress.processes`) each works on its share of the images, and the main one writes.

    Args:
        model: from `load`, dense or compressed. One that is compressed keeps its weights and is pruned further.
        plan: from `make_plan`, `plan_for_budget`, a search or a file.
        output: the folder to write; nothing is left there if anything fails before it is complete.
        dense: the dense model that a compressed `model` was made from; None: the file that it names.
        command: recorded as how it was made.
        force: replace `output` if ssmcompress wrote it.
        found: how the plan was found, for the report; its images are used.

    Returns:
        The report that is in the folder.

    Raises:
        InputError: data, plan or output that cannot be used.
    """
    start, found = find_start(model, dense), found or FoundPlan(plan)
    check_recipe(model, options)
    if start.input is not None and (found.trims or found.search is not None):
        raise InputError("`found` trims or searched, and a compressed model only loses tokens: pass the dense model")
    if plan.stages or (not found.trims and found.search is None):
        plan = check_plan(model, plan, {}, found.trims.apply_to(model.config).depth)
        check_fewer(model, plan)
    return _compress(start, replace(found, plan=plan), Target(Path(output), force, command), options)


def _compress(start: Start, found: FoundPlan, target: Target, options: CompressOptions) -> dict[str, Any]:
    """Do what `compress` does by a plan that was checked."""
    model = start.model
    target.check(model, options.data)
    images = found.images or choose_images(model, options.data, options.finetune is not None)
    snapshots, report = _prune_folder(start, found, images, target, options)
    forget_results()
    if options.finetune is None:
        return report
    processes.barrier()  # until the main process has written: if fine-tuning is killed, the pruned folder is there
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
    """Write the pruned folder; returns the snapshots, the last of which is in it, and its report."""
    model, calibration, together = start.model, images.calibration, processes.count() > 1
    plan, search = found.plan, found.search
    plan = replace(plan, gap=images.gap_source(options.gap, plan.gap), calibration=None)
    refit, levels = None, bool(model.levels) and images.wants_reconstruction(None)
    if images.wants_reconstruction(options.reconstruct):
        # Corrections of the class token cost little in FLOPs, but time; a latency was searched for without them.
        timed = search is not None and search.record["asked"]["latency"] is not None
        refit = Reconstruct(bool(options.reconstruct), RefitOptions(class_corrections=not timed))
    context = Context(start.dense, calibration, seed=options.data.seed, distributed=together, command=target.command)
    trimming = trimming_steps(found.trims, search.chains if search is not None else {})
    steps = [*trimming, *pruning_steps(plan, refit, levels)]
    # Of a trimmed model, what is not repaired yet is one column: the figures of each step would not fit.
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
    """A copy of a dense model as a compressed one: it is run as it is, because that meets the budget."""
    unchanged = copy.deepcopy(model)
    unchanged.learnt = learnt_from(model)
    unchanged.mark_compressed()
    return unchanged


def preview(model: TokenModel | Start, plan: Plan, trims: Trims = Trims()) -> dict[str, Any]:
    """What a plan would do to a model, without images: a JSON object that is itself read as a plan.

    Of a model that is pruned further it has `input`, the FLOPs of the model as it came.
    """
    start = model if isinstance(model, Start) else find_start(model)
    model, dense = start.model, flops(start.dense)
    pruned = build_trimmed(model, trims) if trims else mark_unchanged(remove_stages(model))
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
