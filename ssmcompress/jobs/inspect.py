"""What a model is: architecture, size, FLOPs by part and the reachable budget, as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..evaluation.flops import flops, flops_by_part, smallest_share
from ..models.base import TokenModel
from ..pruning.plan import default_stages


def inspect_model(model: TokenModel) -> dict[str, Any]:
    """A JSON object: `architecture`, `params`, `tokens` by layer, `flops` in GFLOPs, `range` of budgets, `pruned`."""
    depth = len(model.blocks)
    stages = [s.after for s in model.plan.stages] if model.plan else list(default_stages(depth)) if depth > 1 else []
    lowest = round(100 * smallest_share(model, stages), 2)
    return {
        "architecture": {"type": model.architecture, **asdict(model.config)},
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": model.token_counts(),
        "flops": {
            **flops(model),
            "by_part": flops_by_part(model, "full"),
            "by_part_paper": flops_by_part(model, "paper"),
        },
        "range": {"stages": stages, "min_percent": lowest, "max_percent": 100.0},
        "pruned": model.plan is not None,
    }
