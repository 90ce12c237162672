"""Opening images by name, and the images to use where no name is given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from .folders import read_folder
from .images import Images
from .shards import read_shards
from .tables import read_hub, read_tables

PHOTOGRAPH_CROPS = 64
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def open_images(name: str | Path, num_classes: int) -> Images:
    """Open the images of a data set, for a head of `num_classes` classes.

    Little of a large data set is kept in memory: names of files, offsets in shards, tables mapped from the disk.

    Args:
        name: a folder of class folders, a folder of images, a parquet or arrow file or a folder of them, a tar shard in
            webdataset's format or a folder of them, or a `datasets` hub name with its split (`owner/name:split`).

    Raises:
        InputError: the data does not exist, has no images, or has other classes than the head.
    """
    path = Path(name)
    if not path.exists():
        repo, colon, split = str(name).partition(":")
        if colon and repo and split:
            return read_hub(repo, split, num_classes)
        raise InputError(
            f"no data at {name}: expected a folder, a parquet, arrow or tar file, or a hub name with :split"
        )
    try:
        if not path.is_dir() and path.name.endswith(SHARD_SUFFIXES):
            return read_shards([path], str(name), num_classes)
        if not path.is_dir():
            return read_tables([path], str(name), num_classes)
        if shards := sorted(p for p in path.iterdir() if p.name.endswith(SHARD_SUFFIXES) and p.is_file()):
            return read_shards(shards, str(name), num_classes)
        tables = sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".arrow") and p.is_file())
        if tables:
            return read_tables(tables, str(name), num_classes)
        return read_folder(path, num_classes)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


def photographs(image_size: tuple[int, int], count: int = PHOTOGRAPH_CROPS, seed: int = 0) -> Images:
    """Return crops of scikit-learn's two sample photographs: unlabelled real images for use without other data."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(photo) for photo in load_sample_images().images]
    generator = np.random.default_rng(seed)
    boxes = []
    for i in range(count):
        width, height = originals[i % 2].size
        scale = generator.uniform(0.3, 1.0) * min(width / image_size[1], height / image_size[0])
        w, h = scale * image_size[1], scale * image_size[0]
        left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
        boxes.append((left, top, left + w, top + h))

    def read(i: int) -> Image.Image:
        size = (image_size[1], image_size[0])
        return originals[i % 2].resize(size, Image.Resampling.BICUBIC, box=boxes[i])

    return Images("sample photographs", count, read, lambda i: f"crop {i} of the sample photographs", stand_in=True)


def find_images(
    data: str | Path | None, image_size: tuple[int, int], num_classes: int, recorded: str | None = None
) -> Images:
    """Return the images to use with a model: `data`, else those recorded with it, else sample photographs.

    Args:
        data: as for `open_images`, or None.
        image_size: (height, width) of the model's images in pixels. num_classes: classes of its head.
        recorded: an absolute path or a hub name; it is ignored if the path no longer exists.

    Raises:
        InputError: as `open_images`.
    """
    if (
        data is None
        and recorded is not None
        and (":" in recorded or (os.path.isabs(recorded) and os.path.exists(recorded)))
    ):
        data = recorded
    return photographs(image_size) if data is None else open_images(data, num_classes)
