"""The kernels as C functions of one pointer, compiled at first use and cached on disk.

Every thread of a team calls the same function with the same table, which `arguments` describes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from numba import boolean, carray, cfunc, float32, int64, types, uint16, uint64, void
from numba.core import event
from numba.core.extending import overload

from .arguments import arguments, flush_denormals, restore
from .conv import conv_backward, conv_forward
from .grid_conv import grid_conv_backward, grid_conv_forward
from .memory import keep_freed_memory
from .norm import norm_forward
from .scan import scan_backward, scan_forward, scan_rows
from .segments import segment_sums


class _Kernel(NamedTuple):
    """A kernel and its arguments after the table: a letter of `_TYPES` for each flag and each array."""

    function: Callable
    flags: str
    arrays: str


_TYPES = {"b": boolean, "i": int64, "u": uint64, "f": float32}  # and "a", the dtype of activations
_KERNELS = {
    "scan_forward": _Kernel(scan_forward, "bbb", "aafaafaffffaiaa"),
    "scan_rows": _Kernel(scan_rows, "bb", "affffffffif"),
    "scan_backward": _Kernel(scan_backward, "bb", "aaffffaffffiaaaffffaff"),
    "conv_forward": _Kernel(conv_forward, "bb", "affia"),
    "conv_backward": _Kernel(conv_backward, "bb", "affiaaff"),
    "grid_conv_forward": _Kernel(grid_conv_forward, "biiii", "affia"),
    "grid_conv_backward": _Kernel(grid_conv_backward, "biiii", "affiaaff"),
    "norm_forward": _Kernel(norm_forward, "", "affa"),
    "norm_to_half": _Kernel(norm_forward, "", "fffa"),
    "segment_sums": _Kernel(segment_sums, "ui", "aifff"),
}


def _run(name, table_and_arrays):
    """Call a kernel; for Numba's cache, a closure over the kernel itself would differ in each process."""


@overload(_run, prefer_literal=True)
def _typed_run(name, table_and_arrays):
    kernel = _KERNELS[name.literal_value].function
    return lambda name, table_and_arrays: kernel(*table_and_arrays)


def _make_entry(name, flags, dtypes, stamp):
    # The cache checks only the file of a function, and the values of its closure, for changes. So the closure includes
    # `stamp`, a hash of all files that a kernel is built from.
    def entry(pointer):
        _ = stamp
        before = flush_denormals()
        _run(name, arguments(carray(pointer, (1,), int64), flags, dtypes))
        restore(before)

    entry.__qualname__ = name  # names the cache files: one index per kernel
    return entry


_addresses: dict[tuple[str, bool], int] = {}
_compiling = threading.Lock()
_logger = logging.getLogger("ssmcompress")


def address(kernel: str, half: bool) -> int:
    """Return the address of a kernel's C function void(void *), for bfloat16 activations if `half`, else float32."""
    found = _addresses.get((kernel, half))
    if found is None:
        with _compiling:
            keep_freed_memory()
            found = _addresses[kernel, half] = _compiled(kernel, half).address
    return found


@cache
def _compiled(kernel: str, half: bool):
    _, flags, arrays = _KERNELS[kernel]
    types_ = {**_TYPES, "a": uint16 if half else float32}
    entry = _make_entry(kernel, tuple(types_[f] for f in flags), tuple(types_[a] for a in arrays), _stamp())
    with event.install_listener("numba:run_pass", _Announcer()):  # a kernel from the cache runs no compiler pass
        return _made(entry)


def _made(function: Callable):
    try:
        return cfunc(void(types.voidptr), cache=True)(function)
    except Exception as error:  # no writable folder, a full disk or a damaged file only cost time
        _logger.debug("compiled code cannot be kept: %s", error)
        return cfunc(void(types.voidptr))(function)


class _Announcer(event.Listener):
    """Announces the compilation of kernels when the thread that created it runs the first compiler pass."""

    def __init__(self):
        self.thread = threading.get_ident()

    def on_start(self, event) -> None:
        if threading.get_ident() == self.thread:
            _announce()

    def on_end(self, event) -> None:
        pass


@cache
def _announce() -> None:
    _logger.warning("compiling the CPU kernels (10 to 20 s, kept for later runs)")


def _renew_lock() -> None:
    global _compiling
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # a thread that held the lock does not exist in the child


@cache
def _stamp() -> int:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return int.from_bytes(hashlib.sha256(b"".join(f.read_bytes() for f in files)).digest()[:7], "big")
