"""Checks of the names given to a command before anything is loaded: swapped arguments and mistyped paths.

The kind of a file follows from its suffix, and that of a folder from the names in it; no file is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from ..errors import InputError
from ..hub_names import TEXTS, WEIGHTS
from ..suffixes import ARRAY_SUFFIXES, IMAGE_SUFFIXES, TABLE_SUFFIXES, VIDEO_SUFFIXES

MODEL, ONNX, IMAGES, REPORT, OTHER = "a model", "an ONNX file", "images", "a report", "other"
DATA = (
    *IMAGE_SUFFIXES,
    *TABLE_SUFFIXES,
    *VIDEO_SUFFIXES,
    *ARRAY_SUFFIXES,
)  # not tar: checkpoints may be called .pth.tar
LOOKED_AT = 10_000  # names checked in a folder, which may hold millions of images


def recognise(name: str) -> str | None:
    """Return what a name refers to: one of the constants above; None if it is unknown or does not exist."""
    path, lower = Path(name), name.lower()
    if lower.endswith(".onnx"):
        return ONNX
    if not path.exists():
        return None
    if not path.is_dir():
        kinds = {WEIGHTS: MODEL, DATA: IMAGES, TEXTS: REPORT}
        return next((kind for endings, kind in kinds.items() if lower.endswith(endings)), None)
    names = os.listdir(path)
    if "model.safetensors" in names:
        return MODEL
    if "config.json" in names or any(name.lower().endswith(WEIGHTS) for name in names):
        return OTHER
    return IMAGES if _holds_images(path, depth=2) else OTHER


def _holds_images(folder: Path, depth: int) -> bool:
    """Return whether a folder, or one up to `depth` levels below it, contains images."""
    try:
        entries = list(islice(os.scandir(folder), LOOKED_AT))
    except OSError:
        return False
    if any(entry.name.lower().endswith((*DATA, ".tar")) for entry in entries):
        return True
    below = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return depth > 0 and any(_holds_images(path, depth - 1) for path in below[:20])


def check_model(name: str, advice: str = "") -> None:
    """Check that the name given for a model does not refer to something else.

    Args:
        advice: added to the message about images, if the command takes images.

    Raises:
        InputError: it does; the message says what it is, and which option or command takes it.
    """
    kind = recognise(name)
    if kind == ONNX:
        raise InputError(
            f"{name} is the name of an ONNX file; expected the checkpoint or folder that it is made from. "
            f"`verify MODEL {name}` checks it, `export MODEL --onnx -o {name}` writes it"
        )
    if kind == IMAGES:
        raise InputError(f"{name} holds images; expected a checkpoint or a folder that prune wrote{advice}")
    if kind == REPORT:
        raise InputError(f"{name} is not a model; expected a checkpoint or a folder that prune wrote")


def check_inputs(model: str, images: Mapping[str, str | None]) -> None:
    """Check the names of a model and of datasets before anything is loaded.

    Args:
        images: option -> its value, None if it is not given.

    Raises:
        InputError: two of them are swapped, one is something else, or there is no data with that name.
    """
    given = {option: name for option, name in images.items() if name is not None}
    swapped = [option for option, name in given.items() if recognise(name) == MODEL and recognise(model) == IMAGES]
    if swapped:
        option, name = swapped[0], given[swapped[0]]
        raise InputError(f"{model} holds images and {option} {name} is a model: swap them, {name} {option} {model}")
    check_model(model, f" (images: {next(iter(images))})")
    for option, name in given.items():
        kind = recognise(name)
        if kind in (MODEL, ONNX, REPORT):
            what = {MODEL: "is a model", ONNX: "is an ONNX file", REPORT: "is not a dataset"}[kind]
            raise InputError(f"{option} {name} {what}; expected images: a folder, a parquet, arrow or tar file")
        if kind is None and not Path(name).exists():
            from ..data.find import check_name

            check_name(name)


def check_onnx_pair(model: str, file: str) -> None:
    """Check the two arguments of a command that takes a model and its ONNX file.

    Raises:
        InputError: they are swapped, or the second one is not an ONNX file.
    """
    if recognise(model) == ONNX and recognise(file) != ONNX:
        raise InputError(f"{model} is an ONNX file and {file} is not: swap them, {file} {model}")
    if recognise(file) in (MODEL, IMAGES, REPORT):
        raise InputError(f"{file} is not an ONNX file; expected the file that `export {model} --onnx` wrote")
    if not Path(file).exists():
        raise InputError(f"{file}: no such file; `ssmcompress export {model} --onnx -o {file}` writes it")
