"""Images in folders: one folder for each class, or files without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from .images import Images, decode
from .labels import class_index

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def read_folder(path: Path, num_classes: int) -> Images:
    """Return the images of a folder, labelled by class folder if it has any; InputError if they cannot be used."""
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    unlabelled = _image_files(path)
    by_class = {folder.name: _image_files(folder) for folder in folders}
    if any(by_class.values()):
        if unlabelled:
            raise InputError(f"{path} holds both images and class folders; name one of the two")
        index = class_index(list(by_class), num_classes, str(path))
        files = [f"{name}/{file}" for name, files in by_class.items() for file in files]
        images = _from_files(path, files, tuple(index[name] for name, files in by_class.items() for _ in files))
        return replace(images, classes=tuple(sorted(index, key=index.get)) if len(index) == num_classes else None)
    if unlabelled:
        return _from_files(path, unlabelled, None)
    nested = [f.name for f in folders if any(p.is_dir() for p in f.iterdir())]
    hint = f"; did you mean {path / nested[0]}?" if nested else ""
    raise InputError(f"no images in {path}{hint}")


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _from_files(path: Path, files: Sequence[str], labels: tuple[int, ...] | None) -> Images:
    # One array of bytes: a million names take 40 MB instead of 400, and worker processes share them.
    names = np.array([os.fsencode(file) for file in files])

    def file_path(i: int) -> Path:
        return path / os.fsdecode(bytes(names[i]))

    return Images(str(path), len(files), lambda i: decode(file_path(i)), lambda i: str(file_path(i)), labels)
