"""Settings of OpenMP's threads for shared machines, applied before torch reads them.

- Idle threads wait only briefly. A thread of GNU OpenMP, which is part of torch's wheels for Linux, spins 300,000 times
  before it sleeps: up to 20 ms. If one thread of a team has lost its core to another process, the others spin on theirs
  until they lose them, too. Next to two busy processes on two cores, a forward pass of a small model took up to 770 ms
  instead of 12.
- A container that may use fewer cores than the machine has gets as many threads as it may use cores.

At run time, work that is too small for a second thread runs on a single one (`one_thread`).
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# About 0.2 ms: longer than the pauses between the parallel parts of a forward pass, and shorter than a time slice. On
# an idle machine, forward passes of a small model at batch 8 took 1.2 times as long with 1,000 as with the default, and
# no longer with 3,000; on a busy one, 10,000 took 1.7 times as long as 1,000.
SPINS = 3000


def prepare() -> None:
    """Set `GOMP_SPINCOUNT` and, in a container with a CPU quota, `OMP_NUM_THREADS`, for this process and its child
    processes.

    Variables set by the user are not changed. torch reads them when it is imported; after that, nothing is set.
    """
    if "torch" in sys.modules:
        return
    if not has_own_waits():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    quota = read_quota()
    if quota is not None and quota < count_cores() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(quota)


def has_own_waits() -> bool:
    """Return whether the environment configures how long OpenMP's threads wait."""
    return "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ


def count_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the CPU quota of a container in cores, rounded up; None: there is no limit.

    Args:
        cgroup: mount point of Linux control groups (version 2, or 1 with the folder `cpu`).
    """
    try:
        if (file := cgroup / "cpu.max").exists():
            share, period = file.read_text().split()
        else:
            share, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(share) / int(period)  # no limit if "max" or -1
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return math.ceil(cores) if cores > 0 else None


@contextmanager
def one_thread(small: bool = True) -> Iterator[None]:
    """Run torch operations and kernels in the body on one thread if the work is `small`.

    Python threads that use torch for the first time inherit torch's current number of threads, so nothing is changed
    while there are other Python threads.
    """
    import torch

    threads = torch.get_num_threads()
    if not small or threads == 1 or threading.active_count() > 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
