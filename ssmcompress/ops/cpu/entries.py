"""The kernels as C functions of one pointer, compiled at their first use and cached on disk.

Every thread of a team calls the same function with the same table of seven int64 a row: the first row has the counter
of items, flags and sizes; each further row has the address, shape and strides of one array.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from numba import carray, cfunc, float32, int64, types, uint16, uint64, void
from numba.core import event

from .conv import conv_backward, conv_forward
from .grid_conv import grid_conv_forward
from .memory import keep_freed_memory
from .norm import norm_forward
from .scan import scan_backward, scan_forward, scan_rows
from .segments import segment_sums
from .vector import array_at

COLUMNS = 7

# `a` is the dtype of activations. Numba's cache checks only the file of a function for changes, but also the values of
# its closure: `stamp` is a hash of all files that a kernel is built from.


def _scan_forward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        scan_forward(
            t[0], t[0, 1] != 0, t[0, 2] != 0, t[0, 3] != 0, array_at(t, 1, a), array_at(t, 2, a),
            array_at(t, 3, float32), array_at(t, 4, a), array_at(t, 5, a), array_at(t, 6, float32), array_at(t, 7, a),
            array_at(t, 8, float32), array_at(t, 9, float32), array_at(t, 10, float32), array_at(t, 11, float32),
            array_at(t, 12, a), array_at(t, 13, int64), array_at(t, 14, a), array_at(t, 15, a),
        )  # fmt: skip

    return entry


def _scan_rows(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        scan_rows(
            t[0], t[0, 1] != 0, t[0, 2] != 0, array_at(t, 1, a), array_at(t, 2, float32),
            array_at(t, 3, float32), array_at(t, 4, float32), array_at(t, 5, float32), array_at(t, 6, float32),
            array_at(t, 7, float32), array_at(t, 8, float32), array_at(t, 9, float32), array_at(t, 10, int64),
            array_at(t, 11, float32),
        )  # fmt: skip

    return entry


def _scan_backward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        scan_backward(
            t[0], t[0, 1] != 0, t[0, 2] != 0, array_at(t, 1, a), array_at(t, 2, a), array_at(t, 3, float32),
            array_at(t, 4, float32), array_at(t, 5, float32), array_at(t, 6, float32), array_at(t, 7, a),
            array_at(t, 8, float32), array_at(t, 9, float32), array_at(t, 10, float32), array_at(t, 11, float32),
            array_at(t, 12, int64), array_at(t, 13, a), array_at(t, 14, a), array_at(t, 15, a),
            array_at(t, 16, float32), array_at(t, 17, float32), array_at(t, 18, float32), array_at(t, 19, float32),
            array_at(t, 20, a), array_at(t, 21, float32), array_at(t, 22, float32),
        )  # fmt: skip

    return entry


def _conv_forward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        conv_forward(
            t[0], t[0, 1] != 0, t[0, 2] != 0, array_at(t, 1, a), array_at(t, 2, float32), array_at(t, 3, float32),
            array_at(t, 4, int64), array_at(t, 5, a),
        )  # fmt: skip

    return entry


def _conv_backward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        conv_backward(
            t[0], t[0, 1] != 0, t[0, 2] != 0, array_at(t, 1, a), array_at(t, 2, float32), array_at(t, 3, float32),
            array_at(t, 4, int64), array_at(t, 5, a), array_at(t, 6, a), array_at(t, 7, float32),
            array_at(t, 8, float32),
        )  # fmt: skip

    return entry


def _grid_conv_forward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        grid_conv_forward(
            t[0], t[0, 1] != 0, t[0, 2], t[0, 3], t[0, 4], t[0, 5], array_at(t, 1, a), array_at(t, 2, float32),
            array_at(t, 3, float32), array_at(t, 4, int64), array_at(t, 5, a),
        )  # fmt: skip

    return entry


def _norm_forward(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        norm_forward(t[0], array_at(t, 1, a), array_at(t, 2, float32), array_at(t, 3, float32), array_at(t, 4, a))

    return entry


def _norm_to_half(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        norm_forward(t[0], array_at(t, 1, float32), array_at(t, 2, float32), array_at(t, 3, float32), array_at(t, 4, a))

    return entry


def _segment_sums(a, stamp):
    def entry(pointer):
        _ = stamp
        t = carray(pointer, (1, COLUMNS), int64)
        segment_sums(
            t[0], uint64(t[0, 1]), t[0, 2], array_at(t, 1, a), array_at(t, 2, int64), array_at(t, 3, float32),
            array_at(t, 4, float32), array_at(t, 5, float32),
        )  # fmt: skip

    return entry


_KERNELS: dict[str, Callable] = {
    "scan_forward": _scan_forward,
    "scan_rows": _scan_rows,
    "scan_backward": _scan_backward,
    "conv_forward": _conv_forward,
    "conv_backward": _conv_backward,
    "grid_conv_forward": _grid_conv_forward,
    "norm_forward": _norm_forward,
    "norm_to_half": _norm_to_half,
    "segment_sums": _segment_sums,
}
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
    function = _KERNELS[kernel](uint16 if half else float32, _stamp())
    with event.install_listener("numba:run_pass", _Announcer()):  # a kernel from the cache runs no compiler pass
        return _made(function)


def _made(function: Callable):
    try:
        return cfunc(void(types.voidptr), cache=True)(function)
    except Exception as error:  # no writable folder, a full disk, a damaged file: they cost only time
        _logger.debug("compiled code cannot be kept: %s", error)
        return cfunc(void(types.voidptr))(function)


class _Announcer(event.Listener):
    """Announces that kernels are compiled, when the thread that it was made in runs the first pass of the compiler."""

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
