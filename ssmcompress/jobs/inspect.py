"""What a checkpoint is: architecture, task, origin, size, FLOPs by part and the reachable budget, as JSON."""

from __future__ import annotations

from typing import Any

from ..evaluation.flops import flops, flops_by_part, smallest_share
from ..models.base import TokenModel
from ..models.checkpoint import LoadOptions, read_model
from ..pruning.plan import default_stages

# The commands that take a dense and a pruned model.
DENSE = ("prune", "compare", "evaluate", "export", "verify", "benchmark")
PRUNED = ("evaluate", "finetune", "report", "export", "verify", "benchmark")


def inspect_file(path: str, options: LoadOptions) -> dict[str, Any]:
    """Describe the model in a file: `inspect_model`, and what the file says about it.

    Returns:
        A JSON object with the keys of `inspect_model`, `task`, `writer` (the tool that wrote the file, None if nothing
        says it), `named` (where the architecture is named, or None) and `commands` (those that take the file).

    Raises:
        InputError: the file cannot be read, or its model is not supported; the message says what it is.
    """
    model, said = read_model(path, options)
    commands = DENSE if model.plan is None else PRUNED
    return inspect_model(model) | {
        "task": "image classification",
        "writer": said.writer,
        "named": said.family.where if said.family is not None else None,
        "commands": list(commands),
    }


def inspect_model(model: TokenModel) -> dict[str, Any]:
    """A JSON object: `architecture`, `params`, `tokens` by layer, `flops` in GFLOPs, `range` of budgets, `pruned`."""
    depth = len(model.blocks)
    stages = [s.after for s in model.plan.stages] if model.plan else list(default_stages(depth)) if depth > 1 else []
    lowest = round(100 * smallest_share(model, stages), 2)
    return {
        "architecture": {"type": model.architecture, **model.config.to_dict()},
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
