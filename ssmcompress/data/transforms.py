"""Preprocessing of images to model inputs: size, crop, interpolation and normalisation, with timm's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import note

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
CROP_MODES = ("center", "squash", "border")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 2  # mean or std of pixels from 0 to 1; a larger one belongs to pixels from 0 to 255


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform: resize to size / crop_pct, centre crop, scale to 0..1, subtract mean, divide by std.

    Attributes:
        mean, std: per channel, on a 0..1 scale.
        crop_pct: share of the resized image's side kept by the crop, above 0 and at most 1.
        interpolation: one of `INTERPOLATIONS`.
        crop_mode: one of `CROP_MODES`, as in timm: "center" keeps the aspect ratio and cuts the longer side, "squash"
            does not keep it, "border" keeps it and pads the shorter side.
        defaults: names of the values that are defaults, given by neither a file nor the user.
        recorded: whether they were read from a saved model, so that assumed values need not be noted again.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    defaults: tuple[str, ...] = field(default=(), compare=False)
    recorded: bool = field(default=False, compare=False)

    @classmethod
    def default(cls, in_chans: int, image_size: tuple[int, int], video: bool = False) -> Preprocessing:
        """Return ImageNet's values for three channels, else 0.5; crop 0.875 at 224 pixels and above, no crop below.

        The shorter side of video frames is not cropped, as in the training and evaluation of video models.
        """
        crop_pct = 0.875 if min(image_size) >= 224 and not video else 1.0
        if in_chans == 3:
            return cls(IMAGENET_MEAN, IMAGENET_STD, crop_pct, defaults=VALUES)
        return cls((0.5,) * in_chans, (0.5,) * in_chans, crop_pct, defaults=VALUES)

    @property
    def assumed(self) -> bool:
        """Whether mean or standard deviation is assumed."""
        return bool(self.defaults)

    def changed(self, **changes: Any) -> Preprocessing:
        """Return a copy with fields replaced; None keeps a field, and one number is used for every channel.

        Values not given remain assumed, until both mean and standard deviation are given.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        assumed = still_assumed(self.defaults, changes)
        changes = per_channel(changes, self.mean, self.std)
        changed = self.from_dict(self.to_dict() | changes | {"assumed": assumed}, channels=len(self.mean))
        return replace(changed, recorded=self.recorded)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON value that `from_dict` reads.

        It has `crop_mode` only if that is not "center", and `assumed` only if mean or standard deviation is: true,
        or the list of assumed values if not all.
        """
        values = {"mean": list(self.mean), "std": list(self.std)}
        values |= {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        values |= {"crop_mode": self.crop_mode} if self.crop_mode != "center" else {}
        return values | encode_assumed(self.defaults, VALUES)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], channels: int) -> Preprocessing:
        """Return the preprocessing that a JSON object describes; InputError for invalid values."""
        try:
            mean, std = (tuple(_parse_number(v) for v in value[k]) for k in ("mean", "std"))
            crop_pct, interpolation = _parse_number(value["crop_pct"]), str(value["interpolation"])
            crop_mode = str(value.get("crop_mode", "center"))
            defaults = decode_assumed(value.get("assumed"), VALUES)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"not a preprocessing block: {type(error).__name__} {error}") from error
        if not len(mean) == len(std) == channels:
            raise InputError(f"mean {mean} and std {std}: expected one value, or {channels}, one per channel")
        if not all(0 < s < float("inf") for s in std) or not all(abs(m) < float("inf") for m in mean):
            raise InputError(f"mean {mean} and std {std}: expected finite means and positive deviations")
        if not 0.05 <= crop_pct <= 1:
            raise InputError(f"`crop_pct` {crop_pct:g}: expected 0.05 to 1")
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"unknown interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
        if crop_mode not in CROP_MODES:
            raise InputError(f"unknown crop mode {crop_mode!r}: expected one of {', '.join(CROP_MODES)}")
        return cls(mean, std, crop_pct, interpolation, crop_mode, defaults, recorded=True)

    def transform(self, image_size: tuple[int, int]) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image, in any mode, to (channels, height, width) float32.

        A note lists assumed values, unless they come from a saved model.
        """
        steps = self._steps(image_size)
        mode = "L" if len(self.mean) == 1 else "RGB"
        return lambda image: _apply(steps, image.convert(mode))

    def transform_crops(self, image_size: tuple[int, int], crops: int) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image to crops (crops, channels, height, width) float32.

        They are evenly spaced along the longer side of the resized image, from end to end, and centred along the other
        side; a single one equals the result of `transform`.
        """
        resize, _, *finish = self._steps(image_size)
        mode = "L" if len(self.mean) == 1 else "RGB"

        def prepare(image: Any) -> Tensor:
            resized = resize(image.convert(mode))
            return torch.stack([_apply(finish, part) for part in cut_crops(resized, image_size, crops)])

        return prepare

    def _steps(self, image_size: tuple[int, int]) -> list[Callable[[Any], Any]]:
        """Return the steps of timm's transform: resize, centre crop, to a tensor, normalise."""
        channels = len(self.mean)
        if channels not in (1, 3):
            raise InputError(f"the model takes {channels}-channel input; images have 1 or 3 channels")
        # Imported here because importing timm takes seconds, and half of the commands do not prepare images.
        from timm.data import create_transform

        to_tensor = create_transform(
            input_size=(channels, *image_size),
            is_training=False,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
        )
        if self.assumed and not self.recorded:
            note(self.describe_assumption())
        return to_tensor.transforms

    def describe_assumption(self) -> str:
        """Return a line that lists the assumed values and the arguments that change them."""
        shown = {"crop_pct": f"{self.crop_pct:g}", "interpolation": self.interpolation}
        return describe_defaults(self.defaults, {**describe_colours(self.mean, self.std), **shown})


