"""File names in a recipe, which are relative to its folder, and their conversion for a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..hub_names import parse_hub_name

WRITTEN = ("output", "tensorboard")  # options whose file need not exist yet


def from_recipe(name: Any, key: str, base: Path) -> Any:
    """Convert a name in a recipe, relative to the recipe's folder, to one relative to the working directory.

    Args:
        key: option key of the name. Names that are not files, such as Hub datasets or fine-tuning recipes, are kept.
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
    # The working directory may contain an unrelated file with this name.
    local = key in WRITTEN or name.startswith(".") or any(os.path.exists(path) for path, _ in _candidates(name))
    if key == "model":
        local |= parse_hub_name(name) is None
    return os.path.relpath(base / name) if local else name


def to_recipe(name: Any, folder: Path) -> Any:
    """Convert a name relative to the working directory to one relative to `folder`; other names are kept."""
    if not isinstance(name, str) or os.path.isabs(name):
        return name
    for path, rest in _candidates(name):
        if os.path.exists(path):
            try:
                relative = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
            except ValueError:  # another Windows drive
                return os.path.abspath(path) + rest
            return (relative if relative.startswith(".") else f"./{relative}") + rest
    return name


def _candidates(name: str) -> Iterator[tuple[str, str]]:
    """Yield (path, rest) for the ways to read a data name, which may end in `:split`."""
    yield name, ""
    head, colon, tail = name.rpartition(":")
    if head and colon:
        yield head, f":{tail}"
