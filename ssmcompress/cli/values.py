"""Parsing of option values: "60%", "224x256", "5,10,15", "4x3"."""

from __future__ import annotations

import math
from enum import Enum

from ..errors import InputError

# For the help and for completion, which must not import torch; the library reports unknown metrics.
IMPORTANCE_NAMES = ("clip", "l1", "l2", "mean", "random", "delta", "clip-paths", "saliency", "attention")


def parse_merge(text: str | None) -> tuple[int, float] | None:
    """Parse "8" or "8,-1": the number of tokens merged in every layer, and an inflection; InputError if invalid."""
    if text is None:
        return None
    number, _, inflection = text.partition(",")
    try:
        return int(number), float(inflection or 0)
    except ValueError as error:
        raise InputError(
            f"--merge {text!r}: expected a number of tokens, such as 8, or with an inflection, 8,-1"
        ) from error


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
    """Parse the numbers in "5,10,15"; None for None."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: expected comma-separated numbers") from error


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse (height, width) in pixels from "224" or "224x256"."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) > 0 for side in sides):
        raise InputError(f"--image-size {text}: expected a side in pixels, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def parse_views(text: str | None) -> tuple[int, int] | None:
    """Parse (clips, crops) from "4x3"; None for None. The library reports numbers that are too large."""
    if text is None:
        return None
    counts = text.lower().split("x")
    if len(counts) != 2 or not all(count.isdecimal() and len(count) < 6 and int(count) > 0 for count in counts):
        raise InputError(f"--views {text}: expected CLIPSxCROPS, such as 4x3")
    return int(counts[0]), int(counts[1])


def parse_share(text: str | None, option: str, what: str = "a share") -> float | None:
    """Parse a share: 0.6 for "60%" or "0.6"; None for None. The library reports shares that cannot be reached.

    Args:
        what: the quantity, for the message.

    Raises:
        InputError: not a number, or a number of 2 and more without a percent sign, which may be meant as percent.
    """
    if text is None:
        return None
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{option} {text}: expected {what}, such as 30% or 0.3")
    if value >= 2 and not percent:
        raise InputError(f"{option} {text}: expected {what}, such as {value:g}% or {value / 100:g}")
    return value


def parse_shares(text: str | None, option: str, what: str = "a share") -> tuple[float, ...] | None:
    """Parse the shares in "20%,30%" or "0.2,0.3"; None for None.

    Raises:
        InputError: as for `parse_share`; or "0,3", which may be meant as 0.3.
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) == 2 and parts[0].strip() == "0" and parts[1].strip().isdecimal():
        raise InputError(f"{option} {text}: a comma separates shares; did you mean 0.{parts[1].strip()}?")
    return tuple(parse_share(part, option, what) for part in parts)


def parse_ratios(text: str | None) -> tuple[float, ...] | None:
    """Parse the shares of tokens to remove in "0.3", "30%" or "0.2,0.3,0.4"."""
    values = parse_shares(text, "--ratio", "the share of tokens to remove")
    for value in values or ():
        if not 0 < value < 1:
            raise InputError(f"--ratio {text}: expected the share of tokens to remove, above 0 and below 1")
    return values
