"""Selection of the calibration, training, held-out and evaluation images of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import processes
from ..data.batches import Batches, sample_indices, skip_picture
from ..data.find import open_images
from ..data.images import Images
from ..errors import InputError
from ..models.base import TokenModel
from ..models.learnt import LearntFrom, learnt_from
from ..progress import note
from .requests import DataOptions

# One in HELD_OUT_SHARE training images selects the best epoch, at most HELD_OUT_MOST; below HELD_OUT_LEAST none do.
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_LEAST = 20, 1024, 32
# Images to measure a drop on: with 4,096, a difference between two models that disagree on 5 % has a standard error of
# 0.35 points. Fewer than JUDGED_LEAST are no better than those of the search.
JUDGED_MOST, JUDGED_LEAST = 4096, 256
# One in ten images is for evaluation, at most MEASURED_MOST. To find as many that were not trained on, LOOKED_SHARE
# times as many are read, or LOOKED_LEAST.
MEASURED_MOST, LOOKED_SHARE, LOOKED_LEAST = 5000, 4, 4096


@dataclass(frozen=True)
class CalibrationImages:
    """Images for a compression.

    Attributes:
        calibration: this process's shard of the calibration images. measured: its shard of the evaluation images.
        count: number of calibration images over all processes.
        judged: images to measure a drop on, disjoint from these; None: there are none, or none are needed.
    """

    calibration: Batches
    measured: Batches
    count: int
    judged: Batches | None = None

    @property
    def source(self) -> Images:
        """The dataset of the calibration images."""
        return self.calibration.source

    def wants_reconstruction(self, asked: bool | None) -> bool:
        """Return whether to reconstruct: as requested; by default if there are two or more images of the user's own."""
        return asked if asked is not None else not self.source.stand_in and self.count > 1

    def gap_source(self, asked: str | None, planned: str | None = None) -> str:
        """Return the gap source: as requested, else as planned, else "calibrated" for images of the user's own."""
        return asked or planned or ("bias" if self.source.stand_in else "calibrated")


