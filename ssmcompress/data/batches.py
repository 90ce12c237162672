"""Batches of images as a model takes them: prepared from pictures, or whatever else a caller has."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import processes
from ..errors import InputError
from .images import Images


@dataclass(frozen=True)
class Batch:
    """Images (batch, channels, height, width); labels (batch,) or None; where each stood in its source."""

    images: Tensor
    labels: Tensor | None
    index: list[int]


@dataclass(eq=False)
class Batches:
    """Prepared images of a source, in batches that can be iterated again and again.

    Unreadable images are left out. An iteration fills `unreadable` with their indices and `digests` with the hashes of
    the others, by which the same image is recognised elsewhere.

    Attributes:
        source: the pictures. transform: picture -> (channels, height, width), of a model: `TokenModel.transform()`.
        index: which of the pictures, in order; None: all of them.
        batch_size: images in a batch, fewer in the last one. workers: processes that decode them; 0: this one does.
    """

    source: Images
    transform: Callable[[Any], Tensor]
    index: Sequence[int] | None = None
    batch_size: int = 64
    workers: int = 0
    unreadable: set[int] = field(default_factory=set)
    digests: set[bytes] = field(default_factory=set)

    def __post_init__(self):
        if self.index is None:
            self.index = range(len(self.source))

    def unreadable_names(self) -> list[str]:
        """What could not be read, as a person would name it."""
        return [self.source.describe(i) for i in sorted(self.unreadable)]

    def sync(self) -> None:
        """Merge the unreadable images and the digests of all processes, after each has iterated over its own images."""
        found = processes.all_gather((self.unreadable, self.digests))
        self.unreadable = set().union(*(unreadable for unreadable, _ in found))
        self.digests = set().union(*(digests for _, digests in found))

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        i = self.index[row]
        try:
            return i, self.transform(self.source.read(i))
        except (OSError, ValueError):
            return i, None

    def __iter__(self) -> Iterator[Batch]:
        rows = [range(k, min(k + self.batch_size, len(self.index))) for k in range(0, len(self.index), self.batch_size)]
        # Readers are closures, which only forked workers can take over; forking is not safe elsewhere.
        fork = "fork" if self.workers and sys.platform == "linux" else None
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=rows,
            num_workers=self.workers if fork else 0,
            collate_fn=list,
            multiprocessing_context=fork,
        )
        empty = True
        for items in loader:
            self.unreadable.update(i for i, image in items if image is None)
            items = [(i, image) for i, image in items if image is not None]
            if not items:
                continue
            empty = False
            index = [i for i, _ in items]
            labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i in index])
            self.digests.update(digest(image) for _, image in items)
            yield Batch(torch.stack([image for _, image in items]), labels, index)
        if empty and self.index:
            raise InputError(f"none of the {len(self.index)} images of {self.source.name} can be read")


def digest(image: Tensor) -> bytes:
    """A hash by which the same prepared image is known in another place."""
    return hashlib.sha1(image.cpu().numpy().tobytes()).digest()


def sample_indices(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Sample `count` of `size` indices without replacement; returns (those, the others), both in rising order."""
    order = np.random.default_rng(seed).permutation(size).tolist()
    return sorted(order[:count]), sorted(order[count:])


class Labelled(NamedTuple):
    """Prepared images (batch, channels, height, width), and their labels (batch,) or None."""

    images: Tensor
    labels: Tensor | None


class AnyBatches:
    """What a caller has, as Labelled batches that can be iterated again and again.

    Args:
        data: a tensor of images; or batches, each a tensor, an (images, labels) pair or a `Batch`.
    """

    def __init__(self, data: Any):
        if isinstance(data, Tensor):
            data = data.split(64)
        self.data = data if isinstance(data, Batches) or _is_sized(data) else list(data)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Labelled]:
        for batch in self.data:
            if isinstance(batch, Tensor):
                yield Labelled(batch, None)
            elif isinstance(batch, Batch):
                yield Labelled(batch.images, batch.labels)
            else:
                yield Labelled(batch[0], batch[1])


def in_chunks(batches: Iterable[Labelled], size: int) -> Iterator[Tensor]:
    """The images of `batches` in chunks of `size`, the last one smaller.

    What is computed in chunks is the same to the last bit for any batch size: matrix products round by their shape.
    """
    waiting: list[Tensor] = []
    for images, _ in batches:
        if waiting and waiting[0].shape != images.shape[1:]:
            raise InputError(f"images {tuple(waiting[0].shape)} and {tuple(images.shape[1:])}: expected one size")
        waiting.extend(images)
        while len(waiting) >= size:
            yield torch.stack(waiting[:size])
            del waiting[:size]
    if waiting:
        yield torch.stack(waiting)


def _is_sized(data: Any) -> bool:
    try:
        len(data)
    except TypeError:  # an iterator, or a loader over a stream
        return False
    return True
