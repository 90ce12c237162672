"""Masks: the class numbers of an image's pixels, read from single-channel pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError, raise_if_out_of_memory
from ..progress import note, track
from ..tasks import IGNORED, SEGMENTATION, Task
from ..tasks.segmentation import find_wrong_labels
from .images import Images, find_orientation, find_source, load
from .labels import some_names

# PIL modes whose values are class numbers; for a palette picture, its indices.
MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
# Maximum number of pairs whose headers are checked on opening, which takes 0.1 ms for each with a warm disk cache.
HEADERS = 4000
# ADE20K counts its classes from 1, and 0 is no class.
ADE_NOTE = "labels are ADE20K's, where 0 is no class: `reduce_zero_label` is on"
# Possible reasons why masks have no labelled pixel.
IGNORED_LABELS = f"({IGNORED} is ignored; with `reduce_zero_label`, 0 too)"
# Message for data with one label per image.
LABELS_NOT_READ = "labels of whole images are not read, the model needs masks; the images count as unlabelled"


@dataclass(frozen=True)
class MaskRules:
    """What the values of masks mean.

    Attributes:
        classes: number of classes of the model.
        reduce_zero_label: whether 0 is no class and the classes count from 1; None: decided by the data if it is known,
            otherwise false.
    """

    classes: int
    reduce_zero_label: bool | None = None


def make_rules(task: Task, classes: int, reduce_zero_label: bool | None) -> MaskRules | None:
    """Return the meaning of a segmentation task's masks; None for tasks with one label per image.

    Raises:
        InputError: `reduce_zero_label` for another task, or more classes than a mask can represent.
    """
    if task.name != SEGMENTATION.name:
        if reduce_zero_label is not None:
            raise InputError(f"`reduce_zero_label` is for the masks of {SEGMENTATION.title}, the task is {task.title}")
        return None
    if classes > IGNORED:
        raise InputError(
            f"a model of {classes} classes: masks can distinguish {IGNORED}, as label {IGNORED} is ignored"
        )
    return MaskRules(classes, reduce_zero_label)


def decide_rules(rules: MaskRules, is_ade: bool, name: str) -> MaskRules:
    """Return rules that specify whether labels are shifted, with a note if the data decides that they are."""
    if rules.reduce_zero_label is None and is_ade:
        note(f"{name}: {ADE_NOTE}")
    return MaskRules(rules.classes, is_ade if rules.reduce_zero_label is None else rules.reduce_zero_label)


def read_mask(source: Any, root: Path, rules: MaskRules, where: str) -> np.ndarray:
    """Return the class numbers (height, width) uint8 of a mask, 255 for pixels without a class.

    Args:
        source: as for `ssmcompress.data.images.decode`. where: name of the mask, for messages.

    Raises:
        InputError: the mask is unreadable, has several channels, or other labels than the classes.
    """
    try:
        pixels, mode = _read_pixels(find_source(source, root))
    except Exception as error:  # PIL's decoders raise many kinds of errors for a damaged file
        raise_if_out_of_memory(error)
        raise InputError(f"{where}: unreadable mask ({error})") from error
    if mode is not None:
        raise InputError(f"{where}: {describe_channels(mode)}")
    if pixels.dtype != np.uint8:
        low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
        if low < 0 or high > IGNORED:
            raise InputError(f"{where}: label {low if low < 0 else high}: expected class numbers, 0 to {IGNORED}")
        pixels = pixels.astype(np.uint8)
    if not rules.reduce_zero_label:
        try:
            SEGMENTATION.check_target(torch.from_numpy(pixels)[None], rules.classes)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return pixels
    table = np.arange(-1, 255).astype(np.uint8)  # 0 becomes 255, as -1 does in 8 bits
    table[IGNORED] = IGNORED
    if wrong := find_wrong_labels(torch.from_numpy(table[pixels]), rules.classes):
        _, label, *rest = wrong.split()
        raise InputError(
            f"{where}: label {int(label) + 1} {' '.join(rest)}: the model has {rules.classes} classes, labels 1 to "
            f"{rules.classes} since `reduce_zero_label` is on; 0 and {IGNORED} are ignored"
        )
    return table[pixels]


def _read_pixels(source: Path | io.BytesIO | np.ndarray) -> tuple[np.ndarray, str | None]:
    """Return the integer values of a mask (height, width), and its mode if that has no class numbers."""
    if isinstance(source, np.ndarray):
        if source.ndim == 2 and (source.dtype == bool or np.issubdtype(source.dtype, np.integer)):
            return np.array(source, np.uint8 if source.dtype == bool else source.dtype), None
        raise ValueError(f"{source.dtype} of {source.ndim} dimensions, expected integers in rows and columns")
    image = load(source)
    if image.mode not in MODES:
        return np.empty(0), image.mode
    pixels = np.array(image)
    return pixels.astype(np.uint8) if image.mode == "1" else pixels, None


def describe_channels(mode: str) -> str:
    """Return the error text for a mask whose PIL mode is not among `MODES`."""
    channels = Image.getmodebands(mode)
    found = f"a mask of {channels} channels ({mode})" if channels > 1 else f"a mask of mode {mode}"
    return (
        f"{found}: expected one channel of class numbers; colours, which stand for classes and instances in the full "
        "ADE20K and for classes in other data, have to be converted"
    )


@dataclass(frozen=True)
class Header:
    """Header data of a picture: its size (height, width), and its mode, None for an array."""

    size: tuple[int, int]
    mode: str | None


def read_headers(image: Any, mask: Any, root: Path) -> tuple[Header | None, Header | None]:
    """Return the headers of an image, with its size after rotation (`decode`), and of its mask."""
    mask_header = read_header(mask, root)
    header = read_header(image, root, shown=True)
    if header is not None and mask_header is not None and header.size == mask_header.size[::-1] != mask_header.size:
        # A PNG file may store its rotation after the pixels; they are decoded only if that could explain the sizes.
        header = read_header(image, root, shown=True, whole=True)
    return header, mask_header


def read_header(source: Any, root: Path, *, shown: bool = False, whole: bool = False) -> Header | None:
    """Return the header of an image or mask, None if it is unreadable; pixels are decoded only if `whole` is true.

    Args:
        shown: whether the size is that of the picture as `decode` rotates it.
    """
    try:
        source = find_source(source, root)
        if isinstance(source, np.ndarray):
            return Header((source.shape[0], source.shape[1]), None)
        with Image.open(source) as image:
            if whole:
                image.load()
            # PIL decodes the pixels of a PNG file when it looks for EXIF data that are not stored before them.
            known = shown and (whole or image.format != "PNG" or "exif" in image.info)
            turned = known and find_orientation(image) >= 5
            return Header((image.width, image.height) if turned else (image.height, image.width), image.mode)
    except Exception as error:  # as in `read_mask`
        raise_if_out_of_memory(error)
        return None


def check_pairs(name: str, pairs: Sequence[str], headers: Callable[[int], tuple[Header | None, Header | None]]) -> None:
    """Check the masks of a dataset by their headers, unless there are more than `HEADERS`.

    Args:
        pairs: names of the masks. headers: function from an index to the headers of the image and of its mask.

    Raises:
        InputError: masks are unreadable, have several channels, or another size than their image. Unreadable images
            are not an error: they are skipped when they are read.
    """
    if len(pairs) > HEADERS:
        return
    unreadable, modes, sizes = [], [], []
    for i in track(range(len(pairs)), "checking masks", len(pairs)):
        image, mask = headers(i)
        if mask is None:
            unreadable.append(pairs[i])
        elif mask.mode is not None and mask.mode not in MODES:
            modes.append((pairs[i], mask.mode))
        elif image is not None and image.size != mask.size:
            sizes.append(f"{pairs[i]}: {describe_sizes(mask.size, image.size)}")
    total = len(pairs)
    if unreadable:
        raise InputError(f"{name}: {len(unreadable)} of {total} masks cannot be read ({some_names(unreadable)})")
    if modes:
        names = some_names([mask for mask, _ in modes])
        raise InputError(
            f"{name}: {len(modes)} of {total} masks ({names}) cannot be used: {describe_channels(modes[0][1])}"
        )
    if sizes:
        raise InputError(f"{name}: {len(sizes)} of {total} masks differ in size from their image ({some_names(sizes)})")


def drop_empty_masks(images: Images) -> Images:
    """Return images without their masks if none of these labels a pixel, with a note; else the same images.

    Masks are read up to the first one with a label, which is usually the first. If one of them cannot be used, the
    images keep their masks, and the error is raised when it is read.
    """
    try:
        if has_labelled_pixel(images, range(len(images))):
            return images
    except InputError:
        return images
    note(f"{images.name}: {describe_empty(len(images))}; the images count as unlabelled")
    return replace(images, masks=None, empty_masks=len(images))


def has_labelled_pixel(images: Images, index: Sequence[int]) -> bool:
    """Return whether any of the masks at `index` labels a pixel; they are read up to the first one that does.

    Raises:
        InputError: a mask cannot be used.
    """
    return any((images.masks(i) != IGNORED).any() for i in track(index, "looking for labels", len(index)))


def describe_empty(count: int) -> str:
    """Return a message that `count` masks label no pixel, and why."""
    return f"no labelled pixel in {count} mask{'s' * (count != 1)} {IGNORED_LABELS}"


def describe_sizes(mask: tuple[int, int], image: tuple[int, int]) -> str:
    """Return a message about the different sizes of a mask and its image, both (height, width)."""
    return f"height x width {mask[0]} x {mask[1]}, the image {image[0]} x {image[1]}"
