"""Measuring models on images: accuracy if there are labels, agreement with the dense model if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import processes
from ..data.any_batches import check_classes
from ..errors import NOT_FINITE, InputError
from ..models.inputs import as_batches, check_module
from ..progress import track


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model.

    Attributes:
        images: number of images. labelled: whether they have labels.
        top1, top5: accuracy in percent, None without labels (top5 also for five classes or fewer).
        agreement: percent of images that get the dense model's class, None without a dense model.
        kl: mean KL(dense || this) in nats per image, None without a dense model.
        loss: mean cross entropy of the labels in nats per image, None without labels.
    """

    images: int
    labelled: bool
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    loss: float | None = None


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    dense: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
) -> Evaluation:
    """Measure a model on images.

    Args:
        model: images (B, C, H, W) -> logits (B, classes). A module of other code is measured, too.
        data: the images, with labels or without: a folder or another name that `ssmcompress.open_images` takes, for a
            model from `load`; `Images` or `Batches`; a tensor of prepared images, alone or as (images, labels); a
            DataLoader, or any iterable of batches: tensors, (images, labels, ...) or dicts; a data set of torch or of
            `datasets`. Labels are class numbers. It is iterated once, so an iterator may be of any length.
        dense: the model it was made from, for agreement and KL divergence.
        dtype: float32, or bfloat16 for autocast.
        distributed: every process of the default `torch.distributed` group makes this call, each with its own images;
            all of them return the figures of all images.

    Raises:
        InputError: images or labels that cannot be used, or values that are not finite.
    """
    check_module(model)
    if dense is not None:
        check_module(dense, "dense")
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
    """Measure several models on the same images in one pass; the others are compared with a model named "dense".

    Logits that were computed earlier can take the place of a model.

    Raises:
        InputError: as `evaluate`; or images that come in another order than those of the logits.
    """
    modules = {name: model for name, model in models.items() if not isinstance(model, Logits)}
    earlier = {name: model for name, model in models.items() if isinstance(model, Logits)}
    tallies, start, labelled = {name: _Tally() for name in models}, 0, None
    batches = as_batches(next(iter(modules.values())), data, repeat=False, labelled=True)
    for images, labels in track(batches, "measuring", batches.total):
        logits = {name: values.of(images, start) for name, values in earlier.items()}
        start += len(images)
        if labelled is not None and labelled != (labels is not None):
            raise InputError("some batches have labels and others have none: expected labels for all or for none")
        labelled = labels is not None
        for name, model in modules.items():
            device = next(model.parameters()).device
            with autocast(device, dtype):
                logits[name] = model(images.to(device)).float().cpu()
        check_classes(labels, next(iter(logits.values())).shape[1])
        for name, tally in tallies.items():
            tally.add(logits[name], labels, logits["dense"] if name != "dense" and "dense" in logits else None)
    if distributed:
        device = next(next(iter(modules.values())).parameters()).device
        for tally in tallies.values():
            processes.all_reduce_sum(tally.sums, device=device)
    return {name: tally.result() for name, tally in tallies.items()}


@dataclass(frozen=True)
class Logits:
    """Logits of a model that were computed earlier, and by what their images are recognised.

    Attributes:
        values: (images, classes) float32. samples: (images, numbers), a few values of each image.
    """

    values: Tensor
    samples: Tensor

    def of(self, images: Tensor, start: int) -> Tensor:
        """Return the logits of images (batch, ...), number `start` of the data and those after it.

        Raises:
            InputError: they are other images.
        """
        rows = slice(start, start + len(images))
        if not torch.equal(self.samples[rows], _sample_values(images)):
            raise InputError(
                "the images are not those of the first pass, or come in another order: use a loader that neither "
                "shuffles nor augments"
            )
        return self.values[rows]


@torch.no_grad()
def compute_logits(model: nn.Module, data: Any, dtype: torch.dtype = torch.float32) -> Logits:
    """Compute the logits of a model, for `measure` with other models on the same images in the same order."""
    device, logits, samples = next(model.parameters()).device, [], []
    batches = as_batches(model, data, repeat=False)
    for images, _ in track(batches, "measuring the dense model", batches.total):
        with autocast(device, dtype):
            logits.append(model(images.to(device)).float().cpu())
        samples.append(_sample_values(images))
    if not logits:
        raise InputError("no images to measure on")
    return Logits(torch.cat(logits), torch.cat(samples))


def _sample_values(images: Tensor) -> Tensor:
    """Return up to 64 values of each image, spread evenly: enough to tell a pass in another order."""
    values = images.flatten(1)
    return values[:, :: max(1, values.shape[1] // 64)].clone().cpu()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return an autocast context to `dtype` on `device`, or one that does nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def kl_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """Return KL(dense || this) in nats, summed over the images, for logits (images, classes); float64."""
    ours, theirs = logits.double().log_softmax(1), dense.double().log_softmax(1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


class _Tally:
    """Sums over batches in float64, so that figures depend neither on the batch size nor on the number of processes."""

    def __init__(self):
        self.sums = torch.zeros(8, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor | None, dense: Tensor | None) -> None:
        """Add a batch: logits of the model and of the dense one (images, classes), labels (images,)."""
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        images, classes = logits.shape
        if dense is not None and dense.shape != logits.shape:
            raise InputError(f"the dense model has {dense.shape[1]} classes and the model {classes}: expected the same")
        correct1 = correct5 = loss = same = kl = 0.0
        if labels is not None:
            best = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
            correct1, correct5 = int(best[:, 0].sum()), int(best.sum())
            loss = float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        if dense is not None:
            same = int((logits.argmax(1) == dense.argmax(1)).sum())
            kl = float(kl_divergence(dense, logits))
        labelled, compared = images * (labels is not None), images * (dense is not None)
        correct5 = correct5 if classes > 5 else -images  # a negative count stands for no top-5
        values = [images, labelled, correct1, correct5, loss, compared, same, kl]
        self.sums += torch.tensor(values, dtype=torch.float64)

    def result(self) -> Evaluation:
        """Return the figures of all images; InputError if there were none."""
        images, labelled, correct1, correct5, loss, compared, same, kl = self.sums.tolist()
        if not images:
            raise InputError("no images to measure on")

        def percent(count: float, defined: bool) -> float | None:
            return round(100 * count / images, 4) if defined else None

        return Evaluation(
            images=int(images),
            labelled=bool(labelled),
            top1=percent(correct1, bool(labelled)),
            top5=percent(correct5, bool(labelled) and correct5 >= 0),
            agreement=percent(same, bool(compared)),
            kl=round(kl / images, 6) if compared else None,
            loss=round(loss / images, 6) if labelled else None,
        )
