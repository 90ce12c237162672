"""One process or several: what each is to do of a job, and sums over all of them.

Started by `torchrun` or `accelerate launch`, the same command runs in every process; `start` brings them together. Each
takes its share of the images, results are added up, and the first alone prints and writes. Without a launcher there is
one process, and everything here is as good as nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def launched_index() -> int:
    """The number that a launcher gave to this process, 0 without one; known before anything is imported or started."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def start(device: str) -> str:
    """Join the processes that a launcher started, if one did.

    Args:
        device: what the user asked for.

    Returns:
        The device of this process: of several with "cuda", each has one of its own.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return device
    import torch
    from accelerate import PartialState

    if torch.device(device).type == "cuda" and not torch.distributed.is_initialized():
        # Both kinds of tensors are added up: gradients on the GPUs, counts on the CPU.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("cuda:nccl,cpu:gloo")
    state = PartialState(cpu=torch.device(device).type == "cpu")
    return str(state.device) if device == "cuda" else device


def count() -> int:
    """How many processes there are."""
    import torch

    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def index() -> int:
    """Which of them this is, from 0."""
    import torch

    return torch.distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the one that prints and writes."""
    return index() == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every so many of `items`: all of them over the processes, each once."""
    return items[index() :: count()]


def all_reduce_sum(*values: Any, device: Any = "cpu") -> None:
    """Replace each tensor by its sum over the processes.

    Args:
        device: where the tensors are added; a group with NCCL alone takes those on its GPU only.
    """
    if count() == 1:
        return
    import torch

    for value in values:
        total = value.to(device)
        torch.distributed.all_reduce(total)
        value.copy_(total)


def all_gather(value: T) -> list[T]:
    """Every process's value, in their order."""
    if count() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Go on when all have come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def shutdown() -> None:
    """Part from the other processes at the end of a command."""
    import sys

    if "torch" in sys.modules and count() > 1:
        import torch

        torch.distributed.destroy_process_group()
