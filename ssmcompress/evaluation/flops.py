"""FLOPs of one image, counted by formula and by part.

One multiply-add is one FLOP in linear and convolution layers. The scan counts 9 FLOPs per token, channel and state, one
per token and channel for D and one for the gate. Norms, activations and biases are not counted. This is the convention
of the papers, in two variants:

- `full`: everything that is executed, including both directions of a Vim. Reports show it by default.
- `paper`: the numbers printed in the papers, with one direction of a Vim (1.45 / 5.08 / 18.87 for tiny / small / base),
  all four of a PlainMamba but no gate (3.01 / 8.07 / 14.43 for L1 / L2 / L3), and without the cost of selecting and
  merging tokens. For a ViT, both are equal. Use it only to compare with the papers.

A correction of the class token or of the logits reads sums over all tokens: one FLOP for each token and feature.

A convolution on a grid counts all taps of its window at each kept token, as computed by the compiled backends; in an
ONNX file, and when gradients are computed, it covers the whole grid.

A Vim reads out only its class token, so its last layer is computed only for that token (`TokenModel.trace`). `paper`,
and `full` of a dense model, count all tokens of that layer, as computed by the published code. `full` of a compressed
model counts what is run here, at batch 1; in a larger batch, whose images keep different numbers of tokens before the
class token, and in an ONNX file, part of this saving is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..models.base import TokenModel
from ..models.class_corrections import count_inputs, max_readout_rank
from ..models.inputs import check_model
from ..models.sizes import LayeredConfig
from ..pruning.importance import IMPORTANCES
from ..pruning.merging import count_merge
from ..pruning.plan import MAX_RATIO, Stage

CONVENTIONS = ("full", "paper")
# Parts of a segmentation model whose cost does not depend on dropped tokens.
DENSE_PARTS = ("neck", "head")


def flops(model: TokenModel) -> dict[str, float]:
    """Return the GFLOPs of the model for one image, by convention: as published if it is dense, else as it is run."""
    check_model(model)
    return {convention: sum(flops_by_part(model, convention).values()) for convention in CONVENTIONS}


def flops_as_run(model: TokenModel) -> dict[str, float]:
    """Return the GFLOPs of one image as they are run here, by convention, also for a dense model."""
    return {convention: sum(flops_by_part(model, convention, True).values()) for convention in CONVENTIONS}


def backbone_flops(model: TokenModel) -> dict[str, float] | None:
    """Return the GFLOPs (`flops`) of a segmentation model without its neck and head; None for a classifier."""
    if not model.reads_levels:
        return None
    parts = {convention: flops_by_part(model, convention) for convention in CONVENTIONS}
    return {
        convention: sum(count for part, count in counts.items() if part not in DENSE_PARTS)
        for convention, counts in parts.items()
    }


def share_of_whole(model: TokenModel, backbone: float) -> float:
    """Convert a share of a dense segmentation model's backbone FLOPs (`full`) to a share of the whole model's.

    Neck and head cost the same whatever tokens are dropped.

    Raises:
        InputError: the model is a classifier, which is all backbone.
    """
    found = backbone_flops(model)
    if found is None:
        raise InputError("`flops_backbone` is for segmentation models, and this one classifies: give `flops`")
    rest = 1 - found["full"] / flops(model)["full"]
    return backbone * (1 - rest) + rest


def share_of_backbone(model: TokenModel, whole: float) -> float:
    """Convert a share of a dense segmentation model's FLOPs to a share of its backbone's.

    It is the inverse of `share_of_whole`, with the same errors.
    """
    rest = share_of_whole(model, 0.0)
    return (whole - rest) / (1 - rest)


def dense_flops(model: TokenModel) -> dict[str, float]:
    """Return the GFLOPs of the corresponding dense model for one image, as published, by convention."""
    return {convention: _count_dense(model, convention) / 1e9 for convention in CONVENTIONS}


def _count_dense(model: TokenModel, convention: str = "full") -> int:
    config = model.dense_config
    counts = model.counts_for((), config=config)
    return sum(model.count_flops(config, counts, convention, as_run=False).values())


def flops_of(model: TokenModel, config: LayeredConfig, counts: Sequence[int] | None = None) -> float:
    """Return the FLOPs (`full`, as run) of a model with the sizes `config`, as a share of the dense FLOPs of `model`.

    Args:
        counts: tokens of each layer and of the readout (`token_counts`); None: all tokens.
    """
    counts = model.counts_for((), config=config) if counts is None else counts
    return sum(model.count_flops(config, counts, "full").values()) / _count_dense(model)


def flops_by_part(model: TokenModel, convention: str = "full", as_run: bool | None = None) -> dict[str, float]:
    """Return the GFLOPs of one image by part: embedding, in_proj, conv, x_proj, dt_proj, scan, out_proj, head.

    A pruned model can additionally have the parts scoring and merging, a reconstructed one corrections.

    Args:
        as_run: count what is run here, or what the published code runs; None: as run for a compressed model only.
    """
    as_run = model.plan is not None if as_run is None else as_run
    parts = model.flops_by_part(model.token_counts(), convention, as_run)
    if model.plan and convention == "full":
        parts = {**parts, **_stage_parts(model, model.plan.stages)}
    if (count := _count_corrections(model)) > 0:
        parts = {**parts, "corrections": count}
    return {part: count / 1e9 for part, count in parts.items()}


def flops_by_section(model: TokenModel) -> list[dict[str, Any]]:
    """Return the layers of each section of a model, with tokens, width and GFLOPs (`full`) for one image.

    Parts before, between and after the sections are not included. The list is empty for a model with one section.
    """
    counts, sections = model.token_counts(), model.sections
    if len(sections) == 1:
        return []
    whole, found = sum(model.flops_by_part(counts, "full").values()), []
    for section in sections:
        first, last = model.count_index(section.first), model.count_index(section.last) + 2
        without = [*counts[:first], *[0] * (last - first), *counts[last:]]
        spent = (whole - sum(model.flops_by_part(without, "full").values())) / 1e9
        found.append({**section._asdict(), "gflops": spent})
    return found


def remaining_share(model: TokenModel, stages: Sequence[Stage]) -> float:
    """Return the FLOPs (`full`) of a dense or trimmed `model` when pruned at `stages`, as a share of the dense FLOPs.

    The model is counted as run, the dense one as published; therefore a Vim that prunes nothing has less than 1.
    """
    counts = model.counts_for(stages)
    as_run = all(stage.after < len(model.blocks) for stage in stages)  # with a stage, the last layer is run in full
    run = sum(model.flops_by_part(counts, "full", as_run).values()) + sum(_stage_parts(model, stages).values())
    return run / _count_dense(model)


def _stage_parts(model: TokenModel, stages: Sequence[Stage]) -> dict[str, int]:
    """Return the FLOPs of the stages themselves: products of a probe or query (scoring), cosines and sums (merging)."""
    counts, parts = model.counts_for(stages), {}
    for stage in stages:
        index, width = model.count_index(stage.after), model.section_of(stage.after).width
        tokens, kept = counts[index : index + 2]
        if (scoring := IMPORTANCES[stage.importance].flops) > 0:
            parts["scoring"] = parts.get("scoring", 0) + scoring * tokens * width
        if stage.merge is not None:
            merging = count_merge(stage.merge, tokens, kept, width, model.key_width)
            parts["merging"] = parts.get("merging", 0) + merging
    return parts


def _count_corrections(model: TokenModel) -> int:
    """Return the FLOPs of the corrections: their maps, and the sums for the class token and the logits."""
    readout = model.readout_correction
    maps = [*model.corrections.parameters(), *model.class_corrections.parameters()]
    layers, counts = [int(layer) for layer in model.class_corrections], model.token_counts()
    if readout is not None:
        maps += readout.parameters()
        layers.append(len(model.blocks) + 1)
    stages = [stage.after for stage in model.plan.stages if stage.after < max(layers, default=0)] if model.plan else []
    summed = sum(counts[layer - 1] for layer in layers) + sum(counts[after - 1] + counts[after] for after in stages)
    return sum(weight.numel() for weight in maps) + summed * model.d_model + model.count_level_maps()


def corrections_share(model: TokenModel, stages: Sequence[int], reconstruct: bool = True) -> float:
    """Return the maximum share of the dense FLOPs that corrections can cost when pruning after layers `stages`.

    Args:
        reconstruct: whether the layers are refitted; if not, only the maps of a segmentation model's levels count,
            which are always fitted if there are images.
    """
    width, groups, count = model.d_model, len(set(stages)), model.bound_level_maps(stages)
    if reconstruct:
        for section in model.sections:
            inside = [after for after in stages if section.first <= after <= section.last]
            # Two factors of half the rank in each layer after the first of these stages.
            count += (section.last - min(inside, default=section.last)) * section.width**2
        layers = len(model.blocks) - min(stages, default=len(model.blocks))
        if model.protected is not None:
            inputs = count_inputs(width, model.segments)
            count += layers * (max(1, width // 2) * (inputs + width) + model.length * width)
            count += groups * 2 * model.length * width
        elif model.pools:
            inputs, classes = model.segments * (width + 1), model.config.num_classes
            count += max_readout_rank(classes, inputs) * (inputs + classes) + (1 + 2 * groups) * model.length * width
    return count / _count_dense(model)


def smallest_share(model: TokenModel, stages: Sequence[int]) -> float:
    """Return the smallest share of the dense FLOPs that pruning after layers `stages` can leave (two tokens kept)."""
    return remaining_share(model, [Stage(after, MAX_RATIO) for after in stages])
