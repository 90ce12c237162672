"""Datasets of videos: folders of videos, with or without class folders, and arrays of several videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..extras import require_extra
from ..progress import note
from ..suffixes import ARRAY_SUFFIXES, VIDEO_SUFFIXES
from .folders import file_paths, label_by_folder
from .images import Images
from .labels import SYNSET, check_labels, some_names, text_labels
from .listing import Listing, kind_of, suffix_of
from .masks import MaskRules
from .video import array_video, check_frames, open_video, read_arrays

VIDEO_FILES = frozenset(VIDEO_SUFFIXES | ARRAY_SUFFIXES)
EXPECTED = (
    "a folder of videos, or of class folders of videos, each a folder of frames, a video file (.mp4, .avi, .mkv, "
    ".webm, .mov) or an .npz or .npy file of frames; or one .npz file of several videos"
)
LAYOUT = "expected a folder of frames for each video, CLASS/VIDEO/0001.jpg, or video files, CLASS/VIDEO.mp4"
# Numbers of folders, and of pictures in each, whose headers are read to distinguish frames from other pictures.
CHECKED = 4, 8


def read_video_folder(listing: Listing, name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the videos of a folder, labelled by class folder if there are any.

    A folder that contains pictures is a video with these frames. Therefore, pictures directly in the folders of a
    dataset are videos without labels, unless these are clearly class folders of pictures.

    Args:
        listing: of the folder, with pictures, video files and arrays as its images.

    Raises:
        InputError: pictures that are not frames, videos next to class folders, other classes than the head's, a file in
            another format, or video files without PyAV.
    """
    items, frames = _find_videos(listing, name)
    flat = [item for item in items if "/" not in item]
    if flat and len(flat) < len(items):
        deeper = next(item for item in items if "/" in item)
        held = "the pictures in" if flat[0] in frames else "the video"
        raise InputError(
            f"{name} holds videos ({held} {flat[0]}) next to folders of videos ({deeper}): {LAYOUT}, for all of them, "
            f"or without CLASS for all of them"
        )
    _check_sizes(listing.root, frames)
    labels, classes = None, None
    if flat:
        _check_flat([item for item in flat if item in frames], len(flat), name, num_classes)
    else:
        labels, classes = label_by_folder(listing, items, name, num_classes, "videos")
    if any(item not in frames and suffix_of(item) in VIDEO_SUFFIXES for item in items):
        require_extra("video")
    _check_first_array(listing.root, [item for item in items if item not in frames])
    path = file_paths(listing.root, items)
    return Images(name, len(items), lambda i: open_video(path(i)), lambda i: str(path(i)), labels, classes=classes)


def _find_videos(listing: Listing, name: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the videos in the order of the listing, and the frames of those that are folders."""
    frames: dict[str, list[str]] = {}
    items: dict[str, None] = {}
    for file in listing.images:
        item = file
        if kind_of(file) == "images":
            item = file.rpartition("/")[0]
            frames.setdefault(item, []).append(file)
        items[item] = None
    if "" in frames:
        raise InputError(
            f"{name} holds pictures ({frames[''][0]}) where videos are expected: {LAYOUT}; if they are the frames of "
            f"one video, name a folder that holds {listing.root}"
        )
    for item in items:
        parts = item.split("/")
        for around in ("/".join(parts[:i]) for i in range(1, len(parts))):
            if around in frames:
                raise InputError(
                    f"{name}: {around} holds pictures ({frames[around][0]}) and videos ({item}): {LAYOUT}; move the "
                    "pictures out if they are not frames"
                )
    return list(items), frames


def _check_flat(folders: Sequence[str], count: int, name: str, num_classes: int) -> None:
    """Note that folders of pictures are read as unlabelled videos; InputError if they look like class folders.

    Args:
        folders: the videos that are folders. count: the number of all videos.
    """
    if not folders:
        return
    synsets = all(map(SYNSET.fullmatch, folders))
    if synsets or len(folders) == count == num_classes > 1:
        why = "called as classes of ImageNet are" if synsets else "as many as the model has classes"
        raise InputError(
            f"{name} holds {len(folders)} folders of pictures ({some_names(folders)}), {why}: pictures in a class "
            f"folder are not videos. {LAYOUT[0].upper()}{LAYOUT[1:]}. If each folder is a video without a label, store "
            f"them as .npz files of frames"
        )
    note(
        f"{name}: {len(folders)} folders of pictures ({some_names(folders)}) are read as videos without labels; a "
        f"class folder would hold a folder for each of its videos"
    )


def _check_sizes(root: Path, frames: dict[str, list[str]]) -> None:
    """Raise InputError if the pictures of a folder differ in size, like those of different scenes.

    Few headers are read. Unreadable pictures are reported when the videos are read.
    """
    folders, pictures = CHECKED
    for folder, files in list(frames.items())[:folders]:
        sizes: dict[tuple[int, int], str] = {}
        for file in files[:: max(1, len(files) // pictures)]:
            try:
                with Image.open(root / file) as image:
                    sizes.setdefault(image.size, file)
            except Exception:  # PIL raises errors of many kinds for a damaged file
                continue
        if len(sizes) > 1:
            texts = [f"{file} {width}x{height}" for (width, height), file in list(sizes.items())[:2]]
            raise InputError(
                f"the pictures in {root / folder} differ in size ({', '.join(texts)}), so they are not frames of one "
                f"video: {LAYOUT}"
            )


def _check_first_array(root: Path, files: Sequence[str]) -> None:
    """Raise InputError if the first array is readable but not a video, since the others will have the same format."""
    arrays = [file for file in files if suffix_of(file) in ARRAY_SUFFIXES]
    for file in arrays[:1]:
        try:
            frames, _ = read_arrays(root / file)
        except OSError:  # reported when it is read
            return
        try:
            array_video(frames)
        except OSError as error:
            several = f"; name {root / file} alone if it holds several videos" if frames.ndim == 5 else ""
            raise InputError(f"{root / file}: {error}{several}") from error


def read_array_set(path: Path, name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the videos in one file: an array (videos, frames, height, width, 3) uint8, in an .npz file with `labels`.

    Raises:
        InputError: the file cannot be read or has another format.
    """
    try:
        videos, others = read_arrays(path)
        if videos.ndim == 4 and videos.dtype == np.uint8:
            raise InputError(f"{path} is a single video {videos.shape}; name a folder that holds it")
        check_frames(videos, ("videos", "frames", "height", "width"))
        if not len(videos):
            raise InputError(f"{path} has an array of 0 videos")
    except OSError as error:
        raise InputError(f"{path}: {error}") from error
    labels, classes = _read_labels(others.pop("labels", None), len(videos), name, num_classes)
    if others:
        note(f"{name}: arrays that are not read: {some_names(list(others))}")
    describe = "video {} of {}".format
    return Images(
        name, len(videos), lambda i: array_video(videos[i]), lambda i: describe(i, path), labels, classes=classes
    )


def _read_labels(
    labels: np.ndarray | None, count: int, name: str, num_classes: int
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return class numbers, and class names if the labels are text; InputError for other labels."""
    if labels is None:
        return None, None
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise InputError(f"{name}: labels {labels.shape} {labels.dtype}, expected ({count},) class numbers or text")
    if labels.dtype.kind != "U":
        return check_labels(labels.tolist(), name, num_classes), None
    values, classes, notes = text_labels(labels.tolist(), name, num_classes)
    for text in notes:
        note(f"{name}: {text}")
    return values, classes
