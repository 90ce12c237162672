"""Kinds of data that callers pass as images, and parsing of the items of a loader, dataset or list."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..errors import InputError
from ..tasks import CLASSIFICATION, SEGMENTATION, Task
from .batches import Batch, Batches, LabelledBatch
from .columns import IMAGE_COLUMNS, LABEL_COLUMNS, MASK_COLUMNS
from .dense import DensePreprocessing
from .transforms import Preprocessing

# Batch size for data that is not batched.
BATCH_SIZE = 64
EXPECTED = "a folder, a tensor (images, channels, height, width), a DataLoader, a dataset or batches of images"
Transform = Callable[[Any], Tensor]
IMAGE_SIDES = ("channels", "height", "width")
VIDEO_SIDES = ("channels", "frames", "height", "width")
# Names of the dimensions of images, videos and their views, by their number.
SIDES = {3: IMAGE_SIDES, 4: VIDEO_SIDES, 5: ("views", *VIDEO_SIDES)}
# The images and labels of an item, and whether it is a single image.
Parsed = tuple[LabelledBatch, bool]


@dataclass(frozen=True)
class InputSpec:
    """What a model takes.

    Attributes:
        shape: (channels, height, width) of an image, (channels, frames, height, width) of a video, None for a side of
            any length; None: images of any size.
        dtype: dtype of the images.
        transform: function from a PIL image to an image; None: PIL images are rejected, as for models of videos.
        preprocessing: how images are normalised; None: unknown.
        task: task of the model; for segmentation, labels are masks, and batches may differ in size.
    """

    shape: tuple[int | None, ...] | None = None
    dtype: torch.dtype = torch.float32
    transform: Transform | None = None
    preprocessing: Preprocessing | DensePreprocessing | None = None
    task: Task = CLASSIFICATION

    @property
    def dense(self) -> bool:
        """Whether labels are masks."""
        return self.task.name == SEGMENTATION.name

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the dimensions of an image, for messages."""
        return IMAGE_SIDES if self.shape is None else SIDES[len(self.shape)]

    def is_single(self, value: Any) -> bool:
        """Return whether a tensor, an array or a PIL image is one image, not a batch of them."""
        return isinstance(value, Image) or value.ndim == len(self.sides)


# The spec for modules of other code, about which nothing is known.
IMAGES = InputSpec()


def as_items(data: Any, spec: InputSpec = IMAGES) -> Any:
    """Return an iterable of batches or single images for data passed by a caller."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, Mapping) and any(hasattr(value, "column_names") for value in data.values()):
        raise InputError(f"several datasets: {', '.join(map(str, data))}; pass one of them")
    if isinstance(data, (Batch, LabelledBatch, Mapping)):
        return [data]
    if isinstance(data, np.ndarray):
        data = _to_tensor(data)
    if isinstance(data, Tensor):
        if data.ndim != len(spec.sides) + 1:
            raise InputError(f"a tensor {tuple(data.shape)}: expected images (count, {', '.join(spec.sides)})")
        return data.split(BATCH_SIZE)
    if _is_pair(data, spec):
        images, labels = _to_images(data[0], replace(spec, transform=None)), data[1]
        starts = range(0, len(images), BATCH_SIZE)
        if labels is not None and len(labels) != len(images):
            raise InputError(f"{len(labels)} labels for {len(images)} images: expected one for each")
        return [
            (images[i : i + BATCH_SIZE], labels[i : i + BATCH_SIZE] if labels is not None else None) for i in starts
        ]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__"):
        return _Rows(data)
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        found = repr(data) if isinstance(data, (str, bytes)) or data is None else type(data).__name__
        raise InputError(f"{found} where images are expected: pass {EXPECTED}")
    return data


class _Rows:
    """The items of a map-style dataset, in order."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


def _is_pair(data: Any, spec: InputSpec) -> bool:
    """Return whether data is (images, labels): a batch of images and something else."""
    if not isinstance(data, (tuple, list)) or len(data) != 2 or getattr(data[0], "ndim", 0) != len(spec.sides) + 1:
        return False
    if isinstance(data[1], (Tensor, np.ndarray)):
        return data[1].ndim < (4 if spec.dense else 3)
    return data[1] is None or (isinstance(data[1], list) and not any(map(_is_image, data[1])))


