"""Tar shards in webdataset's format, read in place: they are indexed once, and each image is read on demand.

Unlike a stream of shards, the index can be shuffled as a whole, resumed at any image and divided among processes. The
members of one sample have the same name up to the first dot: `train/000017.jpg`, `train/000017.cls`.
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..progress import track
from .images import Images, decode
from .labels import check_labels

IMAGE_MEMBERS = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif"}
# Members larger than this are not read as labels.
LABEL_BYTES = 1 << 16


@dataclass(frozen=True)
class ShardIndex:
    """Positions of images in uncompressed tar files; it takes 20 bytes for each image.

    Attributes:
        files: the shards. shard, offset, size: (images,) index into `files`, offset and length in bytes.
        labels: (images,) classes, -1 for images without one; None if no image has one.
    """

    files: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, i: int) -> bytes:
        """Return the encoded image `i`."""
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(int(self.offset[i]))
            return file.read(int(self.size[i]))

    def describe(self, i: int) -> str:
        """Return a name of the image `i` for messages."""
        return f"{self.files[self.shard[i]]}, at byte {self.offset[i]}"


def read_shards(files: list[Path], name: str, num_classes: int) -> Images:
    """Return the images of tar shards; InputError if there are none, or their labels are not the head's."""
    index = read_index(files)
    if not len(index):
        raise InputError(f"{name} holds no images: expected members like 000017.jpg, and 000017.cls with the class")
    labels = None
    if index.labels is not None:
        labels = check_labels(index.labels.tolist(), name, num_classes)
    return Images(name, len(index), lambda i: decode(index.read(i)), index.describe, labels)


def read_index(files: Sequence[Path]) -> ShardIndex:
    """Index the images of shards.

    Raises:
        InputError: a shard is damaged or compressed, or has a label that is not a whole number.
    """
    columns = {"shard": array("i"), "offset": array("q"), "size": array("q"), "labels": array("q")}
    for number, path in enumerate(track(files, "looking through shards", len(files))):
        try:
            with tarfile.open(path, "r:") as tar:
                _index_shard(tar, path, number, columns)
        except (tarfile.TarError, EOFError) as error:
            message = f"{path}: not a whole uncompressed tar file ({error})"
            raise InputError(f"{message}; a compressed one cannot be read in place: unpack it") from error
    arrays = {name: np.frombuffer(values, dtype=values.typecode) for name, values in columns.items() if len(values)}
    if not arrays:
        empty = np.zeros(0, np.int64)
        return ShardIndex(tuple(files), empty, empty, empty, None)
    labels = arrays.pop("labels")
    return ShardIndex(tuple(files), **arrays, labels=labels if (labels >= 0).any() else None)


def _index_shard(tar: tarfile.TarFile, path: Path, number: int, columns: dict[str, array]) -> None:
    """Append the images of a shard to `columns`. A label may precede or follow its image, but must be next to it."""
    key, image, label, end = None, None, -1, 0

    def finish() -> None:
        if image is not None:
            for name, value in zip(columns, (number, *image, label), strict=True):
                columns[name].append(value)

    for member in tar:
        tar.members = []  # type: ignore[assignment]  # tarfile would otherwise keep millions of members
        if not member.isreg():
            continue
        end = member.offset_data + member.size
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if folder + slash + stem != key:
            finish()
            key, image, label = folder + slash + stem, None, -1
        suffix = suffix.lower()
        if suffix in IMAGE_MEMBERS:
            image = member.offset_data, member.size
        elif suffix in ("cls", "json") and member.size <= LABEL_BYTES:
            label = _read_label(tar.extractfile(member).read(), suffix, f"{path}, {member.name}", label)
    finish()
    if end > path.stat().st_size:
        raise tarfile.ReadError("its last member is cut off")


def _read_label(content: bytes, suffix: str, where: str, default: int) -> int:
    """Return the class in a .cls or a .json member, `default` if a .json has none."""
    try:
        value = json.loads(content)
        if suffix == "json":
            value = next((value[k] for k in ("label", "cls") if isinstance(value, dict) and k in value), default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number, found {str(value)[:20]!r}")
        if not -1 <= value < 2**31:
            raise ValueError(f"{value} is no class")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no label ({error})") from error
    return value
