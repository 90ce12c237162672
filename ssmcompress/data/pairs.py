"""Images and masks in two folders, images/ and annotations/, with the same file names, as in ADE20K."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import InputError
from ..progress import note
from .folders import file_paths, read_folder
from .images import Images, decode
from .labels import some_names
from .listing import ANNOTATIONS, IMAGES, LeftOut, Listing, is_system, list_files, top_of
from .masks import MaskRules, check_pairs, decide_rules, drop_empty_masks, read_headers, read_mask
from .splits import choose_split, find_split, split_folders

MASK_SUFFIX = ".png"
ADE_STEM = re.compile(r"ADE_(train|val)_\d{8}", re.ASCII)
# ADE20K's list of its 150 classes, with tabs: number, share of the pixels, counts of images, names.
ADE_CLASSES = "objectInfo150.txt"


@dataclass(frozen=True)
class PairFolders:
    """Two folders whose files are matched by their paths, without the suffix.

    Attributes:
        root: the folder that contains images/ and annotations/. inner: path of the split below both, "" if there is
            none.
        files: the images, paths relative to images/inner.
    """

    root: Path
    inner: str
    files: list[str]

    @property
    def images(self) -> Path:
        return self.root / IMAGES / self.inner

    @property
    def masks(self) -> Path:
        return self.root / ANNOTATIONS / self.inner

    @property
    def masks_name(self) -> str:
        """The folder of the masks in messages: "annotations/validation/"."""
        return f"{ANNOTATIONS}/{self.inner}/" if self.inner else f"{ANNOTATIONS}/"


def find_pair_reader(path: Path, name: str, split: str | None) -> Callable[[int, MaskRules], Images] | None:
    """Return a function that reads images with masks below a folder; None if there is no pair of folders.

    Args:
        path: a folder with images/ and annotations/, its parent folder, or images/ or a folder below it.
        name: name of the data as given by the user. split: the requested split, if any.

    Raises:
        InputError: it is ambiguous which split is meant, the folder contains only masks, or there are no images.
        OSError: something cannot be read.
    """
    if not path.is_dir():
        return None
    place = _find_root(path, split)
    if place is None:
        return None
    root, inner, split = place
    listing = list_files(root / IMAGES / inner)
    tops = {top_of(file) for file in listing.images} - {""}
    splits = {folder: folder for folder in split_folders(tops)}
    if split is not None and split in tops:
        splits[split] = split
    where = str(root / IMAGES / inner if inner else root)
    if split is not None and not splits:
        raise InputError(f"{where} has no splits, so none called {split}; give the folder without a split")
    if splits:
        folder = choose_split(splits, split, where)
        _leave_out_others(listing, folder, set(splits))
        listing.left_out.tell(name)
        files = [file.removeprefix(f"{folder}/") for file in listing.images]
        return partial(_read_pairs, PairFolders(root, f"{inner}/{folder}" if inner else folder, files), name)
    if not listing.images:
        raise InputError(f"no images in {root / IMAGES / inner}")
    listing.left_out.tell(name)
    return partial(_read_pairs, PairFolders(root, inner, listing.images), name)


def _find_root(path: Path, split: str | None) -> tuple[Path, str, str | None] | None:
    """Return the folder with images/ and annotations/, the path below images/ that is meant, and its split."""
    if _is_root(path):
        return path, "", split
    whole = path.absolute()
    for folder in (whole, *whole.parents):
        inner = whole.relative_to(folder).as_posix() if folder != whole else ""
        if folder.name == IMAGES and _is_root(folder.parent) and (folder.parent / ANNOTATIONS / inner).is_dir():
            return folder.parent, inner, split
        if folder.name == ANNOTATIONS and _is_root(folder.parent) and (folder.parent / IMAGES / inner).is_dir():
            images = folder.parent / IMAGES / inner
            raise InputError(f"{path} holds masks; name the images, {images}, and the masks are found by their names")
    with os.scandir(path) as entries:
        inside = sorted(entry.name for entry in entries if not is_system(entry.name) and entry.is_dir())
    roots = [folder for folder in inside if _is_root(path / folder)]
    if not roots:
        return None
    if split is not None and len(same := find_split(roots, split)) == 1:
        return path / same[0], "", None
    if len(roots) > 1:
        return path / choose_split({folder: folder for folder in roots}, split, str(path)), "", None
    return path / roots[0], "", split


def _is_root(folder: Path) -> bool:
    return (folder / IMAGES).is_dir() and (folder / ANNOTATIONS).is_dir()


def _leave_out_others(listing: Listing, folder: str, splits: set[str]) -> None:
    """Leave out images that belong to no split; those of other splits are not reported."""
    for file in listing.images:
        if top_of(file) not in splits:
            listing.left_out.add("image without a split", file)
    listing.images = [file for file in listing.images if top_of(file) == folder]


def _read_pairs(pairs: PairFolders, name: str, num_classes: int, rules: MaskRules) -> Images:
    """Return the images of two folders with their masks; InputError if some have none, or masks cannot be used."""
    if not pairs.masks.is_dir():
        note(f"{name}: there is no folder {pairs.masks_name}, so the images count as unlabelled")
        return read_folder(Listing(pairs.images, pairs.files), name, num_classes, rules)
    masks = _match(pairs, name)
    image_path, mask_path = file_paths(pairs.images, pairs.files), file_paths(pairs.masks, masks)
    check_pairs(name, masks, lambda i: read_headers(image_path(i), mask_path(i), Path()))
    stems = (_stem(file).rpartition("/")[2] for file in pairs.files)
    rules = decide_rules(rules, all(map(ADE_STEM.fullmatch, stems)), name)
    images = Images(
        name,
        len(pairs.files),
        lambda i: decode(image_path(i), shown=True),
        lambda i: str(image_path(i)),
        classes=_read_ade_classes(pairs.root, num_classes) if rules.reduce_zero_label else None,
        masks=lambda i: read_mask(mask_path(i), Path(), rules, str(mask_path(i))),
    )
    return drop_empty_masks(images)


def _match(pairs: PairFolders, name: str) -> list[str]:
    """Return the mask of each image, a path relative to the folder of the masks."""
    listing = list_files(pairs.masks)
    masks = {_stem(file): file for file in listing.images if file.lower().endswith(MASK_SUFFIX)}
    missing = [file for file in pairs.files if _stem(file) not in masks]
    if missing:
        others = set(listing.images) - set(masks.values())
        wrong = sorted(file for file in others if _stem(file) in set(map(_stem, missing)))
        hint = f"; expected {MASK_SUFFIX} files, found {some_names(wrong)}" if wrong else ""
        raise InputError(
            f"{name}: {len(missing)} of {len(pairs.files)} images have no mask in {pairs.masks_name} "
            f"({some_names(missing)}){hint}"
        )
    owners: dict[str, str] = {}
    for file in pairs.files:
        if (other := owners.setdefault(_stem(file), file)) != file:
            raise InputError(
                f"{name}: {other} and {file} have the same mask {masks[_stem(file)]}; expected one of them"
            )
    alone = [mask for stem, mask in masks.items() if stem not in owners]
    if alone:
        note(f"{name}: {len(alone)} of {len(masks)} masks have no image and are not used ({some_names(alone)})")
    _tell_others(listing, set(masks.values()), name)
    return [masks[_stem(file)] for file in pairs.files]


def _tell_others(listing: Listing, masks: set[str], name: str) -> None:
    left_out: LeftOut = listing.left_out
    for file in (*listing.images, *listing.tables, *listing.shards):
        if file not in masks:
            left_out.add_file(file)
    left_out.tell(f"{name}, {ANNOTATIONS}/")


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _read_ade_classes(root: Path, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of ADE20K's classes, None if its list is missing or has another number of classes."""
    try:
        lines = (root / ADE_CLASSES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    rows: Sequence[list[str]] = [line.split("\t") for line in lines if line.strip()]
    names = {int(row[0]): row[-1].strip() for row in rows if row[0].strip().isdecimal() and row[-1].strip()}
    if sorted(names) != list(range(1, num_classes + 1)):
        return None
    return tuple(names[i] for i in range(1, num_classes + 1))
