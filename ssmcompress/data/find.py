"""Opening images by name, and the default images if no name is given."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..tasks import CLASSIFICATION, Task
from .images import Images
from .local import EXPECTED, find_reader
from .masks import make_rules
from .pairs import find_pair_reader
from .tables import read_hub
from .video import Video
from .videos import EXPECTED as VIDEOS

PHOTOGRAPH_CROPS = 64
# owner/name or name, with a split, or with a configuration and a split, in the syntax of `datasets`: `train[:10%]`.
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]+(/[\w.-]+)?)(:(?P<split>[^\s/\\]+))?", re.ASCII)


def open_images(
    name: str | Path,
    num_classes: int,
    *,
    task: Task = CLASSIFICATION,
    reduce_zero_label: bool | None = None,
    videos: bool = False,
) -> Images:
    """Open the images or videos of a dataset, for a head of `num_classes` classes.

    Little of a large dataset is kept in memory: file names, offsets in shards, tables mapped from disk. An ambiguity is
    an error, or a note says how it was resolved (`ssmcompress.progress`):

    - A class is a folder directly in the data's folder; it contains images at any depth, as in torchvision's
      ImageFolder. Synset ids are ImageNet's classes for a head of 1,000. Numbers are class indices: 0 to K-1, or 1 to
      K, for K classes, or some numbers below K, counted from 0, unless they could mean other classes. Other names are
      sorted as text, and their number must equal the number of classes.
    - Folders without images are not classes, unless they are needed to reach `num_classes`.
    - Hidden files, macOS's `._` files, `__MACOSX`, `lost+found` and the like are ignored. A note lists other files that
      are left out.
    - Folders, tables or shards named by split (`train`, `test-00000-of-00001.parquet`) are never combined.
    - The labels of a table are its column `label`, or one with a similar name or with `datasets`' type ClassLabel. Text
      labels are mapped to classes like the names of class folders.

    For segmentation, images have masks instead of labels: single-channel pictures whose values are class numbers (for a
    palette picture, the indices), with 255 for pixels without a class:

    - In folders, images/ and annotations/ next to each other contain files with the same names, optionally below split
      folders: ADE20K's layout, given by its folder and split (`ADEChallengeData2016:validation`) or by the folder of
      the images. Masks are PNG files.
    - The masks of a table are its column `annotation`, `mask`, `label` or `segmentation`, if it contains pictures.
    - In other data, images are treated as unlabelled, even if they have labels.
    - An image without a mask, a mask of another size or with several channels, and an unreadable mask are errors. All
      masks are checked when the data is opened if there are up to 4,000; otherwise, and for labels in any case, they
      are checked when they are read.

    Videos are read only from folders and .npz files, with the same rules for classes, splits and files. A video is a
    folder of pictures in natural order of their names, an .npy or .npz file of frames (frames, height, width, 3) uint8,
    or a video file, which requires PyAV. `Images.read` then returns a `Video`:

    - CLASS/VIDEO/0001.jpg and CLASS/VIDEO.mp4 are labelled. Without CLASS, videos have no labels: pictures directly in
      the folders of a dataset are frames of videos, not images of classes. They are rejected if they differ in size
      within a folder, or if there are as many folders as classes, or if the folders have the names of ImageNet's.
    - A single .npz file has `videos` (videos, frames, height, width, 3) uint8, and optionally `labels`.

    Args:
        name: a folder of class folders, a folder of images, a parquet or arrow file or a folder of them, a folder saved
            by `datasets`, a tar shard in webdataset's format or a folder of them; one split of a folder
            (`folder:test`); or a `datasets` hub name with its split (`owner/name:split`, `owner/name:config:split`).
        task: the task that the images are for, `model.task`.
        reduce_zero_label: for segmentation, whether the labels of masks count from 1, and 0 is ignored. None: true for
            ADE20K, recognised by the names of its files or columns, and false for other data.
        videos: whether the model takes videos, so that these are read (`model.frames` is not None).

    Raises:
        InputError: the data does not exist, has no images, is ambiguous, or has other classes than the head.
    """
    masks = make_rules(task, num_classes, reduce_zero_label)
    if not str(name).strip():
        raise InputError("the name of the data is empty")
    path, split = _local(str(name))
    try:
        if path is not None:
            reader = None if masks is None else find_pair_reader(path, str(name), split)
            return (reader or find_reader(path, str(name), split, videos))(num_classes, masks)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or name}: {error.strerror or error}") from error
    if videos:
        raise InputError(f"no videos at {name}: expected {VIDEOS}")
    hub = _parse_hub_name(str(name))
    return read_hub(hub["repo"], hub["split"], num_classes, masks)


def check_name(name: str) -> None:
    """Check that data with this name and split exists, by file names only; the hub is not contacted.

    Raises:
        InputError: it does not exist.
    """
    path, split = _local(name)
    try:
        if path is None:
            _parse_hub_name(name)
        elif split is not None and find_pair_reader(path, name, split) is None:
            _check_split(path, name, split)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or name}: {error.strerror or error}") from error


def _check_split(path: Path, name: str, split: str) -> None:
    """Raise InputError unless the split exists for images or for videos, since the model is not known yet."""
    try:
        find_reader(path, name, split)
    except InputError as error:
        try:
            find_reader(path, name, split, videos=True)
        except InputError:
            raise error from None


def _parse_hub_name(name: str) -> re.Match[str]:
    """Match a hub name with its split; InputError for any other name."""
    hub = HUB_NAME.fullmatch(name)
    if hub and hub["split"]:
        return hub
    advice = f"; a Hub dataset needs its split, such as {name}:validation" if hub and "/" in name else ""
    raise InputError(f"no data at {name}: expected {EXPECTED}, or a hub name with :split{advice}")


def _local(name: str) -> tuple[Path | None, str | None]:
    """Return the local path in a name, None if it does not exist, and the split after a colon."""
    whole = os.path.expanduser(name)
    folder, colon, split = whole.rpartition(":")
    if os.path.exists(whole):  # a path may itself contain a colon
        return Path(whole), None
    return (Path(folder), split) if colon and folder and split and os.path.exists(folder) else (None, None)


def absolute_name(name: str) -> str:
    """Return a dataset's name in a form that is valid from any working directory."""
    path, split = _local(name)
    return name if path is None else str(path.absolute()) + (f":{split}" if split else "")


