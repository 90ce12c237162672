"""What all launches of Triton kernels here share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def check_driver() -> None:
    """Raise what a first launch would, where the driver or the C compiler that Triton calls is missing."""
    if not INTERPRETED:
        triton.runtime.driver.active.get_current_target()


def launch(kernel, grid, like: Tensor, arguments: dict[str, Any], **constants: Any) -> None:
    """Run a kernel on the device of `like`, with those of the `arguments` that it takes."""
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    with torch.cuda.device_of(like):
        kernel[grid](**taken, **constants)


@cache
def capability() -> int:
    """What kernels are compiled for: 90 for NVIDIA's sm_90; 0 in the interpreter and for other makes."""
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    return target.arch if target is not None and target.backend == "cuda" else 0


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def even_rows(tensor: Tensor) -> Tensor:
    """`tensor` (batch, length, channels) as rows evenly spaced in memory: copied where it is not."""
    batch, length, _ = tensor.shape
    even = tensor.stride(2) == 1 and (batch == 1 or tensor.stride(0) == length * tensor.stride(1))
    return tensor if even else tensor.contiguous()
