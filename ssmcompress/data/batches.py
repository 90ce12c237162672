"""Batches of model inputs, prepared from images."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import processes
from ..errors import InputError
from ..progress import note
from .clips import Views
from .content import digest_mask, digest_picture
from .images import Images
from .masks import describe_sizes
from .workers import make_loader


class Item(NamedTuple):
    """An image that has been read.

    Attributes:
        index: its index in the source. image: prepared; None: unreadable. digest: of its pixels.
        mask: class numbers (height, width), if the source has masks, with their digest.
        error: error message for the mask, since a worker process cannot raise a one-line error.
        remark: a note about the image, shown once for all images with the same note.
        reason: why the image is unreadable.
    """

    index: int
    image: Tensor | None
    digest: int
    mask: Tensor | None = None
    mask_digest: int = 0
    error: str | None = None
    remark: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Batch:
    """Images, their labels, and their places in the source.

    Attributes:
        images: (batch, channels, height, width), with frames after the channels of videos.
        labels: (batch,), or masks (batch, mask height, mask width) uint8, or None.
        index: the index of each image in its source.
    """

    images: Tensor
    labels: Tensor | None
    index: list[int]


@dataclass(eq=False)
class Batches:
    """Prepared images of a source, in batches that can be iterated repeatedly.

    Unreadable images are skipped. An iteration fills `unreadable` with their indices, and `digests` with digests of the
    others (`ssmcompress.data.content`), which identify the same image in other data.

    If the source has masks, prepared images and masks may differ in size. Consecutive images with equal image and mask
    sizes share a batch, so there may be more than `len()` batches. A mask that cannot be used raises an InputError; it
    is never skipped.

    Attributes:
        source: the images. transform: function from a PIL image to (channels, height, width): `TokenModel.transform()`.
            Its optional method `pair` prepares an image and its mask; without it, masks are unchanged.
            Its optional method `remark` returns a note about a picture, or None.
        index: indices of the images to use, in order; None: all of them.
        batch_size: the last batch may be smaller.
        workers: number of processes that decode images; 0: this process decodes them.
        pictures: whether the source returns pictures, not prepared images, which have other digests.
        labelled: whether masks are read, if the source has any.
        unreadable: indices of the images that could not be read so far.
        digests: (images of the source,) uint64, 0 for images not read so far. mask_digests: the same for the masks.
    """

    source: Images
    transform: Callable[[Any], Tensor] = field(repr=False)
    index: Sequence[int] | None = field(default=None, repr=False)
    batch_size: int = 64
    workers: int = 0
    pictures: bool = True
    unreadable: set[int] = field(default_factory=set, repr=False)
    digests: np.ndarray = field(init=False, repr=False)
    mask_digests: np.ndarray = field(init=False, repr=False)
    labelled: bool = True

    def __post_init__(self):
        if self.index is None:
            self.index = range(len(self.source))
        self.digests = np.zeros(len(self.source), np.uint64)
        self.mask_digests = np.zeros(len(self.source), np.uint64)

    @property
    def views(self) -> Views | None:
        """The views of each video, in the dimension before the channels of prepared images; None: a single one."""
        return getattr(self.transform, "views", None)

    @property
    def reads_masks(self) -> bool:
        """Whether an iteration reads masks."""
        return self.labelled and self.source.masks is not None

    def content_labels(self) -> Sequence[int] | np.ndarray | None:
        """Return what represents the labels in a content hash: labels, digests of masks, or None.

        Digests are 0 for masks that have not been read.
        """
        return self.mask_digests if self.source.masks is not None else self.source.labels

    def unreadable_names(self) -> list[str]:
        """Return readable names of the images that could not be read."""
        return [self.source.describe(i) for i in sorted(self.unreadable)]

    def sync(self) -> None:
        """Merge the unreadable images and digests of all processes, after each has iterated over its shard."""
        gathered = processes.all_gather((self.unreadable, self.digests, self.mask_digests))
        unreadable, digests, masks = zip(*gathered, strict=True)
        self.unreadable = set().union(*unreadable)
        self.digests, self.mask_digests = np.maximum.reduce(digests), np.maximum.reduce(masks)

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def all_indices(self) -> list[int]:
        """Return the indices of all processes in ascending order without duplicates; all processes must call this."""
        return sorted(set().union(*processes.all_gather(list(self.index))))

    def read_rest(self) -> None:
        """Read the images of all processes that no iteration has read, for their digests, and merge these."""
        self.sync()
        missing = [i for i in self.all_indices() if not self.digests[i] and i not in self.unreadable]
        rest = processes.shard(missing)
        others = Batches(self.source, skip_picture, rest, self.batch_size, self.workers, labelled=self.labelled)
        for items in others._read():
            self._note(items)
        self.sync()

    def _note(self, items: Iterable[Item]) -> None:
        for item in items:
            if item.error is not None:
                raise InputError(item.error)
            if item.remark is not None:
                note(f"{self.source.name}: {item.remark}")
            if item.image is None:
                self.unreadable.add(item.index)
                continue
            self.digests[item.index] = item.digest
            if item.mask is not None:
                self.mask_digests[item.index] = item.mask_digest

    def __getitem__(self, row: int) -> Item:
        i = self.index[row]
        try:
            picture = self.source.read(i)
            digest = int(self.digests[i]) or digest_picture(picture)
            if not self.reads_masks:
                remark = getattr(self.transform, "remark", None)
                return Item(i, self.transform(picture), digest, remark=remark and remark(picture))
        except (OSError, ValueError) as error:
            return Item(i, None, 0, reason=str(error))
        try:
            mask = self.source.masks(i)
            size = (picture.height, picture.width) if self.pictures else mask.shape
            if mask.shape != size:
                raise InputError(f"{self.source.describe(i)}, its mask: {describe_sizes(mask.shape, size)}")
        except InputError as error:
            return Item(i, None, 0, error=str(error))
        try:
            pair = getattr(self.transform, "pair", None)
            image, target = (self.transform(picture), torch.from_numpy(mask)) if pair is None else pair(picture, mask)
        except (OSError, ValueError) as error:
            return Item(i, None, 0, reason=str(error))
        return Item(i, image, digest, target, int(self.mask_digests[i]) or digest_mask(mask))

    def _read(self) -> Iterator[list[Item]]:
        rows = [range(k, min(k + self.batch_size, len(self.index))) for k in range(0, len(self.index), self.batch_size)]
        return iter(make_loader(self, rows, self.workers))

    def _readable(self) -> Iterator[list[Item]]:
        """Yield the readable images of each batch; InputError if none of all images is readable."""
        empty, reason = True, None
        for items in self._read():
            self._note(items)
            reason = reason or next((item.reason for item in items if item.reason), None)
            items = [item for item in items if item.image is not None]
            empty = empty and not items
            yield items
        if empty and self.index:
            shown = f" (first one: {reason[:200]})" if reason else ""
            raise InputError(f"none of the {len(self.index)} images of {self.source.name} can be read{shown}")

    def __iter__(self) -> Iterator[Batch]:
        chunks = self._readable()
        if self.reads_masks:
            chunks = iter([itertools.chain.from_iterable(chunks)])
        for chunk in chunks:
            for items in self._same_shapes(chunk):
                index = [item.index for item in items]
                if self.reads_masks:
                    labels = torch.stack([item.mask for item in items])
                else:
                    labels = (
                        None if self.source.labels is None else torch.tensor([self.source.labels[i] for i in index])
                    )
                yield Batch(torch.stack([item.image for item in items]), labels, index)

    def _same_shapes(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """Yield consecutive images with equal shapes, at most `batch_size`."""
        shapes = itertools.groupby(items, lambda item: (item.image.shape, item.mask is not None and item.mask.shape))
        for _, group in shapes:
            while part := list(itertools.islice(group, self.batch_size)):
                yield part


def skip_picture(picture: Any) -> Tensor:
    """A transform for `Batches` that are read only for their digests: it returns an empty tensor."""
    return torch.empty(0)


def digest(image: Tensor) -> bytes:
    """Return a hash that identifies the same prepared image in other batches."""
    return hashlib.sha1(image.cpu().numpy().tobytes()).digest()


def sample_indices(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Sample `count` of `size` indices without replacement; return (sampled, others), both in ascending order."""
    order = np.random.default_rng(seed).permutation(size).tolist()
    return sorted(order[:count]), sorted(order[count:])


class LabelledBatch(NamedTuple):
    """Prepared images (batch, channels, height, width), and their labels (batch,), masks (batch, ., .) or None."""

    images: Tensor
    labels: Tensor | None
