"""Warnings about figures: accuracy at chance or not measured in spite of masks, low agreement.

All functions are pure: they take figures and facts and return lines. As in the library's errors, arguments are in
backticks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.images import Images
from ..data.masks import describe_empty
from ..models.base import TokenModel
from ..tasks import CLASSIFICATION, Evaluation, Task
from .report_refits import read_learning

LOW_AGREEMENT = 50.0  # percent
MANY = 32  # number of images from which on repeated images and missing classes are not a coincidence


@dataclass(frozen=True)
class Subject:
    """Facts about a model and its evaluation images.

    Attributes:
        task: what its outputs mean. classes: of its head. images: number of evaluation images.
        assumed: which of mean and standard deviation are default values, by name.
        by_name: whether classes are numbered by name.
        masks: number of masks, if the images have masks instead of labels.
        own_images: whether the images are the user's, not sample photographs.
        pruned: whether it prunes. refitted: whether its later layers were reconstructed. tuned: whether it was
            fine-tuned.
    """

    classes: int
    images: int
    assumed: tuple[str, ...] = ()
    by_name: bool = False
    own_images: bool = True
    pruned: bool = False
    refitted: bool = False
    tuned: bool = False
    masks: int = 0
    task: Task = CLASSIFICATION

    @classmethod
    def of(cls, model: TokenModel, images: Images, count: int) -> Subject:
        """Return the facts about a model and the `count` images of a dataset that it was evaluated on."""
        refit, used = model.find_record("reconstruction"), model.preprocessing
        return cls(
            classes=model.config.num_classes,
            images=count,
            assumed=() if used is None else tuple(name for name in ("mean", "std") if name in used.defaults),
            by_name=images.classes is not None,
            own_images=not images.stand_in,
            pruned=model.plan is not None,
            refitted=refit is not None and refit.kept,
            tuned=model.find_record("finetuning") is not None,
            masks=images.empty_masks or (count if images.masks is not None else 0),
            task=model.task,
        )


def find_doubts(subject: Subject, dense: Evaluation | None, pruned: Evaluation | None) -> list[str]:
    """Return the warnings about the figures of a dense model and of the one pruned from it; None: not measured."""
    lines = []
    if dense is not None:
        lines += doubt_accuracy("the dense model", dense, subject)
    if pruned is None:
        return lines
    if dense is None:
        lines += doubt_accuracy("the model", pruned, subject)
    return lines + doubt_agreement(pruned, subject)


def doubt_accuracy(who: str, result: Evaluation | None, subject: Subject) -> list[str]:
    """Return a warning if no mask has a labelled pixel, or if the accuracy is at chance, with possible causes.

    Args:
        result: the figures of the model; None: not measured.
    """
    if result is None:
        return []
    if subject.masks and result.figures.get(subject.task.quality) is None:
        return [f"{describe_empty(subject.masks)}: the accuracy of {who} was not measured"]
    if not subject.task.is_at_chance(result, subject.classes):
        return []
    causes = [_describe_assumed(subject.assumed)] if subject.assumed else []
    causes += [*subject.task.causes_of_chance(subject.by_name), "`stride` or `architecture`"]
    return [f"{who} {subject.task.describe_chance(result, subject.classes)}; check {'; '.join(causes)}"]


def doubt_agreement(result: Evaluation, subject: Subject) -> list[str]:
    """Return a warning if fewer than half of the decisions are the dense model's, with what to try next."""
    likeness = result.figures.get(subject.task.likeness)
    if likeness is None or likeness >= LOW_AGREEMENT:
        return []
    shown = subject.task.describe_likeness(likeness, result.images)
    return [f"{shown}; to lose less, {_next(subject)}"]


def doubt_calibration(calibration: Mapping[str, Any]) -> list[str]:
    """Return warnings if the calibration images are too similar for a fit that generalises.

    Args:
        calibration: `images`, `distinct` and `classes`, {`seen`, `of`}, as a report has them.
    """
    images, distinct, classes = (calibration.get(name) for name in ("images", "distinct", "classes"))
    lines = []
    if distinct and images >= MANY and distinct * 2 <= images:
        lines.append(f"only {distinct} of {images} images to calibrate on are different: give more (`data`)")
    if classes and images >= MANY and classes["seen"] * 2 <= min(images, classes["of"]):
        lines.append(
            f"the images to calibrate on cover only {classes['seen']} of {classes['of']} classes: what is fitted may "
            "not hold for the others; give images of all classes (`data`)"
        )
    return lines


def doubt_reconstruction(section: Mapping[str, Any]) -> list[str]:
    """Return warnings if a reconstruction used too few images or does not generalise to the evaluation images.

    Args:
        section: `reconstruction`, as a report has it.
    """
    lines = []
    if (curve := read_learning(section)) is not None and curve.is_starved:
        lines.append(
            f"{section['images']} images are few to reconstruct on: half of them bring {curve.half_gain:.0%} of the "
            "improvement that all bring to the refitted maps; give more (`samples`, `data`)"
        )
    before, after = (section.get(f"kl_measured_{name}") for name in ("before", "after"))
    if before is not None and after > before:
        lines.append(
            "the reconstruction does not hold for the measured images: KL from dense "
            f"{before:.4f} -> {after:.4f} nats; give more images (`samples`), images like these (`data`), or leave it "
            "out (`reconstruct=False`)"
        )
    return lines


def _describe_assumed(names: tuple[str, ...]) -> str:
    return f"{' and '.join(f'`{name}`' for name in names)}, which {'were' if len(names) > 1 else 'was'} assumed"


def _next(subject: Subject) -> str:
    """Return what to try next, after the methods already used."""
    if not subject.pruned:
        return "compare with the dense model that this one was made from"
    if subject.refitted and subject.tuned:
        return "keep more tokens (a lower `ratio`, a higher `flops`), or fine-tune for more epochs"
    if subject.refitted:
        return "keep more tokens (a lower `ratio`, a higher `flops`), or fine-tune"
    if not subject.own_images:
        return "give `data`, images like those that the model is for: then later layers are refitted (`reconstruct`)"
    return "refit later layers (`reconstruct`, on more images: `samples`), or keep more tokens (a lower `ratio`)"
