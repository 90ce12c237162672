"""Cache of expensive results in a folder while a job runs, so that an interrupted job can resume from them.

A result is identified by a hash of everything it depends on: weights, images, options. So results of another run, of
changed images or of another model are never reused, and a resumed run gives the same results as an uninterrupted one,
bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..errors import InputError, raise_if_out_of_memory
from ..processes import count

Result = TypeVar("Result")

_results: ContextVar[Results | None] = ContextVar("ssmcompress_results", default=None)
# File names of a result, and of a partially written result.
_NAME = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.part")
_logger = logging.getLogger("ssmcompress")


class Results(NamedTuple):
    """The folder of cached results, and what they depend on in addition to their own hashes.

    Attributes:
        folder: the folder of the files. parents: its parent folders that did not exist before, the lowest first.
        device: the device on which results are computed.
        setting: hash of the versions, the device and the threads, which affect the last bits.
    """

    folder: Path
    parents: tuple[Path, ...]
    device: torch.device
    setting: str


@contextmanager
def keep_results(folder: Path | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Cache results in a folder, created if needed, in the body of the with statement; None: no caching.

    With several processes nothing is cached: they wait for each other, and could be stopped at different points.

    Args:
        device: the device on which results are computed, and to which they are read.
    """
    results = None
    if folder is not None and count() == 1:
        device = torch.device(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        setting = (__version__, torch.__version__, device.type, name, torch.get_num_threads())
        parents = tuple(parent for parent in folder.absolute().parents if not parent.exists())
        results = Results(folder, parents, device, hash_of(*map(str, setting)))
    token = _results.set(results)
    try:
        yield
    finally:
        _results.reset(token)


def forget_results() -> None:
    """Remove the cached results, at the end of the work that they belong to."""
    if (results := _results.get()) is not None:
        remove_results(results.folder)
        with suppress(OSError):  # a folder that is not empty
            for parent in results.parents:
                parent.rmdir()


def remove_results(folder: Path) -> None:
    """Remove results of an earlier run; InputError for a folder with other content, which is not changed."""
    check_results(folder)
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def check_results(folder: Path) -> None:
    """Raise an InputError if a path contains anything but results of an earlier run."""
    if not folder.exists():
        return
    names = os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else [f"{folder.name}, no folder"]
    if others := [name for name in names if not _NAME.fullmatch(name)]:
        raise InputError(
            f"{folder} holds {others[0]}, which is not a result of an interrupted run: move it, or choose another "
            "output"
        )


def keeps_results() -> bool:
    """Return whether results are cached; if not, hashes need not be computed."""
    return _results.get() is not None


def hash_of(*values: Any) -> str:
    """Return a hash of the content of tensors, numbers, strings, None, and of tuples, lists and dataclasses of them.

    Raises:
        TypeError: a value of another type, whose `repr` may not represent its content.
    """
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (tuple, list)):
            digest.update(f"{len(value)} values {hash_of(*value)}".encode())
        elif is_dataclass(value) and not isinstance(value, type):
            fields_ = [getattr(value, field.name) for field in fields(value)]
            digest.update(f"{type(value).__name__} {hash_of(*fields_)}".encode())
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{type(value).__name__} {value!r}".encode())
        else:
            raise TypeError(f"a {type(value).__name__} cannot be hashed by its content")
        digest.update(b"\0")
    return digest.hexdigest()


def remembered(key: Callable[[], str], compute: Callable[[], Result]) -> Result:
    """Return a cached result, or compute and cache it.

    Args:
        key: function that returns its `hash_of`. compute: function that returns numbers, strings, None, tensors, or
            lists, tuples and dicts of them. Nested calls of `remembered` inside it are not cached.
    """
    if not keeps_results():
        return compute()
    name = key()
    if (found := recall(name)) is not None:
        return found[0]
    with keep_results(None):
        value = compute()
    keep(name, value)
    return value


def recall(name: str) -> tuple[Any] | None:
    """Return (result,) cached under a hash; None if there is none or its file is damaged."""
    if (results := _results.get()) is None:
        return None
    try:
        content = _file(results, name).read_bytes()
        check, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != check:  # torch does not verify tensor data
            raise ValueError("damaged")
        return (torch.load(BytesIO(payload), map_location=results.device, weights_only=True),)
    except FileNotFoundError:
        return None
    except Exception as error:  # the errors of torch for other kinds of files are not documented
        raise_if_out_of_memory(error)
        _logger.debug("a result of %s cannot be read: %s", results.folder, error)
        return None


def keep(name: str, value: Any) -> None:
    """Cache a result under a hash, atomically; without enough space, it is not cached."""
    if (results := _results.get()) is None:
        return
    payload = BytesIO()
    torch.save(value, payload)
    content, file = payload.getvalue(), _file(results, name)
    temporary = file.with_name(f".{file.name}.part")
    try:
        results.folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _logger.debug("a result cannot be saved in %s: %s", results.folder, error)


def _file(results: Results, name: str) -> Path:
    return results.folder / hash_of(results.setting, name)
