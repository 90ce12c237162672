"""Values of options from their texts: "60%", "224x256", "5,10,15"."""

from __future__ import annotations

import math
from enum import Enum

from ..errors import InputError

# For the help and for completion, which do not wait for torch; the library reports a metric that it does not know.
IMPORTANCE_NAMES = ("clip", "l1", "l2", "mean", "random", "delta", "clip-paths", "saliency")


class GapSource(str, Enum):
    calibrated = "calibrated"
    bias = "bias"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Stored(str, Enum):
    float32 = "float32"
    float16 = "float16"


class ScanForm(str, Enum):
    auto = "auto"
    scan = "scan"
    linear_attention = "linear-attention"
    standard = "standard"


def parse_numbers(text: str | None, option: str, kind: type = float) -> tuple | None:
    """The numbers in "5,10,15"; None for None."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers with commas between them") from error


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels, of "224" or "224x256"."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) > 0 for side in sides):
        raise InputError(f"--image-size {text}: expected a side in pixels, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def parse_share(text: str | None, option: str) -> float | None:
    """0.6 of "60%" or "0.6"; whether that can be reached is for the library to say."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{option} {text}: expected the share to keep, as 60% or 0.6") from error
    if not math.isfinite(value):
        raise InputError(f"{option} {text}: expected the share to keep, as 60% or 0.6")
    return value


def parse_ratios(text: str | None) -> tuple[float, ...] | None:
    """The shares of tokens to remove in "0.3" or "0.2,0.3,0.4"."""
    values = parse_numbers(text, "--ratio")
    for value in values or ():
        if not 0 < value < 1:
            raise InputError(f"--ratio {value:g}: expected the share of tokens to remove, above 0 and below 1")
    return values
