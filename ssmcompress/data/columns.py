"""Columns of a table: which one contains the images, and which the labels or masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .labels import SYNSET, check_labels, class_index, is_number, known_classes, text_labels

# Names in lower case, without "_", "-" and spaces, the most common ones first.
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "targets", "class", "cls", "category", "y")
# Columns of masks; `label` only if it contains pictures.
MASK_COLUMNS = ("annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask")
NUMBERED = ("", "id", "ids", "idx", "index", "number")


@dataclass
class Labels:
    """The labels of a table.

    Attributes:
        values: a class for each row, or None. classes: the names of the head's classes in order, or None.
        notes: notes on ambiguities.
    """

    values: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def is_text(feature: Any) -> bool:
    """Return whether a column of a table contains text."""
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def image_column(table: Any, name: str) -> tuple[str, list[str]]:
    """Return the column with the images, and notes on other columns with images that are not used.

    Raises:
        InputError: no column has images, or several do and their names do not show which is meant.
    """
    from datasets import Image as ImageFeature

    named = [key for key in table.column_names if _plain(key) in set(map(_plain, IMAGE_COLUMNS))]
    typed = [key for key, feature in table.features.items() if isinstance(feature, ImageFeature)]
    candidates = typed or named
    if not candidates:
        raise InputError(f"{name} has columns {', '.join(table.column_names)}: expected one with images, called image")
    chosen = [key for key in candidates if key in named] or candidates
    if len(chosen) > 1:
        chosen = [key for key in chosen if _plain(key) == "image"]
    if len(chosen) != 1:
        raise InputError(
            f"{name} has several columns of images ({', '.join(candidates)}); rename the one to use to image"
        )
    others = [key for key in candidates if key != chosen[0]]
    return chosen[0], [f"images are the column {chosen[0]}; {', '.join(others)} not used"] if others else []


def mask_column(table: Any, name: str) -> tuple[str | None, list[str]]:
    """Return the column with the masks of the images, None if there is none, and notes on it.

    Raises:
        InputError: several columns could be the masks.
    """
    names = set(map(_plain, MASK_COLUMNS))
    columns = [column for column in table.column_names if _plain(column) in names and _holds_masks(table, column)]
    chosen = columns if len(columns) < 2 else [column for column in columns if _plain(column) == "annotation"]
    if columns and len(chosen) != 1:
        raise InputError(
            f"{name} has several columns of masks ({', '.join(columns)}); rename the one to use to annotation"
        )
    if not columns:
        listed = ", ".join(table.column_names)
        lines = [
            f"none of the columns {listed} holds masks, called annotation or similar; the images count as unlabelled"
        ]
        return None, lines
    others = [column for column in columns if column != chosen[0]]
    return chosen[0], [f"masks are the column {chosen[0]}; {', '.join(others)} not used"] if others else []


def _holds_masks(table: Any, column: str) -> bool:
    """Return whether a column contains pictures, encoded or as rows of numbers, or their file names."""
    from datasets import Image as ImageFeature
    from datasets import Value

    feature = table.features[column]
    if isinstance(feature, ImageFeature):
        return True
    if isinstance(feature, Value):  # text in a column called label names a class
        return "binary" in feature.dtype or (is_text(feature) and _plain(column) not in ("label", "labels"))
    if isinstance(feature, dict):
        return "bytes" in feature
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Array2D" or type(inner).__name__ in ("List", "LargeList", "Sequence")


def find_missing(table: Any, column: str) -> np.ndarray:
    """Return the rows in which a column of pictures is empty, in ascending order."""
    import pyarrow.compute as pc
    from pyarrow import types

    parts = []
    for batch in table.with_format("arrow").iter(batch_size=1000):
        values = batch[column]
        fields = [values]
        if types.is_struct(values.type):  # bytes or a file path; both are null if the whole value is
            fields = [pc.struct_field(values, field.name) for field in values.type if field.name in ("bytes", "path")]
        missing = [pc.is_null(field).to_numpy() for field in fields]
        parts.append(np.logical_and.reduce(missing))
    return np.flatnonzero(np.concatenate(parts))


def read_labels(table: Any, name: str, num_classes: int) -> Labels:
    """Return the labels in a table, for a head of `num_classes` classes.

    Raises:
        InputError: the labels do not match the head, or several columns could be the labels and differ. Among these,
            one with as many classes as the head takes precedence, then the one called label.
    """
    plain, longer = _label_columns(table)
    columns = plain + longer
    if not columns:
        listed = ", ".join(table.column_names)
        return Labels(
            notes=[f"none of the columns {listed} is called label or similar; the images count as unlabelled"]
        )
    labelled: dict[str, Labels] = {}
    errors = []
    for column in columns:
        try:
            labels = _read_column(table, column, name, num_classes)
        except InputError as error:
            errors.append(error)
        else:
            labelled |= {column: labels} if labels.values is not None else {}
    complete = [column for column in labelled if _count(table, column, labelled[column]) == num_classes]
    # A column with a longer name replaces a `label` that does not match the head only if its number of classes does.
    usable = [column for column in plain if column in labelled] or (complete if errors else list(labelled))
    if not usable:
        if errors:
            raise errors[0]
        return Labels()
    if len({labelled[column].values for column in usable}) > 1:
        usable = [c for c in usable if c in complete] or [c for c in usable if _plain(c) == "label"]
        if len(usable) != 1:
            raise InputError(
                f"{name} has several columns of labels ({', '.join(labelled)}), and it is not clear which has the "
                f"model's {num_classes} classes; leave only one of them in the table"
            )
    chosen = labelled[usable[0]]
    others = [column for column in columns if column != usable[0]]
    if others:
        chosen.notes.insert(0, f"labels are the column {usable[0]}; {', '.join(others)} not used")
    return chosen


def _label_columns(table: Any) -> tuple[list[str], list[str]]:
    """Return the columns that could be the labels: those called label or similar, and those with longer names.

    Columns with class names (`label_name`) are used only if there are no others.
    """
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    plain, longer, texts = [], [], []
    # fine_label has a longer name: next to coarse_label, the number of the head's classes decides between the two.
    words = [word for word in (*LABEL_COLUMNS, "classes", "categories") if word != "fine_label"]
    names = {_plain(word) + end for word in words for end in NUMBERED}
    for column, feature in table.features.items():
        if isinstance(feature, ImageFeature):  # a mask
            continue
        if _plain(column) in names:
            plain.append(column)
        elif isinstance(feature, ClassLabel) or re.search(r"(label|class|category)s?(id|idx|index)?$", _plain(column)):
            longer.append(column)
        elif re.search(r"(label|class|category)(name|text|str)s?$", _plain(column)):
            texts.append(column)
    return plain, longer or ([] if plain else texts)


def _count(table: Any, column: str, labels: Labels) -> int:
    """Return the number of classes of a column: declared ones, otherwise those that occur."""
    names = getattr(table.features[column], "names", None)
    return len(names) if names else len(set(labels.values or ()))


def _read_column(table: Any, column: str, name: str, num_classes: int) -> Labels:
    from datasets import ClassLabel, Value

    feature = table.features[column]
    if not isinstance(feature, (ClassLabel, Value)):
        raise InputError(f"{name}: the column {column} does not hold one class for each image")
    values: Sequence[Any] = list(table[column])
    if is_text(feature):
        return Labels(*text_labels(values, name, num_classes))
    names = getattr(feature, "names", None)
    if not names or all(v is None or v == -1 for v in values):
        return Labels(check_labels(values, name, num_classes))
    index, notes = _declared_index(names, name, num_classes)
    labels = check_labels(values, name, len(names)) or ()
    return Labels(tuple(index[names[label]] for label in labels), known_classes(index, num_classes), notes)


def _declared_index(names: Sequence[str], name: str, num_classes: int) -> tuple[dict[str, int], list[str]]:
    """Return class name -> class index for the classes that a table declares in its own order.

    That order is used unless the names are numbers or ImageNet's synsets: `datasets` sorts numbered folders as text.
    """
    own = {key: i for i, key in enumerate(names)}
    synsets = num_classes == 1000 and all(map(SYNSET.fullmatch, names))
    if len(names) == num_classes and not synsets and not all(map(is_number, names)):
        return own, []
    index, notes = class_index(names, num_classes, name)
    return index, [] if index == own else notes