def cut_crops(image: Any, size: tuple[int, int], crops: int) -> list[Any]:
    """Return evenly spaced crops (height, width) along the longer side of a PIL image; a single one is centred."""
    height, width = size
    rooms = image.height - height, image.width - width
    along = int(rooms[1] >= rooms[0])  # the side with more free space: 0 vertical, 1 horizontal
    shares = [k / (crops - 1) for k in range(crops)] if crops > 1 else [0.5]
    parts = []
    for share in shares:
        top, left = (round(room * (share if side == along else 0.5)) for side, room in enumerate(rooms))
        parts.append(image.crop((left, top, left + width, top + height)))
    return parts


def _apply(steps: Iterable[Callable[[Any], Any]], value: Any) -> Any:
    for step in steps:
        value = step(value)
    return value


# Values that may be assumed, in the order in which messages list them.
VALUES = ("mean", "std", "crop_pct", "interpolation")


def still_assumed(defaults: Sequence[str], given: Iterable[str]) -> list[str]:
    """Return the names of the values still assumed once others are given; none if mean and std are both given."""
    rest = [name for name in defaults if name not in set(given)]
    return rest if {"mean", "std"} & set(rest) else []


def encode_assumed(defaults: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
    """Return the key `assumed` of a JSON object: true if all `values` are defaults, else their names."""
    return {"assumed": True if set(defaults) == set(values) else list(defaults)} if defaults else {}


def decode_assumed(value: Any, values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of default values from the output of `encode_assumed`; empty for anything else."""
    if value is True:
        return tuple(values)
    return tuple(name for name in values if name in value) if isinstance(value, list) else ()


def describe_colours(mean: Sequence[float], std: Sequence[float]) -> dict[str, str]:
    """Return mean and standard deviation as texts by their names."""
    return {name: ",".join(f"{value:g}" for value in values) for name, values in (("mean", mean), ("std", std))}


def describe_defaults(defaults: Sequence[str], values: Mapping[str, str]) -> str:
    """Return a line that lists which of the values were assumed."""
    assumed = ", ".join(f"`{name}` {value}" for name, value in values.items() if name in defaults)
    return f"preprocessing is not in the file; assumed: {assumed}"


def per_channel(changes: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """Return changes of a preprocessing with mean and std per channel, if one of the two is changed.

    Raises:
        InputError: the number of values is neither one nor the number of channels, or they are on a 0..255 scale.
    """
    changes, channels = dict(changes), len(mean)
    for name, present in (("mean", mean), ("std", std)):
        if isinstance(changes.get(name), Real):
            changes[name] = (changes[name],)
        count = len(changes.get(name, present))
        if count == 1:
            changes[name] = tuple(changes.get(name, present)) * channels
        elif count != channels:
            typed = ",".join(f"{value:g}" for value in changes[name])
            model = f"the model has {channels} channel{'s' if channels > 1 else ''}"
            raise InputError(f"`{name}` {typed}: {count} values, {model}")
        if name in changes and any(value > LARGEST for value in changes[name]):
            typed = ",".join(f"{value:g}" for value in changes[name])
            raise InputError(f"`{name}` {typed}: expected those of pixels from 0 to 1: divide by 255")
    return changes


def _parse_number(value: Any) -> float:
    """Convert a number to float; TypeError for a text or a boolean, which are different types in JSON."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"expected a number, found {value!r}")
    return float(value)
