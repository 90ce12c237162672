"""Helpers for launching Triton kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Compute capability of the first NVIDIA generation with bfloat16 arithmetic.
OLDEST = 80


def check_driver() -> None:
    """Raise the error of a first launch early if the GPU is too old, or the driver or a C compiler is missing."""
    if not INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch < OLDEST:
            raise RuntimeError(f"compute capability {target.arch / 10}: expected {OLDEST / 10} or newer")


def launch(kernel, grid, like: Tensor, arguments: dict[str, Any], **constants: Any) -> None:
    """Run a kernel on the device of `like`, passing only those `arguments` that it has as parameters."""
    accepted = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    with torch.cuda.device_of(like):
        kernel[grid](**accepted, **constants)


@cache
def capability(device: torch.device) -> int:
    """Return the compute capability, such as 90 for NVIDIA's sm_90; 0 for CPUs and other vendors."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for a CPU, where the interpreter runs programs sequentially."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def even_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return `tensor` (batch, length, channels) with evenly spaced rows, copied if necessary, and the row stride."""
    batch, length, channels = tensor.shape
    stride = tensor.stride(1) if length > 1 else tensor.stride(0)  # the stride of an axis of size one has no meaning
    even = (channels == 1 or tensor.stride(2) == 1) and (batch == 1 or tensor.stride(0) == length * stride)
    return (tensor, stride) if even and stride >= channels else (dense(tensor), channels)


def dense(tensor: Tensor) -> Tensor:
    """Return a copy with contiguous rows; `contiguous` would not change the stride of a single row."""
    return tensor.clone(memory_format=torch.contiguous_format)


def sums(of: Tensor, *shape: int) -> Tensor:
    """Return a float32 tensor for the sums of a kernel over `of`; zeros if `of` is empty and no kernel runs."""
    return (torch.empty if of.numel() else torch.zeros)(shape, dtype=torch.float32, device=of.device)
