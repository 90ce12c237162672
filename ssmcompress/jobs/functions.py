"""Jobs as Python functions: `search` finds a plan for a budget, `compare` compares methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..compression.calibrate import calibrate
from ..compression.reconstruct.layerwise import RefitOptions
from ..data.batches import Batches, sample_indices
from ..errors import BudgetError, InputError
from ..evaluation.flops import share_of_whole
from ..models.base import TokenModel
from ..models.inputs import check_dense, to_batches
from ..models.learnt import add_learnt
from ..models.modes import runs_in_eval_mode
from ..models.rewrite import list_numbers
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan
from .axes_search import choose_axes, search_axes
from .compare import compare_methods
from .images import JUDGED_LEAST, JUDGED_MOST, CalibrationImages
from .pipeline import Context, run_steps
from .prune import mark_unchanged
from .requests import SAMPLES, CompareRequest, DataOptions, PlanRequest
from .search import search_plan
from .steps import Reconstruct, pruning_steps, trimming_steps
from .trial import SearchRequest


@runs_in_eval_mode
def search(
    model: TokenModel,
    data: Any,
    *,
    flops: float | None = None,
    latency: float | None = None,
    stages: Sequence[int] | None = None,
    importance: str | None = None,
    alignment: Alignment | bool = True,
    reconstruct: bool = True,
) -> Plan:
    """Search for the plan with the smallest loss within a budget, and calibrate it.

    Args:
        model: the dense model.
        data: as for `ssmcompress.calibrate`; at most 1,024 images are used. Tensors and loaders are read into memory,
            up to 4 GiB.
        flops, latency: share of the dense model's to keep, above 0 and below 1; give one of them.
        stages, importance: the layers and the metric to choose from; None: all.
        alignment: as for `make_plan`.
        reconstruct: whether the model will be reconstructed: plans are then evaluated for that, and the budget leaves
            room for the corrections.

    Returns:
        A plan for `prune`, with its calibration.

    Raises:
        BudgetError: the budget is out of reach. InputError: arguments or images that cannot be used.
    """
    check_dense(model)
    budgets = {"flops": flops, "latency": latency}
    if len(given := [name for name, value in budgets.items() if value is not None]) != 1:
        raise InputError(f"{' and '.join(f'`{name}`' for name in given) or 'no budget'}: give `flops` or `latency`")
    _check_shares(given[0], (budgets[given[0]],))
    batches = to_batches(model, data)
    chosen = sample_indices(len(batches.index), SAMPLES, 0)[0]
    calibration = _select(batches, chosen)
    alignment = Alignment(alignment, alignment) if isinstance(alignment, bool) else alignment
    layers = list_numbers("stages", stages, "layers") if stages is not None else None
    request = SearchRequest(**budgets, stages=layers, importance=importance, alignment=alignment)
    images = CalibrationImages(calibration, calibration, len(chosen))
    plan = search_plan(model, request, images, DataOptions(), gap="calibrated", reconstruct=reconstruct).plan
    if not plan.stages:
        raise BudgetError(
            f"the dense model is within {given[0]}={budgets[given[0]]} as it is run, because its last layer computes "
            "only what is read out: there is nothing to prune"
        )
    return calibrate(model, calibration, plan, name=batches.source.name)


@runs_in_eval_mode
def fit_budget(
    model: TokenModel,
    data: Any,
    *,
    flops: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    flops_backbone: float | None = None,
    axes: Sequence[str] | None = None,
) -> TokenModel:
    """Compress a dense model to a budget along several axes and reconstruct it; the argument is not modified.

    Args:
        model: the dense model.
        data: as for `ssmcompress.calibrate`; at most 1,024 images are used, and with `max_drop` up to 4,096 others to
            measure the drop. Tensors and loaders are read into memory, up to 4 GiB.
        flops, latency: share of the dense model's to keep, above 0 and below 1. max_drop: maximum loss in percentage
            points. flops_backbone: share of the FLOPs of a segmentation model's backbone to keep. Give one of them.
        axes: what may be trimmed, among "states", "channels", "layers" and "tokens"; None: all that the model has.

    Raises:
        BudgetError: the budget is out of reach. InputError: arguments or images that cannot be used.
    """
    check_dense(model)
    if isinstance(axes, str):
        raise InputError(f"`axes` {axes!r}: expected several, [{axes!r}]")
    budgets = {"flops": flops, "flops_backbone": flops_backbone, "latency": latency, "max_drop": max_drop}
    request = PlanRequest(**budgets, axes=None if axes is None else tuple(axes))
    request.check()
    if not request.searches:
        raise InputError("no budget: give `flops`, `latency` or `max_drop`")
    for name, share in budgets.items():
        _check_shares(name, () if share is None or name == "max_drop" else (share,))
    if flops_backbone is not None:
        flops = share_of_whole(model, flops_backbone)
    batches = to_batches(model, data)
    chosen, rest = sample_indices(len(batches.index), SAMPLES, 0)
    judged = _select(batches, rest[:JUDGED_MOST]) if max_drop is not None and len(rest) >= JUDGED_LEAST else None
    calibration = _select(batches, chosen)
    images = CalibrationImages(calibration, calibration, len(chosen), judged)
    wanted = SearchRequest(flops, latency, choose_alignment=True, max_drop=max_drop)
    wanted = replace(wanted, axes=choose_axes(model, request.axes, images))
    if wanted.axes == ("tokens",) and max_drop is None:
        result = search_plan(model, wanted, images, DataOptions(), gap="calibrated", reconstruct=True)
    else:
        result = search_axes(model, wanted, images, DataOptions(), gap="calibrated", repair=True)
    context = Context(model, images.calibration)
    refit = Reconstruct(False, RefitOptions(class_corrections=latency is None))
    steps = [*trimming_steps(result.trims, result.chains), *pruning_steps(result.plan, refit, bool(model.levels))]
    *_, compressed = [mark_unchanged(model), *run_steps(steps, context, keep=()).values()]
    add_learnt(compressed, [result.sensitivity.digests])
    return compressed


@runs_in_eval_mode
def compare(
    model: TokenModel,
    data: Any,
    *,
    ratios: Sequence[float] = CompareRequest.ratios,
    flops: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    eval_data: Any = None,
    output: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Compare methods on a dense model, at the same FLOPs and on the same images.

    Args:
        data: calibration images, as for `search`; without `eval_data`, at most half of them are used, and the methods
            are evaluated on the others.
        ratios: shares of the tokens to remove at each stage. flops: shares of the FLOPs to keep, instead of `ratios`.
        methods: names of methods (`ssmcompress.jobs.methods.NAMES`); None: those without search and reconstruction.
        eval_data: evaluation images, with or without labels.
        output: folder for the rows, as JSON and CSV, and charts; an existing comparison is resumed. None: nothing is
            saved.
        force: overwrite the folder if it contains another comparison.

    Returns:
        A JSON object with the `rows`: for each method and level the `method`, `ratio`, the figures of the task (`top1`,
        `agreement`, `kl`), `flops`, `latency_ms`, ...

    Raises:
        InputError: arguments, images or a folder that cannot be used.
    """
    check_dense(model)
    for name, values in (("ratios", ratios), ("flops", flops), ("methods", methods)):
        if isinstance(values, (str, Real)):
            raise InputError(f"`{name}` {values!r}: expected several, [{values!r}]")
        if values is not None and not len(values):
            raise InputError(f"`{name}` is empty: expected at least one")
    _check_shares("flops", flops or ())
    request = CompareRequest(
        ratios=list_numbers("ratios", ratios, "shares of tokens to remove"),
        flops=None if flops is None else tuple(flops),
        methods=None if methods is None else tuple(methods),
    )
    request.check()
    images = _split(to_batches(model, data), None if eval_data is None else to_batches(model, eval_data))
    with TemporaryDirectory(prefix="ssmcompress-") as folder:
        return compare_methods(model, request, folder if output is None else output, force=force, images=images)


def _check_shares(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, Real) or not 0 < value < 1:
            raise InputError(f"`{name}` {value!r}: expected a share of the dense model's to keep, above 0 and below 1")


def _split(data: Batches, measured: Batches | None) -> CalibrationImages:
    """Return images for calibration and evaluation; without `measured`, at most half of `data` is for calibration."""
    count = len(data.index)
    if count < (2 if measured is None else 1):
        raise InputError(f"{data.source.name} has {count} images: expected one to calibrate and one to measure on")
    chosen, rest = sample_indices(count, min(SAMPLES, count // 2) if measured is None else SAMPLES, 0)
    measured = _select(data, rest) if measured is None else measured
    return CalibrationImages(_select(data, chosen), measured, len(chosen))


def _select(batches: Batches, rows: Sequence[int]) -> Batches:
    return replace(batches, index=[batches.index[row] for row in rows], unreadable=set())
