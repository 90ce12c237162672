"""Uniform batches from any data that a caller passes: tensors, loaders, datasets, lists of images."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import warn
from .batches import Batches, LabelledBatch
from .dense import DensePreprocessing
from .items import IMAGES, InputSpec, as_items, collect_singles, join_batches, parse_item
from .transforms import Preprocessing

# Maximum number of bytes of an iterator's images kept in memory: 7,100 images of 224 pixels.
KEPT_BYTES = 1 << 32
# Property that batches with another order of dimensions lack, and the permutation to the expected order, by the number
# of dimensions of an image: 3, or 4 of a video.
ORDERS = {
    3: {"channels first": (0, 3, 1, 2)},
    4: {"channels before frames": (0, 2, 1, 3, 4), "channels first": (0, 4, 1, 2, 3)},
}


class AnyBatches:
    """Data passed by a caller, as LabelledBatch items that can be iterated repeatedly.

    The data may be augmented or come in another order in each iteration, as from a shuffling loader, so only sums over
    all images may be compared between two iterations.

    Args:
        data: `Batches`; a tensor or array of images (count, channels, height, width), alone or as a pair with labels;
            an iterable of batches, each a tensor, (images, labels, ...), a dict as from Hugging Face loaders, or a
            `Batch`; a torch `Dataset`, or an iterable of single images or (image, label) pairs.
        spec: what the model takes.
        repeat: whether it is iterated more than once. An iterator is then read into memory, up to `KEPT_BYTES`.
        labelled: whether labels are read; if not, they may be anything.
        named: whether the caller gave only a name, and so cannot see which images are unreadable: a warning lists them.

    Attributes:
        name: name of the data, "images" if it has none.
        total: the number of batches, 0 if unknown.
        views: the views of each video, in the dimension before the channels; None: a single one.

    Raises:
        InputError: the data, or a batch in an iteration, is of another kind, shape or dtype.
    """

    def __init__(
        self,
        data: Any,
        spec: InputSpec = IMAGES,
        *,
        repeat: bool = True,
        labelled: bool = True,
        named: bool = False,
    ):
        self.views = data.views if isinstance(data, Batches) else None
        if self.views is not None and spec.shape is not None:
            spec = replace(spec, shape=(self.views.count, *spec.shape))
        self.data, self.spec, self.labelled = as_items(data, spec), spec, labelled
        self.name = data.source.name if isinstance(data, Batches) else "images"
        self._seen, self._warn_unreadable = 0, named
        self._check_range = not isinstance(data, Batches) and spec.preprocessing is not None
        if repeat and isinstance(self.data, Iterator):
            self.data = list(self._keep(self))
        self.total = operator.length_hint(self.data, 0)  # loaders of streams have a `__len__` that raises

    def __iter__(self) -> Iterator[LabelledBatch]:
        count = 0
        parsed = (parse_item(item, self.spec, self.labelled) for item in self.data)
        for images, labels in collect_singles(parsed, self.spec):
            if not len(images):
                continue
            count += len(images)
            self._check_shape(images)
            if self._check_range:
                self._check_range = False
                warn_about_range(images, self.spec.preprocessing)
            yield LabelledBatch(images.to(self.spec.dtype), labels)
        if self._seen and not count:
            raise InputError(
                "the data gave images in the first pass and none in the second: pass something that can be iterated "
                "repeatedly, such as a list, a DataLoader or `Batches`"
            )
        self._seen = max(self._seen, count)
        if self._warn_unreadable and self.data.unreadable:
            self._warn_unreadable = False
            names = self.data.unreadable_names()
            warn(f"left out {len(names)} unreadable images: {', '.join(names[:3])}")

    def read_all(self) -> LabelledBatch:
        """Return all images and labels as one batch.

        Raises:
            InputError: there are no images, or more than `KEPT_BYTES` of them.
        """
        batches = list(self._keep(self))
        if not batches:
            raise InputError("there are no images in the data")
        return join_batches(batches)

    def _keep(self, batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
        size = 0
        for batch in batches:
            size += batch.images.nbytes
            if size > KEPT_BYTES:
                raise InputError(
                    f"more than {KEPT_BYTES >> 30} GiB of images, which have to be in memory because they are needed "
                    f"more than once: pass a folder, `Batches` or fewer images"
                )
            yield batch

    def _check_shape(self, images: Tensor) -> None:
        shape, found = self.spec.shape, tuple(images.shape)
        if shape is None or _fits(found[1:], shape):
            return
        sides = (side or name for side, name in zip(shape, self.spec.sides, strict=True))
        expected = f"expected (batch, {', '.join(map(str, sides))})"
        for what, order in ORDERS.get(len(shape), {}).items():
            if _fits([found[i] for i in order[1:]], shape):
                raise InputError(f"images {found}: {expected}, {what}: images.permute({', '.join(map(str, order))})")
        if found[0] == 1 and shape[0] == 1 and _fits(found[2:], shape[1:]):
            raise InputError(f"images {found[1:]}: {expected}: add the channels with images[:, None]")
        raise InputError(f"images {found}: {expected}; load the model with another image_size for other images")


def _fits(found: Sequence[int], shape: tuple[int | None, ...]) -> bool:
    return all(side in (None, size) for size, side in zip(found, shape, strict=True))


def warn_about_range(images: Tensor, preprocessing: Preprocessing | DensePreprocessing) -> None:
    """Warn if images (count, channels, height, width) are clearly not normalised: all values in 0..1 or 0..255."""
    low, high = float(images.min()), float(images.max())
    pairs = list(zip(preprocessing.mean, preprocessing.std, strict=True))
    darkest, brightest = min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)
    # Real images have pixels darker than the mean, which are negative after normalisation.
    # Non-finite values are reported by the model.
    if not (0 <= low < high and darkest < -0.25 and (high <= 1 or 10 * brightest < high < math.inf)):
        return
    warn(
        f"the images have values from {low:.3g} to {high:.3g}, as if they were not normalised: the model takes images "
        f"scaled to 0..1, minus mean {preprocessing.mean}, divided by std {preprocessing.std}, as model.transform() "
        f"makes them"
    )


def in_chunks(batches: Iterable[LabelledBatch], size: int) -> Iterator[Tensor]:
    """Yield the images of `batches` in chunks of `size`; the last one, and the last before a new shape, may be smaller.

    Results computed in chunks are bitwise equal for any batch size: rounding in matrix products depends on the shape.
    """
    pending: list[Tensor] = []
    for images, _ in batches:
        if pending and images.shape[1:] != pending[0].shape:
            yield torch.stack(pending)
            pending.clear()
        pending.extend(images)
        while len(pending) >= size:
            yield torch.stack(pending[:size])
            del pending[:size]
    if pending:
        yield torch.stack(pending)
