"""The options that commands share: their types, their help, and what their texts mean."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated

import typer

from ..errors import InputError


class Importance(str, Enum):
    clip = "clip"
    l1 = "l1"
    l2 = "l2"
    mean = "mean"
    random = "random"
    delta = "delta"
    clip_paths = "clip-paths"
    saliency = "saliency"


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


def numbers(text: str | None, option: str, kind: type = float) -> tuple | None:
    """The numbers in "5,10,15"; None for None."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers with commas between them") from error


def image_sides(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels, of "224" or "224x256"."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) > 0 for side in sides):
        raise InputError(f"--image-size {text}: expected a side in pixels, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def share_kept(text: str, option: str) -> float:
    """0.6 of "60%" or "0.6"; whether that can be reached is not for this function to say."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{option} {text}: expected the share to keep, as 60% or 0.6") from error
    if not math.isfinite(value):
        raise InputError(f"{option} {text}: expected the share to keep, as 60% or 0.6")
    return value


def ratios_removed(text: str) -> tuple[float, ...]:
    """The shares of tokens to remove in "0.3" or "0.2,0.3,0.4"."""
    values = numbers(text, "--ratio")
    for value in values:
        if not 0 < value < 1:
            raise InputError(f"--ratio {value:g}: expected the share of tokens to remove, above 0 and below 1")
    return values


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint file, or a folder that prune wrote.")]
MaybeModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Folder or file; without it, the newest under compressed/.")
]
ImageSize = Annotated[
    str | None, typer.Option(help="Side of the images in pixels, or HEIGHTxWIDTH. Default: as trained.")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Step between patches in pixels. Default: the patch size.")]
Weights = Annotated[str, typer.Option(help="Entry of a training checkpoint: model or model_ema.")]
Unsafe = Annotated[bool, typer.Option("--unsafe-load", help="Unpickle a file that could run code; only if trusted.")]
Mean = Annotated[str | None, typer.Option(help="Normalisation mean, one value or one a channel (0.485,0.456,0.406).")]
Std = Annotated[str | None, typer.Option(help="Normalisation deviation, likewise.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized side that the centre crop keeps.")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")]
Data = Annotated[
    str | None, typer.Option(help="Folder of (class folders of) images, parquet, arrow or tar file, or hub name:split.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[Precision, typer.Option(help="Precision of matrix products when measuring.")]
DtypeOrNone = Annotated[
    Precision | None, typer.Option(help="Precision. Default: float32; for --ops on a GPU bfloat16 and float32.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; changes no result.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: none besides this one.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU. Default: all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Provider = Annotated[str, typer.Option(help="onnxruntime's execution provider: cpu, cuda, ...")]
Atol = Annotated[float, typer.Option(min=0, help="Largest difference of a logit that is let pass.")]
Dense = Annotated[str | None, typer.Option(help="Dense model to compare with. Default: the one it was made from.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the images drawn, and of whatever else is.")]
RecipeName = Annotated[
    str,
    typer.Option(help="How to fine-tune: default, top-vim (the paper's), or a JSON file with what differs from one."),
]
RecipeChanges = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a value of the recipe (lr=2e-3, mixup=0.8); repeatable."),
]
Ramp = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of the fine-tuning over which pruning rises from nothing to its target."),
]
TensorBoard = Annotated[str | None, typer.Option(help="Folder to log the fine-tuning to, for TensorBoard.")]


def recipe_of(name: str, changes: list[str] | None, epochs: int | None, ramp: float | None):
    """The recipe that the options ask for."""
    from ..compression.finetune.recipe import Recipe

    given = [f"{key}={value}" for key, value in (("epochs", epochs), ("ramp", ramp)) if value is not None]
    return Recipe.named(name).changed([*(changes or []), *given])
