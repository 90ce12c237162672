"""Evaluation of the models of a job on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..data.batches import Batches
from ..data.clips import Views
from ..errors import InputError
from ..evaluation.latency import time_models
from ..evaluation.measure import Evaluation, measure, run_in
from ..evaluation.timings import Timings
from ..models.base import TokenModel
from .requests import MeasureOptions


@dataclass(frozen=True)
class Measured:
    """Models evaluated on the same images.

    Attributes:
        models: by column of the report, "dense" first and "pruned" last; "dense" is None if it no longer exists.
        results: by column, for the existing models.
        images: the evaluation images. sample: (batch, channels, height, width), their first batch; None except in the
            main process.
        timings: latency at batch size 1 by column; None: not measured.
        options: evaluation options.
        wide: if evaluated in a dtype other than float32, by column for "dense" and "pruned": the model in float32, and
            the model in that dtype compared with it.
    """

    models: Mapping[str, TokenModel | None]
    results: Mapping[str, Evaluation]
    images: Batches
    sample: Tensor | None
    timings: Timings | None
    options: MeasureOptions
    wide: Mapping[str, tuple[Evaluation, Evaluation]] = field(default_factory=dict)


def name_columns(dense: TokenModel | None, snapshots: Mapping[str, TokenModel]) -> dict[str, TokenModel | None]:
    """Return the columns of a report: the dense model, each snapshot by its name, and the last one as "pruned"."""
    *earlier, result = snapshots
    return {"dense": dense, **{name: snapshots[name] for name in earlier}, "pruned": snapshots[result]}


def add_views(model: TokenModel, images: Batches, options: MeasureOptions) -> Batches:
    """Return the images for evaluation: unchanged, or with the requested views of each video.

    Their digests and unreadable images are also recorded in `images`.

    Raises:
        InputError: views are requested for images, or for inputs that are already tensors.
    """
    if (views := model.check_views(options.views)) is None:
        return images
    if not images.pictures:
        raise InputError("`views` are made of videos, and these are prepared already: give a folder, or leave it out")
    transform = model.transform_with(replace(model.preprocessing, recorded=True), views)
    batch_size = max(1, images.batch_size // views.count)  # uses as much memory as without views
    viewed = replace(images, transform=transform, batch_size=batch_size)
    viewed.digests, viewed.mask_digests = images.digests, images.mask_digests
    return viewed


def describe_views(model: TokenModel, options: MeasureOptions) -> dict[str, Any]:
    """Return `views`, a JSON object, with the clips and crops that a video model is evaluated on; {} for images."""
    if model.frames is None:
        return {}
    return {"views": (model.check_views(options.views) or Views())._asdict()}


def measure_models(
    models: Mapping[str, TokenModel | None], images: Batches, options: MeasureOptions, distributed: bool
) -> Measured:
    """Evaluate the models of a report's columns on the same images, and time the dense and the pruned one.

    Raises:
        InputError: no image can be read, or values are not finite.
    """
    present = {name: model for name, model in models.items() if model is not None}
    dtype = options.torch_dtype
    viewed = add_views(models["pruned"], images, options)
    results = measure(present, viewed, dtype=dtype, distributed=distributed)
    compared = {name: run_in(present[name], dtype) for name in ("dense", "pruned") if name in present}
    wide = {}
    if dtype != torch.float32:
        for name, narrow in compared.items():
            pair = measure({"dense": present[name], "narrow": narrow}, viewed, distributed=distributed)
            wide[name] = pair["dense"], pair["narrow"]
    images.sync()
    if not processes.is_main():
        return Measured(models, results, images, None, None, options, wide)
    sample = next(iter(images)).images.to(next(models["pruned"].parameters()).device)
    timings = None
    if options.latency:
        timings = time_models(compared, sample[:1])
    return Measured(models, results, images, sample, timings, options, wide)
