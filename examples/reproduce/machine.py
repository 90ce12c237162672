"""Description of the machine that the script runs on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path


@functools.cache
def describe_machine() -> str:
    """Return the processor, number of cores and operating system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
