"""Loaders that read items in worker processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def make_loader(
    dataset: Any, rows: Sequence[Sequence[Any]], workers: int, worker_init: Callable[[int], None] | None = None
) -> torch.utils.data.DataLoader:
    """Return a loader for the items of `dataset` at each of `rows`, read in `workers` processes (0: in this one).

    It does not use the global random generator. Workers end when this process has ended, for whatever reason.
    """
    # Readers are closures, which only forked workers can inherit; forking is unsafe on systems other than Linux.
    fork = "fork" if workers and sys.platform == "linux" else None
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=rows,
        num_workers=workers if fork else 0,
        collate_fn=list,
        multiprocessing_context=fork,
        worker_init_fn=partial(_begin_worker, os.getpid(), worker_init),
        generator=torch.Generator(),
    )


def _begin_worker(parent: int, worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Watch the parent process, then call `worker_init`."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if worker_init is not None:
        worker_init(worker)


def _end_with(parent: int, interval: float = 1.0) -> None:
    """End this process at most `interval` seconds after `parent` is no longer its parent.

    torch's watchdog is not sufficient: it determines the parent only after the worker has started, so it never notices
    a parent that was killed before, and the worker waits forever to write results that do not fit into the pipe, whose
    other end it holds itself.
    """
    while os.getppid() == parent:
        time.sleep(interval)
    os._exit(1)
