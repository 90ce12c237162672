"""Accuracy where there are labels, agreement with the dense model where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import AnyBatches
from .errors import NOT_FINITE, InputError
from .progress import track


@dataclass(frozen=True)
class Evaluation:
    """What was measured on how many images.

    Attributes:
        images: how many. labelled: whether they had labels.
        top1, top5: percent right, None without labels (top5 also for five classes or fewer).
        agreement: percent of images given the dense model's class, None without a dense model.
        kl: mean KL(dense || this), nats an image, None without a dense model.
    """

    images: int
    labelled: bool
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None


def evaluate(
    model: nn.Module, data: Any, *, dense: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> Evaluation:
    """Measure a model on images.

    Args:
        model: images (B, C, H, W) -> logits (B, classes).
        data: batches: `ssmcompress.batches.Batches`, (images, labels) pairs, or image tensors; or one tensor.
        dense: the model it was made from, for agreement and KL divergence.
        dtype: float32, or bfloat16 for autocast.
    """
    models = {"dense": dense, "model": model} if dense is not None else {"model": model}
    return measure(models, data, dtype=dtype)["model"]


@torch.no_grad()
def measure(models: Mapping[str, nn.Module], data: Any, *, dtype: torch.dtype = torch.float32) -> dict[str, Evaluation]:
    """Measure several models on the same images in one pass; a model named "dense" is what others agree with."""
    tallies = {name: _Tally() for name in models}
    batches = AnyBatches(data)
    for images, labels in track(batches, "measuring", len(batches)):
        logits = {}
        for name, model in models.items():
            device = next(model.parameters()).device
            with autocast(device, dtype):
                logits[name] = model(images.to(device)).float().cpu()
        for name, tally in tallies.items():
            tally.add(logits[name], labels, logits["dense"] if name != "dense" and "dense" in logits else None)
    return {name: tally.result() for name, tally in tallies.items()}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def kl_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(dense || this) in nats, summed over the images, of logits (images, classes); float64."""
    ours, theirs = logits.double().log_softmax(1), dense.double().log_softmax(1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


class _Tally:
    """Counts over batches; sums in float64, so that the batch size changes nothing that is printed."""

    def __init__(self):
        self.images = self.right1 = self.right5 = self.same = 0
        self.labelled = self.compared = False
        self.classes = 0
        self.kl = 0.0

    def add(self, logits: Tensor, labels: Tensor | None, dense: Tensor | None) -> None:
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        self.images += len(logits)
        self.classes = logits.shape[1]
        if labels is not None:
            self.labelled = True
            best = logits.topk(min(5, self.classes), dim=1).indices == labels[:, None]
            self.right1 += int(best[:, 0].sum())
            self.right5 += int(best.sum())
        if dense is not None:
            self.compared = True
            self.same += int((logits.argmax(1) == dense.argmax(1)).sum())
            self.kl += float(kl_divergence(dense, logits))

    def result(self) -> Evaluation:
        if not self.images:
            raise InputError("no images to measure on")

        def percent(count: int, wanted: bool) -> float | None:
            return round(100 * count / self.images, 4) if wanted else None

        return Evaluation(
            images=self.images,
            labelled=self.labelled,
            top1=percent(self.right1, self.labelled),
            top5=percent(self.right5, self.labelled and self.classes > 5),
            agreement=percent(self.same, self.compared),
            kl=round(self.kl / self.images, 6) if self.compared else None,
        )
