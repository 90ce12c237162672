"""Augmented training examples in steps, independent of the number of workers and processes.

The augmentation of an image depends only on the seed, the epoch and the image, and the images of a step depend only on
the seed and the epoch. So a resumed run gives the same results as an uninterrupted one, and several processes take the
same step as one.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.batches import Batches, Item
from ...data.workers import make_loader
from ...errors import InputError
from ...models.base import TokenModel
from .augmentation import training_transform
from .recipe import Recipe
from .seeds import seed_rng


class MicroBatch(NamedTuple):
    """A micro-batch of a step.

    Attributes:
        images: (n, channels, height, width), or (n, channels, frames, height, width) for videos.
        targets: class probabilities (n, classes), for segmentation masks (n, height, width) uint8; None: no labels.
    """

    images: Tensor
    targets: Tensor | None


class Examples:
    """The augmented images of `training`, step by step.

    Args:
        model: the model, which determines the image size, preprocessing and classes.
        training: the images; its batch size and transform are not used, and unreadable images are skipped.
        process: (index of this process, number of processes that share a step).

    Raises:
        InputError: there are too few images, or the recipe does not fit the task of the model. Invalid masks raise an
            InputError during iteration.
    """

    def __init__(
        self, model: TokenModel, training: Batches, recipe: Recipe, seed: int, process: tuple[int, int] = (0, 1)
    ):
        self.training, self.recipe, self.seed = training, recipe, seed
        self.process, self.processes = process
        processes = self.processes
        recipe.check_task(model.task)
        self.task, self.classes = model.task, model.config.num_classes
        transform = training_transform(model.preprocessing, model.config.image_size, recipe, model.frames)
        self.reader = replace(training, transform=transform, labelled=True)
        images = len(training.index)
        # With fewer images than the batch size, a step has all of them.
        self.batch_size = min(recipe.batch_size, images - images % 2)
        parts = processes * recipe.accumulate
        if self.batch_size < 2 * parts:
            split = f"in {parts} parts ({processes} processes, {recipe.accumulate} after each other)"
            raise InputError(
                f"{images} images to train on, {recipe.batch_size} a step {split}: expected 2 at least in each part"
            )
        self.steps = images // self.batch_size

    def iterate_epoch(self, epoch: int, first: int = 0) -> Iterator[list[MicroBatch]]:
        """Yield this process's micro-batches of each step of an epoch (0-based), starting at step `first`."""
        # Digests of images that were read before are reused.
        self.reader.digests, self.reader.mask_digests = self.training.digests, self.training.mask_digests
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.training.index))
        rows = []
        for step in range(first, self.steps):
            step_rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            for part in range(self.recipe.accumulate):
                number = part * self.processes + self.process
                part_rows = select_pairs(step_rows, number, self.processes * self.recipe.accumulate)
                rows.append([(epoch, int(row)) for row in part_rows])
        parts = iter(make_loader(self, rows, self.training.workers, _ignore_signals))
        try:
            for step in range(first, self.steps):
                yield [self._make_part(next(parts), epoch, step) for _ in range(self.recipe.accumulate)]
        finally:
            # End the workers now, not when the iterator is garbage-collected.
            if (shutdown := getattr(parts, "_shutdown_workers", None)) is not None:
                shutdown()

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Return the image and mask for an (epoch, row), augmented."""
        epoch, row = key
        with seed_rng(self.seed, epoch, self.training.index[row]):
            return self.reader[row]

    def _make_part(self, items: list[Item], epoch: int, step: int) -> MicroBatch:
        """Stack the readable images with their masks; or mix them, and encode their labels."""
        if wrong := next((item.error for item in items if item.error is not None), None):
            raise InputError(wrong)
        self.training.unreadable.update(item.index for item in items if item.image is None)
        items = [item for item in items if item.image is not None]
        for item in items:
            self.training.digests[item.index] = item.digest
            self.training.mask_digests[item.index] = item.mask_digest
        if not items:
            raise InputError(f"every image of a part of a step is unreadable in {self.training.source.name}")
        images, source = torch.stack([item.image for item in items]), self.training.source
        if self.reader.reads_masks:
            targets = torch.stack([item.mask for item in items])
        else:
            targets = torch.tensor([source.labels[item.index] if source.labels is not None else 0 for item in items])
        if source.labelled:
            self.task.check_target(targets, self.classes)
        part = MicroBatch(images, targets) if self.reader.reads_masks else self._encode(images, targets, (epoch, step))
        return part if source.labelled else part._replace(targets=None)

    def _encode(self, images: Tensor, labels: Tensor, place: tuple[int, int]) -> MicroBatch:
        """Return images with smoothed labels, given labels (images,), and mix them if the recipe says so.

        Args:
            place: the epoch and the step, which seed the mixing.
        """
        recipe = self.recipe
        if recipe.mixes and len(images) % 2 == 0:  # odd if an image was unreadable
            from timm.data import Mixup

            mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=self.classes)
            # timm cuts boxes out of the third and fourth dimension, which for videos would be frames and height.
            planes = images.flatten(1, -3)
            with seed_rng(self.seed, *place, 1):
                mixed, targets = mix(planes, labels)
            return MicroBatch(mixed.view(images.shape), targets)
        targets = torch.nn.functional.one_hot(labels, self.classes).float()
        return MicroBatch(images, targets * (1 - recipe.smoothing) + recipe.smoothing / self.classes)


def select_pairs(rows: Sequence[int], part: int, parts: int) -> np.ndarray:
    """Return one of `parts` parts of a step's rows, composed of pairs of the i-th row from the front and the back.

    timm mixes a batch with its reverse, so every part is mixed as in the whole batch.
    """
    rows = np.asarray(rows)
    half = len(rows) // 2
    inner = np.arange(part * half // parts, (part + 1) * half // parts)
    return np.concatenate([rows[inner], rows[::-1][inner[::-1]]])


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM. Ctrl-C reaches all processes, but the main one saves first, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
