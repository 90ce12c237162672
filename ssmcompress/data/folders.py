"""Images in folders: one folder per class, or files without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..progress import note
from .images import Images, decode
from .labels import SYNSET, class_index, is_number, known_classes, some_names
from .listing import Listing, top_of
from .masks import MaskRules


def read_folder(listing: Listing, name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the images of a folder, labelled by class folder if there are any; InputError if they cannot be used.

    A class is a folder directly in it, with images at any depth, as in torchvision's ImageFolder.

    Args:
        masks: for models that need masks; the images are then unlabelled, whatever folders they are in.
    """
    if masks is not None:
        if any(map(top_of, listing.images)):
            note(f"{name}: folders are not read as classes, the model needs masks; the images count as unlabelled")
        return _from_files(listing.root, name, listing.images, shown=True)
    tops = Counter(map(top_of, listing.images))
    flat = tops.pop("", 0)
    if flat and tops:
        raise InputError(f"{name} holds both images and class folders ({next(iter(tops))}); name one of the two")
    if flat:
        return _from_files(listing.root, name, listing.images)
    labels, classes = label_by_folder(listing, listing.images, name, num_classes)
    return _from_files(listing.root, name, listing.images, labels, classes)


def label_by_folder(
    listing: Listing, items: Sequence[str], name: str, num_classes: int, what: str = "images"
) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Return the class of each item by its top-level folder, and the names of the classes.

    Args:
        items: paths relative to the listed folder, each within a folder. what: kind of the items, for notes.

    Raises:
        InputError: the folders are not the classes of the head.
    """
    tops = list(dict.fromkeys(map(top_of, items)))
    empty = [folder for folder in listing.folders if folder not in tops]
    inside = _folders_inside(items)
    if len(tops) + sum(map(is_number, empty)) != num_classes:
        _check_numbers(listing.root, name, inside)
    index, notes = class_index(tops, num_classes, name, empty, _hint(listing.root, inside, num_classes))
    deeper = [item for item in items if item.count("/") > 1]
    if deeper:
        top = top_of(deeper[0])
        notes.append(f"{what} in nested folders count for their class folder: {len(deeper)} ({deeper[0]} is {top})")
    for text in notes:
        note(f"{name}: {text}")
    return tuple(index[top_of(item)] for item in items), known_classes(index, num_classes)


def _folders_inside(items: Sequence[str]) -> dict[str, set[str]]:
    """Return class folder -> its subfolders that contain images or videos, "" for items directly in it."""
    inside: dict[str, set[str]] = {}
    for item in items:
        top, _, rest = item.partition("/")
        inside.setdefault(top, set()).add(top_of(rest))
    return inside


def _check_numbers(root: Path, name: str, inside: dict[str, set[str]]) -> None:
    """Raise InputError if numbered folders contain class folders, like the severities of ImageNet-C.

    Class folders are synsets, or two or more names that are the same in each of several numbered folders.
    """
    names = set().union(*inside.values())
    same = len(names) > 1 < len(inside) and all(folders == names for folders in inside.values())
    if all(map(is_number, inside)) and "" not in names and (same or all(map(SYNSET.fullmatch, names))):
        first = next(iter(inside))
        raise InputError(
            f"{name}: the folders with numbers ({some_names(list(inside))}) hold class folders "
            f"({some_names(sorted(inside[first]))}), and are not classes themselves; did you mean {root / first}?"
        )


def _hint(root: Path, inside: dict[str, set[str]], num_classes: int) -> str:
    """Return advice for a folder whose class folders are not the head's classes."""
    # A folder with as many subfolders as classes, alone or unlike the folders next to it.
    fitting = [top for top, folders in inside.items() if "" not in folders and len(folders) == num_classes > 1]
    if len(fitting) != 1 and all(map(is_number, inside)):
        return (
            f"; if these are some of its classes, add empty folders for the others, so that there are 0 to "
            f"{num_classes - 1}, or 1 to {num_classes}"
        )
    if len(inside) == 1 or len(fitting) == 1:
        return f"; did you mean {root / (fitting or list(inside))[0]}?"
    return ""


def _from_files(
    root: Path,
    name: str,
    files: Sequence[str],
    labels: tuple[int, ...] | None = None,
    classes: tuple[str, ...] | None = None,
    *,
    shown: bool = False,
) -> Images:
    path = file_paths(root, files)
    return Images(
        name, len(files), lambda i: decode(path(i), shown=shown), lambda i: str(path(i)), labels, classes=classes
    )


def file_paths(root: Path, files: Sequence[str]) -> Callable[[int], Path]:
    """Return a function from an index to the path of that file; `files` are relative to `root`."""
    # One array of bytes: a million names take 40 MB instead of 400, and it is shared with worker processes.
    names = np.array([os.fsencode(file) for file in files])
    return lambda i: root / os.fsdecode(bytes(names[i]))
