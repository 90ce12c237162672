"""Normalisation of arguments passed to the library: models, and images for a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.any_batches import AnyBatches
from ..data.batches import Batches
from ..data.find import open_images
from ..data.images import Images
from ..data.items import InputSpec
from ..data.tables import is_table, read_dataset
from ..errors import InputError
from .base import TokenModel
from .precision import check_not_quantised


def check_model(model: Any, name: str = "model") -> None:
    """Raise an InputError if the argument `name` is not a model from `ssmcompress.load`, or is quantised."""
    if isinstance(model, TokenModel):
        check_not_quantised(model)
        return
    if isinstance(model, (str, Path)):
        raise InputError(f"`{name}` is the name {str(model)!r}: pass the model, load({str(model)!r})")
    if isinstance(model, nn.Module):
        raise InputError(f"`{name}` is a {type(model).__name__} of other code: pass load(...) of it")
    if isinstance(model, Mapping):
        raise InputError(f"`{name}` is a dict: pass load(...) of the state dict or checkpoint")
    raise InputError(f"`{name}` is a {type(model).__name__}: expected a model of ssmcompress.load()")


def check_dense(model: Any) -> None:
    """Raise an InputError if an argument is not a model from `ssmcompress.load`, or is already pruned or trimmed."""
    check_model(model)
    if model.plan is None:
        return
    origin = f", {model.source.path}" if model.source is not None and model.source.path else ""
    done = "trimmed" if model.dense_config != model.config else "compressed"
    done = "pruned" if model.plan.stages else done
    raise InputError(f"the model is {done} already; expected the dense model that it was made from{origin}")


def check_classes(pruned: TokenModel, dense: TokenModel) -> None:
    """Raise an InputError if a model has a new classifier, and `dense` is the file with the former one."""
    record = pruned.find_record("classifier")
    before = record.values.get("source_sha256") if record is not None else None
    if before is not None and dense.source is not None and dense.source.sha256 == before:
        raise InputError(
            "the classifier of the model was replaced (`reset_classifier`), so the dense model has other classes: "
            "leave it out, or give a dense model of the new classes"
        )


def check_module(model: Any, name: str = "model") -> None:
    """Raise an InputError if an argument is not a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        check_model(model, name)


def as_batches(model: nn.Module, data: Any, *, repeat: bool = True, labelled: bool = False) -> AnyBatches:
    """Return images for a model as batches.

    Args:
        model: the model that the images are for. Any module will do, unless it has to prepare them.
        data: any argument of `AnyBatches`; or a name accepted by `ssmcompress.open_images`, or `Images`, which are
            prepared by the model's transform.
        repeat, labelled: see `AnyBatches`.

    Raises:
        InputError: the data cannot be used.
    """
    if isinstance(data, AnyBatches):
        return data
    opened = open_batches(model, data)
    return AnyBatches(
        data if opened is None else opened, _spec_of(model), repeat=repeat, labelled=labelled, named=opened is not None
    )


def open_batches(model: nn.Module, data: Any) -> Batches | None:
    """Return the images named by `data` as batches for a model; None if `data` is not a name of images.

    Args:
        data: a name accepted by `ssmcompress.open_images`, `Images`, or a dataset of the `datasets` library.

    Raises:
        InputError: the images cannot be opened, or the module does not define their preprocessing.
    """
    table = is_table(data)
    if not table and not isinstance(data, (str, Path, Images)):
        return None
    if not isinstance(model, TokenModel):
        raise InputError(
            f"a {type(model).__name__} does not say how to prepare images: pass batches of tensors, or load(...) of it"
        )
    if table and model.frames is not None:
        raise InputError("a dataset of `datasets`: the model takes videos, which are read from folders and .npz files")
    if table:
        data = read_dataset(data, model.config.num_classes, task=model.task)
    elif not isinstance(data, Images):
        data = open_images(data, model.config.num_classes, task=model.task, videos=model.frames is not None)
    return Batches(data, model.transform())


def to_batches(model: TokenModel, data: Any) -> Batches:
    """Return images for a model as `Batches`; tensors and loaders are read into memory.

    Args:
        data: see `as_batches`.

    Raises:
        InputError: the data cannot be used, or exceeds the limit of `AnyBatches.read_all`.
    """
    batches = data if isinstance(data, Batches) else open_batches(model, data)
    if batches is not None:
        return batches
    images, labels = as_batches(model, data, repeat=False, labelled=True).read_all()
    if labels is not None:
        model.task.check_target(labels, model.config.num_classes)
    targets: dict[str, Any] = {}
    if labels is not None and labels.ndim > 1:
        masks = labels.to(torch.uint8).numpy()
        targets["masks"] = lambda i: masks[i]
    elif labels is not None:
        targets["labels"] = tuple(labels.tolist())
    source = Images("images", len(images), lambda i: PreparedImage(images[i]), lambda i: f"image {i}", **targets)
    return Batches(source, attrgetter("image"), pictures=False)


class PreparedImage:
    """Presents a prepared image (channels, height, width) as a picture, with the methods that `digest_picture` uses."""

    mode = "RGB"

    def __init__(self, image: Tensor):
        self.image, self.size = image, tuple(image.shape)

    def load(self) -> None:
        """Do nothing: the image is already in memory."""

    def tobytes(self) -> bytes:
        """Return the bytes that identify the image in other data."""
        return self.image.float().numpy().tobytes()


def open_training(model: TokenModel, data: Any) -> Batches:
    """Return the training images for a model, which are read again and augmented in each epoch.

    Args:
        data: any argument of `open_batches`, or `Batches`.

    Raises:
        InputError: the data has another type, or the images cannot be opened.
    """
    batches = data if isinstance(data, Batches) else open_batches(model, data)
    if batches is None:
        found = repr(data) if data is None else f"a {type(data).__name__}"
        raise InputError(
            f"{found} to train on: expected a folder, open_images(...) or `Batches`, because the images are "
            "augmented differently in each epoch"
        )
    return batches


def _spec_of(model: nn.Module) -> InputSpec:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if not isinstance(model, TokenModel):
        return InputSpec(dtype=dtype)
    # Created lazily: it needs timm, which takes seconds to import.
    transform = cache(model.transform)
    return InputSpec(model.image_shape, dtype, lambda image: transform()(image), model.preprocessing, model.task)
