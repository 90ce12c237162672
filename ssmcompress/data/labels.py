"""Labels of images: mapping names to the classes of a model's head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .images import Images

SYNSET = re.compile(r"n\d{8}", re.ASCII)


def class_index(
    names: Sequence[str], num_classes: int, where: str, empty: Sequence[str] = (), hint: str = ""
) -> tuple[dict[str, int], list[str]]:
    """Return class name -> class index, and notes on ambiguities.

    Synset ids are ImageNet's classes if the head has 1,000. Integers are class indices: 0 to K-1 or 1 to K for K
    classes, or some numbers below K. Other names are sorted as text, as in torchvision's ImageFolder.

    Args:
        names: classes that have images. where: the name of the data, for messages.
        empty: names without images; used only if the classes match the head with them.
        hint: text appended to the message if the classes do not match the head.

    Raises:
        InputError: the classes do not match the head, or two names are the same number.
    """
    if num_classes == 1000 and any(map(SYNSET.fullmatch, names)):
        return _by_synset(names, where), _without_images(empty)
    # Next to numbered folders, only numbered ones can be classes.
    every = [*names, *(name for name in empty if is_number(name) or not all(map(is_number, names)))]
    chosen = next((some for some in (names, every) if len(some) == num_classes), None)
    notes = _without_images(empty)
    if chosen is every and len(every) > len(names):
        added = every[len(names) :]
        notes = _without_images([name for name in empty if name not in added])
        notes.append(f"classes, though they have no images: {some_names(added)}; without them, there are too few")
    if all(map(is_number, chosen or names)):
        # A number without images could be a class, in which case all later classes would shift.
        unsure = chosen is names and any(map(is_number, empty))
        index, lines = _by_number(names if chosen is None else chosen, num_classes, where, unsure)
        if index:
            return index, notes + lines
        chosen = None
    if chosen is None:
        without = f" with images and {len(empty)} without" if empty else ""
        raise InputError(
            f"{where} has {len(names)} class{'es' if len(names) != 1 else ''}{without} ({some_names(names)}), the "
            f"model has {num_classes} classes; its images cannot be scored{hint}"
        )
    ordered = sorted(chosen)
    natural = sorted(chosen, key=natural_key)
    if ordered != natural:
        i = next(i for i, pair in enumerate(zip(ordered, natural, strict=True)) if pair[0] != pair[1])
        notes.append(
            f"classes are sorted as text, as torchvision's ImageFolder sorts them: class {i} is {ordered[i]}; "
            f"timm's order has {natural[i]} there"
        )
    return {name: i for i, name in enumerate(ordered)}, notes


def _by_synset(names: Sequence[str], where: str) -> dict[str, int]:
    from timm.data import ImageNetInfo

    synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    unknown = [name for name in names if name not in synsets]
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown[:3])} is not one of ImageNet-1k's synsets")
    return {name: synsets[name] for name in names}


def _by_number(names: Sequence[str], num_classes: int, where: str, unsure: bool) -> tuple[dict[str, int], list[str]]:
    """Return number -> class index, and notes; ({}, []) if the numbers do not match the head's classes."""
    ordered = sorted(names, key=int)
    numbers = [int(name) for name in ordered]
    for i in range(1, len(ordered)):
        if numbers[i] == numbers[i - 1]:
            raise InputError(f"{where}: {ordered[i - 1]} and {ordered[i]} are the same number; rename one of them")
    first, last, complete = numbers[0], numbers[-1], len(numbers) == num_classes
    # 0 to 9 for a head of 1,000 are the classes of other data; 3, 17 and 998 are some of its classes. If most
    # numbers occur, but not 0, they could be 1 to K with some missing: then each would be off by one.
    unclear = (first <= 1 and last - first + 1 == len(numbers)) or (first > 0 and 2 * len(numbers) > num_classes)
    if last < num_classes and (complete or not unclear):
        index = dict(zip(ordered, numbers, strict=True))
        notes = []
        if not complete:
            others = num_classes - len(numbers)
            what = (
                f"numbers {some_names(ordered)} are classes" if len(ordered) > 1 else f"number {ordered[0]} is a class"
            )
            notes = [f"the {what} of the model, counted from 0; {others} others have no images"]
    elif complete and not unsure:
        index = {name: i for i, name in enumerate(ordered)}
        notes = [f"classes are in the order of the numbers: {ordered[0]} is class 0, {ordered[-1]} the last one"]
    else:
        return {}, []
    text = sorted(ordered)
    moved = [name for name, other in zip(ordered, text, strict=True) if name != other]
    if moved:
        notes.append(
            f"numbers are classes by their value: {moved[0]} is class {index[moved[0]]}; sorted as text, as in "
            f"torchvision's ImageFolder, {len(moved)} of {len(names)} would be other classes"
        )
    return index, notes


