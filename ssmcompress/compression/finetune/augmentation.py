"""Augmentation of training images (with timm, for classification), of video clips, and of images with masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.dense import DensePreprocessing
from ...data.frames import draw_frames
from ...data.transforms import Preprocessing
from ...data.video import Video
from ...tasks import IGNORED
from .recipe import Recipe
from .seeds import seed_rng

# As in mmsegmentation: a crop in which one class has more than this share of the labelled pixels is redrawn, up to this
# number of attempts in total.
LARGEST_CLASS, CROPS = 0.75, 10
# Maximum change of hue relative to `Recipe.jitter`, in turns of the colour circle: 36 degrees for a jitter of 0.5.
HUE = 0.2


def training_transform(
    preprocessing: Preprocessing | DensePreprocessing,
    image_size: tuple[int, int],
    recipe: Recipe,
    frames: int | None = None,
) -> Callable[[Any], Tensor]:
    """Return a function from a PIL image, in any mode, to an augmented tensor (channels, height, width), float32.

    For segmentation it has a method `pair`, which applies the same augmentation to an image and its mask.

    Args:
        frames: for videos, the number of frames of a clip: the function then maps a `Video` to
            (channels, frames, height, width). None: images.
    """
    if isinstance(preprocessing, DensePreprocessing):
        return DenseAugmentation(preprocessing, image_size, recipe)
    from timm.data import create_transform

    channels = len(preprocessing.mean)
    augment, colours, finish = create_transform(
        input_size=(3, *image_size),
        is_training=True,
        scale=(recipe.crop, 1.0),
        hflip=recipe.flip,
        color_jitter=0.0,
        auto_augment=recipe.randaugment or None,
        # timm's crops and RandAugment do not support nearest and lanczos.
        interpolation=preprocessing.interpolation if preprocessing.interpolation == "bilinear" else "bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=recipe.erasing,
        re_mode="pixel",
        separate=True,
    )
    mode = "L" if channels == 1 else "RGB"

    def prepare(image: Any) -> Tensor:
        # RandAugment pads with a three-channel colour, so it needs an RGB image.
        return finish(colours(augment(image.convert("RGB"))).convert(mode))

    return prepare if frames is None else VideoAugmentation(prepare, frames)


@dataclass(frozen=True)
class VideoAugmentation:
    """A function from a `Video` to an augmented clip (channels, frames, height, width).

    One frame is sampled from each of `frames` equal parts of the video. All frames get the same crop, flip, operations
    and erased box, because `prepare` runs with the same random numbers for each.

    Attributes:
        prepare: function from a frame to an augmented tensor (channels, height, width); all frames have the same size.
        frames: number of frames.
    """

    prepare: Callable[[Any], Tensor]
    frames: int

    def __call__(self, video: Video) -> Tensor:
        pictures = video.pick(lambda length: draw_frames(length, self.frames))
        seed, clip = int(torch.randint(1 << 62, ())), []
        for picture in pictures:
            with seed_rng(seed):
                clip.append(self.prepare(picture))
        return torch.stack(clip, 1)


class Window(NamedTuple):
    """A window along one side of a resized image: side length before and after, first pixel and number of pixels."""

    side: int
    resized: int
    first: int
    count: int

    def places(self) -> Tensor:
        """Return the float32 pixel centres (count,) in coordinates of the original image."""
        return (torch.arange(self.first, self.first + self.count) + 0.5) * (self.side / self.resized)


@dataclass(frozen=True)
class DenseAugmentation:
    """A function from a PIL image to an augmented (channels, height, width); `pair` augments its mask in the same way.

    An image is resized by a random factor between `min_scale` and `max_scale`, relative to its size in evaluation, then
    randomly cropped to `size` and flipped. Small images are padded at the bottom and right with the mean colour, masks
    with `IGNORED`. Colours are jittered by up to `jitter`. Only the crop is resized, so a large scale needs no more
    time or memory.

    Attributes:
        preprocessing: size at scale 1, and normalisation. size: (height, width) of the result.
        recipe: its `min_scale`, `max_scale`, `flip` and `jitter`.
    """

    preprocessing: DensePreprocessing
    size: tuple[int, int]
    recipe: Recipe

    def __call__(self, picture: Any) -> Tensor:
        return self._augment(picture, None)[0]

    def pair(self, picture: Any, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return an image (channels, height, width) and its mask (height, width) uint8.

        Args:
            mask: class indices (height, width) of the picture's pixels.
        """
        return self._augment(picture, torch.from_numpy(np.ascontiguousarray(mask)))

    def _augment(self, picture: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values, recipe = self.preprocessing, self.recipe
        scale = recipe.min_scale + (recipe.max_scale - recipe.min_scale) * torch.rand(()).item()
        size = tuple(max(1, round(side * scale)) for side in _measured_size(values, picture.height, picture.width))
        mirrored = torch.rand(()).item() < recipe.flip
        rows, columns = self._draw_windows((picture.height, picture.width), size, mask)
        pixels = np.array(picture.convert("L" if len(values.mean) == 1 else "RGB"))
        image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        image = _interpolate(_interpolate(image, 1, rows), 2, columns) / 255
        image = self._change_colours(image)
        mean, std = (torch.tensor(v)[:, None, None] for v in (values.mean, values.std))
        image = self._finish((image - mean) / std, mirrored, 0.0)
        return image, None if mask is None else self._finish(_pick(mask, rows, columns), mirrored, IGNORED)

    def _draw_windows(
        self, before: tuple[int, int], size: tuple[int, int], mask: Tensor | None
    ) -> tuple[Window, Window]:
        """Draw the crop windows of an image that is resized from `before` to `size`, both (height, width)."""
        for _ in range(CROPS):
            rows, columns = (_draw_window(*sides) for sides in zip(before, size, self.size, strict=True))
            if mask is None:
                break
            counts = torch.bincount(_pick(mask, rows, columns).flatten(), minlength=IGNORED + 1)[:IGNORED]
            if int((counts > 0).sum()) > 1 and int(counts.max()) < LARGEST_CLASS * int(counts.sum()):
                break
        return rows, columns

    def _change_colours(self, image: Tensor) -> Tensor:
        """Randomly change brightness, contrast, saturation and hue of an image (channels, height, width) in [0, 1]."""
        if not (jitter := self.recipe.jitter):
            return image
        from torchvision.transforms import ColorJitter

        return ColorJitter(jitter, jitter, jitter, min(0.5, HUE * jitter))(image)

    def _finish(self, part: Tensor, mirrored: bool, fill: float) -> Tensor:
        """Flip a crop of an image or mask (..., height, width) if `mirrored`, and pad it to `size`."""
        part = part.flip(-1) if mirrored else part
        height, width = (wanted - side for wanted, side in zip(self.size, part.shape[-2:], strict=True))
        return F.pad(part, (0, width, 0, height), value=fill)


def _measured_size(values: DensePreprocessing, height: int, width: int) -> tuple[int, ...]:
    """Return the (height, width) of an image in evaluation."""
    size, multiple = values.new_size(height, width), values.multiple
    return size if multiple is None else tuple(-(-side // multiple) * multiple for side in size)


def _draw_window(side: int, resized: int, wanted: int) -> Window:
    count = min(resized, wanted)
    return Window(side, resized, int(torch.randint(resized - count + 1, ())), count)


def _interpolate(image: Tensor, dim: int, window: Window) -> Tensor:
    """Resize one side of an image and return a window of it (bilinear, no antialiasing, corners not aligned)."""
    at = (window.places() - 0.5).clamp(0, window.side - 1)
    low = at.long()
    shape = [1] * image.ndim
    shape[dim] = window.count
    below = image.index_select(dim, low).float()
    above = image.index_select(dim, (low + 1).clamp(max=window.side - 1)).float()
    return torch.lerp(below, above, (at - low).view(shape))


def _pick(mask: Tensor, rows: Window, columns: Window) -> Tensor:
    """Resize a mask (height, width) with nearest-neighbour sampling, and return a window of it."""
    index = (part.places().long().clamp(max=part.side - 1) for part in (rows, columns))
    return mask.index_select(0, next(index)).index_select(1, next(index))
