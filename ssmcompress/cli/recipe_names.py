"""Names of files in a recipe, which are relative to its folder, and the same names for a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..hub_names import parse_hub_name

WRITTEN = ("output", "tensorboard")  # options whose file need not be there yet


def from_recipe(name: Any, key: str, base: Path) -> Any:
    """Return a name in a recipe as one from the working folder: what is beside the recipe is meant.

    Args:
        key: of the name. What a data set on the hub or a recipe of fine-tuning is called, for instance, stays as it is.
        base: the folder of the recipe.
    """
    if not isinstance(name, str) or os.path.isabs(name):
        return name
    if name.startswith("~"):
        return os.path.expanduser(name)
    base = Path(os.path.realpath(base))
    for path, rest in _candidates(name):
        if (base / path).exists():
            return os.path.relpath(base / path) + rest
    # Not that of the working folder, which may happen to have one of this name.
    local = key in WRITTEN or name.startswith(".") or any(os.path.exists(path) for path, _ in _candidates(name))
    if key == "model":
        local |= parse_hub_name(name) is None
    return os.path.relpath(base / name) if local else name


def to_recipe(name: Any, folder: Path) -> Any:
    """Return a name from the working folder as one from `folder`; absolute ones, and those of no files, stay."""
    if not isinstance(name, str) or os.path.isabs(name):
        return name
    for path, rest in _candidates(name):
        if os.path.exists(path):
            try:
                relative = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
            except ValueError:  # another drive of Windows
                return os.path.abspath(path) + rest
            return (relative if relative.startswith(".") else f"./{relative}") + rest
    return name


def _candidates(name: str) -> Iterator[tuple[str, str]]:
    """Yield (path, rest) for the ways to read a name of data, of which `:split` may be the end."""
    yield name, ""
    head, colon, tail = name.rpartition(":")
    if head and colon:
        yield head, f":{tail}"
