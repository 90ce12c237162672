"""A plan for a budget with the same ratio at every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import BudgetError
from ...evaluation.flops import remaining_share
from ...models.base import TokenModel
from ...models.rewrite import make_plan
from ...pruning.plan import MAX_RATIO, Plan, ratio_for_budget


def plan_for_budget(
    model: TokenModel, budget: float, stages: Sequence[int] | None, *, reserve: float = 0.0, **options: Any
) -> Plan:
    """Make the plan with the smallest ratio, equal at every stage, that leaves at most `budget` of the FLOPs.

    Args:
        budget: share of the dense FLOPs to keep. stages: layers to prune after; None: those of `make_plan`.
        reserve: share of the dense FLOPs reserved for the corrections of a reconstruction.
        options: those of `make_plan`.

    Raises:
        BudgetError: these stages cannot reach the budget.
    """
    options["stages"] = stages
    stages = tuple(stage.after for stage in make_plan(model, **options).stages)
    least = least_share(model, **options) + reserve
    if not least <= budget < 1:
        raise BudgetError(
            f"{budget:.1%} of the FLOPs is out of reach: pruning after {','.join(map(str, stages))} "
            f"leaves from {least:.1%} to below 100%"
        )

    def share(ratio: float) -> float:
        return remaining_share(model, make_plan(model, ratio=ratio, **options).stages)

    return make_plan(model, ratio=ratio_for_budget(budget - reserve, share), **options)


def least_share(model: TokenModel, stages: Sequence[int] | None, **options: Any) -> float:
    """Return the smallest share of the dense FLOPs that plans with these stages and options can leave."""
    return remaining_share(model, make_plan(model, stages=stages, ratio=MAX_RATIO, **options).stages)
