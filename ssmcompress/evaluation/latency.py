"""Latency, throughput and memory of models beside each other, and of their matrix products alone."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import TokenModel
from ..ops import use_backend
from ..progress import track
from .measure import autocast

REPEATS = 7
PRODUCTS = "matrix products alone"
REFERENCE = "with the reference scan"


@torch.inference_mode()
def timings(
    calls: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    what: str = "timing",
    at_once: int = 1,
) -> dict[Any, list[float]]:
    """Milliseconds of `repeats` runs of each call, after one that is not timed.

    The runs are interleaved, so that whatever else the machine does falls on all of them.

    Args:
        at_once: calls that make a run, so many in a row that a GPU need not wait for the next; the time is one call's.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for repeat in track(range(repeats + 1), what, repeats + 1):
        for name, call in calls.items():
            _synchronise(device)
            start = perf_counter()
            for _ in range(at_once):
                call()
            _synchronise(device)
            elapsed = perf_counter() - start
            if repeat:
                times[name].append(1e3 * elapsed / at_once)
    return times


def latency(models: Mapping[str, nn.Module], images: Tensor, repeats: int = REPEATS) -> dict[str, float]:
    """Median milliseconds of one forward pass of each model.

    Args:
        models: name -> images (B, C, H, W) -> logits, all on the device of `images`.
        repeats: timed runs of each, after one that is not timed.
    """
    times = timings({name: lambda m=m: m(images) for name, m in models.items()}, images.device, repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def latency_settings(device: torch.device) -> dict[str, Any]:
    """What `latency` at batch 1 was measured with: a JSON value."""
    return {"batch": 1, "repeats": REPEATS, "device": device_name(device), "threads": torch.get_num_threads()}


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and the quartiles beside it: a JSON value."""
    low, _, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else [milliseconds[0]] * 3
    )
    return {"ms": statistics.median(milliseconds), "ms_low": low, "ms_high": high}


def settings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """What figures of this module depend on beside the models: a JSON value."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numba", "triton", "mambapy", "mamba-ssm", "ssmcompress"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the architecture of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def benchmark(
    models: Mapping[str, TokenModel],
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = REPEATS,
    dtype: torch.dtype = torch.float32,
    reference: bool = False,
) -> list[dict[str, Any]]:
    """Time models in one interleaved run, each beside its matrix products alone.

    Args:
        models: by name, all on one device and for one image size or each its own; the first is what others' speed is
            a multiple of.
        reference: time each with the reference scan, too.

    Returns:
        For each batch size and model a JSON value: `model`, `batch`, milliseconds of a forward (`ms`, `ms_low` and
        `ms_high`, the quartiles), `images_per_second`, `times_faster` than the first model, `products_ms` and
        `times_products`, `reference_ms` and `times_reference` where asked for, and `peak_mb` beside `activations_mb`.
    """
    device = next(next(iter(models.values())).parameters()).device
    rows = []
    for batch in batch_sizes:
        calls: dict[str, Callable[[], Any]] = {}
        for name, model in models.items():
            images = torch.randn(batch, model.config.in_chans, *model.config.image_size, device=device)
            calls[name] = _forward(model, images, dtype)
            calls[f"{name}, {PRODUCTS}"] = _products(model, batch, dtype, device)
            if reference:
                calls[f"{name}, {REFERENCE}"] = _forward(model, images, dtype, "reference")
        times = timings(calls, device, repeats, f"timing, batch {batch}")
        first = None
        for name, model in models.items():
            row = {"model": name, "batch": batch, **spread(times[name])}
            first = first or row["ms"]
            products = statistics.median(times[f"{name}, {PRODUCTS}"])
            row |= {"images_per_second": 1e3 * batch / row["ms"], "times_faster": first / row["ms"]}
            row |= {"products_ms": products, "times_products": row["ms"] / products}
            if reference:
                slow = statistics.median(times[f"{name}, {REFERENCE}"])
                row |= {"reference_ms": slow, "times_reference": slow / row["ms"]}
            row["peak_mb"] = peak_memory(calls[name], device) / 1e6
            row["activations_mb"] = batch * model.activation_bytes(dtype.itemsize) / 1e6
            rows.append(row)
    return rows


def _forward(model: TokenModel, images: Tensor, dtype: torch.dtype, backend: str | None = None) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with autocast(images.device, dtype):
            if backend is None:
                return model(images)
            with use_backend(backend):
                return model(images)

    return run


def _products(model: TokenModel, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """The matrix products of a forward and nothing else, on inputs that are made beforehand."""
    weights = [(tokens * batch, weight.detach().to(dtype)) for tokens, weight in model.matrix_products()]
    shapes = {(rows, weight.shape[1]) for rows, weight in weights}
    inputs = {shape: torch.randn(shape, dtype=dtype, device=device) for shape in shapes}

    def run() -> None:
        for rows, weight in weights:
            F.linear(inputs[rows, weight.shape[1]], weight)

    return run


@torch.inference_mode()
def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of torch's tensors that a call holds at once, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines on stderr, of GPUs that are not there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        most = max(most, held)
    return most


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
