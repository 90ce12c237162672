"""Classification: one class per image, with logits (images, classes)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import Evaluation, Figure, Meter, Task
from .binomial import at_least, at_most

# One-sided probability of three standard deviations of a normal distribution.
THREE_SIGMA = 0.00135
# Limits of chance level with more than FEW_CLASSES: a multiple of it, or a share of the images.
FEW_CLASSES, TIMES_CHANCE, LOW_ACCURACY = 20, 3, 0.03


class Classification(Task):
    """One class per image. Outputs are logits (images, classes), targets are class numbers (images,).

    `loss` and `accuracy` also take class probabilities (images, classes) as targets.
    """

    name, title = "classification", "image classification"
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("top1", "top-1", column="top-1"),
        Figure("top5", "top-5"),
        Figure("agreement", "same class as dense", compared=True, key="top1", column="agrees"),
        Figure("kl", "KL from dense", "{:.4f} nats", "nats", compared=True, column="KL"),
    )
    quality, likeness, hits = "top1", "agreement", "top1"
    lost_likeness = "% of the dense model's classes"
    labels = "class folders, a column label, or .cls files in tar shards"

    def meter(self, classes: int | None = None) -> Meter:
        return _Tally(self)

    def distance(self, dense: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """Return KL(dense || this)."""
        ours, theirs = ((logits / temperature).log_softmax(1) for logits in (output, dense))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy."""
        if target.is_floating_point():
            return -(target * output.log_softmax(1)).sum(1)
        return F.cross_entropy(output, target, reduction="none")

    def margin(self, output: Tensor) -> Tensor:
        best = output.topk(min(2, output.shape[1]), dim=1).values
        return 2 * best[:, 0] - best.sum(1)

    def agreement(self, dense: Tensor, output: Tensor) -> Tensor:
        return (dense.argmax(1) == output.argmax(1)).float()

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        classes = target.argmax(1) if target.is_floating_point() else target
        return (output.argmax(1) == classes).float()

    def check_target(self, target: Tensor, classes: int) -> None:
        if not len(target):
            return
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            advice = "; leave out the labels of unlabelled images" if low < 0 else ""
            raise InputError(f"label {low if low < 0 else high}: the model has classes 0 to {classes - 1}{advice}")

    def is_at_chance(self, result: Evaluation, classes: int) -> bool:
        """Return whether the accuracy is hardly better than guessing.

        With `FEW_CLASSES` or fewer, it is not above chance by three standard deviations. With more, it is at most three
        times chance or 3 %: a wrong order of the classes leaves some of them in place; sorting numbers as strings, for
        example, leaves 12 of 1,000. There must be enough images that a model half way between chance and perfect would
        have done better, with a certainty of three standard deviations: 33 images for 2 classes, 12 for 10 and 10 for
        1,000.
        """
        images, top1 = result.images, result.figures.get("top1")
        if top1 is None or classes < 2 or not images:
            return False
        right, chance = round(top1 / 100 * images), 1 / classes
        if at_most(right, images, (1 + chance) / 2) >= THREE_SIGMA:
            return False
        if classes <= FEW_CLASSES:
            return at_least(right, images, chance) > THREE_SIGMA
        return right <= images * max(TIMES_CHANCE * chance, LOW_ACCURACY)

    def describe_chance(self, result: Evaluation, classes: int) -> str:
        more = "hardly" if result.top1 > 100 / classes else "no"
        return (
            f"finds the class of {result.top1:.4g} % of {result.images} images, {more} more than chance with "
            f"{classes} classes"
        )

    def causes_of_chance(self, by_name: bool) -> list[str]:
        return [f"the order of the classes{', which are numbered by their names' if by_name else ' in the labels'}"]

    def describe_likeness(self, likeness: float, images: int) -> str:
        return f"only {likeness:.4g} % of {images} images get the dense model's class"


class _Tally(Meter):
    """Sums of a classifier: images, labelled ones, top-1 and top-5 hits, loss; compared ones, agreeing ones, KL."""

    def __init__(self, task: Classification):
        self.task = task
        self.sums = torch.zeros(8, dtype=torch.float64, device="cpu")

    @property
    def images(self) -> int:
        return int(self.sums[0])

    def add(self, output: Tensor, target: Tensor | None, dense: Tensor | None) -> None:
        images, classes = output.shape
        top1 = top5 = loss = same = kl = 0.0
        if target is not None:
            best = output.topk(min(5, classes), dim=1).indices == target[:, None]
            top1, top5 = int(best[:, 0].sum()), int(best.sum())
            loss = float(self.task.loss(output.double(), target).sum())
        if dense is not None:
            same = float(self.task.agreement(dense, output).sum())
            kl = float(self.task.distance(dense.double(), output.double()).sum())
        top5 = top5 if classes > 5 else -images  # a negative count means that there is no top-5
        labelled, compared = images * (target is not None), images * (dense is not None)
        values = [images, labelled, top1, top5, loss, compared, same, kl]
        self.sums += torch.tensor(values, dtype=torch.float64, device="cpu")

    def result(self) -> Evaluation:
        """Return `top1` and `top5` in percent (`top5` for more than five classes), `agreement`, `kl` and `loss`."""
        images, labelled, top1, top5, loss, compared, same, kl = self.sums.tolist()

        def percent(count: float, defined: bool) -> float | None:
            return round(100 * count / images, 4) if defined else None

        return Evaluation(
            int(images),
            bool(labelled),
            top1=percent(top1, bool(labelled)),
            top5=percent(top5, bool(labelled) and top5 >= 0),
            agreement=percent(same, bool(compared)),
            kl=round(kl / images, 6) if compared else None,
            loss=round(loss / images, 6) if labelled else None,
        )
