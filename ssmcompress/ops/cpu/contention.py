"""Shorter waits of OpenMP's threads while other processes take their cores, where `ssmcompress.openmp` came too late.

GNU OpenMP has no function for that. But it spins only 100 times, instead of 300,000, while a process has more of its
threads than the machine has cores. So a thread is started that holds a team of idle threads, which cost no time; when
the machine is quiet, it ends, because there 100 spins make a forward a fifth slower.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from ...openmp import count_cores

SECONDS = 0.5  # between two looks; the times of the system are counted in hundredths of a second
# Cores that other processes take from the threads of this one, at which waits become short, and long again.
BUSY, QUIET = 0.3, 0.1
# Looks in a row at a quiet machine before waits are long again.
PATIENCE = 10

Parallel = Callable[[ctypes.c_void_p, int | None, int, int], None]
_IDLE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)


class Watch:
    """Looks from time to time whether other processes take cores from the threads of this one, and shortens waits then.

    Args:
        parallel: GOMP_parallel(function, data, threads, flags) of the OpenMP that torch uses.
        others: function that returns the seconds of cores that other processes have used so far, or None.
    """

    def __init__(self, parallel: Parallel, others: Callable[[], float | None] | None = None):
        self._parallel, self._others = parallel, others or used_by_others
        self._looked, self._used = perf_counter(), self._others()
        self._quiet_looks = 0
        self._end: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def shortens(self) -> bool:
        """Whether waits are short now."""
        return self._end is not None

    def look(self, threads: int) -> None:
        """Shorten or lengthen the waits, if it is time to look again; `threads` are those that torch uses."""
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
    """Return the seconds that anything but this process has used of the cores that this process may run on.

    They count from when the machine started, with the time that the host of a virtual machine took for others. None:
    the system does not say.

    Args:
        stat: file of Linux whose lines "cpu0", "cpu1", ... have the times of a core by kind, in ticks.
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
