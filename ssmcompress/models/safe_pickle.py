"""Safe unpickling of training checkpoints, without running any code in them."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, raise_if_out_of_memory
from ..files import check_regular

# Dict subclasses for settings, read as `OrderedDict` without importing their packages; VMamba's files have the first.
SETTINGS = ("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "addict.addict.Dict", "easydict.EasyDict")

TOO_NEW = range(4, pickle.HIGHEST_PROTOCOL + 1)  # protocols that torch's safe unpickler does not support


def _safe_globals() -> list[Any]:
    """Return the types that training checkpoints contain in addition to tensors; none of them can run code."""
    numbers = [np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8", "?")]
    scalar = type(np.float32(0)).__reduce__(np.float32(0))[0]
    paths = {
        f"{module}.{name}": getattr(pathlib, f"Pure{name.removeprefix('Pure')}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    }
    return [
        argparse.Namespace,
        np.dtype,
        *{type(number) for number in numbers},
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((path_class, name) for name, path_class in paths.items()),
        *((OrderedDict, name) for name in SETTINGS),
    ]


def read_pickle(file: Path, unsafe_load: bool = False) -> Any:
    """Read a checkpoint file: tensors, numbers, strings, containers, Namespaces, `SETTINGS` and paths.

    Raises:
        InputError: the file is damaged, or refers to an object that could run code; the message names it, and nothing
            is run.
        OSError: the file cannot be opened.
    """
    check_regular(file)
    with open(file, "rb") as content:  # a file that cannot be opened is not a damaged one
        if content.read(12) == b"version http":
            raise InputError("a pointer that git-lfs left in place of the file; fetch it with `git lfs pull`")
    _check_sums(file)
    try:
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; unreadable files raise below
            return torch.load(file, map_location="cpu", weights_only=not unsafe_load)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        if not _asks_for_more(error, file):
            raise_if_out_of_memory(error)
        reported = re.findall(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (names := _unsafe_globals(file) or reported[:1]):
            raise InputError(
                f"refused: this pickle asks for {', '.join(names)}, which could run code; nothing was run "
                f"(`unsafe_load=True` reads it all the same, if you trust where it comes from)"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and (protocol := _find_protocol(file)) in TOO_NEW:
            raise InputError(
                f"a pickle of protocol {protocol}, which cannot be read without running what it asks for: expected "
                f"{TOO_NEW[0] - 1} or less; write it again with torch.save, without `pickle_protocol` "
                f"(`unsafe_load=True` reads it as it is, if you trust where it comes from)"
            ) from error
        raise InputError(f"not a checkpoint, or a damaged one{_describe_start(file)}") from error


def _asks_for_more(error: Exception, file: Path) -> bool:
    """Return whether torch requested more memory than the file size: torch does not compress, so it is damaged."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    return asked is not None and int(asked[1]) > file.stat().st_size


def _describe_start(file: Path) -> str:
    """Return " (...)" with the start of a file that is not a checkpoint, for an error message; else ""."""
    with open(file, "rb") as content:
        start = content.read(256)
    if not start:
        return " (it is empty)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return " (it is a web page)"
    printable = start.decode("latin-1").translate(dict.fromkeys(map(ord, "\t\n\r"))).isprintable()
    return " (it is a text file)" if printable and start.isascii() else ""


def _check_sums(file: Path) -> None:
    """Verify the checksums of a checkpoint's records, which torch.load does not, to detect flipped bits.

    Raises:
        InputError: some of them differ. If all differ, the file was written without checksums (`set_crc32_options`).
    """
    if not zipfile.is_zipfile(file):
        return
    records = damaged = 0
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                records += 1
                try:
                    with archive.open(info) as record:
                        while record.read(1 << 20):
                            pass
                except zipfile.BadZipFile:
                    damaged += 1
    except Exception as error:  # torch.load reports files that are not torch archives
        raise_if_out_of_memory(error)
        return
    if 0 < damaged < records:
        raise InputError(f"damaged: {damaged} of {records} records differ from their checksums; get the file again")


# Globals that occur in the pickles of tensors, state dicts and training arguments.
_SAFE_NAMES = re.compile(
    r"torch\.(_utils\._rebuild\w+|\w+Storage|storage\.\w+|nn\.parameter\.Parameter|Size|device|b?float\d+|u?int\d+|bool)"
    r"|numpy\.(dtype|dtypes\.\w+|_?core\.multiarray\.scalar)|pathlib\.(_local\.)?(Pure)?(Posix|Windows)Path"
    r"|collections\.OrderedDict|argparse\.Namespace|_codecs\.encode|(__builtin__|builtins)\.set|"
    + "|".join(map(re.escape, SETTINGS))
)


def _read_content(file: Path) -> bytes:
    """Return the bytes of the pickle in a file; in torch's legacy format, of several pickles."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def _find_protocol(file: Path) -> int:
    """Return the protocol that the pickle in a file declares; 0 if it declares none."""
    try:
        start = _read_content(file)[:2]
    except Exception as error:  # a damaged archive
        raise_if_out_of_memory(error)
        return 0
    return start[1] if len(start) == 2 and start[:1] == pickle.PROTO else 0


def _unsafe_globals(file: Path) -> list[str]:
    """Return up to three globals in a pickle of any protocol that are not known to be safe, without executing it."""
    names: set[str] = set()
    try:
        content = _read_content(file)
        stream = io.BytesIO(content)
        while stream.tell() < len(content):  # torch's legacy format is a sequence of pickles
            memo: list[str | None] = []
            strings: list[str | None] = [None, None]
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(part or "?" for part in strings[-2:]))
                elif opcode.name == "MEMOIZE":
                    memo.append(strings[-1])
                elif opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
                    strings.append(memo[argument])
                elif opcode.name not in ("FRAME", "PROTO"):
                    strings.append(argument if isinstance(argument, str) else None)
    except Exception as error:  # a damaged tail: report the names read so far
        raise_if_out_of_memory(error)
    return sorted(name for name in names if not _SAFE_NAMES.fullmatch(name))[:3]
