"""Compression that starts from a compressed model: what it starts from, which requests are rejected, and its record."""

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

# Report column of the model that a compression started from.
INPUT_COLUMN = "input"


@dataclass(frozen=True)
class Start:
    """The starting point of a compression.

    Attributes:
        model: input of the first step. dense: what it is compared with and refitted to; the same model if that is
            dense.
        input: the original model if it is already compressed; otherwise None.
    """

    model: TokenModel
    dense: TokenModel
    input: TokenModel | None = None

    @property
    def columns(self) -> dict[str, TokenModel]:
        """The models shown in a report between the dense one and the snapshots."""
        return {} if self.input is None else {INPUT_COLUMN: self.input}


def find_start(
    model: TokenModel, dense: TokenModel | str | Path | None = None, folder: str | Path | None = None
) -> Start:
    """Return the starting point of a compression of `model`.

    Args:
        model: dense or compressed.
        dense: the dense model that a compressed one was made from, or its file; None: the file that it names.
        folder: the folder or file that a compressed model was read from; None: unknown.

    Raises:
        InputError: `dense` is given although the model is dense itself; the dense model of a compressed one does not
            exist any more, has changed, or has other sizes.
    """
    check_model(model)
    if model.plan is None:
        if dense is not None:
            raise InputError("`dense` is for compressed models, and this model is dense itself: leave it out")
        return Start(model, model)
    if not isinstance(dense, TokenModel):
        try:
            dense = find_dense(model, dense)
        except InputError as error:
            if dense is not None:
                raise
            raise InputError(
                f"compressing a compressed model further needs the dense one, but {error}: give it as `dense`"
            ) from error
    if dense.plan is not None:
        raise InputError("`dense` is compressed itself; expected the dense model that `model` was made from")
    if dense.dense_config != model.dense_config:
        raise InputError("`dense` differs in size from the model that `model` was made from: expected that one")
    start = copy.deepcopy(model)
    start.add_record(StepRecord(INPUT, describe_input(model, folder)))
    return Start(start, dense, model)


def describe_input(model: TokenModel, folder: str | Path | None) -> dict[str, Any]:
    """Return the record of the model that a compression starts from, a JSON object.

    It contains the `path` and `sha256` of its file, None if unknown; `stages`, the tokens kept by each of its stages;
    the kinds of the `steps` that changed its weights; and `input`, the same for the model that it was made from, or
    None.
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
    """Raise an InputError if the way to find a plan requires a dense model, before any work is done."""
    if start.input is None or not request.searches:
        return
    budget = next(iter(request.budgets))
    by_flops = budget in ("flops", "flops_backbone")
    ways = f"`ratio`, `plan` or {'`search=False`' if by_flops else '`flops` with `search=False`'}"
    raise InputError(
        f"`{budget}`: a search measures what a dense model loses by each step, and this model is compressed already: "
        f"give {ways} to compress it further, or search on the dense model{name_dense(start.model)}"
    )


def read_further_trims(start: Start, file: str) -> Trims:
    """Return the trims of a plan in a file; empty for a compressed model, from which only tokens are dropped.

    Raises:
        InputError: the plan is for a model with other trims than the one to start from.
    """
    trims = read_trims(file)
    if start.input is None:
        return trims
    present = find_trims(start.model.steps)
    # A plan without trims fits any model, but its stages would be applied to the remaining layers.
    if trims != present and (trims or present.layers):
        found = f"trims {trims.to_dict()}" if trims else "trims nothing"
        raise InputError(
            f"{file}: the plan {found}, and the model has lost {present.to_dict() or 'nothing but tokens'}; from a "
            f"compressed model only tokens are dropped: start from the dense model{name_dense(start.model)}"
        )
    return Trims()


def check_further(start: Start, request: PlanRequest, plan: Plan) -> None:
    """Check a plan for a model that is already pruned, and log what is taken over from the model's own plan.

    Raises:
        InputError: the plan keeps tokens that the model no longer has.
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
