"""Evaluation of models on images: accuracy if there are labels, agreement with the dense model if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.inputs import as_batches, check_classes, check_module
from ..models.modes import runs_in_eval_mode
from ..models.precision import narrow_products
from ..progress import track
from ..tasks import CLASSIFICATION, Evaluation, Task
from .views import predict


@runs_in_eval_mode
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    dense: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
) -> Evaluation:
    """Evaluate a model on images.

    Args:
        model: maps images (B, C, H, W) to its outputs, logits (B, classes) for a classifier. Other modules are
            evaluated as classifiers.
        data: the images, with or without labels: a folder or another name that `ssmcompress.open_images` takes, for a
            model from `load`; `Images` or `Batches`; a tensor of prepared images, alone or as (images, labels); a
            DataLoader, or any iterable of batches: tensors, (images, labels, ...) or dicts; a dataset of torch or of
            `datasets`. Labels are class numbers. It is iterated once, so an iterator may be of any length. For
            `Batches` with views (`model.transform(views=(4, 3))`), probabilities are averaged over each video's views.
        dense: the model it was made from, for agreement and KL divergence.
        dtype: float32, or bfloat16, see `run_in`.
        distributed: every process of the default `torch.distributed` group makes this call, each with its own images;
            each returns the figures of all images.

    Raises:
        InputError: images or labels that cannot be used, or values that are not finite.
    """
    check_module(model)
    if dense is not None:
        check_module(dense, "dense")
        if isinstance(model, TokenModel) and isinstance(dense, TokenModel):
            check_classes(model, dense)
    models = {"dense": dense, "model": model} if dense is not None else {"model": model}
    return measure(models, data, dtype=dtype, distributed=distributed)["model"]


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module | Tensor],
    data: Any,
    *,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate several models on the same images in one pass; the others are compared with a model named "dense".

    Precomputed logits can replace a model.

    Raises:
        InputError: as for `evaluate`; or images that come in another order than those of the logits.
    """
    given = {name: model for name, model in models.items() if not isinstance(model, Logits)}
    earlier = {name: model for name, model in models.items() if isinstance(model, Logits)}
    task, classes = _find_task(*given.values())
    modules = {name: run_in(model, dtype) for name, model in given.items()}
    meters, start, labelled = {name: task.meter(classes) for name in models}, 0, None
    batches = as_batches(next(iter(given.values())), data, repeat=False, labelled=True)
    for images, labels in track(batches, "measuring", batches.total):
        logits = {name: values.of(images, start) for name, values in earlier.items()}
        start += len(images)
        if labelled is not None and labelled != (labels is not None):
            raise InputError("some batches have labels and others have none: expected labels for all or for none")
        labelled = labels is not None
        for name, model in modules.items():
            logits[name] = predict(model, images, batches.views).cpu()
        dense = logits.get("dense")
        _check_outputs(logits)
        if labels is not None:
            task.check_target(labels, next(iter(logits.values())).shape[1])
        for name, meter in meters.items():
            meter.add(logits[name], labels, dense if name != "dense" else None)
    if distributed:
        device = next(next(iter(modules.values())).parameters()).device
        for meter in meters.values():
            processes.all_reduce_sum(meter.sums, device=device)
    if not all(meter.images for meter in meters.values()):
        raise InputError("no images to measure on")
    return {name: meter.result() for name, meter in meters.items()}


def _find_task(*models: nn.Module) -> tuple[Task, int | None]:
    """Return the task of models evaluated together, and their number of classes, None for other modules."""
    known = [model for model in models if isinstance(model, TokenModel)]
    return (known[0].task, known[0].config.num_classes) if known else (CLASSIFICATION, None)


def _check_outputs(outputs: Mapping[str, Tensor]) -> None:
    """Raise an InputError for outputs (images, classes, ...) that are not finite, or whose classes differ from the
    dense model's.
    """
    dense = outputs.get("dense")
    for output in outputs.values():
        if not output.isfinite().all():
            raise InputError(NOT_FINITE)
        if dense is not None and dense.shape != output.shape:
            raise InputError(
                f"the dense model has {dense.shape[1]} classes and the model {output.shape[1]}: expected the same"
            )


@dataclass(frozen=True)
class Logits:
    """Precomputed logits of a model, and samples that identify their images.

    Attributes:
        values: (images, classes) float32. samples: (images, numbers), a few values of each image.
    """

    values: Tensor
    samples: Tensor

    def of(self, images: Tensor, start: int) -> Tensor:
        """Return the logits of images (batch, ...) from index `start` of the data on.

        Raises:
            InputError: the images differ.
        """
        rows = slice(start, start + len(images))
        if not torch.equal(self.samples[rows], _sample_values(images)):
            raise InputError(
                "the images or their order differ from the first pass: use a loader that neither shuffles nor augments"
            )
        return self.values[rows]


@torch.no_grad()
def compute_logits(model: nn.Module, data: Any, dtype: torch.dtype = torch.float32) -> Logits:
    """Compute the logits of a model, for `measure` with other models on the same images in the same order."""
    logits, samples = [], []
    batches, run = as_batches(model, data, repeat=False), run_in(model, dtype)
    for images, _ in track(batches, "measuring the dense model", batches.total):
        logits.append(predict(run, images, batches.views).cpu())
        samples.append(_sample_values(images))
    if not logits:
        raise InputError("no images to measure on")
    return Logits(torch.cat(logits), torch.cat(samples))


def _sample_values(images: Tensor) -> Tensor:
    """Return up to 64 evenly spaced values of each image: enough to detect a pass in another order."""
    values = images.flatten(1)
    return values[:, :: max(1, values.shape[1] // 64)].clone().cpu()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return an autocast context to `dtype` on `device`, or one that does nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def run_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model that runs in `dtype`; the model itself for float32.

    In bfloat16 it runs under autocast, and a model of this package stores the weights of its layers' matrix products in
    bfloat16 as well. Other modules are not changed.
    """
    return model if dtype == torch.float32 else _InDtype(model, dtype)


class _InDtype(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = narrow_products(model, dtype) if isinstance(model, TokenModel) else model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.dtype):
            return self.model(images)
