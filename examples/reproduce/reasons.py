"""Measurements that explain whether alignment helps: which half of it, in which layers, and what is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ssmcompress
from ssmcompress.data.batches import sample_indices
from ssmcompress.models import TokenModel
from ssmcompress.models.blocks import ScanBlock
from ssmcompress.models.rewrite import prune_like
from ssmcompress.ops import gather_tokens
from ssmcompress.progress import line, track
from ssmcompress.pruning.alignment import UNALIGNED, Alignment

from .methods import IMPORTANCES
from .rows import find_kept, identify, name_row
from .settings import Settings, read, write
from .subjects import Subject

METRICS = ("clip", "saliency", "random")  # whose aligned rows are analysed, if present
ALIGNMENTS = {"none": UNALIGNED, "conv": Alignment(True, False), "scan": Alignment(False, True), "both": Alignment()}
CONTENTS = ("background", "clutter", "object")


def explain(subject: Subject, settings: Settings) -> None:
    """Measure what the rows of a model do not show, for each metric not measured yet.

    Uses the model of the first seed's aligned row. Skips models whose layers have no scan, since nothing is aligned in
    them, and models whose later sections restore all tokens.
    """
    file = settings.file_of("reasons", subject.name)
    dense = subject.load(settings.device)
    if dense.reads_levels or not all(isinstance(block, ScanBlock) for block in dense.blocks):
        return
    if len(dense.sections) > 1:
        line(f"{subject.name}: not explained, as its layers have grids of several sizes")
        return
    for metric, folder in find_work(subject.name, settings, "reasons"):
        line(f"{subject.name}: explaining {metric}")
        pruned = ssmcompress.load(folder, device=settings.device)
        models = {name: prune_like(dense, pruned, alignment) for name, alignment in ALIGNMENTS.items()}
        images = choose(subject.test, dense, settings)
        figures = {name: ssmcompress.evaluate(model, images, dense=dense).figures for name, model in models.items()}
        of = identify_reasons(subject.name, settings, metric)
        value = {"of": of, "figures": figures, **run_both(subject, dense, models, images)}
        write(file, read(file) | {metric: value})


def find_aligned(metric: str, settings: Settings) -> str:
    """Return the name of the aligned row of a metric at the main share of the FLOPs."""
    return name_row(IMPORTANCES[metric][1], settings.share)


def find_work(name: str, settings: Settings, kind: str) -> Iterator[tuple[str, Path]]:
    """Yield each metric not measured yet, with the model folder of its aligned row, if it exists."""
    done, kept = read_reasons(name, settings, kind), dict(find_kept(name, settings, settings.share))
    for metric in METRICS:
        folder = kept.get(find_aligned(metric, settings))
        if metric not in done and folder is not None:
            yield metric, folder


def read_reasons(name: str, settings: Settings, kind: str) -> dict[str, Any]:
    """Return the measurements of a model by metric, skipping those whose row has changed.

    Args:
        kind: "reasons" or "inputs".
    """
    found = read(settings.file_of(kind, name))
    return {key: value for key, value in found.items() if value.get("of") == identify_reasons(name, settings, key)}


def identify_reasons(name: str, settings: Settings, metric: str) -> dict[str, Any]:
    """Return what the figures of a metric depend on."""
    return identify(name, settings, find_aligned(metric, settings), reason_images=settings.reason_images)


def choose(name: str, model: TokenModel, settings: Settings) -> ssmcompress.Batches:
    """Return the images used for the explanations, drawn with the first seed."""
    images = model.find_images(name)
    index, _ = sample_indices(len(images), min(settings.reason_images, len(images)), settings.seeds[0])
    return ssmcompress.Batches(images, model.transform(), index, settings.batch_size, settings.workers)


@torch.inference_mode()
def run_both(
    subject: Subject, dense: TokenModel, models: Mapping[str, TokenModel], images: ssmcompress.Batches
) -> dict[str, Any]:
    """Return the error that each layer introduces by itself, the lengths of the gaps, and what the dropped tokens show.

    Returns:
        `errors`, for each alignment and layer after the first stage: the squared error of the layer's contribution to
        the kept tokens, and to the class token alone, relative to its contribution in the dense model. The layer gets
        the dense model's features at the tokens that the aligned model keeps, so errors of earlier layers are excluded.
        `gap`: the mean number of dropped tokens between two kept ones, over non-empty gaps, after the last stage.
        `dropped`, `all`: the shares of the pixels of dropped tokens, and of all, by content; empty if unknown.
    """
    sums: dict[str, dict[int, list[Tensor]]] = {name: {} for name in models}
    gaps, contents, counts = [], {"dropped": [], "all": []}, []
    last = models["both"]
    for batch in track(images, "explaining", len(images)):
        pictures = batch.images.to(next(dense.parameters()).device)
        before = {run.layer: run for run in dense.run_layers(dense.embed(pictures))}
        embedded = {name: model.embed(pictures) for name, model in models.items()}
        for run in last.run_layers(last.embed(pictures)):
            positions = run.before.positions
            if positions is None:
                continue
            full = before[run.layer]
            outputs = gather_tokens(full.after.features, positions)
            for name, model in models.items():
                tokens = replace(embedded[name], features=full.before.features).keep(positions)
                error = model.blocks[run.layer - 1](tokens).features - outputs
                parts = [measure(error, tokens), measure(outputs - tokens.features, tokens)]
                add(sums[name].setdefault(run.layer, []), parts)
        counts.append(len(positions))
        gaps.append(mean_gap(positions))
        if subject.draw is not None:
            for key, shares in share_contents(subject, dense, batch.index, positions).items():
                contents[key].append(shares)
    errors = {
        name: {layer: (error / size).tolist() for layer, (error, size) in layers.items()}
        for name, layers in sums.items()
    }
    shares = {
        k: dict(zip(CONTENTS, np.average(v, axis=0, weights=counts).tolist(), strict=True))
        for k, v in contents.items()
        if v
    }
    return {"errors": errors, "gap": float(np.average(gaps, weights=counts)), **shares}


def measure(values: Tensor, tokens: Any) -> Tensor:
    """Return the sums of squares (2,) over all tokens, and over the token that is never dropped, if there is one."""
    squares = values.double().square().sum(2)
    own = squares[tokens.is_protected(tokens.positions)] if tokens.protected is not None else squares
    return torch.stack([squares.sum(), own.sum()])


def add(total: list[Tensor], parts: list[Tensor]) -> None:
    """Add tensors to those in a list, in place."""
    total[:] = [a + b for a, b in zip(total, parts, strict=True)] if total else parts


def mean_gap(positions: Tensor) -> float:
    """Return the mean size of the non-empty gaps between neighbouring positions (batch, kept)."""
    missing = positions.diff(dim=1) - 1
    return missing[missing > 0].double().mean().item() if (missing > 0).any() else 0.0


def share_contents(subject: Subject, model: TokenModel, index: list[int], kept: Tensor) -> dict[str, np.ndarray]:
    """Return the shares (3,) of background, clutter and object in the pixels of the dropped tokens, and of all."""
    rows, columns = model.config.grid
    gone = torch.ones(len(index), model.length, dtype=torch.bool).scatter(1, kept.cpu(), False).numpy()
    if model.protected is not None:
        gone = np.delete(gone, slice(model.protected, model.protected + model.protected_count), axis=1)
    drawn = np.stack([subject.draw(number) for number in index])
    count, height, width = drawn.shape
    tiles = drawn.reshape(count, rows, height // rows, columns, width // columns)
    shares = np.stack([(tiles == kind).mean(axis=(2, 4)).reshape(count, -1) for kind in range(len(CONTENTS))], axis=2)
    return {"dropped": shares[gone].mean(axis=0), "all": shares.mean(axis=(0, 1))}
