"""Training examples, augmented by timm; they do not depend on the number of workers or processes.

The augmentation of an image depends only on the seed, the epoch and the image, and the images of a step only on the
seed and the epoch. So an interrupted run continues exactly as an uninterrupted one, and several processes take the same
step as one.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.batches import Batches, make_loader
from ...data.content import digest_picture
from ...data.transforms import Preprocessing
from ...errors import InputError
from ...models.base import TokenModel
from .recipe import Recipe


class MicroBatch(NamedTuple):
    """A part of a step: images (n, channels, height, width); targets (n, classes), class probabilities, or None."""

    images: Tensor
    targets: Tensor | None


class Examples:
    """The augmented images of `training`, step by step.

    Args:
        model: the model, which decides the image size, preprocessing and classes.
        training: the images; its batch size and transform are not used, and unreadable images are left out.
        process: (index of this process, number of processes that share a step).
    """

    def __init__(
        self, model: TokenModel, training: Batches, recipe: Recipe, seed: int, process: tuple[int, int] = (0, 1)
    ):
        self.training, self.recipe, self.seed = training, recipe, seed
        self.process, self.processes = process
        processes = self.processes
        self.classes = model.config.num_classes
        self.transform = training_transform(model.preprocessing, model.config.image_size, recipe)
        images = len(training.index)
        # If there are fewer images than a batch, a step has all of them.
        self.batch_size = min(recipe.batch_size, images - images % 2)
        parts = processes * recipe.accumulate
        if self.batch_size < 2 * parts:
            split = f"in {parts} parts ({processes} processes, {recipe.accumulate} after each other)"
            raise InputError(
                f"{images} images to train on, {recipe.batch_size} a step {split}: expected 2 at least in each part"
            )
        self.steps = images // self.batch_size

    def iterate_epoch(self, epoch: int, first: int = 0) -> Iterator[list[MicroBatch]]:
        """Yield this process's parts of each step of an epoch (from 0), starting at step `first`."""
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | None, int, int]:
        """Return (index in the source, image or None, label or -1, digest of its pixels) for an (epoch, row)."""
        epoch, row = key
        source, i = self.training.source, self.training.index[row]
        label = -1 if source.labels is None else source.labels[i]
        with seed_rng(self.seed, epoch, i):
            try:
                picture = source.read(i)
                content = int(self.training.digests[i]) or digest_picture(picture)
                return i, self.transform(picture), label, content
            except (OSError, ValueError):
                return i, None, label, 0

    def _make_part(self, items: list[tuple[int, Tensor | None, int, int]], epoch: int, step: int) -> MicroBatch:
        """Stack and mix the images that could be read, and encode their labels."""
        self.training.unreadable.update(item[0] for item in items if item[1] is None)
        items = [item for item in items if item[1] is not None]
        for i, _, _, content in items:
            self.training.digests[i] = content
        if not items:
            raise InputError(f"every image of a part of a step is unreadable in {self.training.source.name}")
        images, labels = torch.stack([item[1] for item in items]), torch.tensor([item[2] for item in items])
        has_labels = self.training.source.labels is not None
        smoothing, recipe = self.recipe.smoothing, self.recipe
        if recipe.mixes and len(images) % 2 == 0:  # odd if an image was unreadable
            from timm.data import Mixup

            mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=self.classes)
            with seed_rng(self.seed, epoch, step, 1):
                images, targets = mix(images, labels.clamp(min=0))
        else:
            targets = torch.nn.functional.one_hot(labels.clamp(min=0), self.classes).float()
            targets = targets * (1 - smoothing) + smoothing / self.classes
        return MicroBatch(images, targets if has_labels else None)


def select_pairs(rows: Sequence[int], part: int, parts: int) -> np.ndarray:
    """Return one of `parts` parts of a step's rows, made of pairs of the i-th row from the front and from the back.

    timm mixes a batch with its own reverse, so every part is mixed as it would be in the whole batch.
    """
    rows = np.asarray(rows)
    half = len(rows) // 2
    inner = np.arange(part * half // parts, (part + 1) * half // parts)
    return np.concatenate([rows[inner], rows[::-1][inner[::-1]]])


def training_transform(
    preprocessing: Preprocessing, image_size: tuple[int, int], recipe: Recipe
) -> Callable[[Any], Tensor]:
    """Return a function from a PIL image, in any mode, to an augmented tensor (channels, height, width), float32."""
    from timm.data import create_transform

    channels = len(preprocessing.mean)
    augment, colours, finish = create_transform(
        input_size=(3, *image_size),
        is_training=True,
        scale=(recipe.crop, 1.0),
        hflip=recipe.flip,
        color_jitter=0.0,
        auto_augment=recipe.randaugment or None,
        # timm's crops and RandAugment do not take nearest and lanczos.
        interpolation=preprocessing.interpolation if preprocessing.interpolation == "bilinear" else "bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=recipe.erasing,
        re_mode="pixel",
        separate=True,
    )
    mode = "L" if channels == 1 else "RGB"
    # RandAugment fills with a colour of three channels, so it needs an RGB image.
    return lambda image: finish(colours(augment(image.convert("RGB"))).convert(mode))


@contextmanager
def seed_rng(*numbers: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators in the body of the with statement; their states return after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.random.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM. Ctrl-C reaches all processes, but the main one saves first, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
