"""Semantic segmentation: one class per pixel, with logits (images, classes, height, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import Evaluation, Figure, Meter, Task

# The label of pixels without a class.
IGNORED = 255
# Maximum number of logits resized at a time, 64 MB in float32, and compared at a time: small enough for a cache, which
# halves the time. An image of 150 classes has 39 million at 512 x 512.
RESIZED, COMPARED = 1 << 24, 1 << 20
# Limits of chance level: up to this multiple of it, if that is below this mIoU in percent.
TIMES_CHANCE, LOW_MIOU = 3, 3.0
# Fewer images may all show a scene on which a working model fails.
LEAST_IMAGES = 5
# Start of the confusion matrix in the sums of a meter.
HEAD = 6


class Segmentation(Task):
    """One class per pixel. Outputs are logits (images, classes, height, width).

    Targets are class numbers (images, target height, target width), uint8 or another integer dtype, `IGNORED` for
    pixels without a class. If their size differs from that of the outputs, the logits are resized to it, bilinear,
    without aligned corners. Targets are never resized. Comparisons of two outputs use the outputs' own pixels.
    """

    name, title = "segmentation", "semantic segmentation"
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("miou", "mIoU", column="mIoU"),
        Figure("pixel_accuracy", "pixel accuracy", column="pixels"),
        Figure("class_accuracy", "class accuracy"),
        Figure("agreement", "same class as dense, pixels", compared=True, key="pixels", column="agrees"),
        Figure("kl", "KL from dense", "{:.4f} nats", "nats", compared=True, key="kl", column="KL"),
    )
    quality, likeness, hits = "miou", "agreement", "pixel_accuracy"
    lost_likeness = "% of the dense model's pixels"
    labels = "masks: folders images/ and annotations/, or a column annotation"

    def meter(self, classes: int | None = None) -> Meter:
        """Return a meter for models of `classes` classes.

        Raises:
            ValueError: `classes` is None; the confusion matrix needs the number.
        """
        if classes is None:
            raise ValueError("classes is None: a meter of segmentation needs the number of classes")
        return _Tally(self, classes)

    def distance(self, dense: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """Return KL(dense || this), averaged over the pixels of an image."""
        return _per_image(lambda *pair: _mean_kl(*pair, temperature), dense, output)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy averaged over the labelled pixels of an image, 0 if there are none."""
        return _per_image(_cross_entropy, output, target)

    def margin(self, output: Tensor) -> Tensor:
        """Return the largest logit minus the second largest, averaged over the pixels of an image."""
        return _per_image(_mean_margin, output)

    def agreement(self, dense: Tensor, output: Tensor) -> Tensor:
        """Return the share of pixels for which both outputs have the same class."""
        return _per_image(lambda *pair: _same_pixels(*pair) / pair[0][0].numel(), dense, output)

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the share of labelled pixels that are correct, 0 for an image without any."""

        def share(logits: Tensor, labels: Tensor) -> Tensor:
            right = (_read_pixels(logits, labels)[0] == labels.to(logits.device)).sum()  # `IGNORED` equals no class
            return right / (labels != IGNORED).sum().clamp(min=1).to(logits.device)

        return _per_image(share, output, target)

    def check_target(self, target: Tensor, classes: int) -> None:
        if classes > IGNORED:
            raise InputError(f"a model of {classes} classes: expected {IGNORED} at most, as label {IGNORED} is ignored")
        integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        if target.ndim != 3 or not integers:
            dtype = str(target.dtype).removeprefix("torch.")
            raise InputError(
                f"masks {tuple(target.shape)} {dtype}: expected class numbers, (images, height, width) integers"
            )
        if (wrong := find_wrong_labels(target, classes)) is not None:
            raise InputError(
                f"{wrong}: the model has classes 0 to {classes - 1}, and {IGNORED} for ignored pixels; "
                f"`reduce_zero_label` shifts labels that count from 1"
            )

    def is_at_chance(self, result: Evaluation, classes: int) -> bool:
        """Return whether the mIoU is hardly better than that of predictions unrelated to the images.

        That is the larger of two values: the mIoU of the most frequent class everywhere, and that of the model's own
        predictions in randomly permuted pixels (`chance`). Up to three times as much counts as chance if it is less
        than 3 %: labels shifted by one still agree in some pixels, where a class is mistaken for its neighbour in the
        list.
        """
        miou, chance = result.figures.get("miou"), result.figures.get("chance")
        if miou is None or chance is None or result.images < LEAST_IMAGES:
            return False
        return miou <= max(chance, min(TIMES_CHANCE * chance, LOW_MIOU))

    def describe_chance(self, result: Evaluation, classes: int) -> str:
        more = "hardly" if result.miou > result.chance else "no"
        return (
            f"has an mIoU of {result.miou:.3g} % on {result.images} images, {more} more than predictions independent "
            f"of them would get ({result.chance:.3g} %)"
        )

    def causes_of_chance(self, by_name: bool) -> list[str]:
        return ["`reduce_zero_label`, for labels that count from 1", "the order of the classes in the labels"]

    def describe_likeness(self, likeness: float, images: int) -> str:
        return f"only {likeness:.4g} % of the pixels of {images} images get the dense model's class"


def find_wrong_labels(target: Tensor, classes: int) -> str | None:
    """Return the first label that is neither a class nor `IGNORED`, and its pixels: "label 12 in 37 pixels".

    Args:
        target: integers of any shape.
    """
    wrong = (target >= classes) & (target != IGNORED)
    if target.dtype != torch.uint8:
        wrong |= target < 0
    if not wrong.any():
        return None
    label = int(target[wrong].min())
    count = int((target == label).sum())
    return f"label {label} in {count} pixel{'s' * (count != 1)}"


def _per_image(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """Apply a function to one image at a time, to limit memory, and return the values (images,)."""
    values = [function(*items) for items in zip(*batches, strict=True)]
    return torch.stack(values) if values else batches[0].new_zeros(0)


def _mean_kl(dense: Tensor, output: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Return KL(dense || this) in nats per pixel, for logits (classes, height, width), computed in `dtype`."""
    classes, height, width = output.shape
    rows = max(1, COMPARED // (classes * width))
    total = 0.0
    for first in range(0, height, rows):
        theirs, ours = (
            (logits[:, first : first + rows].to(dtype or logits.dtype) / temperature).log_softmax(0)
            for logits in (dense, output)
        )
        total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / (height * width)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of labelled pixels, for logits (classes, h, w) and labels (height, width)."""
    labels = labels.to(logits.device).long()
    total = F.cross_entropy(_resize(logits, labels.shape)[None], labels[None], ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _mean_margin(logits: Tensor) -> Tensor:
    best = logits.topk(min(2, len(logits)), dim=0).values
    return (2 * best[0] - best.sum(0)).mean()


def _same_pixels(dense: Tensor, output: Tensor) -> Tensor:
    return (dense.argmax(0) == output.argmax(0)).sum()


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits (classes, h, w); return them unchanged if they already have the size."""
    if logits.shape[1:] == size:
        return logits
    return F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def _read_pixels(logits: Tensor, labels: Tensor, with_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the predictions (height, width) of an image, and the float64 mean cross entropy of its labelled pixels.

    Classes are resized in chunks, since labels of a photograph may have ten times as many pixels as the logits.

    Args:
        logits: (classes, h, w). labels: (height, width).
    """
    size, labels = labels.shape, labels.to(logits.device).long()
    step = max(1, RESIZED // labels.numel())
    prediction = torch.zeros_like(labels)
    best = logits.new_full(size, -torch.inf)
    total, own = torch.zeros_like(best), torch.zeros_like(best)  # sum of exp(logit - best), logit of the label
    for first in range(0, len(logits), step):
        part = _resize(logits[first : first + step], size)
        value, index = part.max(0)
        prediction = torch.where(value > best, index + first, prediction)
        larger = torch.maximum(best, value)
        if with_loss:
            place = labels - first
            chosen = part.gather(0, place.clamp(0, len(part) - 1)[None])[0]
            own = torch.where((place >= 0) & (place < len(part)), chosen, own)
            total = total * (best - larger).exp() + (part - larger).exp_().sum(0)
        best = larger
    if not with_loss:
        return prediction, None
    labelled = labels != IGNORED
    loss = (total[labelled].log() + best[labelled] - own[labelled]).double()
    return prediction, loss.sum() / labelled.sum().clamp(min=1)


class _Tally(Meter):
    """Sums of a segmenter: images, labelled ones, loss; compared ones, share of agreeing pixels, KL; confusion matrix.

    The matrix (classes, classes) counts the labelled pixels by label and prediction. Images are added one by one, so
    that the sums do not depend on the batch size.
    """

    def __init__(self, task: Segmentation, classes: int):
        self.task, self.classes = task, classes
        self.sums = torch.zeros(HEAD + classes**2, dtype=torch.float64, device="cpu")

    @property
    def images(self) -> int:
        return int(self.sums[0])

    def add(self, output: Tensor, target: Tensor | None, dense: Tensor | None) -> None:
        for i, logits in enumerate(output):
            loss = same = kl = 0.0
            if target is not None:
                prediction, loss = _read_pixels(logits, target[i], with_loss=True)
                self._count(target[i].to(prediction.device), prediction)
            if dense is not None:
                same = float(_same_pixels(dense[i], logits)) / logits[0].numel()
                kl = float(_mean_kl(dense[i], logits, dtype=torch.float64))
            values = [1.0, target is not None, float(loss), dense is not None, same, kl]
            self.sums[:HEAD] += torch.tensor(values, dtype=torch.float64, device="cpu")

    def _count(self, labels: Tensor, prediction: Tensor) -> None:
        labelled = labels != IGNORED
        pairs = labels[labelled].long() * self.classes + prediction[labelled]
        self.sums[HEAD:] += torch.bincount(pairs, minlength=self.classes**2).double().cpu()

    def result(self) -> Evaluation:
        """Return the figures, `loss`, and `chance`: the mIoU of predictions unrelated to the images.

        Accuracies are in percent. Figures from labels are None if there is no labelled pixel, in which case the images
        count as unlabelled.
        """
        images, labelled, loss, compared, same, kl = self.sums[:HEAD].tolist()
        matrix = self.sums[HEAD:].view(self.classes, self.classes)
        right, labels, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        pixels, there = labels.sum(), labels > 0

        def percent(value: Tensor, defined: bool) -> float | None:
            return round(100 * float(value), 10) if defined else None

        return Evaluation(
            int(images),
            bool(pixels),
            miou=percent(_mean_iou(right, labels, predicted), bool(pixels)),
            pixel_accuracy=percent(right.sum() / pixels, bool(pixels)),
            class_accuracy=percent((right[there] / labels[there]).mean(), bool(pixels)),
            agreement=round(100 * same / images, 10) if compared else None,
            kl=round(kl / images, 10) if compared else None,
            loss=round(loss / images, 10) if labelled else None,
            chance=percent(_chance(labels, predicted), int(there.sum()) > 1),
        )


def _mean_iou(right: Tensor, labels: Tensor, predicted: Tensor) -> Tensor:
    """Return the mean of the classes' intersections over unions (classes,), excluding classes without any pixel."""
    union = labels + predicted - right
    return (right[union > 0] / union[union > 0]).mean()


def _chance(labels: Tensor, predicted: Tensor) -> Tensor:
    """Return the mean IoU of predictions that are independent of the labels; all (classes,) are counts of pixels."""
    shuffled = _mean_iou(labels * predicted / labels.sum(), labels, predicted)
    return torch.maximum(shuffled, labels.max() / labels.sum() / (labels > 0).sum())
