"""Batches of model inputs, prepared from images."""

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
from .content import digest_picture
from .images import Images

# Index in the source, prepared image (None: unreadable), digest of its pixels.
Item = tuple[int, Tensor | None, int]


@dataclass(frozen=True)
class Batch:
    """Images (batch, channels, height, width), labels (batch,) or None, and the index of each image in its source."""

    images: Tensor
    labels: Tensor | None
    index: list[int]


@dataclass(eq=False)
class Batches:
    """Prepared images of a source, in batches that can be iterated repeatedly.

    Unreadable images are skipped. An iteration fills `unreadable` with their indices and `digests` with digests of the
    others (`ssmcompress.data.content`), by which the same image is recognised in other data.

    Attributes:
        source: the images. transform: function from a PIL image to (channels, height, width): `TokenModel.transform()`.
        index: indices of the images to use, in order; None: all of them.
        batch_size: images in a batch, fewer in the last one.
        workers: number of processes that decode images; 0: this process decodes them.
        pictures: whether the source gives pictures, not prepared images, whose digests are others.
        unreadable: indices of the images that could not be read so far.
        digests: (images of the source,) uint64, 0 for images that were not read so far.
    """

    source: Images
    transform: Callable[[Any], Tensor] = field(repr=False)
    index: Sequence[int] | None = field(default=None, repr=False)
    batch_size: int = 64
    workers: int = 0
    pictures: bool = True
    unreadable: set[int] = field(default_factory=set, repr=False)
    digests: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        if self.index is None:
            self.index = range(len(self.source))
        self.digests = np.zeros(len(self.source), np.uint64)

    def unreadable_names(self) -> list[str]:
        """Return readable names of the images that could not be read."""
        return [self.source.describe(i) for i in sorted(self.unreadable)]

    def sync(self) -> None:
        """Merge the unreadable images and the digests of all processes, after each has iterated over its own images."""
        gathered = processes.all_gather((self.unreadable, self.digests))
        self.unreadable = set().union(*(unreadable for unreadable, _ in gathered))
        self.digests = np.maximum.reduce([digests for _, digests in gathered])

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def all_indices(self) -> list[int]:
        """Return the indices of all processes, each once, in ascending order; every process makes this call."""
        return sorted(set().union(*processes.all_gather(list(self.index))))

    def read_rest(self) -> None:
        """Read the images that no iteration has read, of all processes, for their digests, and merge these."""
        self.sync()
        missing = [i for i in self.all_indices() if not self.digests[i] and i not in self.unreadable]
        rest = processes.shard(missing)
        self._note(Batches(self.source, skip_picture, rest, self.batch_size, self.workers)._read())
        self.sync()

    def _note(self, batches: Iterable[list[Item]]) -> None:
        for items in batches:
            for i, image, content in items:
                if image is None:
                    self.unreadable.add(i)
                else:
                    self.digests[i] = content

    def __getitem__(self, row: int) -> Item:
        i = self.index[row]
        try:
            picture = self.source.read(i)
            return i, self.transform(picture), int(self.digests[i]) or digest_picture(picture)
        except (OSError, ValueError):
            return i, None, 0

    def _read(self) -> Iterator[list[Item]]:
        rows = [range(k, min(k + self.batch_size, len(self.index))) for k in range(0, len(self.index), self.batch_size)]
        return iter(make_loader(self, rows, self.workers))

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for items in self._read():
            self._note([items])
            items = [(i, image) for i, image, _ in items if image is not None]
            if not items:
                continue
            empty = False
            index = [i for i, _ in items]
            labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i in index])
            yield Batch(torch.stack([image for _, image in items]), labels, index)
        if empty and self.index:
            raise InputError(f"none of the {len(self.index)} images of {self.source.name} can be read")


def skip_picture(picture: Any) -> Tensor:
    """A transform for `Batches` that are read for their digests alone: it returns an empty tensor."""
    return torch.empty(0)


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
    """Return a hash that identifies the same prepared image in other batches."""
    return hashlib.sha1(image.cpu().numpy().tobytes()).digest()


def sample_indices(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Sample `count` of `size` indices without replacement; returns (sampled, others), both in ascending order."""
    order = np.random.default_rng(seed).permutation(size).tolist()
    return sorted(order[:count]), sorted(order[count:])


class LabelledBatch(NamedTuple):
    """Prepared images (batch, channels, height, width), and their labels (batch,) or None."""

    images: Tensor
    labels: Tensor | None
