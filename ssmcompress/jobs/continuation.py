"""Compression that goes on from a compressed model: what it starts from, what it is refused, and its record."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compression.trim.trims import Trims, find_trims, read_trims
from ..errors import InputError
from ..models.base import TokenModel
from ..models.checkpoint import describe_file, find_dense
from ..models.continuation import check_fewer, is_pruned, name_dense
from ..models.inputs import check_model
from ..models.records import INPUT, StepRecord
from ..progress import line, note
from ..pruning.plan import Plan
from .requests import PlanRequest

# The column of a report that has the model that a compression went on from.
INPUT_COLUMN = "input"


@dataclass(frozen=True)
class Start:
    """What a compression starts from.

    Attributes:
        model: what its steps begin with. dense: what it is compared with, and refitted to; the same model where that is
            dense.
        input: the model as it came, where that is compressed already; else None.
    """

    model: TokenModel
    dense: TokenModel
    input: TokenModel | None = None

    @property
    def columns(self) -> dict[str, TokenModel]:
        """The models that a report shows after the dense one and before the snapshots."""
        return {} if self.input is None else {INPUT_COLUMN: self.input}


def find_start(
    model: TokenModel, dense: TokenModel | str | Path | None = None, folder: str | Path | None = None
) -> Start:
    """Return what a compression of `model` starts from.

    Args:
        model: dense or compressed.
        dense: the dense model that a compressed one was made from, or its file; None: the file that it names.
        folder: the folder or file that a compressed model was read from; None: unknown.

    Raises:
        InputError: `dense` is given for a model that is dense itself; the dense model of a compressed one is gone, has
            changed, or has other sizes.
    """
    check_model(model)
    if model.plan is None:
        if dense is not None:
            raise InputError("`dense` goes with a compressed model, and this one is dense itself: leave it out")
        return Start(model, model)
    if not isinstance(dense, TokenModel):
        try:
            dense = find_dense(model, dense)
        except InputError as error:
            if dense is not None:
                raise
            raise InputError(
                f"to go on from a compressed model, the dense one is needed, and {error}: give it as `dense`"
            ) from error
    if dense.plan is not None:
        raise InputError("`dense` is compressed itself; expected the dense model that `model` was made from")
    if dense.dense_config != model.dense_config:
        raise InputError("`dense` has other sizes than the model that `model` was made from: expected that one")
    start = copy.deepcopy(model)
    start.add_record(StepRecord(INPUT, describe_input(model, folder)))
    return Start(start, dense, model)


def describe_input(model: TokenModel, folder: str | Path | None) -> dict[str, Any]:
    """Return the record of a model that a compression goes on from, a JSON object.

    It has the `path` and `sha256` of its file, None if they are unknown; `stages`, what each of its stages keeps; the
    kinds of the `steps` that made its weights; and `input`, the same of the model that it was made from, or None.
    """
    file, earlier = describe_file(folder) if folder is not None else None, model.steps
    before = model.find_record(INPUT)
    return {
        "path": None if file is None else file.path,
        "sha256": None if file is None else file.sha256,
        "stages": [
            {"after": s.after, "kept": kept} for s, kept in zip(model.plan.stages, model.kept_counts(), strict=True)
        ],
        "steps": [step.kind for step in earlier if step.kind != INPUT],
        "input": None if before is None else before.values,
    }


def check_request(start: Start, request: PlanRequest) -> None:
    """Raise an InputError for a way to find a plan that needs a dense model, before any work."""
    if start.input is None or not request.searches:
        return
    budget = next(iter(request.budgets))
    by_flops = budget in ("flops", "flops_backbone")
    ways = f"`ratio`, `plan` or {'`search=False`' if by_flops else '`flops` with `search=False`'}"
    raise InputError(
        f"`{budget}`: a search measures what a dense model loses by each step, and this model is compressed already: "
        f"give {ways} to go on from it, or search on the dense model{name_dense(start.model)}"
    )


def read_further_trims(start: Start, file: str) -> Trims:
    """Return what a plan in a file trims: nothing where a compressed model is to lose tokens alone.

    Raises:
        InputError: the plan is for a model that was trimmed in another way than the one to go on from.
    """
    trims = read_trims(file)
    if start.input is None:
        return trims
    present = find_trims(start.model.steps)
    # A plan without trims may be for any model, but stages of other layers would be taken for those that are left.
    if trims != present and (trims or present.layers):
        found = f"trims {trims.to_dict()}" if trims else "trims nothing"
        raise InputError(
            f"{file}: the plan {found}, and the model has lost {present.to_dict() or 'nothing but tokens'}; from a "
            f"compressed model only tokens are dropped: start from the dense model{name_dense(start.model)}"
        )
    return Trims()


def check_further(start: Start, request: PlanRequest, plan: Plan) -> None:
    """Check the plan for a model that is pruned already, and say what it has from the plan of that model.

    Raises:
        InputError: the plan keeps tokens that the model has no more.
    """
    if start.input is None or not is_pruned(start.model):
        return
    check_fewer(start.model, plan)
    if request.file is not None or request.merge is not None:
        return
    metrics = dict.fromkeys(stage.importance for stage in plan.stages)
    aligned = [name for name in ("conv", "scan") if getattr(plan.alignment, name)]
    parts = {
        "stages": (request.stages, f"stages {','.join(str(stage.after) for stage in plan.stages)}"),
        "importance": (request.importance, f"importance {','.join(metrics)}"),
        "alignment": (request.align, f"alignment {' and '.join(aligned) or 'none'}"),
    }
    if taken := [text for given, text in parts.values() if given is None]:
        line(f"taken over from the plan of the model: {'; '.join(taken)}")
    if start.model.plan.reenter and not plan.reenter:
        note("all tokens entered the last layers of the model again (`reenter`); by this plan they do not")
