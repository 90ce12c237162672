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
    """A loader that gives the items of `dataset` at each of `rows`, read in `workers` processes (0: in this one).

    It does not draw from the global random generator. Workers end when this process has ended, however it ended.
    """
    # Readers are closures, which only forked workers can inherit; forking is unsafe on other systems than Linux.
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
    """End this process when `parent` is no longer its parent, at most `interval` seconds later.

    The watchdog of torch does not suffice: it asks for the parent only after the worker has begun, so a parent that
    was killed before is never missed, and a worker waits for ever to write results that do not fit into the pipe,
    whose other end it holds itself.
    """
    while os.getppid() == parent:
        time.sleep(interval)
    os._exit(1)
