"""Which images a compressed model was learnt from, so that they are recognised by content among those measured on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.any_batches import AnyBatches
from ..data.batches import Batches
from ..data.content import different
from ..errors import InputError

# Names of the tensor with the digests in a file: whether they are all images that the model was learnt from.
ALL, SOME = "learnt_from.all", "learnt_from.some"


@dataclass(frozen=True, eq=False)
class LearntFrom:
    """The images on which a model was calibrated, reconstructed, searched for, trained, or chosen.

    Attributes:
        digests: (different images,) uint64, ascending (`ssmcompress.data.content`); 8 bytes for an image, 10 MB for
            ImageNet.
        complete: whether these are all of them. Files of older versions do not say, nor do tensors passed in Python.
    """

    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)
    complete: bool = True

    def add(self, images: Any) -> LearntFrom:
        """Return these images and `images`: `Batches` that were read and synced, digests, or other, unknown images."""
        batches = find_batches(images)
        known = images if batches is None else batches.digests if batches.pictures else None
        if not isinstance(known, np.ndarray) or known.dtype != np.uint64:
            return LearntFrom(self.digests, complete=False)
        return LearntFrom(np.union1d(self.digests, different(known)), self.complete)

    def count(self, measured: Batches) -> int | None:
        """Return how many of the images that were read from `measured` are among these; None if that is not known."""
        read = measured.digests[measured.digests != 0]
        found = int(np.isin(read, self.digests).sum())
        return found if (self.complete and measured.pictures) or found == len(read) else None

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensor to save, (different images,) int64, by its name."""
        return {ALL if self.complete else SOME: torch.from_numpy(self.digests.view(np.int64))}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LearntFrom | None:
        """Read what `to_tensors` returned; None without tensors.

        Raises:
            InputError: they are something else.
        """
        if not tensors:
            return None
        (name, value), *more = tensors.items()
        if more or name not in (ALL, SOME) or value.dtype != torch.int64 or value.ndim != 1:
            raise InputError(f"{name} {value.dtype} {tuple(value.shape)}: expected digests of images; damaged file")
        return cls(different(value.numpy().view(np.uint64)), name == ALL)


def count_common(learnt: Batches, measured: Batches) -> int | None:
    """Return how many images of `measured` are in `learnt`, of those that were read; None if that cannot be told.

    Digests of prepared images are compared with each other, and those of pictures with each other.
    """
    if learnt.pictures != measured.pictures:
        return None
    return int(np.isin(measured.digests[measured.digests != 0], learnt.digests).sum())


def find_batches(data: Any) -> Batches | None:
    """Return the `Batches` that `data` is, or that `AnyBatches` wraps; None for any other data."""
    data = data.data if isinstance(data, AnyBatches) else data
    return data if isinstance(data, Batches) else None


def learnt_from(model: Any) -> LearntFrom:
    """Return the images that a model was learnt from; a dense model was learnt from none, as far as it matters here."""
    return model.learnt if model.learnt is not None else LearntFrom(complete=model.plan is None)


def add_learnt(model: Any, parts: Iterable[Any]) -> None:
    """Note further images that `model` was learnt from, each of them as `LearntFrom.add` takes it."""
    learnt = learnt_from(model)
    for part in parts:
        learnt = learnt.add(part)
    model.learnt = learnt
