"""Which files in a folder are data and which are left out; everything left out is reported."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..progress import note
from ..suffixes import IMAGE_SUFFIXES, TABLE_SUFFIXES

# Folders of images and of their masks, next to each other.
IMAGES, ANNOTATIONS = "images", "annotations"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Files and folders created by operating systems, file managers and archivers, in lower case.
SYSTEM_NAMES = {"__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information", "__pycache__"}
SYSTEM_NAMES |= {"thumbs.db", "desktop.ini", "ehthumbs.db"}
# Hidden folders of tools, which never contain user data.
TOOL_FOLDERS = {".git", ".cache", ".huggingface", ".dvc", ".hg", ".svn"}
# Files in a model folder written by this package, or in the Hugging Face format.
MODEL_FILES = {"config.json", "model.safetensors"}
# Stems of files that describe a dataset, in lower case.
DESCRIPTIONS = {"readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_dict", "state", "citation"}


def is_system(name: str) -> bool:
    """Return whether a file or folder with this name is hidden or created by a system rather than the user.

    Names that start with `._` are macOS attributes of another file; `PaxHeaders` are created by tar. `.` and `..` in
    the names of tar members are not hidden.
    """
    return (name.startswith((".", "PaxHeader")) and name not in (".", "..")) or name.lower() in SYSTEM_NAMES


def suffix_of(name: str) -> str:
    """Return the suffix of a file in lower case; ten times as fast as pathlib, for millions of files."""
    return os.path.splitext(name.lower())[1]


def kind_of(name: str) -> str:
    """Return "images", "tables" or "shards" by a file's suffix, "" for other files."""
    suffix = suffix_of(name)
    if name.lower().endswith(SHARD_SUFFIXES):
        return "shards"
    return "images" if suffix in IMAGE_SUFFIXES else "tables" if suffix in TABLE_SUFFIXES else ""


class LeftOut:
    """Counts what is left out of a dataset, with an example of each kind, for a one-line note."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, what: str, example: str, count: int = 1) -> None:
        """Count `count` more of `what`, a singular noun for a kind of file, folder, member or image."""
        self.counts[what] += count
        self.examples.setdefault(what, example)

    def add_file(self, name: str) -> None:
        """Count a file that is not data, by its suffix."""
        suffix = suffix_of(name)
        known = suffix[1:].isalnum() and not suffix[1:].isdigit() and len(suffix) < 12
        self.add(f"{suffix} file" if known else "other file", name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        texts = []
        for what, count in self.counts.most_common(6):
            plural = re.sub(r"\b(file|folder|member|image)\b", r"\1s", what, count=1)
            more = f"{plural} ({self.examples[what]}, ...)" if count > 1 else f"{what} ({self.examples[what]})"
            texts.append(f"{count} {more}")
        return ", ".join(texts) + (", ..." if len(self.counts) > len(texts) else "")

    def tell(self, where: str) -> None:
        """Show a note about what is left out, if anything (`ssmcompress.progress.note`)."""
        if self:
            note(f"{where}: left out {self}")


@dataclass
class Listing:
    """The files below a folder, with paths relative to it, in text order.

    Attributes:
        root: the folder. images, tables, shards: its files of each kind.
        folders: the folders directly in it, including those without data. left_out: everything else.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def top_of(file: str) -> str:
    """Return the first folder of a relative path, "" if there is none."""
    return file.partition("/")[0] if "/" in file else ""


def list_files(root: Path, more: Collection[str] = ()) -> Listing:
    """List the files below a folder, following links to folders as torchvision and timm do.

    A broken link is listed like its target, so that it is reported as unreadable.

    Args:
        more: suffixes of further files that count as images, as videos do for a model that takes them.

    Raises:
        InputError: a folder or table would be counted twice, because a link leads to it.
    """
    listing = Listing(root)
    files: dict[str, list[tuple[str, str]]] = {}  # folder -> (kind, name) of its files
    seen: dict[tuple[int, int], str] = {}
    models: set[str] = set()  # top-level folders that contain model folders
    stack = [""]
    while stack:
        folder = stack.pop()
        _see_once(root, folder, seen)
        with os.scandir(root / folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        if folder and {entry.name for entry in entries} >= MODEL_FILES:  # contains a picture of kept tokens
            listing.left_out.add("folder of a model", folder)
            models.add(top_of(f"{folder}/"))
            continue
        files[folder] = here = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_system(entry.name):
                _leave_out_system(entry, path, listing.left_out)
            elif _is_folder(entry):
                stack.append(path)
            elif not (entry.is_symlink() or entry.is_file()):  # a pipe or a device: reading it could block forever
                listing.left_out.add("special file", path)
            elif kind := "images" if suffix_of(entry.name) in more else kind_in_folder(entry.name):
                here.append((kind, entry.name))
            else:
                _leave_out(path, listing.left_out)
    filled = {top_of(f"{folder}/") for folder, held in files.items() if held}
    listing.folders = sorted(f for f in files if f and "/" not in f and (f in filled or f not in models))
    for folder in sorted(files, key=lambda folder: (top_of(f"{folder}/"), folder)):
        for kind, name in files[folder]:
            getattr(listing, kind).append(f"{folder}/{name}" if folder else name)
    for name in (*listing.tables, *listing.shards):
        _see_once(root, name, seen)
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _see_once(root: Path, path: str, seen: dict[tuple[int, int], str]) -> None:
    try:
        status = os.stat(root / path)
    except FileNotFoundError:  # a broken link, which is reported when it is opened
        return
    other = seen.setdefault((status.st_dev, status.st_ino), path)
    if other != path:
        what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        names = " and ".join(sorted((str(root / other), str(root / path))))
        raise InputError(f"{names} are the same {what}, so its images would count twice; remove one of the links")


def kind_in_folder(name: str) -> str:
    """Return the kind of a file found in a folder: caches, unfinished files and metadata tables are not data there."""
    kind = kind_of(name)
    return "" if kind == "tables" and name.startswith(("cache-", "tmp", "metadata.")) else kind


def _leave_out(path: str, left_out: LeftOut) -> None:
    name = path.rpartition("/")[2]
    if kind_of(name):
        left_out.add("metadata file" if name.startswith("metadata.") else "cache or unfinished file", path)
    elif name.lower().startswith("metadata."):
        left_out.add("metadata file", path)
    elif name.partition(".")[0].lower() not in DESCRIPTIONS:
        left_out.add_file(path)


def _leave_out_system(entry: os.DirEntry[str], path: str, left_out: LeftOut) -> None:
    """Report a hidden or system entry, unless it is a file that could not be mistaken for data."""
    if _is_folder(entry):
        if entry.name not in TOOL_FOLDERS:
            left_out.add("hidden or system folder", path)
    elif kind_of(entry.name):
        left_out.add("hidden or system file", path)
