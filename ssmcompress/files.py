"""Atomic writes: a file or folder is written completely or not at all, and replaces another only if asked to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_target(path: Path, force: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check before a long computation that `path` can be written; no file or folder is left behind.

    Args:
        path: the file or folder to be written. force: whether an existing one may be replaced.
        inputs: files and folders that are read, which `path` must not be or contain.

    Raises:
        InputError: `path` exists, holds one of the `inputs`, or cannot be written.
    """
    for name in inputs:
        if name is not None and Path(name).exists() and path.exists():
            source = Path(name).resolve()
            if path.resolve() in (source, *source.parents):
                raise InputError(f"{path} is, or holds, the input {name}; choose another output")
    with _workplace(path, force):
        pass


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is moved to `path` on success and deleted if the body of the with raises."""
    with _workplace(path, force) as workplace:
        folder = workplace / "new"
        folder.mkdir()
        yield folder
        _move(folder, path, workplace, force)


def write_file(path: Path, content: bytes, force: bool = False) -> None:
    """Write `content` to `path` completely or not at all."""
    with replace_files(path, force) as folder:
        (folder / path.name).write_bytes(content)


@contextmanager
def replace_files(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved next to `path`, unless the body of the with raises.

    The file with the name of `path` is moved last, so that whenever it exists, the files it needs exist too.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file to write")
    with _workplace(path, force) as workplace:
        folder = workplace / "new"
        folder.mkdir()
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            _move(file, path.with_name(file.name), workplace, force)


def _move(new: Path, path: Path, workplace: Path, force: bool) -> None:
    _refuse_existing(path, force)  # another process may have created it meanwhile
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)
        return
    os.rename(path, workplace / "old")
    try:
        os.rename(new, path)
    except BaseException:  # an interruption, too, must not lose the old folder
        os.rename(workplace / "old", path)
        raise


def _refuse_existing(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise InputError(f"{path} exists; choose another output or pass `force=True` to replace it")
    if path.is_dir() and any(path.iterdir()) and not _is_ours(path):
        raise InputError(f"{path} holds files that ssmcompress did not write; `force=True` does not replace those")


def _is_ours(folder: Path) -> bool:
    try:
        return "format_version" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@contextmanager
def _workplace(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; remove it at the end, and its new parents too if they stay empty."""
    parents: list[Path] = []
    workplace = None
    try:
        _refuse_existing(path, force)
        parents = [p for p in path.absolute().parents if not p.exists()]
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=".ssmcompress-", dir=path.absolute().parent))
        yield workplace
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
        for parent in parents:  # innermost first; stops at the first that is not empty
            try:
                parent.rmdir()
            except OSError:
                break
