"""malloc settings that keep freed memory in the process instead of returning it to the system after every layer.

glibc returns the top of its heap as soon as twice the size of the largest tensor is free there. A forward pass of
Vim-tiny with batch size 8 then has 170,000 page faults and takes 1.5 times as long.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 512 << 20
_LARGEST_ON_HEAP = 32 << 20  # the maximum that glibc accepts; larger tensors are mapped from the system each time


@cache
def keep_freed_memory() -> bool:
    """Keep up to 512 MB of freed memory in this process; return whether glibc accepted the settings.

    Nothing is changed if the environment has its own malloc settings or SSMCOMPRESS_KEEP_MEMORY=0, or if the C library
    is not glibc.
    """
    own = "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if os.environ.get("SSMCOMPRESS_KEEP_MEMORY") == "0":
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  only glibc has it
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT) and mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP))
