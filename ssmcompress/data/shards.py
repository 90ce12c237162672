"""Tar shards in webdataset's manner, read in place: where each image lies is noted once, its bytes when asked for.

So shards can be shuffled as a whole, gone on with anywhere and divided among processes, which a stream of them cannot.
Members that belong together have the same name up to the first dot: `train/000017.jpg`, `train/000017.cls`.
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
# Larger texts are no labels.
LABEL_BYTES = 1 << 16


@dataclass(frozen=True)
class ShardIndex:
    """Places of images in uncompressed tar files: 20 bytes for each.

    Attributes:
        files: the shards. shard, offset, size: (images,) which of them, where in it, and how many bytes.
        labels: (images,) classes, -1 for images without one; None where no image has one.
    """

    files: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, i: int) -> bytes:
        """The encoded image."""
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(int(self.offset[i]))
            return file.read(int(self.size[i]))

    def describe(self, i: int) -> str:
        """How to name that image to a person."""
        return f"{self.files[self.shard[i]]}, at byte {self.offset[i]}"


def read_shards(files: list[Path], name: str, num_classes: int) -> Images:
    index = read_index(files)
    if not len(index):
        raise InputError(f"{name} holds no images: expected members like 000017.jpg, and 000017.cls with the class")
    labels = None
    if index.labels is not None:
        labels = check_labels(index.labels.tolist(), name, num_classes)
    return Images(name, len(index), lambda i: decode(index.read(i)), index.describe, labels)


def read_index(files: Sequence[Path]) -> ShardIndex:
    """Note where the images of shards are.

    Raises:
        InputError: a shard that is damaged or compressed, or has a label that is no whole number.
    """
    places = {"shard": array("i"), "offset": array("q"), "size": array("q"), "labels": array("q")}
    for number, path in enumerate(track(files, "looking through shards", len(files))):
        try:
            with tarfile.open(path, "r:") as tar:
                _add(tar, path, number, places)
        except (tarfile.TarError, EOFError) as error:
            why = f"{path}: not a whole uncompressed tar file ({error})"
            raise InputError(f"{why}; a compressed one cannot be read in place: unpack it") from error
    found = {name: np.frombuffer(values, dtype=values.typecode) for name, values in places.items() if len(values)}
    if not found:
        empty = np.zeros(0, np.int64)
        return ShardIndex(tuple(files), empty, empty, empty, None)
    labels = found.pop("labels")
    return ShardIndex(tuple(files), **found, labels=labels if (labels >= 0).any() else None)


def _add(tar: tarfile.TarFile, path: Path, number: int, places: dict[str, array]) -> None:
    """The images of a shard. A label may come before its image or after it, but next to it."""
    key, image, label, end = None, None, -1, 0

    def finish() -> None:
        if image is not None:
            for name, value in zip(places, (number, *image, label), strict=True):
                places[name].append(value)

    for member in tar:
        tar.members = []  # type: ignore[assignment]  # or it would remember every one of a million
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
            label = _label(tar.extractfile(member).read(), suffix, f"{path}, {member.name}", label)
    finish()
    if end > path.stat().st_size:
        raise tarfile.ReadError("its last member is cut off")


def _label(content: bytes, suffix: str, where: str, known: int) -> int:
    """The class in a .cls or a .json member; what a .json says nothing about stays as it was."""
    try:
        value = json.loads(content)
        if suffix == "json":
            value = next((value[k] for k in ("label", "cls") if isinstance(value, dict) and k in value), known)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number, found {str(value)[:20]!r}")
        if not -1 <= value < 2**31:
            raise ValueError(f"{value} is no class")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no label ({error})") from error
    return value
