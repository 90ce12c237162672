"""Warnings about figures that a working model would not give: accuracy at chance, low agreement with the dense model.

All functions are pure: figures and facts in, lines out. Arguments are in backticks, as in errors of the library.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.images import Images
from ..evaluation.binomial import at_least, at_most
from ..evaluation.measure import Evaluation
from ..models.base import TokenModel

# One-sided probability of three standard deviations of a normal distribution.
THREE_SIGMA = 0.00135
LOW_AGREEMENT = 50.0  # percent
# What is hardly more than chance with more than FEW_CLASSES: a multiple of it, or a share of the images.
FEW_CLASSES, TIMES_CHANCE, LOW_ACCURACY = 20, 3, 0.03


@dataclass(frozen=True)
class Subject:
    """What is known of a model and of the images that it was measured on.

    Attributes:
        classes: of its head. images: number of images measured on.
        assumed: whether mean and standard deviation are default values. by_name: whether classes are numbered by name.
        own_images: whether the images are the user's, not sample photographs.
        pruned: whether it prunes. refitted: whether its later layers were reconstructed. tuned: whether it was
            fine-tuned.
    """

    classes: int
    images: int
    assumed: bool = False
    by_name: bool = False
    own_images: bool = True
    pruned: bool = False
    refitted: bool = False
    tuned: bool = False

    @classmethod
    def of(cls, model: TokenModel, images: Images, count: int) -> Subject:
        """The facts about a model and the `count` images of a data set that it was measured on."""
        refit = model.find_record("reconstruction")
        return cls(
            classes=model.config.num_classes,
            images=count,
            assumed=model.preprocessing is not None and model.preprocessing.assumed,
            by_name=images.classes is not None,
            own_images=not images.stand_in,
            pruned=model.plan is not None,
            refitted=refit is not None and refit.kept,
            tuned=model.find_record("finetuning") is not None,
        )


def is_at_chance(top1: float, images: int, classes: int) -> bool:
    """Return whether an accuracy is hardly better than that of a guess, on enough images to tell.

    With `FEW_CLASSES` or fewer, it is not above chance by three standard deviations. With more, it is at most three
    times chance or 3 %: a wrong order of the classes leaves some of them in their places, as that of their numbers as
    strings does with 12 of 1,000. A model that is right half way between chance and always would have done better,
    with a certainty of three standard deviations: 33 images tell for 2 classes, 12 for 10 and 10 for 1,000.

    Args:
        top1: percent of the `images` whose class, one of `classes`, was found.
    """
    if classes < 2 or not images:
        return False
    right, chance = round(top1 / 100 * images), 1 / classes
    if at_most(right, images, (1 + chance) / 2) >= THREE_SIGMA:
        return False
    if classes <= FEW_CLASSES:
        return at_least(right, images, chance) > THREE_SIGMA
    return right <= images * max(TIMES_CHANCE * chance, LOW_ACCURACY)


def find_doubts(subject: Subject, dense: Evaluation | None, pruned: Evaluation | None) -> list[str]:
    """Return the warnings about the figures of a dense model and of the one pruned from it; None: not measured."""
    lines = []
    if dense is not None:
        lines += doubt_accuracy("the dense model", dense.top1, subject)
    if pruned is None:
        return lines
    if dense is None:
        lines += doubt_accuracy("the model", pruned.top1, subject)
    return lines + doubt_agreement(pruned.agreement, subject)


def doubt_accuracy(who: str, top1: float | None, subject: Subject) -> list[str]:
    """Return a warning if an accuracy in percent is at chance, with its likely causes; None: not measured."""
    if top1 is None or not is_at_chance(top1, subject.images, subject.classes):
        return []
    numbered = ", which are numbered by their names" if subject.by_name else " in the labels"
    causes = ["`mean` and `std`, which were assumed"] if subject.assumed else []
    causes += [f"the order of the classes{numbered}", "`stride` or `architecture`"]
    more = "hardly" if top1 > 100 / subject.classes else "no"
    return [
        f"{who} finds the class of {top1:.4g} % of {subject.images} images, {more} more than chance with "
        f"{subject.classes} classes; check {'; '.join(causes)}"
    ]


def doubt_agreement(agreement: float | None, subject: Subject) -> list[str]:
    """Return a warning if fewer than half of the images keep the dense model's class, with what to try next."""
    if agreement is None or agreement >= LOW_AGREEMENT:
        return []
    return [
        f"only {agreement:.4g} % of {subject.images} images get the dense model's class; to lose less, {_next(subject)}"
    ]


def _next(subject: Subject) -> str:
    """The next lever, after those that were used."""
    if not subject.pruned:
        return "compare with the dense model that this one was made from"
    if subject.refitted and subject.tuned:
        return "keep more tokens (a lower `ratio`, a higher `flops`), or fine-tune for more epochs"
    if subject.refitted:
        return "keep more tokens (a lower `ratio`, a higher `flops`), or fine-tune"
    if not subject.own_images:
        return "give `data`, images like those that the model is for: then later layers are refitted (`reconstruct`)"
    return "refit later layers (`reconstruct`, on more images: `samples`), or keep more tokens (a lower `ratio`)"
