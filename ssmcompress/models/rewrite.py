"""Application of a plan to a model: it adds pruners between the blocks and gap deltas to the blocks after them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ..errors import InputError
from ..pruning.alignment import Alignment
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import Plan
from ..pruning.pruner import TokenPruner
from .base import TokenModel


def prune(model: TokenModel, plan: Plan) -> TokenModel:
    """Return a copy of `model` that prunes by `plan`; `model` is not changed.

    Args:
        model: a dense model from `load`.
        plan: from `calibrate`, or written by hand (with `gap="bias"`, no images are needed).

    Raises:
        InputError: the plan does not fit the model, or the model is pruned already.
    """
    if model.plan is not None:
        raise InputError("the model is pruned already; prune the dense model it came from")
    plan.validate(len(model.blocks))
    for layer in plan.probed_layers:
        if plan.probe(layer) is None:
            metric = next(stage.importance for stage in plan.stages if stage.after == layer)
            raise InputError(f"importance {metric!r} after layer {layer} is fitted on images: use calibrate()")
    return install(copy.deepcopy(model), plan)


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


def _check_pool(model: TokenModel, alignment: Alignment) -> None:
    if alignment.pool and not model.pools:
        raise InputError("the plan's alignment has pool, but this model reads out no mean over its tokens")


@torch.no_grad()
def install(model: TokenModel, plan: Plan) -> TokenModel:
    """Put the pruners and gap deltas of `plan` into `model` itself, and return it.

    Probes that the plan does not have are zeros, to be filled from a file.
    """
    plan.validate(len(model.blocks))
    _check_pool(model, plan.alignment)
    if plan.gap is None:
        plan = replace(plan, gap="bias" if plan.calibration is None else "calibrated")
    if plan.gap == "calibrated" and plan.calibration is None:
        raise InputError("gap 'calibrated' needs calibration images: use calibrate(), or gap 'bias'")
    for index, stage in enumerate(plan.stages):
        seed = plan.seed * 1000 + index  # a different draw for each stage
        probe = None
        if IMPORTANCES[stage.importance].probe:
            size = model.d_model + model.length
            probe = plan.probe(stage.after)
            probe = torch.zeros(size) if probe is None else probe.clone()
            if len(probe) != size:
                raise InputError(
                    f"the saliency after layer {stage.after} was fitted for {len(probe)} features and positions, the "
                    f"model has {size}: the plan was made for another model or image size"
                )
        pruner = TokenPruner(stage.ratio, stage.importance, model.length, seed, probe, stage.merge)
        model.pruners[str(stage.after)] = pruner
    if plan.gap == "calibrated" and len(plan.calibration.gap_deltas) != len(model.blocks):
        raise InputError(
            f"the plan was calibrated on a model of {len(plan.calibration.gap_deltas)} layers, "
            f"this one has {len(model.blocks)}"
        )
    first = min((stage.after for stage in plan.stages), default=len(model.blocks))
    for index, block in enumerate(model.blocks[first:], first):
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
