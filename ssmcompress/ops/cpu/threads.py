"""Thread teams for the kernels: torch's OpenMP if it has one, so that both use the same threads.

A second thread pool would compete with torch's: OpenMP threads spin for a while after each op of torch, exactly when a
kernel needs their cores.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ...openmp import has_own_waits
from .contention import Watch

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(function: int, pointer: int, threads: int) -> None:
    """Call the C function at address `function` with `pointer` in `threads` threads concurrently, and wait for all.

    The function is one of `entries`; its calls share the work.
    """
    if threads > 1 and (openmp := _openmp()) is not None:
        if (watch := _watch()) is not None:
            watch.look(threads)
        openmp(function, pointer, threads, 0)
        return
    task = _find_task(function)
    others = [_pool(os.getpid()).submit(task, pointer) for _ in range(threads - 1)]
    task(pointer)
    for other in others:
        other.result()


@cache
def _find_task(function: int):
    """Return the C function at an address; kernels are never moved."""
    return _TASK(function)


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _openmp():
    """Return GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch uses, or None.

    Also None in a forked child: its OpenMP would wait for threads that exist only in the parent.
    """
    return None if _forked else _find_openmp()


@cache
def _find_openmp():
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start = ctypes.CDLL(str(library)).GOMP_parallel  # from one of the libraries that this one is linked to
    except (OSError, AttributeError):  # macOS and Windows use another OpenMP
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


@cache
def _watch() -> Watch | None:
    """Return the watch that shortens OpenMP's waits on a busy machine; None if the environment sets the wait policy."""
    return None if has_own_waits() else Watch(_find_openmp())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the thread pool of this process; the threads of a parent do not survive a fork."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="ssmcompress")
