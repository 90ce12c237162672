"""Description of a checkpoint: architecture, task, origin, size, FLOPs by part and reachable budgets, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compression.search.axes import Option, list_axes, list_options
from ..compression.search.combine import combine
from ..compression.search.propose import Candidate, prune_most
from ..evaluation.flops import (
    backbone_flops,
    flops,
    flops_as_run,
    flops_by_part,
    flops_by_section,
    flops_of,
    share_of_backbone,
    smallest_share,
)
from ..models.base import TokenModel
from ..models.checkpoint import LoadOptions, read_model
from .trim_sizes import describe_sizes, describe_trims

# Commands for a dense and for a pruned model.
DENSE = ("prune", "compare", "evaluate", "export", "verify", "benchmark")
PRUNED = ("prune", "evaluate", "finetune", "report", "export", "verify", "benchmark")


def inspect_file(path: str, options: LoadOptions) -> dict[str, Any]:
    """Describe the model in a file: `inspect_model`, and the file's own information.

    Returns:
        A JSON object with the keys of `inspect_model`, `task`, `writer` (the tool that wrote the file, None if
        unknown), `named` (where the architecture is named, or None) and `commands` (those that accept the file).

    Raises:
        InputError: the file cannot be read, or its model is not supported; the message says what it is.
    """
    model, said = read_model(path, options)
    commands = DENSE if model.plan is None else PRUNED
    return inspect_model(model) | {
        "task": model.task.title if model.frames is None else model.task.title.replace("image", "video"),
        "writer": said.writer,
        "named": said.family.where if said.family is not None else None,
        "commands": list(commands),
    }


def inspect_model(model: TokenModel) -> dict[str, Any]:
    """Describe a model, without images.

    Returns:
        A JSON object: `architecture`, `params`, `tokens` by layer; `sizes` of the layers and what was trimmed, `trims`;
        `flops` in GFLOPs, with `as_run` (`full` of this implementation), `backbone` for a segmentation model, and
        `by_section` for a model whose layers process grids of several sizes;
        `range`, reachable percentages of the full FLOPs, `axes_backbone`, those of the backbone's FLOPs; `pruned`.
    """
    depth = len(model.blocks)
    stages = [s.after for s in model.plan.stages] if model.plan else list(model.default_stages()) if depth > 1 else []
    lowest = round(100 * smallest_share(model, stages), 2)
    ranges, backbone = list_ranges(model) if model.plan is None else {}, backbone_flops(model)
    return {
        "architecture": {"type": model.architecture, **model.config.to_dict()},
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": model.token_counts(),
        "sizes": describe_sizes(model.config),
        "trims": describe_trims(model),
        "flops": {
            **flops(model),
            "as_run": flops_as_run(model)["full"],
            "by_part": flops_by_part(model, "full"),
            "by_part_paper": flops_by_part(model, "paper"),
            **({"by_section": sections} if (sections := flops_by_section(model)) else {}),
            **({} if backbone is None else {"backbone": backbone}),
        },
        "range": {
            "stages": stages,
            "min_percent": lowest,
            "max_percent": 100.0,
            "axes": ranges,
            **({} if backbone is None else {"axes_backbone": _of_backbone(model, ranges)}),
        },
        "pruned": model.plan is not None,
    }


def _of_backbone(model: TokenModel, ranges: Mapping[str, float]) -> dict[str, float]:
    """Convert the percentages of `list_ranges` to percentages of a segmentation model's backbone."""
    return {axis: round(100 * share_of_backbone(model, share / 100), 2) for axis, share in ranges.items()}


def list_ranges(model: TokenModel) -> dict[str, float]:
    """Return the smallest percentage of a dense model's FLOPs that a search can reach along each axis alone.

    With several axes, `all` is what they reach together.
    """
    axes = list_axes(model)
    options = [
        Option(axis, trims, flops_of(model, trims.apply_to(model.config)), 0.0)
        for axis, trims in list_options(model, axes)
    ]
    # Trimming fewer states or channels always leaves more FLOPs, whatever else is trimmed.
    least = [min((o for o in options if o.axis == axis), key=lambda o: o.flops) for axis in axes if axis != "layers"]
    least += [option for option in options if option.axis == "layers"]
    layers = range(1, len(model.blocks))
    plans = [Candidate(prune_most(model, layers), 0.0)] if layers else []
    ranges = {axis: combine(model, [o for o in least if o.axis == axis], []) for axis in axes}
    ranges |= {"tokens": combine(model, [], plans)} if plans else {}
    ranges |= {"all": combine(model, least, plans)} if len(ranges) > 1 else {}
    return {axis: round(100 * min(c.flops for c in found), 2) for axis, found in ranges.items()}
