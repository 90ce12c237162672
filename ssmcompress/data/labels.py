"""Labels of images: the class of a model's head for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .images import Images


def class_index(names: list[str], num_classes: int, where: str) -> dict[str, int]:
    """Return class name -> class index: by synset id for an ImageNet head, else by sorted name."""
    if num_classes == 1000 and all(name[:1] == "n" and name[1:].isdecimal() for name in names):
        from timm.data import ImageNetInfo

        synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        unknown = [name for name in names if name not in synsets]
        if unknown:
            raise InputError(f"{where}: {', '.join(unknown[:3])} is not one of ImageNet-1k's synsets")
        return {name: synsets[name] for name in names}
    if len(names) != num_classes:
        raise InputError(
            f"{where} has {len(names)} classes ({', '.join(names[:3])}, ...), the model has {num_classes} "
            f"classes; its images cannot be scored"
        )
    return {name: i for i, name in enumerate(sorted(names))}


def check_labels(values: Sequence[Any], name: str, num_classes: int) -> tuple[int, ...] | None:
    """Return the labels, or None if all are missing; InputError for one that is no class of the head."""
    values = list(values)
    if all(v is None or v == -1 for v in values):  # the usual form of unlabelled test splits
        return None
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
            raise InputError(f"{name}, row {row}: label {value!r}; the model has classes 0 to {num_classes - 1}")
    return tuple(values)


def class_names(images: Images, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of a head's classes: ImageNet-1k's for 1,000 synsets or unnamed ones, else the data's."""
    if num_classes != 1000 or (images.classes and not all(name[1:].isdecimal() for name in images.classes)):
        return images.classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(num_classes))
