"""What all launches of Triton kernels here share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# The first NVIDIA generation that computes in bfloat16.
OLDEST = 80


def check_driver() -> None:
    """Raise what a first launch would, where the GPU is too old, or the driver or a C compiler is missing."""
    if not INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch < OLDEST:
            raise RuntimeError(f"compute capability {target.arch / 10}: expected {OLDEST / 10} or newer")


def launch(kernel, grid, like: Tensor, arguments: dict[str, Any], **constants: Any) -> None:
    """Run a kernel on the device of `like`, with those of the `arguments` that it takes."""
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    with torch.cuda.device_of(like):
        kernel[grid](**taken, **constants)


@cache
def capability(device: torch.device) -> int:
    """90 for NVIDIA's sm_90; 0 for CPUs and other makes."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def even_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor` (batch, length, channels) as rows evenly spaced in memory, copied where it is not; and how far apart."""
    batch, length, channels = tensor.shape
    stride = tensor.stride(1) if length > 1 else tensor.stride(0)  # what an axis of one has as its stride says nothing
    even = (channels == 1 or tensor.stride(2) == 1) and (batch == 1 or tensor.stride(0) == length * stride)
    return (tensor, stride) if even and stride >= channels else (dense(tensor), channels)


def dense(tensor: Tensor) -> Tensor:
    """A copy with rows right after each other; `contiguous` leaves a single row as far from the next as it says."""
    return tensor.clone(memory_format=torch.contiguous_format)


def sums(of: Tensor, *shape: int) -> Tensor:
    """A float32 tensor for what a kernel that goes over `of` adds up; zeros if there is nothing to go over."""
    return (torch.empty if of.numel() else torch.zeros)(shape, dtype=torch.float32, device=of.device)
