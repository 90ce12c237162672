"""Which images a job calibrates on, learns from, holds out and measures on."""

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

# One in HELD_OUT_SHARE training images chooses the best epoch, at most HELD_OUT_MOST; fewer than HELD_OUT_LEAST do not.
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_LEAST = 20, 1024, 32
# Images to judge a loss by: of 4,096, a difference between two models that disagree on 5 % has a standard error of 0.35
# points. Fewer than JUDGED_LEAST are not worth more than those of the search.
JUDGED_MOST, JUDGED_LEAST = 4096, 256
# One in ten images is measured on, at most MEASURED_MOST. To find as many that were not learnt from, LOOKED_SHARE times
# as many are read, or LOOKED_LEAST.
MEASURED_MOST, LOOKED_SHARE, LOOKED_LEAST = 5000, 4, 4096


@dataclass(frozen=True)
class CalibrationImages:
    """Images for a compression.

    Attributes:
        calibration: this process's share of the images to calibrate on. measured: its share of those to measure on.
        count: images to calibrate on over all processes.
        judged: images to judge a loss by that are neither of these; None: there are none, or none are needed.
    """

    calibration: Batches
    measured: Batches
    count: int
    judged: Batches | None = None

    @property
    def source(self) -> Images:
        """Where the images to calibrate on come from."""
        return self.calibration.source

    def wants_reconstruction(self, asked: bool | None) -> bool:
        """Whether to reconstruct: as asked; by default where the images are the user's own, two of them at least."""
        return asked if asked is not None else not self.source.stand_in and self.count > 1

    def gap_source(self, asked: str | None, planned: str | None = None) -> str:
        """The gap source: as asked, else as planned, else "calibrated" where the images are the user's own."""
        return asked or planned or ("bias" if self.source.stand_in else "calibrated")


def choose_images(
    model: TokenModel, options: DataOptions, training: bool = False, judged: bool = False
) -> CalibrationImages:
    """Choose images to calibrate on and images to measure on: others of the same data, unless `eval_data` names some.

    Args:
        training: whether the same images will be learnt from: then as many as possible are kept for that. A model that
            was fine-tuned is measured on images that it did not learn from, as far as there are any.
        judged: whether further images are needed to judge a loss by: at most half of those left, and JUDGED_MOST.

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
            if tuned:  # on all images but a tenth, so half of them cannot be measured on
                rest = choose_measured(images, learnt_from(model), options)
                train = sorted(set(range(len(images))) - set(rest))
            chosen = [train[i] for i in sample_indices(len(train), options.samples, options.seed)[0]]
        else:
            count = min(options.samples, len(images) // 2)
            chosen, rest = sample_indices(len(images), count, options.seed)
        if not any(images.readable(i) for i in chosen):  # of a few images, those chosen may be the damaged ones
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
    """Images for fine-tuning: to learn from, to choose the epoch by (or None), to measure on (the last two sharded)."""

    training: Batches
    held_out: Batches | None
    measured: Batches


def split_training_images(model: TokenModel, options: DataOptions) -> TrainingImages:
    """Split images into those to learn from, to choose the epoch by and to measure on.

    Raises:
        InputError: too few images, or images of other classes than the model's.
    """
    images = open_for(model, options.data, options)
    if options.eval_data is None:
        if len(images) < 3:
            raise InputError(
                f"{images.name} has {len(images)} images: expected two to learn from and one to measure on"
            )
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
    """Return the indices of images to measure on, in ascending order, none of them learnt from where that is known.

    They are those that `train_test_split` holds out. Others take the place of those that were learnt from; if there are
    too few others, there are fewer to measure on, and if there are none, those that were learnt from are measured on.
    A note says what was left out or could not be.
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
            f"measured on {_count_images(count)} that the model has learnt from: there is no other among "
            f"{len(candidates)} of {images.name}"
        )
        return sorted(order[:count])
    if len(chosen) < count:
        found = f"{_count_images(len(chosen))} instead of {count}"
        note(f"measured on {found}: the model has learnt from the others of {images.name}")
    elif replaced := len(set(order[:count]) - set(chosen)):
        verb = "replaces one" if replaced == 1 else "replace others"
        note(f"{replaced} of the measured images of {images.name} {verb} that the model has learnt from")
    return sorted(chosen)


def _count_images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def open_for(model: TokenModel, data: str, options: DataOptions) -> Images:
    """The images that `data` names, with labels as the task of a model has them."""
    kind = {"task": model.task, "reduce_zero_label": model.label_rule(options.reduce_zero_label)}
    kind["videos"] = model.frames is not None
    return open_images(data, model.config.num_classes, **kind)


def make_batches(
    model: TokenModel, images: Images, index: Sequence[int], options: DataOptions, fixed: bool = False
) -> Batches:
    """The images at `index`, prepared for the model; `fixed`: all of one size, to fit something on them."""
    transform = model.fixed_transform() if fixed else model.transform()
    return Batches(images, transform, index, options.batch_size, options.workers)
