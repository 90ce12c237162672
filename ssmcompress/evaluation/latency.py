"""Latency, throughput and memory of several models, and the latency of their matrix products alone."""

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
from ..models.precision import check_not_quantised
from ..ops import use_backend
from ..progress import track
from .flops import flops_as_run
from .measure import run_in
from .timings import Timings, describe_load, quartiles, speed_up_interval, system_load, within_noise

REPEATS = 9
PRODUCTS = "matrix products alone"
# Maximum number of elements in the input of a matrix product, 256 MB in float32; larger ones are computed in parts that
# read the same input. A 3x3 convolution of a Vim-S UperNet at 512 px takes 900 MB per image as a matrix product.
PRODUCT_NUMBERS = 1 << 26
REFERENCE = "with the reference scan"


@torch.inference_mode()
def time_calls(
    calls: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    what: str = "timing",
    at_once: int = 1,
) -> dict[Any, list[float]]:
    """Time each call in `repeats` rounds, after a warm-up round, and return milliseconds per call.

    Each round times every call once, so that other load on the machine affects all of them equally.

    Args:
        what: description for the progress bar.
        at_once: number of consecutive calls timed together, so that a GPU need not wait for the next one; the times are
            per call.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for repeat in track(range(repeats + 1), what, repeats + 1):
        for name, call in calls.items():
            _synchronize(device)
            start = perf_counter()
            for _ in range(at_once):
                call()
            _synchronize(device)
            elapsed = perf_counter() - start
            if repeat:
                times[name].append(1e3 * elapsed / at_once)
    return times


def latency(models: Mapping[str, nn.Module], images: Tensor, repeats: int = REPEATS) -> dict[str, float]:
    """Return the median milliseconds of one forward pass of each model.

    Args:
        models: by name, each a module from images (B, C, H, W) to logits, all on the device of `images`.
        repeats: timed passes of each, after a warm-up pass.
    """
    timings = time_models(models, images, repeats)
    return {name: timings.median(name) for name in models}


def time_models(models: Mapping[str, nn.Module], images: Tensor, repeats: int = REPEATS) -> Timings:
    """Time one forward pass of each model, as `latency` does, and return every round."""
    load = system_load()
    calls = {name: lambda m=m: m(images) for name, m in models.items()}
    return Timings(time_calls(calls, images.device, repeats), load)


def latency_settings(device: torch.device) -> dict[str, Any]:
    """Return the settings of a measurement by `latency` at batch 1, as a JSON value."""
    return {"batch": 1, "repeats": REPEATS, "device": device_name(device), "threads": torch.get_num_threads()}


def summarize_times(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles, as a JSON value."""
    low, high = quartiles(milliseconds)
    return {"ms": statistics.median(milliseconds), "ms_low": low, "ms_high": high}


