"""Smaller input images for the same weights: a free baseline that any compression has to beat.

The position embedding is resized to the smaller grid. The classifier is unchanged, or refitted in closed form to the
logits of the model at its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import Batches, digest
from ..errors import NOT_FINITE, InputError
from ..evaluation.flops import flops_of
from ..models.base import TokenModel
from ..models.checkpoint import load
from ..models.modes import runs_in_eval_mode
from ..progress import track
from .reconstruct.both_models import HELD_OUT
from .reconstruct.least_squares import Rows, refit
from .search.proxy_loss import Collector


def choose_image_size(model: TokenModel, share: float) -> tuple[int, int]:
    """Return the largest image size (height, width) in whole patches with at most this share of the dense FLOPs.

    FLOPs are `full`, as run, relative to the dense model at its own size. The aspect ratio is kept.

    Raises:
        InputError: images of one patch already exceed this share.
    """
    least = 1.0
    for size in _list_sizes(model):
        config = replace(model.config, image_size=size)
        least = min(least, flops_of(model, config))
        if least <= share:
            return size
    raise InputError(f"cannot reach {share:.1%}: a smaller image leaves {least:.1%} at least")


def _list_sizes(model: TokenModel) -> Iterator[tuple[int, int]]:
    """Yield the model's image size and smaller ones, each with one row of patches less than the previous one."""
    (rows, columns), (height, width) = model.config.frame_grid, model.config.image_size
    for fewer in range(rows):
        kept = max(1, round(columns * (rows - fewer) / rows))
        yield height - fewer * model.config.stride, width - (columns - kept) * model.config.stride


@runs_in_eval_mode
def shrink_image(model: TokenModel, image_size: tuple[int, int], images: Batches | None = None) -> TokenModel:
    """Return a copy of a dense model for images of another size.

    Args:
        model: the dense model.
        image_size: (height, width) in pixels.
        images: images for refitting the classifier, prepared for `model`; labels are not used, and duplicates are
            ignored. One in five is held out to choose the ridge, as in reconstruction. None: no refit.

    Returns:
        A model that counts as compressed, with an empty plan.

    Raises:
        InputError: there are fewer than two different images, or values are not finite.
    """
    device = next(model.parameters()).device
    small = load(model, image_size=image_size, device=device)
    small.preprocessing = model.preprocessing
    if images is not None:
        refit_classifier(small, model, images)
    small.mark_compressed()
    return small


@torch.no_grad()
def refit_classifier(small: TokenModel, model: TokenModel, images: Batches) -> None:
    """Refit the classifier of `small`, in place, to the logits of `model` on the same images at its own size."""
    device = next(model.parameters()).device
    linear = small.classifier
    old = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], dim=1)
    fitted, held_out = (Rows.zeros(old.shape[1], old.shape[0], device) for _ in range(2))
    seen: set[bytes] = set()
    pairs = zip(images, resize_batches(images, model, small), strict=True)
    for full, resized in track(pairs, "refitting the classifier", len(images)):
        if full.index != resized.index:
            raise InputError("the images cannot be read a second time")
        chosen = [row for row, image in enumerate(full.images) if _is_new(digest(image), seen)]
        if not chosen:
            continue
        numbers = torch.arange(len(seen) - len(chosen), len(seen), device="cpu")
        held = numbers % HELD_OUT == 1  # the second image is held out, so two are enough
        logits = _run(model, full.images[chosen].to(device)).cpu()
        with Collector(small) as received:
            _run(small, resized.images[chosen].to(device))
        features = received.take()
        if not logits.isfinite().all() or not features.isfinite().all():
            raise InputError(NOT_FINITE)
        if linear.bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        for rows, mask in ((fitted, ~held), (held_out, held)):
            rows.add(features[mask], logits[mask], torch.ones(int(mask.sum())))
    if len(seen) < 2:
        raise InputError(f"{len(seen)} different image to refit the classifier on: expected at least two")
    new = refit(fitted, held_out, old.to(fitted.gram.device)).weight
    linear.weight.copy_(new[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.copy_(new[:, -1])


def _is_new(value: bytes, seen: set[bytes]) -> bool:
    """Return whether a value has not been seen before, and add it."""
    count = len(seen)
    seen.add(value)
    return len(seen) > count


def _run(model: TokenModel, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(model.chunk_size())])


def resize_batches(images: Batches, model: TokenModel, small: TokenModel) -> Batches:
    """Convert images prepared for `model` to images for `small`, the same model at another size.

    Pictures prepared by `model.transform()` are prepared again from the original by the transform of `small`; tensors,
    and pictures with a custom transform, are resized after preparation.
    """
    size, prepare = small.config.image_size, images.transform
    if images.pictures and _prepares(images, _silent_transform(model)):
        return replace(images, transform=_silent_transform(small), unreadable=set())
    return replace(images, transform=lambda picture: _resize(prepare(picture), size), unreadable=set())


def _silent_transform(model: TokenModel) -> Callable[[Any], Tensor]:
    """Return the transform of a model, without the note about assumed preprocessing."""
    return model.transform_with(replace(model.preprocessing, recorded=True))


def _prepares(images: Batches, transform: Callable[[Any], Tensor]) -> bool:
    """Return whether a transform reproduces the preparation of the first readable image."""
    for i in images.index:
        try:
            picture = images.source.read(i)
            return torch.equal(images.transform(picture), transform(picture))
        except (OSError, ValueError):
            continue
    return False


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (..., height, width) with the filter of PIL's bicubic resizing."""
    planes = image.flatten(0, -3)[None].float()
    resized = F.interpolate(planes, size, mode="bicubic", align_corners=False, antialias=True)[0]
    return resized.unflatten(0, image.shape[:-2])
