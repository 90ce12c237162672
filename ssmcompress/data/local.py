"""Images at a path: what a file or folder contains, and which of it is the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import InputError
from ..suffixes import ARRAY_SUFFIXES, VIDEO_SUFFIXES
from .folders import read_folder
from .images import Images
from .listing import ANNOTATIONS, IMAGES, LeftOut, Listing, kind_of, list_files, suffix_of, top_of
from .masks import MaskRules
from .shards import read_shards
from .splits import choose_split, find_split, split_folders, split_of_file
from .tables import read_saved, read_tables
from .videos import EXPECTED as VIDEOS
from .videos import VIDEO_FILES, read_array_set, read_video_folder

# A function that opens images, given the number of classes and the meaning of masks (None if they are not read).
Reader = Callable[[int, MaskRules | None], Images]
EXPECTED = "a folder of images, a .parquet, .arrow or uncompressed .tar file, or a folder of these"


def find_reader(path: Path, name: str, split: str | None, videos: bool = False) -> Reader:
    """Return a function that reads the images of a file or folder; only file names are examined here.

    Args:
        name: name of the data as given by the user. split: the requested split, if any.
        videos: whether videos are read, not images.

    Raises:
        InputError: there are no images, or it is ambiguous which are meant. The returned function raises it if the
            images cannot be read, or have other classes than the head.
        OSError: something cannot be read.
    """
    if path.is_dir():
        return _find_folder_reader(path, name, split, videos=videos)
    kind = kind_of(path.name)
    if split is not None:
        raise InputError(f"{path} is a file, which has no split {split}; give the file without a split")
    if videos:
        if suffix_of(path.name) in ARRAY_SUFFIXES:
            return partial(read_array_set, path, name)
        single = suffix_of(path.name) in VIDEO_SUFFIXES
        what = "is a single video; name a folder that holds it" if single else f"holds no videos: expected {VIDEOS}"
        raise InputError(f"{path} {what}")
    if kind == "shards":
        return partial(read_shards, [path], name)
    if kind == "tables":
        return partial(read_tables, [path], name)
    if kind == "images":
        raise InputError(f"{path} is a single image; name a folder that holds it")
    if path.suffix.lower() in (".zip", ".7z", ".rar", ".gz", ".xz", ".bz2", ".zst"):
        raise InputError(f"{path} is an archive, which cannot be read in place: unpack it and name the folder")
    raise InputError(f"{path} holds no images that can be read: expected {EXPECTED}")


def _find_folder_reader(path: Path, name: str, split: str | None, inner: bool = False, videos: bool = False) -> Reader:
    """Return a function that reads a folder; `inner`: what is left out in it was reported with the parent folder."""
    if videos and any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        raise InputError(f"{path} is a dataset of tables, from which videos are not read: expected {VIDEOS}")
    if (path / "dataset_dict.json").is_file():
        splits = {key: key for key in _saved_splits(path / "dataset_dict.json")}
        return partial(read_saved, path / choose_split(splits, split, str(path)), name)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        if split is not None:
            raise InputError(f"{path} is one dataset, which has no split {split}; give the folder without a split")
        return partial(read_saved, path, name)
    listing = list_files(path, VIDEO_FILES if videos else ())
    if inner:
        listing.left_out = LeftOut()
    if "" in (pairs := _find_pairs(listing)):
        return partial(_refuse_masks, path, name)
    if folder := _choose_folder(listing, name, split):
        return _find_folder_reader(path / folder, name, None, videos=videos)
    if split is not None:
        _leave_out_images(listing)
    tops = _tops(listing)
    # Such as `data` in a clone of a hub dataset. A single folder of images could be a class, unless a split is given.
    if len(tops) == 1 and "" not in tops and (split is not None or not listing.images):
        listing.left_out.tell(name)
        return _find_folder_reader(path / tops[0], name, split, inner=True, videos=videos)
    _choose_split(listing, split)
    _check_kinds(listing, "videos" if videos else "images")
    if listing.images and pairs:
        return partial(_refuse_masks, path / pairs[0], name)
    if videos and not listing.images:
        raise InputError(f"{path} holds tables or tar shards, from which videos are not read: expected {VIDEOS}")
    listing.left_out.tell(name)
    if listing.images:
        return partial(read_video_folder if videos else read_folder, listing, name)
    read = read_shards if listing.shards else read_tables
    return partial(read, [path / file for file in listing.shards or listing.tables], name)


def _find_pairs(listing: Listing) -> list[str]:
    """Return the folders at any depth with images in images/ and in annotations/, "" for the folder itself."""
    around: dict[str, set[str]] = {IMAGES: set(), ANNOTATIONS: set()}
    for folder in {file.rpartition("/")[0] for file in listing.images}:
        parts = folder.split("/")
        for i, part in enumerate(parts):
            if part in around:
                around[part].add("/".join(parts[:i]))
    return sorted(around[IMAGES] & around[ANNOTATIONS])


def _refuse_masks(path: Path, name: str, num_classes: int, masks: MaskRules | None) -> Images:
    """Raise an InputError for a folder with images/ and annotations/, which are not classes.

    Models that need masks get here if the folders are deeper than `find_pair_reader` searches.
    """
    found = f"{name} holds images and masks for segmentation ({path / IMAGES} and {path / ANNOTATIONS})"
    if masks is not None:
        raise InputError(f"{found}: give the folder that contains both, {path}")
    raise InputError(
        f"{found}, and the model classifies whole images: give class folders, or {path / IMAGES} for images without "
        f"labels"
    )


def _saved_splits(file: Path) -> list[str]:
    """Return the splits that dataset_dict.json lists, each a folder next to it."""
    try:
        splits = json.loads(file.read_bytes())["splits"]
        if not splits or not all((file.parent / split).is_dir() and Path(split).name == split for split in splits):
            raise ValueError("it lists other splits than there are folders")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} does not list the splits of a saved DatasetDict ({error})") from error
    return splits


def _tops(listing: Listing) -> list[str]:
    """Return the top-level folders with data, and "" if the folder itself directly contains data."""
    return sorted({top_of(file) for file in (*listing.images, *listing.tables, *listing.shards)})


def _choose_folder(listing: Listing, name: str, split: str | None) -> str | None:
    """Return the folder of the split to read, None if the splits are not folders.

    Raises:
        InputError: it is ambiguous which folder is meant, or none is the split.
    """
    path, tops = listing.root, _tops(listing)
    folders = {top: top for top in split_folders(top for top in tops if top)}
    if split is None:
        if len(folders) == 1 and "" in tops:
            return None
        if len(folders) == 1 and listing.images:
            raise InputError(f"no images in {path} itself; did you mean {path / tops[0]}?")
        return choose_split(folders, None, str(path)) if folders else None
    if split in tops:
        folders[split] = split
    # Files may also be named by split: train.parquet next to a folder train.
    named = {file: said for file in (*listing.tables, *listing.shards) if (said := split_of_file(file))}
    if not folders or (named and not find_split(folders, split)):
        return None
    folder = choose_split(folders, split, str(path))
    for file, said in named.items():
        if top_of(file) != folder and find_split([said], split):
            raise InputError(f"{path} holds the split {split} in {folder} and in {file}; name one of them by its path")
    stray = LeftOut()
    for file in (*listing.images, *listing.tables, *listing.shards):
        if not top_of(file) and file not in named:
            stray.add("image without a split" if kind_of(file) == "images" else "file of no split", file)
    stray.tell(name)
    return folder


def _leave_out_images(listing: Listing) -> None:
    """Leave out images that belong to no split: those outside folders, and all next to tables or shards."""
    images, listing.images = listing.images, []
    for image in images:
        if top_of(image) and not (listing.tables or listing.shards):
            listing.images.append(image)
        else:
            listing.left_out.add("image without a split", image)


def _choose_split(listing: Listing, split: str | None) -> None:
    """Restrict the tables and shards of a folder to one split, if they are named by split."""
    path, groups = listing.root, {}
    for file in (*listing.tables, *listing.shards):
        groups.setdefault(split_of_file(file), []).append(file)
    others = groups.pop(None, [])
    if not groups:
        if split is not None:
            raise InputError(f"{path} has no splits, so none called {split}; give the folder without a split")
        return
    if others and split is None:
        raise InputError(
            f"{path} holds files of a split ({', '.join(sorted(groups))}) and others ({others[0]}); name a split, such "
            f"as {path}:{min(groups)}, or a file"
        )
    chosen = set(choose_split(groups, split, str(path)))
    for file in others:
        listing.left_out.add("file of no split", file)
    listing.tables = [file for file in listing.tables if file in chosen]
    listing.shards = [file for file in listing.shards if file in chosen]


def _check_kinds(listing: Listing, what: str) -> None:
    """Raise InputError unless a folder contains data of one kind in one place; `what`: images or videos."""
    path = listing.root
    kinds = {what: listing.images, "tables": listing.tables, "tar shards": listing.shards}
    held = {kind: files for kind, files in kinds.items() if files}
    if not held:
        raise InputError(f"no {what} in {path}" + (f"; it holds only {listing.left_out}" if listing.left_out else ""))
    if len(held) > 1:
        texts = " and ".join(f"{kind} ({files[0]})" for kind, files in held.items())
        raise InputError(f"{path} holds {texts}; name one file or folder in it, or move the others out")
    if len({Path(file).suffix.lower() for file in listing.tables}) > 1:
        raise InputError(
            f"{path} holds .parquet and .arrow tables, which may be the same images twice; name one file, or move the "
            f"others out"
        )
    folders = sorted({str(Path(file).parent) for file in (*listing.tables, *listing.shards)})
    if len(folders) > 1:
        raise InputError(
            f"{path} holds {next(iter(held))} in several folders ({', '.join(folders[:3])}); name one of them"
        )