def collect_singles(parsed: Iterable[Parsed], spec: InputSpec = IMAGES) -> Iterator[LabelledBatch]:
    """Yield batches unchanged, and single images in batches of `BATCH_SIZE`, for segmentation grouped by shape."""

    def kind(pair: Parsed) -> tuple[Any, ...]:
        (images, labels), single = pair
        return single, *((images.shape, labels is not None and labels.shape) if spec.dense and single else ())

    for (single, *_), group in itertools.groupby(parsed, kind):
        batches = (batch for batch, _ in group)
        if not single:
            yield from batches
            continue
        while part := list(itertools.islice(batches, BATCH_SIZE)):
            yield join_batches(part)


def join_batches(parts: Sequence[LabelledBatch]) -> LabelledBatch:
    """Concatenate batches; InputError if their images differ in size, or only some have labels."""
    if len({batch.images.shape[1:] for batch in parts}) > 1:
        sizes = sorted({tuple(batch.images.shape[1:]) for batch in parts})
        raise InputError(f"images of {sizes[0]} and {sizes[1]}: expected one size")
    labels = [batch.labels for batch in parts if batch.labels is not None]
    if len(shapes := {values.shape[1:] for values in labels}) > 1:
        sizes = sorted(map(tuple, shapes))
        raise InputError(f"masks of {sizes[0]} and {sizes[1]}: expected one size")
    if 0 < len(labels) < len(parts):
        raise InputError("some images have labels and others have none: expected labels for all or for none")
    return LabelledBatch(torch.cat([batch.images for batch in parts]), torch.cat(labels) if labels else None)


def parse_item(item: Any, spec: InputSpec, labelled: bool) -> Parsed:
    """Return the images and labels of an item, and whether it is a single image.

    Args:
        item: a tensor or array; (images, labels, ...); a dict, a `Batch`, or a list of single images or pairs.
        spec: what the model takes. For segmentation, labels are masks, (images, height, width), or (height, width) of a
            single image.
        labelled: whether labels are read; if not, they may be anything.

    Raises:
        InputError: another kind of item, or images or labels of another shape or dtype.
    """
    labels = None
    if isinstance(item, (Batch, LabelledBatch)):
        images, labels = item.images, item.labels
    elif isinstance(item, Mapping):
        images, labels = _from_mapping(item, labelled, spec.dense)
    elif isinstance(item, list) and _are_singles(item, spec) and len(item) > 1:
        images = item
    elif isinstance(item, (tuple, list)) and item and (_is_image(item[0]) or _are_singles(item[0], spec)):
        images, labels = item[0], item[1] if len(item) > 1 else None
        if not (spec.dense and _is_integer(labels)):
            _check_views(images, labels, spec)
    elif isinstance(item, (tuple, list)) and item and isinstance(item[0], (tuple, list, Mapping)):
        return join_batches([parse_item(part, spec, labelled)[0] for part in item]), False
    else:
        images = item
    single = _is_image(images) and spec.is_single(images)
    images = _to_images(images, spec)
    to_labels = _to_masks if spec.dense else _to_labels
    return LabelledBatch(images, to_labels(labels, len(images)) if labelled else None), single


def _is_image(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, Image))


def _check_views(images: Any, labels: Any, spec: InputSpec) -> None:
    """Raise InputError if there is a second view instead of labels, as from loaders for contrastive learning.

    Masks have another number of dimensions or channels.
    """
    pair = (images, labels)
    ranks, channels = (len(spec.sides), len(spec.sides) + 1), -len(spec.sides)
    if not all(isinstance(v, (Tensor, np.ndarray)) and v.ndim in ranks for v in pair) or images.ndim != labels.ndim:
        return
    if images.shape[channels] == labels.shape[channels]:
        raise InputError(
            f"labels {tuple(labels.shape)} {_name(labels.dtype)}: these are images again, expected class numbers; pass "
            f"one view of the images, or all as one batch, torch.cat(views)"
        )


def _are_singles(value: Any, spec: InputSpec) -> bool:
    """Return whether value is a list of single images."""
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_image(v) and spec.is_single(v) for v in value)
    )


def _from_mapping(item: Mapping[Any, Any], labelled: bool, dense: bool) -> tuple[Any, Any]:
    """Return the images and labels in a dict: a batch of a loader, or a row of a dataset."""
    keys = {str(key).lower(): key for key in item}
    images = [key for key in ("pixel_values", *IMAGE_COLUMNS) if key in keys]
    labels = [key for key in (MASK_COLUMNS if dense else LABEL_COLUMNS) if key in keys]
    if not images:
        raise InputError(
            f"a batch with {', '.join(map(str, item)) or 'nothing in it'}: expected images under one of the names "
            f"{', '.join(IMAGE_COLUMNS)}"
        )
    if labelled and len(labels) > 1:
        what = "masks" if dense else "labels of the model's classes"
        raise InputError(f"a batch with {' and '.join(labels)}: expected one of them, the {what}")
    return item[keys[images[0]]], item[keys[labels[0]]] if labels else None