def _without_images(empty: Sequence[str]) -> list[str]:
    if not empty:
        return []
    folders = f"{len(empty)} folder{'s' if len(empty) > 1 else ''}"
    return [f"no classes, because they have no images: {folders} ({some_names(empty)})"]


def some_names(names: Sequence[str]) -> str:
    """Return the first three names as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def is_number(name: str) -> bool:
    """Return whether a class name is an integer."""
    return name.isascii() and name.isdecimal() and len(name) <= 18


def natural_key(name: str) -> list[Any]:
    """Return a sort key that compares digits as numbers and ignores case, as in timm's reader."""
    parts = re.split(r"(\d+)", name.lower())  # text at even indices, digits at odd ones
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)]


def check_labels(values: Sequence[Any], name: str, num_classes: int) -> tuple[int, ...] | None:
    """Return the labels, or None if all are missing; InputError for a label that is not a class of the head."""
    values = list(values)
    if all(v is None or v == -1 for v in values):  # the usual form of unlabelled test splits
        return None
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
            one_based = all(type(v) is int and 1 <= v <= num_classes for v in values)
            hint = "; labels start at 1 here, so subtract 1 from each" if one_based else ""
            raise InputError(f"{name}, row {row}: label {value!r}; expected classes 0 to {num_classes - 1}{hint}")
    return tuple(values)


def text_labels(
    values: Sequence[str | None], name: str, num_classes: int
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None, list[str]]:
    """Return labels, class names and notes for text labels: numbers or names of classes."""
    if all(not v for v in values):
        return None, None, []
    missing = next((row for row, v in enumerate(values) if not v), None)
    if missing is not None:
        raise InputError(f"{name}, row {missing}: no label, but other rows have one")
    names = sorted(set(values))
    if all(map(is_number, names)):
        return check_labels([int(v) for v in values], name, num_classes), None, []
    if len(names) != num_classes and not any(map(SYNSET.fullmatch, names)):
        raise InputError(
            f"{name}, row 0: label {values[0]!r}; expected classes 0 to {num_classes - 1}, or text for each of the "
            f"{num_classes} classes, and found {len(names)} ({some_names(names)})"
        )
    index, notes = class_index(names, num_classes, name)
    first, last = min(index, key=index.get), max(index, key=index.get)
    notes = [f"labels are text: {first} is class {index[first]}, ..., {last} is class {index[last]}", *notes]
    return tuple(index[v] for v in values), known_classes(index, num_classes), notes


def known_classes(index: dict[str, int], num_classes: int) -> tuple[str, ...] | None:
    """Return the names of the head's classes in order, None if some have none."""
    return tuple(sorted(index, key=index.get)) if len(index) == num_classes else None


def class_names(images: Images, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of a head's classes: the data's, or ImageNet-1k's for 1,000 that are synsets or numbers."""
    names = images.classes
    if num_classes != 1000 or (names and not all(map(SYNSET.fullmatch, names)) and not all(map(is_number, names))):
        return names
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(num_classes))
