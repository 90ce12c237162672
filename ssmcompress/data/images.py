"""Images: a collection of images or videos, with or without labels or masks, each read on demand."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import raise_if_out_of_memory


@dataclass(frozen=True)
class Images:
    """Images that are read on demand.

    Attributes:
        name: the name given by the user. size: the number of images.
        read: function from an index to a PIL image, or to a `Video` of `ssmcompress.data.video`; it raises OSError for
            an unreadable image. Frames of a video are read later.
        describe: function from an index to a name of that image for messages.
        labels: a class index for each image, or None.
        masks: function from an index to the class numbers of the pixels (height, width) uint8, 255 for pixels without a
            class; it raises InputError for a mask that cannot be used. None: there are none.
        empty_masks: number of masks if none of them labels a pixel; the images are then treated as unlabelled.
        stand_in: whether these are sample images, used because the user gave none.
        classes: the names of the classes, in order, if known.
    """

    name: str
    size: int
    read: Callable[[int], Image.Image] = field(repr=False)
    describe: Callable[[int], str] = field(repr=False)
    labels: tuple[int, ...] | None = field(default=None, repr=False)
    stand_in: bool = False
    classes: tuple[str, ...] | None = field(default=None, repr=False)
    masks: Callable[[int], np.ndarray] | None = field(default=None, repr=False)
    empty_masks: int = 0

    @property
    def labelled(self) -> bool:
        """Whether there are labels or masks."""
        return self.labels is not None or self.masks is not None

    def __len__(self) -> int:
        return self.size

    def readable(self, index: int) -> bool:
        """Return whether the image at `index` can be read."""
        try:
            self.read(index).load()
        except OSError:
            return False
        return True


# The EXIF tag of the orientation, and the transposition for each of its values.
ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: Any, root: Path | None = None, *, shown: bool = False) -> Image.Image:
    """Return a PIL image from a path, encoded bytes, a `datasets` image or an array; OSError if it is unreadable.

    Args:
        shown: whether to apply the rotation in the EXIF data, as viewers and annotation tools do. Classifiers get the
            stored pixels, as from torchvision's ImageFolder.
    """
    try:
        source = find_source(source, root)
        if isinstance(source, np.ndarray):
            return Image.fromarray(_to_uint8(source))
        image = load(source)
        way = TRANSPOSITIONS.get(find_orientation(image)) if shown else None
        return _reduce_depth(image if way is None else image.transpose(way))
    except Exception as error:  # PIL's decoders raise many kinds of errors for a damaged file
        raise_if_out_of_memory(error)
        raise OSError(f"unreadable image: {error}") from error


def find_source(source: Any, root: Path | None) -> Path | io.BytesIO | np.ndarray:
    """Return the source to read an image from: a path below `root`, encoded bytes, or an array."""
    if isinstance(source, dict):
        source = source.get("bytes") or (root or Path()) / source["path"]
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return source if isinstance(source, Path) else np.asarray(source)


def load(source: Path | io.BytesIO) -> Image.Image:
    """Load a PIL image in its own mode; PIL's decoders raise many kinds of errors for a damaged file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is fine; PIL rejects huge ones
        with Image.open(source) as image:
            image.load()
    if isinstance(image.info.get("transparency"), bytes):
        # Models take opaque images. PIL's conversion of a palette ignores this entry too, but with a Python warning.
        del image.info["transparency"]
    return image


def find_orientation(image: Image.Image) -> int:
    """Return the orientation in the EXIF data of a picture, 1 to 8; 1 if it is missing or damaged.

    `PIL.ImageOps.exif_transpose` reads the same tag, but raises an error for damaged data, which would make the whole
    picture unreadable.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception as error:  # PIL raises many kinds of errors for damaged EXIF data
        raise_if_out_of_memory(error)
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (height, width[, channels]) as uint8.

    Raises:
        ValueError: they are not a picture, or their scale is unknown; `decode` converts it to an OSError.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3):
        raise ValueError(f"pixels are {pixels.ndim}-dimensional, expected rows and columns")
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"pixels are {pixels.dtype}, expected whole numbers from 0 to 255")
    return pixels.astype(np.uint8)


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey values to 8 bits; PIL's own conversion clips all values above 255 to white."""
    if image.mode == "F":
        raise ValueError("an image of floating-point values has no known scale")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        return Image.fromarray(_to_uint8(pixels // 257 if image.mode != "I" or pixels.max() > 255 else pixels))
    return image