def choose_images(
    model: TokenModel, options: DataOptions, training: bool = False, judged: bool = False
) -> CalibrationImages:
    """Choose images for calibration and evaluation: disjoint subsets of the same data, unless `eval_data` is given.

    Args:
        training: whether the same data will be trained on, in which case as much as possible is kept for that. A
            fine-tuned model is evaluated on images that it was not trained on, as far as there are any.
        judged: whether further images are needed to measure a drop: at most half of the rest, and JUDGED_MOST.

    Raises:
        InputError: no images, too few of them, or images of other classes than the model's.
    """
    if options.samples < 1:
        raise InputError(f"samples {options.samples}: expected at least 1")
    images = model.find_images(options.data, reduce_zero_label=options.reduce_zero_label)
    if options.eval_data is None:
        if len(images) < 2:
            raise InputError(f"{images.name} has 1 image: expected one to calibrate and one to measure on")
        tuned = model.find_record("finetuning") is not None
        if training or tuned:
            train, rest = train_test_split(len(images), options.seed)
            if tuned:  # trained on all but a tenth of the images, so half of them cannot be used for evaluation
                rest = choose_measured(images, learnt_from(model), options)
                train = sorted(set(range(len(images))) - set(rest))
            chosen = [train[i] for i in sample_indices(len(train), options.samples, options.seed)[0]]
        else:
            count = min(options.samples, len(images) // 2)
            chosen, rest = sample_indices(len(images), count, options.seed)
        if not any(images.readable(i) for i in chosen):  # with few images, those chosen may all be damaged
            spare = [i for i in rest if images.readable(i)][:1]
            chosen, rest = [*chosen, *spare], [i for i in rest if i not in spare]
        others = images
    else:
        chosen, _ = sample_indices(len(images), options.samples, options.seed)
        others = open_for(model, options.eval_data, options)
        rest = range(len(others))
    further: Sequence[int] = ()
    if judged:
        left = sorted(set(range(len(images))) - set(chosen)) if options.eval_data is not None else list(rest)
        count = min(JUDGED_MOST, len(left) if options.eval_data is not None else len(left) // 2)
        further = [left[i] for i in sample_indices(len(left), count, options.seed)[0]]
        rest = rest if options.eval_data is not None else [i for i in rest if i not in {*further}]
    return CalibrationImages(
        make_batches(model, images, processes.shard(chosen), options, fixed=True),
        make_batches(model, others, processes.shard(rest), options),
        len(chosen),
        make_batches(model, images, further, options, fixed=True) if len(further) >= JUDGED_LEAST else None,
    )


@dataclass(frozen=True)
class TrainingImages:
    """Images for fine-tuning: to train on, to select the epoch (or None), to evaluate on (the last two sharded)."""

    training: Batches
    held_out: Batches | None
    measured: Batches


def split_training_images(model: TokenModel, options: DataOptions) -> TrainingImages:
    """Split images into training images, images to select the epoch, and evaluation images.

    Raises:
        InputError: too few images, or images of other classes than the model's.
    """
    images = open_for(model, options.data, options)
    if options.eval_data is None:
        if len(images) < 3:
            raise InputError(f"{images.name} has {len(images)} images: expected two to train on and one to measure on")
        others, rest = images, choose_measured(images, learnt_from(model), options)
        train = sorted(set(range(len(images))) - set(rest))
    else:
        others = open_for(model, options.eval_data, options)
        train, rest = list(range(len(images))), range(len(others))
    count = min(HELD_OUT_MOST, len(train) // HELD_OUT_SHARE)
    held, chosen = sample_indices(len(train), count if count >= HELD_OUT_LEAST else 0, options.seed)
    held_out = processes.shard([train[i] for i in held])
    return TrainingImages(
        make_batches(model, images, [train[i] for i in chosen], options),
        make_batches(model, images, held_out, options) if held else None,
        make_batches(model, others, processes.shard(rest), options),
    )


def train_test_split(size: int, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into training and test images; 10 % are held out, at most 5,000.

    The same seed gives the same split in every command.
    """
    test, train = sample_indices(size, _count_measured(size), seed)
    return train, test


def _count_measured(size: int) -> int:
    return min(MEASURED_MOST, max(1, size // 10))


def choose_measured(images: Images, learnt: LearntFrom, options: DataOptions) -> list[int]:
    """Return the indices of evaluation images in ascending order, excluding known training images.

    They are the held-out images of `train_test_split`. Any of them that were trained on are replaced by others. If
    there are too few others, there are fewer evaluation images; if there are none, training images are used. A note
    says what was excluded or could not be.
    """
    count = _count_measured(len(images))
    order = np.random.default_rng(options.seed).permutation(len(images)).tolist()
    if not len(learnt.digests):
        return sorted(order[:count])
    candidates = order[: max(LOOKED_LEAST, LOOKED_SHARE * count)]
    chosen: list[int] = []
    step = max(count, options.batch_size)
    for start in range(0, len(candidates), step):
        part = candidates[start : start + step]
        read = Batches(images, skip_picture, processes.shard(part), options.batch_size, options.workers)
        read.read_rest()
        chosen += [i for i, known in zip(part, np.isin(read.digests[part], learnt.digests), strict=True) if not known]
        if len(chosen) >= count:
            break
    chosen = chosen[:count]
    if not chosen:
        note(
            f"measured on {_count_images(count)} that the model has already seen: no new ones among {len(candidates)} "
            f"of {images.name}"
        )
        return sorted(order[:count])
    if len(chosen) < count:
        found = f"{_count_images(len(chosen))} instead of {count}"
        note(f"measured on {found}: the model has already seen the others of {images.name}")
    elif replaced := len(set(order[:count]) - set(chosen)):
        verb = "replaces one" if replaced == 1 else "replace others"
        note(f"{replaced} of the measured images of {images.name} {verb} that the model has already seen")
    return sorted(chosen)


def _count_images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def open_for(model: TokenModel, data: str, options: DataOptions) -> Images:
    """Open the images that `data` names, with labels according to the task of a model."""
    kind = {"task": model.task, "reduce_zero_label": model.label_rule(options.reduce_zero_label)}
    kind["videos"] = model.frames is not None
    return open_images(data, model.config.num_classes, **kind)


def make_batches(
    model: TokenModel, images: Images, index: Sequence[int], options: DataOptions, fixed: bool = False
) -> Batches:
    """Return the images at `index`, prepared for the model; `fixed`: all of one size, for fitting."""
    transform = model.fixed_transform() if fixed else model.transform()
    return Batches(images, transform, index, options.batch_size, options.workers)
