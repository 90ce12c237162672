"""Teams of threads for the kernels: OpenMP's own where torch has it, so that both use the same threads.

A second pool beside torch's would compete with it: OpenMP's threads spin for a while after each of torch's ops, just
when a kernel wants their core.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(function: int, pointer: int, threads: int) -> None:
    """Call the C function at address `function` with `pointer`, in `threads` threads at once.

    Returns when all are done. The function is one of `entries`, which share the work out among themselves.
    """
    if threads > 1 and (openmp := _openmp()) is not None:
        openmp(function, pointer, threads, 0)
        return
    task = _TASK(function)
    others = [_pool(os.getpid()).submit(task, pointer) for _ in range(threads - 1)]
    task(pointer)
    for other in others:
        other.result()


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _openmp():
    """GOMP_parallel(function, data, threads, flags) of the library that torch runs on, or None.

    None in a child process too: its OpenMP believes in threads that a fork did not bring along, and waits for them.
    """
    return None if _forked else _find_openmp()


@cache
def _find_openmp():
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that this one is linked to
    except (OSError, AttributeError):  # macOS and Windows have another OpenMP
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: those of a parent did not survive the fork."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="ssmcompress")
