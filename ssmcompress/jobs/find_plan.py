"""The plan for `prune`: generated, read from a file, or found by a search."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..compression.search.equal import least_share, plan_for_budget
from ..compression.trim.trims import Trims
from ..errors import BudgetError
from ..evaluation.flops import corrections_share, share_of_whole
from ..models.base import TokenModel
from ..models.continuation import has_corrections
from ..models.rewrite import make_plan
from ..models.saved import read_plan
from ..progress import line
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan
from ..pruning.schedules import tome_stages
from .axes_search import choose_axes, search_axes
from .continuation import Start, check_further, check_request, find_start, read_further_trims
from .images import CalibrationImages, choose_images
from .prune_request import DEFAULT_RATIO, PruneRequest
from .requests import PlanRequest
from .search import SearchRequest, SearchResult, search_plan


@dataclass(frozen=True)
class FoundPlan:
    """A plan, the search that found it, and the images chosen for it; None without a search or images.

    Attributes:
        plan: what to do with tokens; no stages if nothing. trims: what else is trimmed.
    """

    plan: Plan
    search: SearchResult | None = None
    images: CalibrationImages | None = None
    trims: Trims = Trims()


def find_plan(model: TokenModel | Start, request: PruneRequest) -> FoundPlan:
    """Generate, read or search for the requested plan.

    Args:
        model: the dense model, or the starting point of a compression.

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
        return FoundPlan(model.check_plan(replace(plan, reenter=asked.reenter or plan.reenter)))
    # Report invalid stages before they are used to compute the range.
    stages = tuple(stage.after for stage in make_plan(model, **parts).stages)
    images = choose_images(model, options.data, options.finetune is not None)
    corrected = images.wants_reconstruction(options.reconstruct) or has_corrections(model)
    mapped = bool(model.levels) and images.wants_reconstruction(None)
    reserve = corrections_share(model, stages, corrected) if corrected or mapped else 0.0
    lowest = least_share(model, **parts) + reserve
    line(f"reachable with stages {','.join(map(str, stages))}: {lowest:.1%} to 100%")
    plan = plan_for_budget(model, asked.flops, reserve=reserve, **parts)
    return FoundPlan(replace(plan, reenter=0), images=images)


def _search_request(request: PlanRequest, axes: tuple[str, ...]) -> SearchRequest:
    """Convert the request for a plan to a search request."""
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