def photographs(
    image_size: tuple[int, int], count: int = PHOTOGRAPH_CROPS, seed: int = 0, frames: int | None = None
) -> Images:
    """Return crops of scikit-learn's two sample photographs: unlabelled real images, used if no other data is given.

    Args:
        frames: number of frames of videos, in which a crop moves across its photograph; None: images.
    """
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

    def cut(i: int, box: tuple[float, ...]) -> Image.Image:
        size = (image_size[1], image_size[0])
        return originals[i % 2].resize(size, Image.Resampling.BICUBIC, box=box)

    places = generator.uniform(size=(count, 2))  # end positions of the moving crops

    def read(i: int) -> Image.Image | Video:
        if frames is None:
            return cut(i, boxes[i])
        return Video(frames, lambda t: cut(i, _move(boxes[i], places[i], originals[i % 2].size, t / frames)))

    return Images("sample photographs", count, read, lambda i: f"crop {i} of the sample photographs", stand_in=True)


def _move(
    box: tuple[float, ...], place: Sequence[float], size: tuple[int, int], share: float
) -> tuple[float, float, float, float]:
    """Return a box moved part of the way to another position in a picture.

    Args:
        box: (left, top, right, bottom). place: end position, relative to the free space along each side.
        size: (width, height) of the picture. share: of the way, 0 to 1.
    """
    sides = box[2] - box[0], box[3] - box[1]
    ends = (p * (whole - side) for p, whole, side in zip(place, size, sides, strict=True))
    left, top = (start + share * (end - start) for start, end in zip(box[:2], ends, strict=True))
    return left, top, left + sides[0], top + sides[1]


def find_images(
    data: str | Path | None,
    image_size: tuple[int, int],
    num_classes: int,
    recorded: str | None = None,
    *,
    task: Task = CLASSIFICATION,
    reduce_zero_label: bool | None = None,
    frames: int | None = None,
) -> Images:
    """Return the images to use with a model: `data`, else those recorded in it, else sample photographs.

    Args:
        data: as for `open_images`, or None.
        image_size: (height, width) of the model's images in pixels. num_classes: classes of its head.
        recorded: an absolute path, with or without a split, or a hub name; a path that no longer exists is ignored.
        task, reduce_zero_label: as for `open_images`.
        frames: number of frames that the model takes, so that videos are opened; None: it takes images.

    Raises:
        InputError: as for `open_images`.
    """
    if data is None and recorded and _is_usable(recorded):
        data = recorded
    if data is None:
        make_rules(task, num_classes, reduce_zero_label)  # rejects options that the task does not have
        return photographs(image_size, frames=frames)
    videos = frames is not None
    return open_images(data, num_classes, task=task, reduce_zero_label=reduce_zero_label, videos=videos)


def _is_usable(recorded: str) -> bool:
    """Return whether a recorded name is an absolute path that exists, or a hub name with its split.

    A relative path would refer to other data in another working directory.
    """
    path, _ = _local(recorded)
    if path is not None:
        return path.is_absolute()
    hub = HUB_NAME.fullmatch(recorded)
    return bool(hub and hub["split"])
