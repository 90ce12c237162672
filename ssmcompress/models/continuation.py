"""Further pruning of a pruned model: what the new plan inherits, and the check that it restores no dropped tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..errors import InputError
from ..progress import note
from ..pruning.alignment import Alignment
from ..pruning.merging import MERGED_BY
from ..pruning.plan import FILLS, Plan
from .base import TokenModel
from .blocks import ScanBlock


class Inherited(NamedTuple):
    """The arguments of `make_plan`, completed from the model's current plan.

    Attributes:
        reenter, fill: see `Plan`.
    """

    stages: Sequence[int] | None
    importance: str | Sequence[str] | None
    alignment: Alignment | bool
    fuse: bool
    reenter: int = 0
    fill: str = FILLS[0]


def is_pruned(model: TokenModel) -> bool:
    """Return whether a model drops or merges tokens; False for a model that was only trimmed."""
    return model.plan is not None and bool(model.plan.stages)


def inherit(
    model: TokenModel,
    stages: Sequence[int] | None,
    importance: str | Sequence[str] | None,
    alignment: Alignment | bool | None,
    fuse: bool,
) -> Inherited:
    """Return the arguments of `make_plan`, where None is replaced by the value in the model's plan, if it has stages.

    The importance of each stage is inherited together with the stages; for other stages it is inherited only if all old
    ones agree. Whether pruned tokens stay in the pooled mean (`Alignment.pool`) is inherited even if `alignment` is
    True or False, because the classifier was fitted for it.

    Raises:
        InputError: the old stages merge tokens in a way that a ratio cannot express.
    """
    if not is_pruned(model):
        return Inherited(stages, importance, True if alignment is None else alignment, fuse)
    old, merges = model.plan, {stage.merge for stage in model.plan.stages}
    if isinstance(alignment, bool):
        alignment = replace(old.alignment, conv=alignment, scan=alignment)
    # A ratio alone requests neither dropping where the model merges nor merging a share in every layer.
    if (merges - {None, "fused"} and None in (stages, importance)) or (importance is None and len(merges) > 1):
        found = f"{sum(stage.merge is not None for stage in old.stages)} layers ({', '.join(merges - {None})})"
        way_out = "`merge` with more tokens, or `plan`" if MERGED_BY["keys"] in merges else "`plan`"
        raise InputError(
            f"the model merges tokens in {found}, which a ratio does not describe: give {way_out}, or start from the "
            f"dense model{name_dense(model)}"
        )
    if importance is None:
        fuse = fuse or "fused" in merges
        metrics = tuple(stage.importance for stage in old.stages)
        if stages is None or len({*metrics}) == 1:
            importance = metrics if stages is None else metrics[0]
    reenter = old.reenter if stages is None else 0  # other stages may come too late to re-enter
    stages = tuple(stage.after for stage in old.stages) if stages is None else stages
    return Inherited(stages, importance, old.alignment if alignment is None else alignment, fuse, reenter, old.fill)


def name_dense(model: TokenModel) -> str:
    """Return ", PATH" with the file of the dense model that a model was made from; "" if it was never a file."""
    return f", {model.source.path}" if model.source is not None and model.source.path else ""


def check_fewer(model: TokenModel, plan: Plan) -> None:
    """Raise an InputError if a plan keeps more tokens before some layer than the pruned model has there.

    The weights and corrections of a pruned model were fitted for the tokens that it keeps.
    """
    if not is_pruned(model):
        return
    new = model.counts_for(plan.stages, plan.reenter)
    for index, (now, then) in enumerate(zip(model.token_counts(), new, strict=True)):
        if then > now:
            place = model.name_count(index)
            raise InputError(
                f"the model has {now} tokens left {place}, and by this plan it would have {then}: prune more (a higher "
                f"`ratio`, a lower `flops`), or start from the dense model{name_dense(model)}"
            )


def remove_stages(model: TokenModel, corrections: bool = True) -> TokenModel:
    """Return a copy of a model with the same weights and sizes that drops no tokens; the argument is not changed.

    Args:
        corrections: whether the copy keeps the corrections and the maps of output levels, if a new plan is to be
            installed. They compensate for dropped tokens, so a model that drops none must not have them.
    """
    model = copy.deepcopy(model)
    model.pruners.clear()
    for block in model.blocks:
        if isinstance(block, ScanBlock):
            block.scans.gap_delta = None
    model.plan = None if model.origin is None else Plan((), gap="bias")
    model.alignment = Alignment()
    if not corrections:
        model.corrections.clear()
        model.class_corrections.clear()
        model.readout_correction = None
        if model.levels:
            model.level_maps.clear()
    return model


def has_corrections(model: TokenModel) -> bool:
    """Return whether a model has corrections in addition to its weights, which cost FLOPs."""
    return bool(len(model.corrections) or len(model.class_corrections)) or model.readout_correction is not None


def make_ready(model: TokenModel, plan: Plan) -> TokenModel:
    """Return a copy of a pruned model in which `plan` can replace its own plan.

    Maps of output levels are specific to the tokens that each stage dropped, so they are kept only if the stages are
    after the same layers; otherwise a note is shown.
    """
    old, model = model.plan, remove_stages(model)
    same = [s.after for s in old.stages] == [s.after for s in plan.stages] and old.reenter == plan.reenter
    if model.levels and len(model.level_maps) and not same:
        note("the maps of output levels are for other stages and are left out, unless new ones are fitted")
        model.level_maps.clear()
        model.steps = tuple(step for step in model.steps if step.kind != "level_maps")
    return model
