"""Preprocessing of images to model inputs: size, crop, interpolation and normalisation, with timm's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..progress import note

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform: resize to size / crop_pct, centre crop, scale to 0..1, subtract mean, divide by std.

    Attributes:
        mean, std: per channel, on a 0..1 scale.
        crop_pct: share of the side of the resized image that the crop keeps, above 0 to 1.
        interpolation: one of `INTERPOLATIONS`.
        assumed: whether these are the default values, which neither a file nor the user gave.
        recorded: whether they were read from a saved model; what was assumed is then no news, and not noted again.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str = "bicubic"
    assumed: bool = field(default=False, compare=False)
    recorded: bool = field(default=False, compare=False)

    @classmethod
    def default(cls, in_chans: int, image_size: tuple[int, int]) -> Preprocessing:
        """Use ImageNet's values for three channels, else 0.5; crop 0.875 at 224 pixels and above, no crop below."""
        crop_pct = 0.875 if min(image_size) >= 224 else 1.0
        if in_chans == 3:
            return cls(IMAGENET_MEAN, IMAGENET_STD, crop_pct, assumed=True)
        return cls((0.5,) * in_chans, (0.5,) * in_chans, crop_pct, assumed=True)

    def changed(self, **changes: Any) -> Preprocessing:
        """Return a copy with fields replaced; None keeps a field, and one number stands for every channel."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        changes = per_channel(changes, self.mean, self.std)
        return type(self).from_dict(self.to_dict() | changes | {"assumed": False}, channels=len(self.mean))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON value that `from_dict` reads; it has the key `assumed` only where that is true."""
        values = {"mean": list(self.mean), "std": list(self.std)}
        values |= {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        return values | ({"assumed": True} if self.assumed else {})

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], channels: int) -> Preprocessing:
        """Return the preprocessing that a JSON object describes; InputError for invalid values."""
        try:
            mean, std = (tuple(_parse_number(v) for v in value[k]) for k in ("mean", "std"))
            crop_pct, interpolation = _parse_number(value["crop_pct"]), str(value["interpolation"])
            assumed = value.get("assumed", False) is True
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"not a preprocessing block: {type(error).__name__} {error}") from error
        if not len(mean) == len(std) == channels:
            raise InputError(f"mean {mean} and std {std}: expected one value, or {channels}, one a channel")
        if not all(0 < s < float("inf") for s in std) or not all(abs(m) < float("inf") for m in mean):
            raise InputError(f"mean {mean} and std {std}: expected finite means and positive deviations")
        if not 0.05 <= crop_pct <= 1:
            raise InputError(f"`crop_pct` {crop_pct:g}: expected 0.05 to 1")
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"unknown interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
        return cls(mean, std, crop_pct, interpolation, assumed, recorded=True)

    def transform(self, image_size: tuple[int, int]) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image, in any mode, to (channels, height, width) float32.

        Values that were assumed are noted, unless a saved model recorded them.
        """
        channels = len(self.mean)
        if channels not in (1, 3):
            raise InputError(f"the model takes {channels}-channel input; images have 1 or 3 channels")
        # Imported here because timm takes seconds to import, and half of the commands prepare no image.
        from timm.data import create_transform

        to_tensor = create_transform(
            input_size=(channels, *image_size),
            is_training=False,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )
        if self.assumed and not self.recorded:
            note(self.describe_assumption())
        mode = "L" if channels == 1 else "RGB"
        return lambda image: to_tensor(image.convert(mode))

    def describe_assumption(self) -> str:
        """Return a line that says which values were assumed, and which arguments change them."""
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"preprocessing is not in the file; assumed: `mean` {mean}, `std` {std}, `crop_pct` {self.crop_pct:g}, "
            f"`interpolation` {self.interpolation}"
        )


def per_channel(changes: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """Return changes of a preprocessing with one mean and std for each channel, if one of the two is changed.

    Raises:
        InputError: there are neither one nor as many values as channels.
    """
    changes, channels = dict(changes), len(mean)
    for name, present in (("mean", mean), ("std", std)):
        count = len(changes.get(name, present))
        if count == 1:
            changes[name] = tuple(changes.get(name, present)) * channels
        elif count != channels:
            typed = ",".join(f"{value:g}" for value in changes[name])
            model = f"the model has {channels} channel{'s' if channels > 1 else ''}"
            raise InputError(f"`{name}` {typed}: {count} values, {model}")
    return changes


def _parse_number(value: Any) -> float:
    """Return a number as a float; TypeError for a text or a truth value, which JSON tells apart."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"expected a number, found {value!r}")
    return float(value)
