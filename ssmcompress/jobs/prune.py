"""The main job: a dense model in, a pruned one with its report in a folder out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.calibrate import make_plan
from ..compression.search.equal import plan_for_budget
from ..compression.search.sensitivity import SENSITIVITY_FILE
from ..errors import InputError
from ..evaluation.flops import corrections_share, flops, smallest_share
from ..models.base import TokenModel
from ..models.checkpoint import read_plan, versions
from ..models.records import MadeBy
from ..models.rewrite import install
from ..progress import line
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan, default_stages
from .finetune import FinetuneOptions, FinetuneTarget, tune_folder
from .folder import Target, folder_name, write_folder
from .images import CalibrationImages, DataOptions, choose_images
from .measuring import MeasureOptions, measure_models, name_columns
from .pipeline import Context, Step, run_steps
from .report import describe_calibration, describe_reconstruction, list_stages, make_report
from .search import SEARCH_IMAGES, SearchRequest, SearchResult, search_plan
from .steps import Reconstruct, pruning_steps

DEFAULT_RATIO = 0.3


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
class PlanRequest:
    """Which plan to make: at most one of ratio, flops, latency and file is given; without any, the ratio is 0.3.

    Attributes:
        ratio: shares of tokens to remove, one for all stages or one for each.
        flops, latency: share of the dense model's to keep. file: a plan as JSON.
        search: whether `flops` searches for the plan, instead of pruning all stages alike.
        stages: layers to prune after, or to choose from; None: the default ones, or all.
        importance: metric; None: "clip", or all that a search chooses from.
        align: whether the later layers are aligned; None: yes.
        sensitivity: file that a search measured earlier. by_labels: whether a search judges by labels.
        search_images: images to search on at most.
    """

    ratio: tuple[float, ...] | None = None
    flops: float | None = None
    latency: float | None = None
    file: str | None = None
    search: bool = True
    stages: tuple[int, ...] | None = None
    importance: str | None = None
    align: bool | None = None
    sensitivity: str | None = None
    by_labels: bool = False
    search_images: int = SEARCH_IMAGES

    @property
    def searches(self) -> bool:
        """Whether the plan comes from a search."""
        return self.search and (self.flops is not None or self.latency is not None)

    def check(self) -> None:
        """Check that what is given goes together.

        Raises:
            InputError: it does not; the message names the arguments of this class, `plan` for `file`.
        """
        ways = {"ratio": self.ratio, "flops": self.flops, "latency": self.latency, "plan": self.file}
        given = [f"`{name}`" for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)}: expected one of them")
        own = {"`stages`": self.stages, "`importance`": self.importance, "`align` or `align=False`": self.align}
        if self.file is not None and (extra := [name for name, value in own.items() if value is not None]):
            raise InputError(f"`plan` and {', '.join(extra)}: a plan has that in it")
        if self.latency is not None and not self.search:
            raise InputError("`latency` is met by a search: leave out `search=False`")
        if not self.searches and (self.sensitivity is not None or self.by_labels):
            raise InputError("`sensitivity` and `by_labels` belong to a search: give `flops` or `latency`")

    def search_request(self) -> SearchRequest:
        """What the search is asked for."""
        return SearchRequest(
            flops=self.flops,
            latency=self.latency,
            stages=self.stages,
            importance=self.importance,
            alignment=Alignment(self.align is not False, self.align is not False),
            labels=self.by_labels,
            sensitivity=self.sensitivity,
            images=self.search_images,
        )


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
        searched = plan.file is None and (plan.flops is not None or plan.latency is not None)
        ratio = plan.ratio if plan.file is not None or searched else plan.ratio or (DEFAULT_RATIO,)
        without_search = plan.flops is not None and not plan.search
        choices = {
            "plan": Path(plan.file).stem if plan.file else None,
            "f": plan.flops,
            "t": plan.latency,
            "r": ratio,
            "s": plan.stages,
            "": plan.importance if plan.importance != "clip" else None,
            "no-align": "" if plan.align is False else None,
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


def find_plan(model: TokenModel, request: PruneRequest) -> tuple[Plan, SearchResult | None]:
    """The plan that is asked for, and the search that found it, if there was one.

    Raises:
        BudgetError: a budget that cannot be reached. InputError: a plan that does not fit the model.
    """
    wanted, options = request.plan, request.options
    if wanted.file is not None:
        return read_plan(wanted.file).validate(len(model.blocks)), None
    if wanted.searches:
        images = choose_images(model, options.data, options.finetune is not None)
        gap, reconstruct = images.gap_source(options.gap), images.wants_reconstruction(options.reconstruct)
        request = wanted.search_request()
        result = search_plan(model, request, images, options.data, gap=gap, reconstruct=reconstruct)
        return result.plan, result
    parts = {"importance": wanted.importance or "clip", "alignment": wanted.align is not False}
    parts |= {"stages": wanted.stages, "seed": options.data.seed}
    if wanted.flops is None:
        ratio = wanted.ratio or (DEFAULT_RATIO,)
        return make_plan(model, ratio=ratio[0] if len(ratio) == 1 else ratio, **parts), None
    make_plan(model, **parts)  # reports bad stages before the range is computed from them
    stages = wanted.stages or default_stages(len(model.blocks))
    images = choose_images(model, options.data, options.finetune is not None)
    reserve = corrections_share(model, stages) if images.wants_reconstruction(options.reconstruct) else 0.0
    lowest = smallest_share(model, stages) + reserve
    line(f"reachable with stages {','.join(map(str, stages))}: {lowest:.1%} to 100%")
    return plan_for_budget(model, wanted.flops, reserve=reserve, **parts), None


def prune_model(model: TokenModel, request: PruneRequest, target: Target) -> dict[str, Any]:
    """Find the plan that is asked for and compress the model by it; returns the report in the folder.

    Raises:
        BudgetError: a budget that cannot be reached. InputError: data, plan or output that cannot be used.
    """
    if request.plan.searches:  # before the long work
        target.check(model, request.options.data)
    plan, search = find_plan(model, request)
    options = request.options
    return compress(model, plan, target.path, options, command=target.command, force=target.force, search=search)


def preview_request(model: TokenModel, request: PruneRequest) -> dict[str, Any]:
    """What the plan that is asked for would do, as `preview` has it, with the `search` that found it."""
    plan, search = find_plan(model, request)
    value = preview(model, plan)
    return value if search is None else {**value, "search": search.record}


def compress(
    model: TokenModel,
    plan: Plan,
    output: str | Path,
    options: CompressOptions = CompressOptions(),
    *,
    command: str = "",
    force: bool = False,
    search: SearchResult | None = None,
) -> dict[str, Any]:
    """Calibrate, prune, reconstruct, measure and write a folder; with `options.finetune`, fine-tune and write it again.

    In several processes (`ssmcompress.processes`) each works on its share of the images, and the main one writes.

    Args:
        model: dense, from `load`.
        plan: from `make_plan`, `plan_for_budget`, a search or a file.
        output: the folder to write; nothing is left there if anything fails before it is complete.
        command: recorded as how it was made.
        force: replace `output` if ssmcompress wrote it.
        search: the search that found the plan, for the report.

    Returns:
        The report that is in the folder.

    Raises:
        InputError: data, plan or output that cannot be used.
    """
    plan.validate(len(model.blocks))
    target = Target(Path(output), force, command)
    target.check(model, options.data)
    images = choose_images(model, options.data, options.finetune is not None)
    pruned, report = _prune_folder(model, plan, images, target, options, search)
    if options.finetune is None:
        return report
    processes.barrier()  # until the main process has written: if fine-tuning is killed, the pruned folder is there
    again = FinetuneTarget(target.path, force=True, command=command, inside=target.path)
    return tune_folder(pruned, again, options.finetune, options.data, options.measure, dense=model, earlier=report)


def _prune_folder(
    model: TokenModel,
    plan: Plan,
    images: CalibrationImages,
    target: Target,
    options: CompressOptions,
    search: SearchResult | None,
) -> tuple[TokenModel, dict[str, Any]]:
    """Write the pruned folder; returns the model and the report that are in it."""
    calibration, together = images.calibration, processes.count() > 1
    plan = Plan(plan.stages, plan.alignment, images.gap_source(options.gap, plan.gap), plan.seed)
    refit = (
        Reconstruct(required=bool(options.reconstruct)) if images.wants_reconstruction(options.reconstruct) else None
    )
    context = Context(model, calibration, seed=options.data.seed, distributed=together, command=target.command)
    snapshots = run_steps([*pruning_steps(plan, refit), *options.steps], context)
    measured = measure_models(name_columns(model, snapshots), images.measured, options.measure, together)
    pruned = measured.models["pruned"]
    pruned.made_by = MadeBy(target.command, versions())
    sections = {
        "calibration": describe_calibration(pruned.plan, calibration),
        "reconstruction": describe_reconstruction(pruned, context.seconds.get("reconstructed", 0.0)),
    }
    files = dict(context.files)
    if search is not None:
        sections["search"] = search.record
        files[SENSITIVITY_FILE] = search.sensitivity.to_json().encode()
    overlap = len(images.measured.digests & calibration.digests)
    report = make_report(measured, overlap, sections, target.command)
    write_folder(target, measured, report, files)
    return pruned, report


def preview(model: TokenModel, plan: Plan) -> dict[str, Any]:
    """What a plan would do to a model, without images: a JSON object that is itself read as a plan."""
    dense = flops(model)
    pruned = install(copy.deepcopy(model), Plan(plan.stages, plan.alignment, seed=plan.seed))
    return {
        "plan": plan.to_dict(),
        "stages": list_stages(pruned),
        "dense": {"flops": dense},
        "pruned": {"flops": flops(pruned)},
    }
