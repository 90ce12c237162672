"""Preprocessing for models with an output per pixel: images keep their aspect ratio, and masks match them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..progress import note
from ..tasks import IGNORED
from .transforms import (
    Preprocessing,
    decode_assumed,
    describe_colours,
    describe_defaults,
    encode_assumed,
    per_channel,
    still_assumed,
)

# Maximum ratio of the longer side to the length of the shorter one after resizing: 2048 for 512.
LONGEST = 4


@dataclass(frozen=True)
class DensePreprocessing:
    """Resize by the shorter side, scale to 0..1, subtract mean, divide by std.

    As in mmsegmentation, the resized image has the largest size of the same aspect ratio whose sides are at most
    `short_side` and `long_side`. Interpolation is bilinear without antialiasing, on 8-bit values.

    Attributes:
        mean, std: per channel, on a 0..1 scale.
        short_side: length of the shorter side in pixels; None: images are not resized.
        long_side: maximum length of the longer side; None: four times `short_side`.
        multiple: both sides are then enlarged independently to multiples of this; None: they are not.
        defaults, recorded: as in `Preprocessing`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int | None = None
    long_side: int | None = None
    multiple: int | None = None
    defaults: tuple[str, ...] = field(default=(), compare=False)
    recorded: bool = field(default=False, compare=False)

    @classmethod
    def default(
        cls, in_chans: int, image_size: tuple[int, int] | None = None, multiple: int | None = None
    ) -> DensePreprocessing:
        """Return ImageNet's values for three channels, else 0.5; the shorter side is that of `image_size`."""
        values = Preprocessing.default(in_chans, image_size or (224, 224))
        return cls(values.mean, values.std, min(image_size) if image_size else None, None, multiple, defaults=VALUES)

    @property
    def assumed(self) -> bool:
        """Whether mean or standard deviation is assumed."""
        return bool(self.defaults)

    def changed(self, **changes: Any) -> DensePreprocessing:
        """Return a copy with fields replaced; None keeps a field, and one number is used for every channel.

        A side or multiple of 0 means none. Values not given remain assumed, as in `Preprocessing.changed`.

        Raises:
            InputError: values of another preprocessing, such as `crop_pct`, or invalid ones.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        known = self.to_dict()
        if others := [name for name in changes if name not in known]:
            raise InputError(
                f"`{others[0]}`: images of a segmentation model are resized by `short_side` and `long_side`, bilinear, "
                f"and not cropped"
            )
        assumed = still_assumed(self.defaults, changes)
        changes = per_channel(changes, self.mean, self.std)
        changes |= {name: changes[name] or None for name in SIZES if name in changes}
        changed = self.from_dict(known | changes | {"assumed": assumed}, channels=len(self.mean))
        return replace(changed, recorded=self.recorded)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON value that `from_dict` reads, with the key `assumed` as in `Preprocessing`."""
        values = {"mean": list(self.mean), "std": list(self.std), **{name: getattr(self, name) for name in SIZES}}
        return values | encode_assumed(self.defaults, VALUES)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], channels: int) -> DensePreprocessing:
        """Return the preprocessing that a JSON object describes; InputError for invalid values."""
        plain = Preprocessing.from_dict({**value, "crop_pct": 1.0, "interpolation": "bilinear"}, channels)
        sizes = {name: value.get(name) for name in SIZES}
        for name, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if size is not None and not (whole and 1 <= size <= 1 << 16):
                raise InputError(f"`{name}` {size!r}: expected a number of pixels, 1 to {1 << 16}")
        defaults = decode_assumed(value.get("assumed"), VALUES)
        short, long = sizes["short_side"], sizes["long_side"]
        if long is not None and (short is None or long < short):
            raise InputError(f"`long_side` {long}: expected at least `short_side`, {short}")
        return cls(plain.mean, plain.std, **sizes, defaults=defaults, recorded=True)

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (height, width) that an image is resized to, before sides are enlarged to multiples."""
        if self.short_side is None:
            return height, width
        long_side = self.long_side or LONGEST * self.short_side
        scale = min(long_side / max(height, width), self.short_side / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def transform(self, crop: tuple[int, int] | None = None) -> DenseTransform:
        """Return a function from a PIL image, in any mode, to (channels, height, width) float32.

        A note lists assumed values, unless they come from a saved model.

        Args:
            crop: (height, width) of the centre crop, for batches of one size; smaller images are padded at the bottom
                and on the right with 0, which is the mean colour. None: the whole image.
        """
        if len(self.mean) not in (1, 3):
            raise InputError(f"the model takes {len(self.mean)}-channel input; images have 1 or 3 channels")
        if self.assumed and not self.recorded:
            note(self.describe_assumption())
        return DenseTransform(self, crop)

    def describe_assumption(self) -> str:
        """Return a line that lists the assumed values and the arguments that change them."""
        values = {**describe_colours(self.mean, self.std), "short_side": str(self.short_side or "none")}
        return describe_defaults(self.defaults, values)


# Values that may be assumed, in the order in which messages list them.
VALUES = ("mean", "std", "short_side")
SIZES = ("short_side", "long_side", "multiple")


@dataclass(frozen=True)
class DenseTransform:
    """A function from a PIL image to (channels, height, width); `pair` prepares a mask in the same way.

    Attributes:
        preprocessing: sizes and normalisation. crop: as for `DensePreprocessing.transform`.
    """

    preprocessing: DensePreprocessing
    crop: tuple[int, int] | None = None

    def __call__(self, picture: Any) -> Tensor:
        values = self.preprocessing
        pixels = np.array(picture.convert("L" if len(values.mean) == 1 else "RGB"))
        image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        for size in self._sizes(*image.shape[1:]):
            image = _resize(image, size)
        mean, std = (torch.tensor(v)[:, None, None] for v in (values.mean, values.std))
        image = (image.float() / 255 - mean) / std
        return image if self.crop is None else _cut(image, self.crop, 0.0)

    def pair(self, picture: Any, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return an image (channels, height, width) and its mask uint8.

        The mask keeps its own size, unless images are cropped; it is then resized with nearest-neighbour
        interpolation, cropped with its image, and padded with 255.

        Args:
            mask: class numbers (height, width) of the picture's pixels.
        """
        image, target = self(picture), torch.from_numpy(np.ascontiguousarray(mask))
        if self.crop is None:
            return image, target
        size = self._sizes(*target.shape)[-1]
        if size != target.shape:
            target = F.interpolate(target[None, None], size=size, mode="nearest-exact")[0, 0]
        return image, _cut(target, self.crop, IGNORED)

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the sizes that an image is resized to, in order, as in PlainMamba's AlignedResize."""
        size, multiple = self.preprocessing.new_size(height, width), self.preprocessing.multiple
        return [size] if multiple is None else [size, tuple(-(-side // multiple) * multiple for side in size)]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (channels, height, width) uint8; ties are rounded up, as in OpenCV."""
    if image.shape[1:] == size:
        return image
    values = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return (values + 0.5).floor().to(torch.uint8)


def _cut(image: Tensor, crop: tuple[int, int], fill: float) -> Tensor:
    """Return the centre crop (..., height, width) of an image, padded at the bottom and on the right."""
    height, width = image.shape[-2:]
    top, left = (max(0, side - wanted) // 2 for side, wanted in zip((height, width), crop, strict=True))
    part = image[..., top : top + crop[0], left : left + crop[1]]
    missing = (0, crop[1] - part.shape[-1], 0, crop[0] - part.shape[-2])
    return F.pad(part, missing, value=fill) if any(missing) else part.contiguous()
