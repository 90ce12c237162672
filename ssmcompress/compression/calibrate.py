"""Calibration: what a plan needs to know of real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..data.batches import AnyBatches, in_chunks
from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.rewrite import prune
from ..progress import track
from ..pruning.alignment import Alignment
from ..pruning.plan import Calibration, Plan, Stage, default_stages
from .saliency import fit_probes


def make_plan(
    model: TokenModel,
    *,
    stages: Sequence[int] | None = None,
    ratio: float | Sequence[float] = 0.3,
    importance: str = "clip",
    alignment: Alignment | bool = True,
    seed: int = 0,
) -> Plan:
    """A plan made without images, its gap source left open, checked against the model.

    Args:
        stages: layers, 1-based, after which to prune; None: ToP-ViM's, scaled to the model's depth.
        ratio: share of the tokens removed at each stage, or one a stage; 0 to below 1.
        importance: the metric, see `ssmcompress.pruning.importance`.
        alignment: True for conv and scan, False for neither, or an Alignment.
        seed: of importance `random`.

    Raises:
        InputError: stages, ratios or a metric that the model cannot be pruned by.
    """
    depth = len(model.blocks)
    stages = default_stages(depth) if stages is None else tuple(stages)
    ratios = tuple(ratio) if isinstance(ratio, Sequence) else (ratio,) * len(stages)
    if len(ratios) != len(stages):
        raise InputError(f"{len(ratios)} ratios for {len(stages)} stages: expected one, or one for each stage")
    if isinstance(alignment, bool):
        alignment = Alignment(alignment, alignment)
    made = tuple(Stage(after, share, importance) for after, share in zip(stages, ratios, strict=True))
    return Plan(made, alignment, seed=seed).validate(depth)


def calibrate(
    model: TokenModel,
    images: Any,
    plan: Plan | None = None,
    *,
    gap: str | None = None,
    name: str = "images",
    distributed: bool = False,
    **options,
) -> Plan:
    """A plan that knows what the model does on real images.

    The delta of a removed token is not known in later layers; its stand-in is the mean delta of the layer,
    dt_proj and channel over all tokens of the calibration images. The passes are re-run over `images`, so memory
    does not grow with their number.

    Args:
        model: dense.
        images: a tensor (count, C, H, W) of prepared images, or something that can be iterated again and again
            over such batches (tensors, (images, labels) pairs, or `ssmcompress.data.batches.Batches`).
        plan: what to prune; None: `make_plan(model, **options)`.
        gap: what stands in for the delta of pruned positions, "calibrated" or "bias"; None: as the plan says, else
            calibrated.
        name: what the images are called in reports.

    Returns:
        The plan with a `calibration`: the mean deltas, and per stage how often each position was kept and its
        mean score.

    Raises:
        InputError: no images, values that are not finite on them, or a plan that does not fit the model.
    """
    plan = (plan or make_plan(model, **options)).validate(len(model.blocks))
    batches = AnyBatches(images)
    # Without scan alignment nothing reads the deltas: no pass over the images for their sake.
    gap = (gap or plan.gap or "calibrated") if plan.alignment.scan else "bias"
    deltas = gap_deltas(model, batches, gap, distributed)
    salient = [stage.after for stage in plan.stages if stage.importance == "saliency"]
    probes = fit_probes(model, batches, salient, distributed=distributed) if salient else ()
    plan = replace(plan, gap=gap, calibration=Calibration(name, 0, deltas, probes=probes))
    return replace(plan, calibration=_with_stage_statistics(model, plan, batches, distributed))


def gap_deltas(model: TokenModel, images: Any, gap: str, distributed: bool = False) -> tuple[Tensor, ...]:
    """Per layer (deltas, d_inner), what stands in for the delta of pruned positions by the gap source `gap`."""
    return mean_deltas(model, AnyBatches(images), distributed) if gap == "calibrated" else bias_deltas(model)


def bias_deltas(model: TokenModel) -> tuple[Tensor, ...]:
    """Per layer (deltas, d_inner): softplus(dt_bias), the delta of a position that brings no input."""
    return tuple(block.bias_delta().detach().cpu() for block in model.blocks)


def mean_deltas(model: TokenModel, batches: AnyBatches, distributed: bool = False) -> tuple[Tensor, ...]:
    """Per layer (deltas, d_inner): the mean of delta over the images and tokens of the dense model."""
    device = next(model.parameters()).device
    totals = [torch.zeros_like(delta, dtype=_exact(device)) for delta in (block.bias_delta() for block in model.blocks)]
    tokens_seen = torch.zeros((), dtype=_exact(device))
    for batch in in_chunks(track(batches, "calibrating", len(batches)), model.chunk_size()):
        tokens_seen += len(batch) * model.length
        for layer, delta in enumerate(_dense_deltas(model, batch)):
            totals[layer] += delta
    if distributed:
        processes.all_reduce_sum(tokens_seen, *totals, device=device)
    if not tokens_seen:
        raise InputError("no images to calibrate on")
    means = tuple((total / tokens_seen.item()).float().cpu() for total in totals)
    if not all(mean.isfinite().all() for mean in means):
        raise InputError(NOT_FINITE)
    return means


def _exact(device: torch.device) -> torch.dtype:
    """Of sums on a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def _dense_deltas(model: TokenModel, images: Tensor) -> list[Tensor]:
    """Per layer (deltas, d_inner), delta summed over images and tokens, in float64."""
    device = next(model.parameters()).device
    tokens = model.embed(images.to(device))
    sums = []
    for block in model.blocks:
        sums.append(block.deltas(tokens).sum((1, 2), dtype=_exact(device)))
        tokens = block(tokens)
    return sums


@torch.no_grad()
def _with_stage_statistics(model: TokenModel, plan: Plan, batches: AnyBatches, distributed: bool) -> Calibration:
    """Which positions each stage keeps and how they scored, from the pruned model on the same images."""
    pruned = prune(model, plan)
    kept = torch.zeros(len(plan.stages), model.length, dtype=torch.float64)
    seen, scores = torch.zeros_like(kept), torch.zeros_like(kept)
    images = torch.zeros((), dtype=torch.float64)
    for batch in in_chunks(track(batches, "scoring tokens", len(batches)), model.chunk_size()):
        images += len(batch)
        logits, decisions = pruned.trace(batch.to(next(model.parameters()).device))
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        for stage, (candidates, values, survivors) in enumerate(decisions):
            candidates, values = candidates.flatten().cpu(), values.flatten().cpu().double()
            seen[stage] += candidates.bincount(minlength=model.length)
            scores[stage] += candidates.bincount(values, minlength=model.length)
            kept[stage] += survivors.flatten().cpu().bincount(minlength=model.length)
    if distributed:
        processes.all_reduce_sum(images, kept, seen, scores, device=next(model.parameters()).device)
    if not images:
        raise InputError("no images to calibrate on")
    return replace(
        plan.calibration,
        images=int(images),
        kept=tuple((kept / images).float()),
        scores=tuple((scores / seen.clamp(min=1)).float()),
    )
