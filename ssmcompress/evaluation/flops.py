"""FLOPs of one image, counted by formula and by part.

One multiply-add is one FLOP in linear and convolution layers; the scan counts 9 FLOPs per token, channel and
state, one per token and channel for D and one for the gate; norms, activations and biases are not counted.
That is the convention of the papers, in two variants:

- `full`: everything that is executed, so both directions of a Vim. What reports show unless told otherwise.
- `paper`: what the papers print, one direction of a Vim (1.45 / 5.08 / 18.87 for tiny / small / base), all four of a
  PlainMamba but no gate (3.01 / 8.07 / 14.43 for L1 / L2 / L3). Only for comparing with them.

A convolution on a grid counts all taps of its window at each kept token, which is what the compiled backends run; in an
ONNX file, and where gradients are wanted, it goes over the whole grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..models.base import TokenModel
from ..pruning.plan import LEAST_KEPT, Stage, token_counts

CONVENTIONS = ("full", "paper")


def flops(model: TokenModel) -> dict[str, float]:
    """GFLOPs of one image as the model stands, pruned or not, by convention."""
    return {convention: sum(by_part(model, convention).values()) for convention in CONVENTIONS}


def dense_flops(model: TokenModel) -> dict[str, float]:
    """GFLOPs of one image by convention if nothing were pruned."""
    counts = [model.length] * (len(model.blocks) + 1)
    return {c: sum(model.flops_by_part(counts, c).values()) / 1e9 for c in CONVENTIONS}


def by_part(model: TokenModel, convention: str = "full") -> dict[str, float]:
    """GFLOPs of one image by part: embedding, in_proj, conv, x_proj, dt_proj, scan, out_proj, head.

    A pruned model may have scoring and merging, a reconstructed one corrections, too.
    """
    parts = model.flops_by_part(model.token_counts(), convention)
    if model.plan:
        parts = {**parts, **_stage_parts(model, model.plan.stages)}
    if model.corrections:
        parts = {**parts, "corrections": sum(weight.numel() for weight in model.corrections.parameters())}
    return {part: count / 1e9 for part, count in parts.items()}


def remaining_share(model: TokenModel, stages: Sequence[Stage]) -> float:
    """FLOPs (`full`) that are left when the dense `model` is pruned at `stages`, as a share of all of them."""

    def count(stages: Sequence[Stage]) -> int:
        counts = token_counts(len(model.blocks), model.length, stages, model.protected is not None)
        return sum(model.flops_by_part(counts, "full").values()) + sum(_stage_parts(model, stages).values())

    return count(stages) / count(())


def _stage_parts(model: TokenModel, stages: Sequence[Stage]) -> dict[str, int]:
    """FLOPs that choosing takes beside what a layer computes anyway: a probe's products, the cosines of a merge."""
    counts = token_counts(len(model.blocks), model.length, stages, model.protected is not None)
    width, parts = model.d_model, {}
    for stage in stages:
        tokens, kept = counts[stage.after - 1], counts[stage.after]
        if stage.importance == "saliency":
            parts["scoring"] = parts.get("scoring", 0) + tokens * width
        if stage.merge is not None:
            pairs = (tokens // 2) ** 2 if stage.merge == "ordered" else tokens * min(tokens - kept, kept)
            parts["merging"] = parts.get("merging", 0) + pairs * width
    return parts


def corrections_share(model: TokenModel, stages: Sequence[int]) -> float:
    """The most that the corrections of reconstruction can cost after layers `stages`, as a share of the dense FLOPs."""
    layers = len(model.blocks) - min(stages)
    return layers * model.d_model**2 / (flops(model)["full"] * 1e9)


def reachable(model: TokenModel, stages: Sequence[int]) -> float:
    """The smallest share of the dense FLOPs that pruning after layers `stages` can leave (two tokens kept)."""
    return remaining_share(model, [Stage(after, LEAST_KEPT) for after in stages])
