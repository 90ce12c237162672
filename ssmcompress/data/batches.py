"""Batches of model inputs, prepared from images or passed by a caller."""

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
    """Images (batch, channels, height, width), labels (batch,) or None, and the index of each image in its source."""

    images: Tensor
    labels: Tensor | None
    index: list[int]


@dataclass(eq=False)
class Batches:
    """Prepared images of a source, in batches that can be iterated repeatedly.

    Unreadable images are skipped. An iteration fills `unreadable` with their indices and `digests` with the hashes of
    the others, by which the same image is recognised in other data.

    Attributes:
        source: the images. transform: function from a PIL image to (channels, height, width): `TokenModel.transform()`.
        index: indices of the images to use, in order; None: all of them.
        batch_size: images in a batch, fewer in the last one.
        workers: number of processes that decode images; 0: this process decodes them.
        unreadable, digests: what the iterations so far have collected.
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
        """Return readable names of the images that could not be read."""
        return [self.source.describe(i) for i in sorted(self.unreadable)]

    def sync(self) -> None:
        """Merge the unreadable images and the digests of all processes, after each has iterated over its own images."""
        gathered = processes.all_gather((self.unreadable, self.digests))
        self.unreadable = set().union(*(unreadable for unreadable, _ in gathered))
        self.digests = set().union(*(digests for _, digests in gathered))

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
        empty = True
        for items in make_loader(self, rows, self.workers):
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


def make_loader(
    dataset: Any, rows: Sequence[Sequence[Any]], workers: int, worker_init: Callable[[int], None] | None = None
) -> torch.utils.data.DataLoader:
    """A loader that gives the items of `dataset` at each of `rows`, read in `workers` processes (0: in this one).

    It does not draw from the global random generator.
    """
    # Readers are closures, which only forked workers can inherit; forking is unsafe on other systems than Linux.
    fork = "fork" if workers and sys.platform == "linux" else None
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=rows,
        num_workers=workers if fork else 0,
        collate_fn=list,
        multiprocessing_context=fork,
        worker_init_fn=worker_init,
        generator=torch.Generator(),
    )


def digest(image: Tensor) -> bytes:
    """Return a hash that identifies the same prepared image in other data."""
    return hashlib.sha1(image.cpu().numpy().tobytes()).digest()


def sample_indices(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Sample `count` of `size` indices without replacement; returns (sampled, others), both in ascending order."""
    order = np.random.default_rng(seed).permutation(size).tolist()
    return sorted(order[:count]), sorted(order[count:])


class LabelledBatch(NamedTuple):
    """Prepared images (batch, channels, height, width), and their labels (batch,) or None."""

    images: Tensor
    labels: Tensor | None


class AnyBatches:
    """Wraps the data that a caller passed as LabelledBatch items that can be iterated repeatedly.

    Args:
        data: a tensor of images; or batches, each a tensor, an (images, labels) pair or a `Batch`.
    """

    def __init__(self, data: Any):
        if isinstance(data, Tensor):
            data = data.split(64)
        self.data = data if isinstance(data, Batches) or _is_sized(data) else list(data)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[LabelledBatch]:
        for batch in self.data:
            if isinstance(batch, Tensor):
                yield LabelledBatch(batch, None)
            elif isinstance(batch, Batch):
                yield LabelledBatch(batch.images, batch.labels)
            else:
                yield LabelledBatch(batch[0], batch[1])


def in_chunks(batches: Iterable[LabelledBatch], size: int) -> Iterator[Tensor]:
    """Yield the images of `batches` in chunks of `size`; the last may be smaller.

    Results that are computed in chunks are bitwise the same for any batch size: matrix products round by their shape.
    """
    pending: list[Tensor] = []
    for images, _ in batches:
        if pending and pending[0].shape != images.shape[1:]:
            raise InputError(f"images {tuple(pending[0].shape)} and {tuple(images.shape[1:])}: expected one size")
        pending.extend(images)
        while len(pending) >= size:
            yield torch.stack(pending[:size])
            del pending[:size]
    if pending:
        yield torch.stack(pending)


def _is_sized(data: Any) -> bool:
    try:
        len(data)
    except TypeError:  # an iterator, or a loader of a stream
        return False
    return True
