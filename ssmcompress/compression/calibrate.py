"""Calibration of plans: collecting the statistics that they need from real images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..data.any_batches import AnyBatches, in_chunks
from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..models.continuation import check_fewer, is_pruned, remove_stages
from ..models.fingerprint import fingerprint
from ..models.inputs import as_batches, check_model
from ..models.modes import runs_in_eval_mode
from ..models.rewrite import check_plan, make_plan, prune
from ..progress import track
from ..pruning.plan import Calibration, Plan
from .remember import hash_of, keeps_results, remembered
from .saliency import fit_probes

# Stands for the step sizes of a layer without scans.
NO_DELTAS = torch.zeros(0, dtype=torch.float32, device="cpu")


@runs_in_eval_mode
def calibrate(
    model: TokenModel,
    images: Any,
    plan: Plan | None = None,
    *,
    gap: str | None = None,
    name: str | None = None,
    distributed: bool = False,
    **options: Any,
) -> Plan:
    """Return a plan with statistics of the model on calibration images.

    The step size (delta) of a dropped token is unknown in later layers. It is replaced by the mean delta over all
    tokens of the calibration images, per layer, dt_proj and channel. `images` is iterated up to three times, so memory
    does not grow with their number. A loader may shuffle or augment them: the statistics are sums over all images.

    Args:
        model: a dense, trimmed or pruned model. For a pruned model, which the plan prunes further, the deltas are
            computed from its weights on all tokens.
        images: a folder or another name accepted by `ssmcompress.open_images`; `Images` or `Batches`; a tensor
            (count, C, H, W) of prepared images; a DataLoader or any iterable of batches: tensors, (images, ...) or
            dicts; a dataset of torch or of `datasets`. Labels are not used. An iterator is read into memory, up to
            4 GiB.
        plan: the plan; None: `make_plan(model, **options)`.
        gap: source of the delta of pruned positions, "calibrated" or "bias"; None: as in the plan, else calibrated.
        name: name of the images in reports; None: their own.
        distributed: every process of the default `torch.distributed` group makes this call, each with its own images.
        options: those of `make_plan`: `stages`, `ratio`, `importance`, `alignment`, `seed`.

    Returns:
        The plan with a `calibration`: the mean deltas, and for each stage the frequency with which each position was
        kept, and its mean score.

    Raises:
        InputError: there are no images, values are not finite, or the plan does not fit the model.
    """
    check_model(model)
    plan = check_plan(model, plan, options) if plan is not None else make_plan(model, **options)
    check_fewer(model, plan)
    batches = as_batches(model, images)
    whole = remove_stages(model, corrections=False) if is_pruned(model) else model
    # Without scan alignment the deltas are not used, so the pass over the images is skipped.
    scans = any(isinstance(block, ScanBlock) for block in model.blocks)
    gap = (gap or plan.gap or "calibrated") if plan.alignment.scan and scans else "bias"
    deltas = gap_deltas(whole, batches, gap, distributed)
    layers = plan.probed_layers
    probes = fit_probes(whole, batches, layers, distributed=distributed) if layers else ()
    plan = replace(plan, gap=gap, calibration=Calibration(name or batches.name, 0, deltas, probes=probes))
    return replace(plan, calibration=_collect_stage_statistics(model, plan, batches, distributed))


def gap_deltas(model: TokenModel, images: Any, gap: str, distributed: bool = False) -> tuple[Tensor, ...]:
    """Return the delta of pruned positions from the gap source `gap`, (deltas, d_inner) for each layer."""
    return mean_deltas(model, as_batches(model, images), distributed) if gap == "calibrated" else bias_deltas(model)


def bias_deltas(model: TokenModel) -> tuple[Tensor, ...]:
    """Return softplus(dt_bias), the delta of a position without input, (deltas, d_inner) for each layer.

    A layer without scans has (0,).
    """
    return tuple(
        block.bias_delta().detach().cpu() if isinstance(block, ScanBlock) else NO_DELTAS for block in model.blocks
    )


def mean_deltas(model: TokenModel, batches: AnyBatches, distributed: bool = False) -> tuple[Tensor, ...]:
    """Return the mean delta over images and tokens of the dense model, (deltas, d_inner) for each layer."""
    device = next(model.parameters()).device
    totals = [torch.zeros_like(delta, dtype=_sum_dtype(device), device=device) for delta in bias_deltas(model)]
    images = torch.zeros((), dtype=_sum_dtype(device), device="cpu")
    known = fingerprint(model) if keeps_results() else ""
    for batch in in_chunks(track(batches, "calibrating", batches.total), model.chunk_size()):
        images += len(batch)
        sums = remembered(partial(hash_of, "deltas", known, batch), partial(_sum_deltas, model, batch))
        for layer, delta in enumerate(sums):
            totals[layer] += delta
    if distributed:
        processes.all_reduce_sum(images, *totals, device=device)
    if not images:
        raise InputError("no images to calibrate on")
    lengths = (model.section_of(layer).length for layer in range(1, len(totals) + 1))
    means = tuple((t / (images.item() * n)).float().cpu() for t, n in zip(totals, lengths, strict=True))
    if not all(mean.isfinite().all() for mean in means):
        raise InputError(NOT_FINITE)
    return means


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums on a device: float64, except on Apple GPUs, which do not support it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def _sum_deltas(model: TokenModel, images: Tensor) -> list[Tensor]:
    """Return delta summed over images and tokens, (deltas, d_inner) for each layer, in float64 if supported."""
    device = next(model.parameters()).device
    sums = []
    for layer, before, *_ in model.run_layers(model.embed(images.to(device))):
        block = model.blocks[layer - 1]
        scans = isinstance(block, ScanBlock)
        sums.append(block.deltas(before).sum((1, 2), dtype=_sum_dtype(device)) if scans else NO_DELTAS.to(device))
    return sums


def _sum_by_position(positions: Tensor, length: int, values: Tensor | None = None) -> Tensor:
    """Return (length,): the sum of values, or the number, of tokens at each position; others are ignored."""
    return positions.bincount(values, minlength=length)[:length]


def _sum_stages(pruned: TokenModel, images: Tensor) -> Tensor:
    """Return (3, stages, positions) float64: kept counts, candidate counts and summed scores per stage and position.

    Raises:
        InputError: values are not finite.
    """
    logits, decisions = pruned.trace(images.to(next(pruned.parameters()).device))
    if not logits.isfinite().all():
        raise InputError(NOT_FINITE)
    longest = _longest(pruned)
    sums = torch.zeros(3, len(decisions), longest, dtype=torch.float64, device="cpu")
    for stage, (candidates, values, survivors) in enumerate(decisions):
        candidates, values = candidates.flatten().cpu(), values.flatten().cpu().double()
        sums[0, stage] = _sum_by_position(survivors.flatten().cpu(), longest)
        sums[1, stage] = _sum_by_position(candidates, longest)
        sums[2, stage] = _sum_by_position(candidates, longest, values)
    return sums


def _longest(model: TokenModel) -> int:
    """Return the largest number of positions of a section."""
    return max(section.length for section in model.sections)


@torch.no_grad()
def _collect_stage_statistics(model: TokenModel, plan: Plan, batches: AnyBatches, distributed: bool) -> Calibration:
    """Return the calibration with the kept frequency and mean score per stage and position of the pruned model."""
    pruned = prune(model, plan)
    totals = torch.zeros(3, len(plan.stages), _longest(model), dtype=torch.float64, device="cpu")
    images = torch.zeros((), dtype=torch.float64, device="cpu")
    known = hash_of(fingerprint(pruned), plan.alignment) if keeps_results() else ""
    for batch in in_chunks(track(batches, "scoring tokens", batches.total), model.chunk_size()):
        images += len(batch)
        totals += remembered(partial(hash_of, "stages", known, batch), partial(_sum_stages, pruned, batch))
    kept, counts, scores = totals
    if distributed:
        processes.all_reduce_sum(images, kept, counts, scores, device=next(model.parameters()).device)
    if not images:
        raise InputError("no images to calibrate on")
    lengths = [model.section_of(stage.after).length for stage in plan.stages]
    return replace(
        plan.calibration,
        images=int(images),
        kept=tuple(row[:n] for row, n in zip((kept / images).float(), lengths, strict=True)),
        scores=tuple(row[:n] for row, n in zip((scores / counts.clamp(min=1)).float(), lengths, strict=True)),
    )
