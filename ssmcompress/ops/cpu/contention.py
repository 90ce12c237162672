"""Shorter spin waits of OpenMP threads while other processes use their cores, if `ssmcompress.openmp` came too late.

GNU OpenMP has no function for this. But it spins only 100 times, instead of 300,000, while a process has more OpenMP
threads than the machine has cores. So a thread is started that holds a team of idle threads, which cost no time. It
ends when the machine is idle, because then 100 spins make a forward pass a fifth slower.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from ...openmp import count_cores

SECONDS = 0.5  # between two checks; the system counts times in hundredths of a second
# Number of cores used by other processes at which waits become short, and long again.
BUSY, QUIET = 0.3, 0.1
# Number of consecutive checks with an idle machine before waits become long again.
PATIENCE = 10

Parallel = Callable[[ctypes.c_void_p, int | None, int, int], None]
_IDLE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)


class Watch:
    """Periodically checks whether other processes use the cores of this one's threads, and shortens waits if so.

    Args:
        parallel: GOMP_parallel(function, data, threads, flags) of the OpenMP library used by torch.
        others: function that returns the core seconds used by other processes so far, or None.
    """

    def __init__(self, parallel: Parallel, others: Callable[[], float | None] | None = None):
        self._parallel, self._others = parallel, others or used_by_others
        self._looked, self._used = perf_counter(), self._others()
        self._quiet_looks = 0
        self._end: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def shortens(self) -> bool:
        """Whether waits are currently short."""
        return self._end is not None

    def look(self, threads: int) -> None:
        """Shorten or lengthen the waits if it is time for a check; `threads` is the number of threads of torch."""
        if perf_counter() - self._looked < SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._look(threads)
        finally:
            self._lock.release()

    def _look(self, threads: int) -> None:
        now = perf_counter()
        if now - self._looked < SECONDS or self._used is None:
            return
        used, before, since = self._others(), self._used, now - self._looked
        self._looked, self._used = now, used
        if used is None:
            return
        taken = (used - before) / since - (count_cores() - threads)
        self._quiet_looks = self._quiet_looks + 1 if taken < QUIET else 0
        if taken > BUSY and not self.shortens:
            self._shorten(threads)
        elif self._quiet_looks >= PATIENCE and self.shortens:
            self._end.set()
            self._end = None

    def _shorten(self, threads: int) -> None:
        end, begun = threading.Event(), threading.Event()
        more = max(2, count_cores() - threads + 2)

        def hold() -> None:
            self._parallel(_IDLE, None, more, 0)
            begun.set()
            end.wait()

        threading.Thread(target=hold, name="ssmcompress-waits", daemon=True).start()
        begun.wait()
        self._end = end


def used_by_others(stat: Path = Path("/proc/stat")) -> float | None:
    """Return the seconds used by everything but this process on the cores that this process may use.

    They count from the start of the machine, including time stolen by the host of a virtual machine. None: not provided
    by the system.

    Args:
        stat: Linux file whose lines "cpu0", "cpu1", ... have the times of a core by kind, in ticks.
    """
    try:
        own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        with stat.open() as file:
            cores = [line.split()[1:9] for line in file if line.split(" ", 1)[0] in own]
        # user, nice, system, idle, waiting for input or output, interrupts, soft interrupts, stolen
        ticks = sum(int(time) for core in cores for kind, time in enumerate(core) if kind not in (3, 4))
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2]) if cores else None
    except (OSError, ValueError, AttributeError):
        return None
