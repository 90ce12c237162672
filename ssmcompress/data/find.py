"""Opening images by name, and the images to use where no name is given."""

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
# owner/name or name, with a split, or a configuration and a split, as `datasets` writes them: `train[:10%]`.
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]+(/[\w.-]+)?)(:(?P<split>[^\s/\\]+))?", re.ASCII)


def open_images(
    name: str | Path,
    num_classes: int,
    *,
    task: Task = CLASSIFICATION,
    reduce_zero_label: bool | None = None,
    videos: bool = False,
) -> Images:
    """Open the images, or the videos, of a data set, for a head of `num_classes` classes.

    Little of a large data set is kept in memory: names of files, offsets in shards, tables mapped from the disk. What
    could be understood in more than one way is an error, or a line says how it was understood (`ssmcompress.progress`):

    - A class is a folder directly in the data's folder; images at any depth in it count, as in torchvision's
      ImageFolder. Synset ids are ImageNet's classes for a head of 1,000. Numbers are classes by their value: 0 to K-1,
      or 1 to K, for K classes, or some numbers below K, counted from 0, unless they could mean other classes. Other
      names are sorted as text, and must be as many as the classes.
    - Folders without images are no classes, unless they are needed to reach `num_classes`.
    - Hidden files, macOS's `._` files, `__MACOSX`, `lost+found` and the like are no data. Other files that are left out
      are named.
    - Folders, tables or shards named by split (`train`, `test-00000-of-00001.parquet`) are never put together.
    - The labels of a table are its column `label`, or one of a similar name or of `datasets`' type ClassLabel. Labels
      that are text are classes as the names of class folders are.

    For segmentation, images have masks instead of labels, pictures of one channel whose values are class numbers (of a
    picture with a palette, the indices), and 255 for pixels without a class:

    - In folders, images/ and annotations/ next to each other have files of the same names, also below folders of
      splits: ADE20K's layout, by its folder and split (`ADEChallengeData2016:validation`) or by the folder of the
      images. Masks are PNG files.
    - The masks of a table are its column `annotation`, `mask`, `label` or `segmentation`, if it holds pictures.
    - In other data images count as unlabelled, whatever labels they have.
    - An image without a mask, a mask of another size or of several channels, and an unreadable one are errors. All are
      checked when the data is opened, if there are up to 4,000; else, and the labels in every case, when they are read.

    Videos are read from folders and .npz files alone, by the same rules for classes, splits and files that count. A
    video is a folder of pictures, whose names are in natural order, an .npy or .npz file of frames (frames, height,
    width, 3) uint8, or a video file, for which PyAV must be installed. `Images.read` then gives a `Video`:

    - CLASS/VIDEO/0001.jpg and CLASS/VIDEO.mp4 are labelled. Without CLASS, videos have no labels: pictures directly in
      the folders of a data set are videos, not classes. They are refused if they differ in size in a folder, or their
      folders are as many as the classes, or have the names of ImageNet's.
    - One .npz file has `videos` (videos, frames, height, width, 3) uint8, and may have `labels`.

    Args:
        name: a folder of class folders, a folder of images, a parquet or arrow file or a folder of them, a folder that
            `datasets` saved, a tar shard in webdataset's format or a folder of them; one split of a folder
            (`folder:test`); or a `datasets` hub name with its split (`owner/name:split`, `owner/name:config:split`).
        task: what the images are for, `model.task`.
        reduce_zero_label: for segmentation, whether the labels of masks count from 1, and 0 is ignored. None: this is
            so for ADE20K, recognised by the names of its files or columns, and not for other data.
        videos: whether the model takes videos, so that these are read (`model.frames` is not None).

    Raises:
        InputError: the data does not exist, has no images, does not say which images are meant, or has other classes
            than the head.
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
    """Check that there is data of this name, with its split, by the names of files alone; the hub is not asked.

    Raises:
        InputError: there is none.
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
    """Raise InputError unless there is such a split of images or of videos: the model is not known yet."""
    try:
        find_reader(path, name, split)
    except InputError as error:
        try:
            find_reader(path, name, split, videos=True)
        except InputError:
            raise error from None


def _parse_hub_name(name: str) -> re.Match[str]:
    """Return the match of a hub name with its split; InputError for any other name."""
    hub = HUB_NAME.fullmatch(name)
    if hub and hub["split"]:
        return hub
    advice = f"; a data set of the hub needs its split, as {name}:validation" if hub and "/" in name else ""
    raise InputError(f"no data at {name}: expected {EXPECTED}, or a hub name with :split{advice}")


def _local(name: str) -> tuple[Path | None, str | None]:
    """Return the path that a name means, None if there is none, and the split that follows it after a colon."""
    whole = os.path.expanduser(name)
    folder, colon, split = whole.rpartition(":")
    if os.path.exists(whole):  # a path may itself have a colon
        return Path(whole), None
    return (Path(folder), split) if colon and folder and split and os.path.exists(folder) else (None, None)


def absolute_name(name: str) -> str:
    """Return a data set's name as it is found from any working directory."""
    path, split = _local(name)
    return name if path is None else str(path.absolute()) + (f":{split}" if split else "")


def photographs(
    image_size: tuple[int, int], count: int = PHOTOGRAPH_CROPS, seed: int = 0, frames: int | None = None
) -> Images:
    """Return crops of scikit-learn's two sample photographs: unlabelled real images for use without other data.

    Args:
        frames: number of frames of videos, in which a crop moves over its photograph; None: images.
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

    places = generator.uniform(size=(count, 2))  # where the crops of a video move to

    def read(i: int) -> Image.Image | Video:
        if frames is None:
            return cut(i, boxes[i])
        return Video(frames, lambda t: cut(i, _move(boxes[i], places[i], originals[i % 2].size, t / frames)))

    return Images("sample photographs", count, read, lambda i: f"crop {i} of the sample photographs", stand_in=True)


def _move(
    box: tuple[float, ...], place: Sequence[float], size: tuple[int, int], share: float
) -> tuple[float, float, float, float]:
    """Return a box on its way to another place in a picture.

    Args:
        box: (left, top, right, bottom). place: of the end, a share of the room that it has on each side.
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
    """Return the images to use with a model: `data`, else those recorded with it, else sample photographs.

    Args:
        data: as for `open_images`, or None.
        image_size: (height, width) of the model's images in pixels. num_classes: classes of its head.
        recorded: an absolute path, with a split or without, or a hub name; a path that no longer exists is ignored.
        task, reduce_zero_label: as `open_images` takes them.
        frames: number of frames that the model takes, so that videos are opened; None: it takes images.

    Raises:
        InputError: as `open_images`.
    """
    if data is None and recorded and _is_usable(recorded):
        data = recorded
    if data is None:
        make_rules(task, num_classes, reduce_zero_label)  # refuses what the task does not have
        return photographs(image_size, frames=frames)
    videos = frames is not None
    return open_images(data, num_classes, task=task, reduce_zero_label=reduce_zero_label, videos=videos)


def _is_usable(recorded: str) -> bool:
    """Return whether a recorded name is an absolute path that exists, or a hub name with its split.

    A relative path means other data in another working directory.
    """
    path, _ = _local(recorded)
    if path is not None:
        return path.is_absolute()
    hub = HUB_NAME.fullmatch(recorded)
    return bool(hub and hub["split"])
