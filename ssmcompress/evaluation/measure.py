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
from ..data.batches import AnyBatches
from ..errors import NOT_FINITE, InputError
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
        model: images (B, C, H, W) -> logits (B, classes).
        data: batches: `ssmcompress.data.batches.Batches`, (images, labels) pairs, or image tensors; or one tensor.
        dense: the model it was made from, for agreement and KL divergence.
        dtype: float32, or bfloat16 for autocast.
        distributed: every process of the default `torch.distributed` group makes this call, each with its own images;
            all of them return the figures of all images.
    """
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

    A tensor of logits (images, classes), in the order of the images, can take the place of a model.
    """
    modules = {name: model for name, model in models.items() if not isinstance(model, Tensor)}
    precomputed, start = {name: model for name, model in models.items() if isinstance(model, Tensor)}, 0
    tallies = {name: _Tally() for name in models}
    batches = AnyBatches(data)
    for images, labels in track(batches, "measuring", len(batches)):
        logits = {name: values[start : start + len(images)] for name, values in precomputed.items()}
        start += len(images)
        for name, model in modules.items():
            device = next(model.parameters()).device
            with autocast(device, dtype):
                logits[name] = model(images.to(device)).float().cpu()
        for name, tally in tallies.items():
            tally.add(logits[name], labels, logits["dense"] if name != "dense" and "dense" in logits else None)
    if distributed:
        device = next(next(iter(modules.values())).parameters()).device
        for tally in tallies.values():
            processes.all_reduce_sum(tally.sums, device=device)
    return {name: tally.result() for name, tally in tallies.items()}


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
