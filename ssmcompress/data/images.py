"""Images: a list of pictures with or without labels, each of them read when it is asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Images:
    """Pictures that are read when asked for.

    Attributes:
        name: what the user called them. size: how many there are.
        read: index -> PIL image; raises OSError for one that cannot be read.
        describe: index -> how to name that picture to a person.
        labels: a class index for each, or None.
        stand_in: whether they were taken for lack of the user's own.
        classes: the names of the classes, in their order, where they are known.
    """

    name: str
    size: int
    read: Callable[[int], Image.Image]
    describe: Callable[[int], str]
    labels: tuple[int, ...] | None = None
    stand_in: bool = False
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.size

    def readable(self, index: int) -> bool:
        """Whether that picture can be read."""
        try:
            self.read(index)
        except OSError:
            return False
        return True


def decode(source: Any, root: Path | None = None) -> Image.Image:
    """A PIL image of a path, of encoded bytes, of a `datasets` image or of an array; OSError if it is none."""
    try:
        if isinstance(source, dict):
            source = source.get("bytes") or (root or Path()) / source["path"]
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif not isinstance(source, Path):
            return Image.fromarray(_bytes(np.asarray(source)))
        with Image.open(source) as image:
            image.load()
            return _eight_bits(image)
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them
        raise OSError(f"unreadable image: {error}") from error


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels as 0..255; an OSError-to-be for anything whose scale would be a guess."""
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"pixels are {pixels.dtype}, expected whole numbers from 0 to 255")
    return pixels.astype(np.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey values scaled down; PIL's own conversion cuts everything above 255 to white."""
    if image.mode == "F":
        raise ValueError("an image of floating-point values has no known scale")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        return Image.fromarray(_bytes(pixels // 257 if image.mode != "I" or pixels.max() > 255 else pixels))
    return image