def _to_tensor(value: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(value))
    except TypeError as error:
        raise InputError(f"an array of {value.dtype}: expected numbers") from error


def _to_images(value: Any, spec: InputSpec) -> Tensor:
    """Return a batch of images from a tensor, an array, a PIL image or a list of single ones."""
    if _are_singles(value, spec):
        return join_batches([LabelledBatch(_to_images(v, spec), None) for v in value]).images
    if isinstance(value, Image):
        if len(spec.sides) > len(IMAGE_SIDES):
            raise InputError("PIL images: the model takes videos, tensors that its transform() makes of `Video`s")
        if spec.transform is None:
            raise InputError("PIL images: prepare them with the model's transform(), which gives tensors")
        return spec.transform(value)[None]
    if isinstance(value, np.ndarray):
        value = _to_tensor(value)
    if not isinstance(value, Tensor):
        named = isinstance(value, (str, Path))
        found = repr(str(value))[:60] if named else type(value).__name__
        hint = "; pass the folder, or open_images()" if named else ""
        raise InputError(f"the data gives {found} where images are expected: expected tensors{hint}")
    if spec.is_single(value):
        value = value[None]
    if value.ndim != len(spec.sides) + 1:
        raise InputError(f"images {tuple(value.shape)}: expected (batch, {', '.join(spec.sides)})")
    if not value.is_floating_point():
        raise InputError(
            f"images are {_name(value.dtype)}: expected floats, scaled to 0..1 and normalised as model.transform() does"
        )
    return value


def _to_labels(value: Any, count: int) -> Tensor | None:
    """Return labels (count,) int64 on the CPU, or None."""
    if isinstance(value, (list, tuple)) and value:
        missing = [v is None for v in value]
        if all(missing):
            value = None
        elif any(isinstance(v, (str, bytes)) for v in value) or any(missing):
            raise InputError(f"labels {list(value[:3])}: expected class numbers, for all images or for none")
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        raise InputError(f"label {value!r}: expected a class number; leave the labels out of unlabelled images")
    if isinstance(value, np.ndarray):
        value = _to_tensor(value)
    try:
        labels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels are {type(value).__name__}: expected class numbers, a tensor of integers") from error
    labels = labels.reshape(1) if labels.ndim == 0 else labels
    hint = (
        "; labels.argmax(1) makes class numbers of one-hot labels" if labels.ndim == 2 and labels.shape[1] > 1 else ""
    )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim != 1:
        raise InputError(
            f"labels {tuple(labels.shape)} {_name(labels.dtype)}: expected class numbers, ({count},) integers{hint}"
        )
    if len(labels) != count:
        raise InputError(f"{len(labels)} labels for {count} images: expected one for each")
    return labels.long().cpu()


def _to_masks(value: Any, count: int) -> Tensor | None:
    """Return masks (count, height, width) on the CPU, uint8 if they already are, else int64; or None.

    Args:
        value: masks (count, height, width) or (count, 1, height, width), or (height, width) of a single image; a PIL
            image, or a list of these.
    """
    if value is None or (isinstance(value, (list, tuple)) and value and all(v is None for v in value)):
        return None
    if isinstance(value, (list, tuple)):
        parts = [_to_masks(v, 1) for v in value]
        if any(part is None for part in parts):
            raise InputError("some images have masks and others have none: expected masks for all or for none")
        return (
            join_batches([LabelledBatch(torch.empty(len(part), 0), part) for part in parts]).labels if parts else None
        )
    if isinstance(value, Image):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        value = _to_tensor(value)
    shape = tuple(getattr(value, "shape", ()))
    if _is_integer(value):
        if value.ndim == 2 and count == 1:
            value = value[None]
        if value.ndim == 4 and value.shape[1] == 1:
            value = value[:, 0]
        if value.ndim == 3 and len(value) == count:
            return value.cpu() if value.dtype == torch.uint8 else value.cpu().long()
    found = f"{shape} {_name(value.dtype)}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(f"masks {found}: expected class numbers, ({count}, height, width) integers")


def _is_integer(value: Any) -> bool:
    """Return whether value is a tensor or an array of whole numbers."""
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.integer)
    real = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return real and value.dtype != torch.bool


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
