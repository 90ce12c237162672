"""Records of the images that a compressed model was fitted on, to detect them by content in evaluation data."""

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

# Name of the tensor of digests in a file; it shows whether they cover all images that the model was fitted on.
ALL, SOME = "learnt_from.all", "learnt_from.some"


@dataclass(frozen=True, eq=False)
class LearntFrom:
    """The images on which a model was calibrated, reconstructed, searched, trained or selected.

    Attributes:
        digests: (different images,) uint64, ascending (`ssmcompress.data.content`); 8 bytes per image, 10 MB for
            ImageNet.
        complete: whether these are all of them. This is unknown for files of older versions and tensors passed in
            Python.
    """

    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)
    complete: bool = True

    def add(self, images: Any) -> LearntFrom:
        """Return the union with `images`: `Batches` that were read and synced, digests, or unidentified images."""
        batches = find_batches(images)
        known = images if batches is None else batches.digests if batches.pictures else None
        if not isinstance(known, np.ndarray) or known.dtype != np.uint64:
            return LearntFrom(self.digests, complete=False)
        return LearntFrom(np.union1d(self.digests, different(known)), self.complete)

    def count(self, measured: Batches) -> int | None:
        """Return how many of the images read from `measured` are among these; None if unknown."""
        read = measured.digests[measured.digests != 0]
        found = int(np.isin(read, self.digests).sum())
        return found if (self.complete and measured.pictures) or found == len(read) else None

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensor to save, (different images,) int64, in a dict by its name."""
        return {ALL if self.complete else SOME: torch.from_numpy(self.digests.view(np.int64))}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LearntFrom | None:
        """Read the result of `to_tensors`; None if there is no such tensor.

        Raises:
            InputError: the tensors are invalid.
        """
        if not tensors:
            return None
        (name, value), *more = tensors.items()
        if more or name not in (ALL, SOME) or value.dtype != torch.int64 or value.ndim != 1:
            raise InputError(f"{name} {value.dtype} {tuple(value.shape)}: expected digests of images; damaged file")
        return cls(different(value.numpy().view(np.uint64)), name == ALL)


def count_common(learnt: Batches, measured: Batches) -> int | None:
    """Return how many of the images read from `measured` are in `learnt`; None if unknown.

    Digests of prepared images are compared only with each other, and those of pictures only with each other.
    """
    if learnt.pictures != measured.pictures:
        return None
    return int(np.isin(measured.digests[measured.digests != 0], learnt.digests).sum())


def find_batches(data: Any) -> Batches | None:
    """Return `data` if it is `Batches`, or the `Batches` wrapped by `AnyBatches`; None for any other data."""
    data = data.data if isinstance(data, AnyBatches) else data
    return data if isinstance(data, Batches) else None


def learnt_from(model: Any) -> LearntFrom:
    """Return the images that a model was fitted on; none for a dense model, whose own training does not count."""
    return model.learnt if model.learnt is not None else LearntFrom(complete=model.plan is None)


def add_learnt(model: Any, parts: Iterable[Any]) -> None:
    """Record further images that `model` was fitted on, each an argument of `LearntFrom.add`."""
    learnt = learnt_from(model)
    for part in parts:
        learnt = learnt.add(part)
    model.learnt = learnt
