"""Atomic writes: a file or folder is written completely or not at all, and replaces another only on request."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .progress import note

# Files that ssmcompress writes into a model folder. Further files are listed in its report.json: under `files` those
# added by steps, under `onnx` the exported file.
OWN_FILES = {
    "model.safetensors", "config.json", "report.json", "README.md", "kept_tokens.png", "segments.png", "axes.png",
    "sensitivity.json", "last.safetensors", "finetuning.png", "recipe.yaml",
}  # fmt: skip
TEMPORARY = ".ssmcompress-"  # prefix of temporary folders
# The file that identifies a folder as ours: of a model, and of pictures, where it lists all other files in `files`.
MODEL_FILE, VISUALIZED = "config.json", "visualize.json"
RECIPE_FILE = "recipe.yaml"  # recreates the folder of a model
ATTENTION = "attention"  # subfolder of a model folder with pictures
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file browsers leave these everywhere
HEAD_BYTES = 1 << 20  # read to recognise the kind of a file; the header of a large model has about 100 KB


@dataclass(frozen=True)
class Kind:
    """A kind of output file: `force=True` replaces an existing file only if it is of the same kind.

    Attributes:
        name: the kind, for messages. matches: whether a file that starts with these bytes is of this kind.
    """

    name: str
    matches: Callable[[bytes], bool]


WEB_PAGE = Kind("a web page", lambda head: head.lstrip().lower().startswith((b"<!doctype html", b"<html")))
# An ONNX file starts with its version field; a .safetensors file with the length of a JSON header.
ONNX = Kind("an ONNX file", lambda head: head[:1] == b"\x08" and head[8:9] != b"{")
MODEL = Kind("a model that ssmcompress wrote", lambda head: head[8:9] == b"{" and b'"ssmcompress' in head)


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_regular(path: Path) -> None:
    """Raise an OSError if `path` exists and is not a regular file: reading a pipe or a device may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a regular file; OSError or UnicodeDecodeError if that fails."""
    check_regular(path)
    return path.read_text(encoding="utf-8")


def check_target(
    path: Path,
    force: bool,
    inputs: Iterable[str | Path | None] = (),
    *,
    folder: str | None = None,
    kind: Kind | None = None,
) -> None:
    """Check before a long computation that `path` can be written; no file or folder is left behind.

    Args:
        path: the file or folder to be written. force: whether an existing one may be replaced.
        inputs: files and folders that are read, which `path` must not be or contain.
        folder: the file that identifies an output folder as ours, MODEL_FILE or VISUALIZED; None: a file will be
            written. kind: the kind of that file.

    Raises:
        InputError: `path` exists, is of another kind, contains one of the `inputs` or files that ssmcompress did not
            write, or cannot be written.
    """
    for name in inputs:
        if name is not None and Path(name).exists() and path.exists():
            source = Path(name).resolve()
            if path.resolve() in (source, *source.parents):
                raise InputError(f"{path} is, or holds, the input {name}; choose another output")
    if folder and os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{path} is a file; expected the name of a folder to write")
    marker = folder or MODEL_FILE
    path = _follow(path) if folder else path
    with _workplace(path, force, kind, marker):
        if path.is_dir() and (foreign := _list_foreign(path, marker)):
            raise _foreign_error(path, foreign)


@contextmanager
def new_folder(path: Path, force: bool = False, marker: str = MODEL_FILE) -> Iterator[Path]:
    """Yield a temporary folder that is moved to `path` on success and deleted if the body of the with raises.

    With `force`, a folder of the same kind that ssmcompress wrote is replaced as a whole; a note lists what else it
    contained. Before long work, callers use `check_target`, which refuses files that ssmcompress did not write.
    `marker` is the file that identifies such a folder.
    """
    path = _follow(path)
    with _workplace(path, force, marker=marker) as workplace:
        folder = workplace / "new"
        folder.mkdir()
        yield folder
        others = sorted({*_list_added(path), *_list_foreign(path, marker)}) if path.is_dir() else []
        _move(folder, path, workplace, force, marker)
        if others:
            note(f"removed {', '.join(str(path / name) for name in others)} with the model that was replaced")


def write_file(path: Path, content: bytes, force: bool = False, kind: Kind | None = None) -> None:
    """Write `content` to `path` completely or not at all; with `kind`, a file of another kind is not replaced."""
    with replace_files(path, force, kind) as folder:
        (folder / path.name).write_bytes(content)


@contextmanager
def replace_files(path: Path, force: bool = False, kind: Kind | None = None) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved next to `path`, unless the body of the with raises.

    The file named `path` is moved last, so that whenever it exists, the files it needs exist as well.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file to write")
    with _workplace(path, force, kind) as workplace:
        folder = workplace / "new"
        folder.mkdir()
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            _move(file, path.with_name(file.name), workplace, force)


def _move(new: Path, path: Path, workplace: Path, force: bool, marker: str = MODEL_FILE) -> None:
    _refuse_existing(path, force, marker=marker)  # another process may have created it in the meantime
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)
        return
    os.rename(path, workplace / "old")
    try:
        os.rename(new, path)
    except BaseException:  # the old folder must also survive an interrupt
        os.rename(workplace / "old", path)
        raise


def _refuse_existing(path: Path, force: bool, kind: Kind | None = None, marker: str = MODEL_FILE) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise InputError(f"{path} exists; choose another output or pass `force=True` to replace it")
    if path.is_dir():
        _refuse_fixed(path)
    if kind is not None and path.name in OWN_FILES and _is_ours(path.parent):
        raise InputError(f"{path} is part of the model in {path.parent}; choose another output")
    if kind is not None and path.is_file():
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        if head and not kind.matches(head):
            raise InputError(f"{path} is not {kind.name}, so `force=True` does not replace it; choose another output")
    if path.is_dir() and any(path.iterdir()) and not _is_ours(path, marker):
        raise _foreign_error(path, _list_foreign(path, marker))


def _refuse_fixed(folder: Path) -> None:
    """Raise an InputError for a folder that cannot be replaced by another one."""
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is, or holds, the working directory and cannot be replaced; choose another")
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced; choose a folder in it")


def _follow(path: Path) -> Path:
    """Return the folder that a link points to; any other path unchanged."""
    return path.resolve() if path.is_symlink() and path.is_dir() else path


def _foreign_error(folder: Path, names: list[str]) -> InputError:
    for marker, what in ((MODEL_FILE, "is the folder of a model"), (VISUALIZED, "has pictures of `visualize`")):
        if not _list_foreign(folder, marker):  # all files are ours, but of another kind
            return InputError(
                f"{folder} {what}, which `force=True` does not replace with something else; choose another"
            )
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return InputError(
        f"{folder} holds files that ssmcompress did not write ({listed}); `force=True` does not remove those: move "
        "them away, or choose another output"
    )


def _is_ours(folder: Path, marker: str = MODEL_FILE) -> bool:
    return "format_version" in _read_json(folder / marker)


def is_model_folder(folder: Path) -> bool:
    """Return whether ssmcompress wrote a model into a folder."""
    return _is_ours(folder)


def _list_foreign(folder: Path, marker: str = MODEL_FILE) -> list[str]:
    """Return the names of files that do not belong to a folder with this marker."""
    # A temporary folder is left behind if a process was killed.
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY)}
    if not _is_ours(folder, marker):
        return sorted(names)
    if marker == VISUALIZED:
        return sorted(names - SYSTEM_FILES - _list_named(folder / VISUALIZED))
    own = OWN_FILES | SYSTEM_FILES | _list_named(folder / "report.json") | _list_exported(folder)
    pictures = folder / ATTENTION
    own |= {ATTENTION} if pictures.is_dir() and not _list_foreign(pictures, VISUALIZED) else set()
    return sorted(names - own)


def _list_named(file: Path) -> set[str]:
    """Return the file names listed under `files` in the JSON object of a file."""
    files = _read_json(file).get("files")
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _list_exported(folder: Path) -> set[str]:
    """Return the names of the ONNX files in a folder that were exported from the model in it."""
    file = folder / "report.json"
    onnx = _read_json(file).get("onnx")
    named = {name for name in _list_named(file) if name.endswith(".onnx")}
    if isinstance(onnx, dict) and isinstance(last := onnx.get("file"), str):  # in reports that do not list it
        named.add(last)
    own = (name for name in named if Path(name).name == name)
    return {part for name in own for part in (name, f"{name}.data") if (folder / part).is_file()}


def _list_added(folder: Path) -> set[str]:
    """Return the names of files created from a model after it was written to a folder."""
    pictures = {ATTENTION} if (folder / ATTENTION / VISUALIZED).is_file() else set()
    return _list_exported(folder) | pictures


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none."""
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _workplace(path: Path, force: bool, kind: Kind | None = None, marker: str = MODEL_FILE) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; remove it at the end, and its new parents too if they stay empty."""
    parents: list[Path] = []
    workplace = None
    try:
        _refuse_existing(path, force, kind, marker)
        parents = [p for p in path.absolute().parents if not p.exists()]
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.absolute().parent))
        yield workplace
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
        for parent in parents:  # innermost first; stops at the first non-empty one
            try:
                parent.rmdir()
            except OSError:
                break
