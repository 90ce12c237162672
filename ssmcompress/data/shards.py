"""Tar shards in webdataset's format, read in place: they are indexed once, and each image is read on demand.

Unlike a stream of shards, the index can be shuffled as a whole, resumed at any image and divided among processes. The
members of a sample have the same name up to the first dot, `train/000017.jpg` and `train/000017.cls`, and may be
anywhere in their shard.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..progress import note, track
from .images import Images, decode
from .labels import check_labels
from .listing import IMAGE_SUFFIXES, LeftOut, is_system
from .masks import LABELS_NOT_READ, MaskRules

# Suffixes of labels, decoded as in webdataset: integers as text, or a JSON object with one of these keys.
NUMBERS, JSON_KEYS = ("cls", "class", "label"), ("label", "cls", "class")
# Maximum size of a .json member that is read for its label; a .cls member has a few bytes.
LABEL_BYTES = 1 << 24
# Label of an image without one, and of one whose .json has a label that is not an integer.
NONE, INVALID = -1, -2
# Maximum number of folders counted, for the message that folders are not used as labels.
FOLDERS = 1000


@dataclass(frozen=True)
class ShardIndex:
    """Positions of images in uncompressed tar files; it takes 20 bytes per image, 28 with labels.

    Attributes:
        files: the shards. shard, offset, size: (images,) index into `files`, offset and length in bytes.
        labels: (images,) classes, -1 for images without one; None if no image has one.
        left_out: members that are not read. folders: folders of images, at most `FOLDERS`.
    """

    files: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None
    left_out: LeftOut
    folders: set[str]

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, i: int) -> bytes:
        """Return the encoded image `i`."""
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(int(self.offset[i]))
            return file.read(int(self.size[i]))

    def describe(self, i: int) -> str:
        """Return the name of image `i` for messages."""
        return f"{self.files[self.shard[i]]}, at byte {self.offset[i]}"


def read_shards(files: list[Path], name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the images of tar shards; InputError if there are none, or their labels do not match the head.

    Args:
        masks: for models that need masks, which shards do not have; the images are then unlabelled.
    """
    index = read_index(files)
    if not len(index):
        found = f"; it holds only {index.left_out}" if index.left_out else ""
        raise InputError(
            f"{name} holds no images: expected members like 000017.jpg, and 000017.cls with the class{found}"
        )
    labels = None
    if index.labels is not None and masks is not None:
        note(f"{name}: {LABELS_NOT_READ}")
    elif index.labels is not None:
        missing = np.flatnonzero(index.labels == NONE)
        if len(missing):
            raise InputError(
                f"{name}, row {missing[0]}: label -1; {len(missing)} of {len(index)} images have no .cls member, the "
                f"first in {index.describe(missing[0])}"
            )
        labels = check_labels(index.labels.tolist(), name, num_classes)
    index.left_out.tell(name)
    if labels is None and masks is None and len(index.folders) > 1:
        some = ", ".join(sorted(index.folders)[:3])
        note(f"{name}: the folders of its members ({some}) are not read as classes, so the images count as unlabelled")
    return Images(name, len(index), lambda i: decode(index.read(i), shown=masks is not None), index.describe, labels)


def read_index(files: Sequence[Path]) -> ShardIndex:
    """Index the images of shards.

    Raises:
        InputError: a shard is damaged or compressed, has a label that is not an integer, or several images or labels
            of one sample.
    """
    left_out, folders = LeftOut(), set()
    parts = []
    for number, path in enumerate(track(files, "indexing shards", len(files))):
        members = _Members()
        try:
            with tarfile.open(path, "r:") as tar:
                _scan(tar, path, members, left_out, folders)
        except (tarfile.TarError, EOFError) as error:
            message = f"{path}: not a whole uncompressed tar file ({error})"
            raise InputError(f"{message}; a compressed one cannot be read in place: unpack it") from error
        labels = _join(path, members, left_out)
        parts.append((np.full(len(labels), number, np.int32), np.array(members.offset), np.array(members.size), labels))
    shard, offset, size, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ShardIndex(tuple(files), shard, offset, size, labels if (labels != NONE).any() else None, left_out, folders)


@dataclass
class _Members:
    """The images of a shard, and its labels by kind of member, each with the key of its sample.

    A key is an 8-byte hash: the names of a million samples would take a hundred times as much memory as the positions.
    """

    keys: array = field(default_factory=lambda: array("Q"))
    offset: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("q"))
    labels: dict[str, tuple[array, array]] = field(default_factory=dict)


