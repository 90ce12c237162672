"""Writing files whole or not at all, and never over something that is there unless asked to."""

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
    """Hex digest of a file's content."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_target(path: Path, force: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Find out before the long work, not after it, whether `path` can be written; leaves nothing behind.

    Args:
        inputs: files and folders that are read: replacing `path` must not take one of them away.
    """
    for name in inputs:
        if name is not None and Path(name).exists() and path.exists():
            read = Path(name).resolve()
            if path.resolve() in (read, *read.parents):
                raise InputError(f"{path} is, or holds, the input {name}; choose another output")
    with _workplace(path, force):
        pass


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise."""
    with _workplace(path, force) as workplace:
        folder = workplace / "new"
        folder.mkdir()
        yield folder
        _move(folder, path, workplace, force)


def write_file(path: Path, content: bytes, force: bool = False) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replace_files(path, force) as folder:
        (folder / path.name).write_bytes(content)


@contextmanager
def replace_files(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder; what is in it at the end goes beside `path`, unless the block ends with an error.

    A file that is named as `path` goes last: where it is there, so is what it needs.
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
    _refuse_existing(path, force)  # another process may have been faster
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)
        return
    os.rename(path, workplace / "old")
    try:
        os.rename(new, path)
    except BaseException:  # an interruption, too, must not cost the old one
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
    """A temporary folder beside `path`, removed at the end, with parents made for it if nothing came of it."""
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
        for parent in parents:  # innermost first; stops at the first that has something in it
            try:
                parent.rmdir()
            except OSError:
                break
