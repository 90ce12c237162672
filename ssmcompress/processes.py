"""Distributed runs: start, sharding, reductions and barriers, for one process or several.

With `torchrun` or `accelerate launch`, the same command runs in every process; `start` joins them into a group. Each
processes its shard of the images, results are summed over all, and only the main process prints and writes. Without a
launcher there is one process, and these functions do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from .extras import require_extra

T = TypeVar("T")


def launched_index() -> int:
    """Return the rank set by a launcher, 0 without one; requires neither torch nor a process group."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def start(device: str) -> str:
    """Initialise the process group if a launcher started this process.

    Args:
        device: the device requested by the user.

    Returns:
        The device of this process: with "cuda", each of several processes has its own GPU.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return device
    require_extra("finetune")
    import torch
    from accelerate import PartialState

    if torch.device(device).type == "cuda" and not torch.distributed.is_initialized():
        # Tensors are reduced on both: gradients on the GPUs, counts on the CPU.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("cuda:nccl,cpu:gloo")
    state = PartialState(cpu=torch.device(device).type == "cpu")
    return str(state.device) if device == "cuda" else device


def count() -> int:
    """Return the number of processes."""
    import torch

    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def index() -> int:
    """Return the rank of this process, from 0."""
    import torch

    return torch.distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the process that prints and writes."""
    return index() == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's shard of `items`: every `count()`-th item, starting at its rank."""
    return items[index() :: count()]


def all_reduce_sum(*values: Any, device: Any = "cpu") -> None:
    """Replace each tensor by its sum over all processes.

    Args:
        values: the tensors.
        device: where they are summed; a group with NCCL alone reduces tensors on its GPU only.
    """
    if count() == 1:
        return
    import torch

    for value in values:
        total = value.to(device)
        torch.distributed.all_reduce(total)
        value.copy_(total)


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, in order of rank."""
    if count() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def shutdown() -> None:
    """Destroy the process group at the end of a command."""
    import sys

    if "torch" in sys.modules and count() > 1:
        import torch

        torch.distributed.destroy_process_group()
