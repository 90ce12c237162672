"""Applying a plan to a model: pruners are added between the blocks, and gap deltas to the blocks after them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..pruning.alignment import Alignment
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import Plan, Stage
from ..pruning.pruner import TokenPruner
from .base import TokenModel
from .blocks import ScanBlock
from .continuation import check_fewer, inherit, is_pruned, make_ready
from .inputs import check_dense, check_model


def make_plan(
    model: TokenModel,
    *,
    stages: Sequence[int] | None = None,
    ratio: float | Sequence[float] = 0.3,
    importance: str | Sequence[str] | None = None,
    alignment: Alignment | bool | None = None,
    seed: int = 0,
    fuse: bool = False,
) -> Plan:
    """Make a plan without calibration images and check it against the model; its gap source is left unset.

    Args:
        model: dense, trimmed or pruned. For a pruned model, the defaults are the stages, importance, alignment and
            `fuse` of its plan, and `ratio` is still relative to all tokens.
        stages: 1-based layers after which to prune, or inside which, between attention and the MLP; None: those of
            ToP-ViM or EViT, scaled to the model's depth.
        ratio: share of the tokens removed at each stage, in [0, 1); one for all stages, or one for each.
        importance: the metric, see `ssmcompress.pruning.importance`; one for all stages, or one for each. None: "clip",
            or "attention" for a model with a class token that attends to the others.
        alignment: True for conv and scan, False for neither, or an Alignment; None: True.
        seed: seed of importance `random`.
        fuse: fuse the tokens removed by a stage into one token, weighted by their attention, as in EViT.

    Raises:
        InputError: the model cannot be pruned by these stages, ratios or metric.
    """
    check_model(model)
    stages, importance, alignment, fuse, reenter, fill = inherit(model, stages, importance, alignment, fuse)
    importance = model.default_importance if importance is None else importance
    stages = model.default_stages() if stages is None else list_numbers("stages", stages, "layers")
    ratio = (ratio,) if isinstance(ratio, Real) else ratio
    ratios = list_numbers("ratio", ratio, "shares of tokens to remove")
    ratios = ratios * len(stages) if len(ratios) == 1 else ratios
    if len(ratios) != len(stages):
        raise InputError(f"{len(ratios)} ratios for {len(stages)} stages: expected one, or one for each stage")
    metrics = tuple(importance) if isinstance(importance, (tuple, list)) else (importance,) * len(stages)
    if len(metrics) != len(stages):
        raise InputError(f"{len(metrics)} importances for {len(stages)} stages: expected one, or one for each stage")
    if isinstance(alignment, bool):
        alignment = Alignment(alignment, alignment)
    merge, parts = "fused" if fuse else None, zip(stages, ratios, metrics, strict=True)
    made = tuple(Stage(*part, merge) for part in parts)
    return model.check_plan(Plan(made, alignment, seed=seed, reenter=reenter, fill=fill))


def list_numbers(name: str, values: Any, what: str) -> tuple[int | float, ...]:
    """Return the entries of a list, array or tensor as Python numbers; InputError if empty or not numeric."""
    values = values.tolist() if hasattr(values, "tolist") else values
    values = (values,) if isinstance(values, Real) and name == "ratio" else values  # an array may be zero-dimensional
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        values = tuple(values)
        if values and all(isinstance(value, Real) for value in values):
            return tuple(_to_python(value) for value in values)
    raise InputError(f"`{name}` {values!r}: expected numbers, {what}")


def _to_python(value: Real) -> bool | int | float:
    """Convert a number of any library to a type that JSON supports."""
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def prune(
    model: TokenModel,
    plan: Plan | None = None,
    *,
    ratio: float | Sequence[float] | None = None,
    stages: Sequence[int] | None = None,
    importance: str | Sequence[str] | None = None,
    alignment: Alignment | bool | None = None,
    seed: int | None = None,
) -> TokenModel:
    """Return a copy of `model` that prunes by `plan`; `model` is not changed.

    A pruned model is pruned further: it keeps its weights and corrections, and `plan` replaces its own plan. Ratios are
    relative to the tokens of the dense model, so a ratio of 0.4 keeps as many tokens as it would there.

    Args:
        model: a model from `load`, dense, trimmed or pruned.
        plan: from `calibrate`, `search` or `make_plan`, written by hand (with `gap="bias"`, no images are needed), or
            the result of `Plan.to_dict`. None: a plan is made without images from the other arguments, which are those
            of `make_plan`; the gap deltas then come from the bias.

    Raises:
        InputError: the plan does not fit the model, or keeps more tokens before some layer than the model has there.
    """
    check_model(model)
    options = {"ratio": ratio, "stages": stages, "importance": importance, "alignment": alignment, "seed": seed}
    options = {name: value for name, value in options.items() if value is not None}
    plan = check_plan(model, plan, options) if plan is not None else make_plan(model, **options)
    for layer in plan.probed_layers:
        if plan.probe(layer) is None:
            metric = next(stage.importance for stage in plan.stages if stage.after == layer)
            raise InputError(f"importance {metric!r} after layer {layer} is fitted on images: use calibrate()")
    check_fewer(model, plan)
    return install(make_ready(model, plan) if is_pruned(model) else copy.deepcopy(model), plan)


def check_plan(model: TokenModel, plan: Any, options: Mapping[str, Any], depth: int | None = None) -> Plan:
    """Check and return a plan given by the caller; InputError if it is invalid or combined with options of a new plan.

    Args:
        plan: a Plan, or its dict. options: the arguments for making a plan that were also given.
        depth: number of layers that the model will have when the plan is applied; None: its current number.
    """
    if options:
        raise InputError(f"`plan` and {', '.join(f'`{name}`' for name in options)}: the plan already sets that")
    if isinstance(plan, Mapping):
        plan = Plan.from_dict(plan)
    if isinstance(plan, Real):
        raise InputError(f"`plan` is {plan}: pass a share of tokens to remove as ratio={plan}")
    if isinstance(plan, (str, Path)):
        raise InputError(f"`plan` is the name {str(plan)!r}: pass the plan, read_plan({str(plan)!r})")
    if not isinstance(plan, Plan):
        raise InputError(f"`plan` is a {type(plan).__name__}: expected a plan of make_plan(), calibrate() or search()")
    if not plan.stages:
        raise InputError("a plan without stages prunes nothing")
    return plan.validate(len(model.blocks) if depth is None else depth, model.drops_inside)


def align(model: TokenModel, alignment: Alignment) -> TokenModel:
    """Return a copy of a pruned `model` with another alignment; `model` is not changed.

    Raises:
        InputError: the model is not pruned, or has no mean over tokens to which `alignment.pool` applies.
    """
    if model.plan is None:
        raise InputError("the model prunes nothing, so there is nothing to align: prune it first")
    _check_pool(model, alignment)
    model = copy.deepcopy(model)
    model.alignment, model.plan = alignment, replace(model.plan, alignment=alignment)
    return model


def prune_like(dense: TokenModel, pruned: TokenModel, alignment: Alignment) -> TokenModel:
    """Return a copy of `dense` that drops the tokens that `pruned` would drop, with another alignment.

    It has the plan, the pruners and the gap deltas of `pruned`, including those loaded from a file, and the weights of
    `dense`.

    Args:
        pruned: a model made from `dense` that drops tokens but was not trimmed.

    Raises:
        InputError: `dense` is itself compressed, or its layers have other sizes.
    """
    check_dense(dense)
    if pruned.config != dense.config:
        raise InputError("the models have other sizes: expected a dense model and one that has lost only tokens")
    model = copy.deepcopy(dense)
    model.pruners = copy.deepcopy(pruned.pruners)
    for block, other in zip(model.blocks, pruned.blocks, strict=True):
        if isinstance(block, ScanBlock) and other.scans.gap_delta is not None:
            block.set_gap_delta(other.scans.gap_delta.clone())
    model.plan, model.alignment = replace(pruned.plan, alignment=alignment), alignment
    return model


def _check_pool(model: TokenModel, alignment: Alignment) -> None:
    if alignment.pool and not model.pools:
        raise InputError("the plan's alignment has pool, but this model reads out no mean over its tokens")


@torch.no_grad()
def install(model: TokenModel, plan: Plan) -> TokenModel:
    """Install the pruners and gap deltas of `plan` in `model` in place, and return it.

    Probes that the plan lacks are initialised to zeros, to be loaded from a file.
    """
    model.check_plan(plan)
    _check_pool(model, plan.alignment)
    if plan.gap is None:
        plan = replace(plan, gap="bias" if plan.calibration is None else "calibrated")
    if plan.gap == "calibrated" and plan.calibration is None:
        raise InputError("gap 'calibrated' needs calibration images: use calibrate(), or gap 'bias'")
    for index, stage in enumerate(plan.stages):
        seed = plan.seed * 1000 + index  # a different draw for each stage
        probe = None
        *_, length, width = model.section_of(stage.after)
        if IMPORTANCES[stage.importance].probe:
            size = width + length
            probe = plan.probe(stage.after)
            probe = torch.zeros(size, dtype=torch.float32, device="cpu") if probe is None else probe.clone()
            if len(probe) != size:
                raise InputError(
                    f"the saliency after layer {stage.after} was fitted for {len(probe)} features and positions, the "
                    f"model has {size}: the plan was made for another model or image size"
                )
        grid = model.config.grid if model.reads_levels else None
        pruner = TokenPruner(stage.ratio, stage.importance, length, seed, probe, stage.merge, grid)
        model.pruners[str(stage.after)] = pruner
    if plan.gap == "calibrated" and len(plan.calibration.gap_deltas) != len(model.blocks):
        raise InputError(
            f"the plan was calibrated on a model of {len(plan.calibration.gap_deltas)} layers, "
            f"this one has {len(model.blocks)}"
        )
    first = min((stage.after for stage in plan.stages), default=len(model.blocks))
    for index, block in enumerate(model.blocks[first:], first):
        if not isinstance(block, ScanBlock):
            continue
        delta = block.bias_delta()
        if plan.gap == "calibrated":
            calibrated = plan.calibration.gap_deltas[index]
            if calibrated.shape != delta.shape:
                raise InputError(
                    f"calibrated gap deltas of layer {index + 1}: expected {tuple(delta.shape)}, "
                    f"found {tuple(calibrated.shape)}; the plan was made for another model"
                )
            delta = calibrated.to(delta, copy=True)
        block.set_gap_delta(delta)
    model.plan = plan
    model.alignment = plan.alignment
    model.pruners.to(next(model.parameters()).device)
    return model