def settings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Return the settings that affect the figures of this module in addition to the models, as a JSON value."""
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
        **describe_load(system_load()),
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the architecture of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def benchmark(
    models: Mapping[str, TokenModel],
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = REPEATS,
    dtype: torch.dtype = torch.float32,
    reference: bool = False,
    peers: Mapping[str, nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """Time models in the same rounds, and for each its matrix products alone.

    Args:
        models: by name, all on one device; image sizes may differ. The speed of all is relative to the first.
        reference: whether to also time each with the reference scan.
        peers: other packages' models by name, which get the images of the first model; see `peers.make_peers`.

    Returns:
        A JSON value for each batch size and model: `model`, `batch`, milliseconds of a forward (`ms`, `ms_low` and
        `ms_high`, the quartiles), `images_per_second`, `times_faster` than the first model with its 95 % interval
        (`times_faster_low`, `times_faster_high`) and whether it is `within_noise` (None: too few repeats to say so),
        `times_fewer_flops` than the first model, as run here, `products_ms` and `times_products`,
        `reference_ms` and `times_reference` if `reference`, then `peak_mb` and `activations_mb`. Values unknown for
        `peers` are None.
    """
    peers = peers or {}
    device = next(next(iter(models.values())).parameters()).device
    first = next(iter(models))
    gflops = {name: flops_as_run(model)["full"] for name, model in models.items()}
    rows = []
    for batch in batch_sizes:
        calls: dict[str, Callable[[], Any]] = {}
        for name, model in models.items():
            images = torch.randn(batch, *model.input_shape, dtype=torch.float32)
            images = images.to(device, next(model.parameters()).dtype)
            calls[name] = _make_forward(model, images, dtype)
            calls[f"{name}, {PRODUCTS}"] = _make_products(model, batch, dtype, device)
            if reference:
                calls[f"{name}, {REFERENCE}"] = _make_forward(model, images, dtype, "reference")
            if name == first:
                peer_images = images
        calls |= {name: _make_forward(peer, peer_images, dtype) for name, peer in peers.items()}
        times = time_calls(calls, device, repeats, f"timing, batch {batch}")
        for name in [*models, *peers]:
            row = {"model": name, "batch": batch, **summarize_times(times[name])}
            row |= {"images_per_second": 1e3 * batch / row["ms"], **_compare_with_first(times, first, name)}
            row["times_fewer_flops"] = gflops[first] / gflops[name] if name in models else None
            products, slow = (
                statistics.median(times[call]) if (call := f"{name}, {kind}") in times else None
                for kind in (PRODUCTS, REFERENCE)
            )
            row |= {"products_ms": products, "times_products": products and row["ms"] / products}
            if reference:
                row |= {"reference_ms": slow, "times_reference": slow and slow / row["ms"]}
            row["peak_mb"] = peak_memory(calls[name], device) / 1e6
            known = name in models
            row["activations_mb"] = batch * models[name].activation_bytes(dtype.itemsize) / 1e6 if known else None
            rows.append(row)
    return rows


def _compare_with_first(times: Mapping[str, Sequence[float]], first: str, name: str) -> dict[str, Any]:
    """Return how many times faster a model is than the first, with its interval, as a JSON value."""
    found = {"times_faster": statistics.median(times[first]) / statistics.median(times[name])}
    if name == first:
        return {**found, "times_faster_low": 1.0, "times_faster_high": 1.0, "within_noise": False}
    low, high = speed_up_interval(times[first], times[name]) or (None, None)
    noise = within_noise(times[first], times[name])
    return {**found, "times_faster_low": low, "times_faster_high": high, "within_noise": noise}


def _make_forward(
    model: nn.Module, images: Tensor, dtype: torch.dtype, backend: str | None = None
) -> Callable[[], Tensor]:
    """Return a function that runs a forward pass."""
    model = run_in(model, dtype)

    def run() -> Tensor:
        if backend is None:
            return model(images)
        with use_backend(backend):
            return model(images)

    return run


def _make_products(model: TokenModel, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function that runs only the matrix products of a forward pass, on inputs created beforehand."""
    check_not_quantised(model)
    weights = [
        (rows, weight.detach().to(dtype))
        for tokens, weight in model.matrix_products()
        for rows in _split_rows(tokens * batch, weight.shape[1])
    ]
    shapes = {(rows, weight.shape[1]) for rows, weight in weights}
    inputs = {shape: torch.randn(shape, dtype=dtype, device=device) for shape in shapes}

    def run() -> None:
        for rows, weight in weights:
            F.linear(inputs[rows, weight.shape[1]], weight)

    return run


def _split_rows(rows: int, width: int) -> list[int]:
    """Split a product with inputs of `width` numbers per row into parts; return the number of rows of each."""
    most = max(1, PRODUCT_NUMBERS // width)
    return [min(most, rows - first) for first in range(0, rows, most)]


@torch.inference_mode()
def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of torch's tensors during a call in bytes, excluding those allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - allocated
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's messages about missing GPUs on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
