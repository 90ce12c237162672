"""Latency of models beside each other."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

REPEATS = 7


@torch.inference_mode()
def latency(models: Mapping[str, nn.Module], images: Tensor, repeats: int = REPEATS) -> dict[str, float]:
    """Median milliseconds of one forward pass of each model.

    The runs are interleaved, so that whatever else the machine does falls on all of them.

    Args:
        models: name -> images (B, C, H, W) -> logits, all on the device of `images`.
        repeats: timed runs of each, after one that is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            _synchronise(images.device)
            start = perf_counter()
            model(images)
            _synchronise(images.device)
            elapsed = perf_counter() - start
            if repeat:
                times[name].append(1e3 * elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def latency_settings(device: torch.device) -> dict[str, Any]:
    """What `latency` at batch 1 was measured with: a JSON value."""
    cuda = device.type == "cuda"
    return {
        "batch": 1,
        "repeats": REPEATS,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