def _key(sample: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _split_name(name: str) -> tuple[str, str]:
    """Split the name of a member at its first dot into the sample and the suffix, in lower case."""
    folder, slash, own = name.removeprefix("./").rpartition("/")
    stem, _, suffix = own.partition(".")
    return folder + slash + stem, suffix.lower()


def _read_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members that are not folders, including truncated ones.

    Raises:
        ReadError: a header is damaged, or something follows the last member.
    """
    end, name = 0, "the beginning"
    for member in tar:
        tar.members = []  # type: ignore[assignment]  # otherwise tarfile would keep millions of members
        if member.size < 0 or member.offset < end:
            raise tarfile.ReadError(f"{member.name} has a damaged header")
        blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
        end, name = member.offset_data + blocks * tarfile.BLOCKSIZE, member.name
        if not member.isdir():
            yield member
    # tarfile takes a damaged header for the end of the file, and stops after the first of two concatenated files.
    tar.fileobj.seek(end)
    while rest := tar.fileobj.read(1 << 16):
        if rest.count(0) != len(rest):
            raise tarfile.ReadError(f"something other than a member follows {name}")


def _scan(tar: tarfile.TarFile, path: Path, members: _Members, left_out: LeftOut, folders: set[str]) -> None:
    """Collect the images and labels of a shard."""
    end = 0
    for member in _read_members(tar):
        end = max(end, member.offset_data + member.size if member.isreg() else 0)
        sample, suffix = _split_name(member.name)
        is_image = f".{suffix}" in IMAGE_SUFFIXES
        if any(map(is_system, member.name.split("/"))):
            if is_image or member.name.lower().endswith(tuple(IMAGE_SUFFIXES)):
                left_out.add("hidden or system member", member.name)
        elif not member.isreg() or member.issparse():
            left_out.add("link or sparse member", member.name)
        elif is_image:
            members.keys.append(_key(sample))
            members.offset.append(member.offset_data)
            members.size.append(member.size)
            if len(folders) < FOLDERS:
                folders.add(sample.rpartition("/")[0])
        elif suffix in NUMBERS or suffix == "json":
            if member.size > LABEL_BYTES:
                raise InputError(f"{path}, {member.name}: {member.size:,} bytes, too large for a label")
            label = _read_label(tar.extractfile(member).read(), suffix, f"{path}, {member.name}")
            if label is None:
                left_out.add(".json member without label, cls or class", member.name)
            else:
                keys, values = members.labels.setdefault(suffix, (array("Q"), array("q")))
                keys.append(_key(sample))
                values.append(label)
        else:
            known = suffix.replace(".", "").isalpha() and len(suffix) < 12
            left_out.add(f".{suffix} member" if known else "other member", member.name)
    if end > path.stat().st_size:
        raise tarfile.ReadError("its last member is cut off")


def _join(path: Path, members: _Members, left_out: LeftOut) -> np.ndarray:
    """Return the labels of a shard's images (images,), by their keys; .cls members take precedence over .json."""
    keys = np.array(members.keys)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    _check_distinct(path, ordered, [suffix[1:] for suffix in IMAGE_SUFFIXES])
    labels = np.full(len(keys), NONE, np.int64)
    for suffix in sorted(members.labels, key=("json", *NUMBERS[::-1]).index):
        label_keys, values = map(np.array, members.labels[suffix])
        _check_distinct(path, np.sort(label_keys), [suffix])
        at = np.searchsorted(ordered, label_keys)
        found = np.zeros(len(at), bool)
        inside = at < len(ordered)
        found[inside] = ordered[at[inside]] == label_keys[inside]
        if not found.all():
            alone = _names(path, label_keys[~found][0], [suffix])
            left_out.add(f".{suffix} member without an image", alone[0], int((~found).sum()))
        image, new, old = order[at[found]], values[found], labels[order[at[found]]]
        differs = (old >= 0) & (new >= 0) & (old != new)
        if differs.any():
            names = _names(path, label_keys[found][differs][0], ["json", *NUMBERS])
            raise InputError(
                f"{path}: {' and '.join(names[:2])} have different labels; expected the same, or one of them"
            )
        labels[image] = np.where(new == NONE, old, new)
    if (labels == INVALID).any():
        (name, *_) = _names(path, keys[labels == INVALID][0], ["json"])
        raise InputError(f"{path}, {name}: no label (expected a whole number in a .json or .cls member)")
    return labels


def _check_distinct(path: Path, ordered: np.ndarray, suffixes: Sequence[str]) -> None:
    """Raise InputError if a sample has several members with one of `suffixes`."""
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(same):
        names = _names(path, ordered[same[0]], suffixes)
        raise InputError(f"{path}: {' and '.join(names[:2])} belong to the same sample; expected only one of them")


def _names(path: Path, key: int, suffixes: Sequence[str]) -> list[str]:
    """Return the names of a sample's members with one of `suffixes`, which the index does not keep."""
    with tarfile.open(path, "r:") as tar:
        names = (member.name for member in _read_members(tar) if member.isreg())
        return [name for name in names if (parts := _split_name(name))[1] in suffixes and _key(parts[0]) == key]


def _read_label(content: bytes, suffix: str, where: str) -> int | None:
    """Return the class in a label member: None if a .json has none, `INVALID` if it has another value."""
    try:
        if suffix == "json":
            value = json.loads(content)
            value = next((value[k] for k in JSON_KEYS if isinstance(value, dict) and k in value), None)
            if value is None or not isinstance(value, int) or isinstance(value, bool):
                return None if value is None else INVALID
        elif re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", content):  # as parsed by webdataset with int(): 007 is 7
            value = int(content)
        else:
            raise ValueError(f"expected a whole number, found {content[:20].decode(errors='replace')!r}")
        if not -1 <= value < 2**31:
            raise ValueError(f"{value} is not a class")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no label ({error})") from error
    return value
