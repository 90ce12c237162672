"""FLOPs of one image, counted by formula and by part.

One multiply-add is one FLOP in linear and convolution layers. The scan counts 9 FLOPs per token, channel and state, one
per token and channel for D and one for the gate. Norms, activations and biases are not counted. That is the convention
of the papers, in two variants:

- `full`: everything that is executed, so both directions of a Vim. Reports show this one by default.
- `paper`: what the papers print, one direction of a Vim (1.45 / 5.08 / 18.87 for tiny / small / base), all four of a
  PlainMamba but no gate (3.01 / 8.07 / 14.43 for L1 / L2 / L3). Use it only to compare with the papers.

A convolution on a grid counts all taps of its window at each kept token, as the compiled backends compute it; in an
ONNX file, and where gradients are computed, it covers the whole grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..models.base import TokenModel
from ..models.inputs import check_model
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import MAX_RATIO, Stage, token_counts

CONVENTIONS = ("full", "paper")


def flops(model: TokenModel) -> dict[str, float]:
    """Return the GFLOPs of one image for the model as it is, pruned or dense, by convention."""
    check_model(model)
    return {convention: sum(flops_by_part(model, convention).values()) for convention in CONVENTIONS}


def dense_flops(model: TokenModel) -> dict[str, float]:
    """Return the GFLOPs of one image without pruning, by convention."""
    counts = [model.length] * (len(model.blocks) + 1)
    return {c: sum(model.flops_by_part(counts, c).values()) / 1e9 for c in CONVENTIONS}


def flops_by_part(model: TokenModel, convention: str = "full") -> dict[str, float]:
    """Return the GFLOPs of one image by part: embedding, in_proj, conv, x_proj, dt_proj, scan, out_proj, head.

    A pruned model can also have the parts scoring and merging, a reconstructed one corrections.
    """
    parts = model.flops_by_part(model.token_counts(), convention)
    if model.plan:
        parts = {**parts, **_stage_parts(model, model.plan.stages)}
    if model.corrections:
        parts = {**parts, "corrections": sum(weight.numel() for weight in model.corrections.parameters())}
    return {part: count / 1e9 for part, count in parts.items()}


def remaining_share(model: TokenModel, stages: Sequence[Stage]) -> float:
    """Return the FLOPs (`full`) of the dense `model` when pruned at `stages`, as a share of its dense FLOPs."""

    def count(stages: Sequence[Stage]) -> int:
        counts = token_counts(len(model.blocks), model.length, stages, model.protected is not None)
        return sum(model.flops_by_part(counts, "full").values()) + sum(_stage_parts(model, stages).values())

    return count(stages) / count(())


def _stage_parts(model: TokenModel, stages: Sequence[Stage]) -> dict[str, int]:
    """Return the FLOPs of the stages themselves, by part: a probe's products (scoring), a merge's cosines (merging)."""
    counts = token_counts(len(model.blocks), model.length, stages, model.protected is not None)
    width, parts = model.d_model, {}
    for stage in stages:
        tokens, kept = counts[stage.after - 1], counts[stage.after]
        if (scoring := IMPORTANCES[stage.importance].flops) > 0:
            parts["scoring"] = parts.get("scoring", 0) + scoring * tokens * width
        if stage.merge is not None:
            pairs = (tokens // 2) ** 2 if stage.merge == "ordered" else tokens * min(tokens - kept, kept)
            parts["merging"] = parts.get("merging", 0) + pairs * width
    return parts


def corrections_share(model: TokenModel, stages: Sequence[int]) -> float:
    """Return the largest share of the dense FLOPs that corrections can cost for pruning after layers `stages`."""
    layers = len(model.blocks) - min(stages)
    return layers * model.d_model**2 / (flops(model)["full"] * 1e9)


def smallest_share(model: TokenModel, stages: Sequence[int]) -> float:
    """Return the smallest share of the dense FLOPs that pruning after layers `stages` can leave (two tokens kept)."""
    return remaining_share(model, [Stage(after, MAX_RATIO) for after in stages])
