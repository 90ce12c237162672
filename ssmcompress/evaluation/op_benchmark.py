"""Benchmark of the ops: the available backends, the reference, other packages and the products of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.snakes import snakes
from ..ops import ScanPath, causal_conv1d, grid_conv2d, scan_paths, selective_scan
from ..ops.dispatch import best_backend
from ..pruning.alignment import gap_steps
from .latency import summarize_times, time_calls

Shape = tuple[int, int, int, int]

# (batch, length, d_inner, d_state): a layer of Vim-small at 224 pixels; for a GPU a large batch and a single image.
SHAPES: dict[str, list[Shape]] = {"cpu": [(8, 197, 768, 16)], "cuda": [(128, 197, 768, 16), (1, 197, 768, 16)]}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}


class Workload(NamedTuple):
    """A call to time, its number of elements, and the minimum number of bytes and exponentials."""

    run: Callable[[], Any] | None
    elements: int | None = None
    bytes: int | None = None
    exps: int = 0


def benchmark_ops(
    shape: Shape | None = None,
    repeats: int = 7,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Time the scan (with bias, softplus, D and gate) and the convolution, forward and backward, and PlainMamba's ops.

    PlainMamba's ops are four scans along snakes over a grid, and a 7x7 convolution on a grid without a third of its
    tokens.

    Args:
        shape: (batch, length, d_inner, d_state); None: the shapes in `SHAPES`.
        dtype: dtype of the activations; None: the dtypes in `DTYPES`.

    Returns:
        A JSON value for each: `op`, `by`, `shape`, `dtype`, milliseconds (`ms`, `ms_low`, `ms_high`),
        `ns_per_element`, where an element is one state of one channel at one token in scans, else one channel of one
        token, and `times_faster` than the reference. On a GPU also `gb_per_s` and `gexp_per_s`, which count each input
        as read once, each result as written once and one exponential per element, and `times_limit`: the time relative
        to that of the slower of the two at the rates that the device reached in `limits`.
    """
    device = torch.device(device)
    limits = _measure_limits(device)
    cases = [
        (extents, kind)
        for extents in ([shape] if shape else SHAPES.get(device.type, SHAPES["cpu"]))
        for kind in ([dtype] if dtype else DTYPES.get(device.type, DTYPES["cpu"]))
    ]
    rows = [row for case in cases for row in _time_case(*case, device, repeats, limits)]
    return [*rows, {"op": "limits", "by": "device", **limits}] if limits else rows


def _time_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int, limits: dict[str, float] | None
) -> list[dict[str, Any]]:
    """Time all workloads of one shape and dtype, and return their rows."""
    workloads = dict(_make_workloads(shape, dtype, device))
    calls = {name: workload.run for name, workload in workloads.items()}
    times = time_calls(calls, device, repeats, "timing ops", at_once=1 if device.type == "cpu" else 5)
    order = list(dict.fromkeys(op for op, _ in times))
    rows = []
    for (op, by), values in sorted(times.items(), key=lambda item: order.index(item[0][0])):
        row = {
            "op": op,
            "by": by,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            **summarize_times(values),
        }
        reference_ms, work = times.get((op, "reference")), workloads[op, by]
        row["ns_per_element"] = 1e6 * row["ms"] / work.elements if work.elements else None
        row["times_faster"] = summarize_times(reference_ms)["ms"] / row["ms"] if reference_ms else None
        if limits and work.bytes:
            row["gb_per_s"], row["gexp_per_s"] = 1e-6 * work.bytes / row["ms"], 1e-6 * work.exps / row["ms"]
            least = max(work.bytes / limits["gb_per_s"], work.exps / limits["gexp_per_s"])
            row["times_limit"] = row["ms"] / (1e-6 * least)
        rows.append(row)
    return rows


def _measure_limits(device: torch.device) -> dict[str, float] | None:
    """Measure the billions of bytes and exponentials per second that a GPU achieves; None on other devices."""
    if device.type != "cuda" or best_backend(torch.empty(0, device=device)) != "triton":
        return None
    from ..ops.triton import limits

    return {"gb_per_s": 1e-9 * limits.copy_rate(device), "gexp_per_s": 1e-9 * limits.exp_rate(device)}


def _make_workloads(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[tuple[str, str], Workload]]:
    """Yield ((op, by), workload) for everything that is timed."""
    scan, conv = _make_inputs(shape, dtype, device)
    batch, length, d_inner, d_state = shape
    exps = batch * length * d_inner * d_state
    rows, states = batch * length * d_inner * dtype.itemsize, batch * length * d_state * dtype.itemsize
    forward, backward = (Workload(None, exps, n * rows + m * states, exps) for n, m in ((4, 2), (7, 4)))
    tap, tap_back = (Workload(None, exps // d_state, n * rows) for n in (2, 3))
    # PlainMamba: four paths that differ only in their order; a window over a grid without a third of its tokens.
    grid = (length - 1) // 14 + 1, 14
    order, on_grid = _make_snakes(length, grid, device), _make_pruned_grid(scan["u"], conv["bias"], grid)
    snake = Workload(None, 4 * exps, 4 * rows + 2 * states, 4 * exps)
    window = Workload(None, on_grid["x"].numel(), 2 * on_grid["x"].numel() * dtype.itemsize)
    backends = list(dict.fromkeys(["reference", best_backend(scan["u"])]))
    for by in backends:
        flags = {"delta_softplus": True, "backend": by}
        yield ("scan", by), forward._replace(run=partial(selective_scan, **scan, **flags))
        yield ("scan backward", by), backward._replace(run=_make_backward(selective_scan, scan, **flags))
        yield ("conv", by), tap._replace(run=partial(causal_conv1d, **conv, backend=by))
        yield ("conv backward", by), tap_back._replace(run=_make_backward(causal_conv1d, conv, backend=by))
        yield ("snakes", by), snake._replace(run=partial(_scan_snakes, **scan, order=order, backend=by))
        yield ("conv 7x7 pruned", by), window._replace(run=partial(grid_conv2d, **on_grid, backend=by))
    if device.type == "cuda":
        both, both_back = (Workload(None, 2 * exps, n * rows + m * states, 2 * exps) for n, m in ((6, 4), (11, 8)))
        second, _ = _make_inputs(shape, dtype, device, seed=1)
        twice = {**scan, **{f"{name}_b": tensor for name, tensor in second.items() if name != "z"}}
        positions, gap = _make_positions(shape, device)
        for by in backends:
            yield ("both ways", by), both._replace(run=partial(_scan_both_ways, **twice, backend=by))
            yield ("both ways aligned", by), both._replace(run=partial(_scan_both_ways, **twice, gap=gap, backend=by))
            yield ("both ways backward", by), both_back._replace(run=_make_backward(_scan_both_ways, twice, backend=by))
            yield (
                ("conv aligned", by),
                tap._replace(run=partial(causal_conv1d, **conv, positions=positions, backend=by)),
            )
        if (scan_fn := _try_import("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")) is not None:
            yield ("scan", "mamba-ssm"), forward._replace(run=_by_mamba_ssm(scan_fn, scan))
            yield ("both ways", "mamba-ssm"), both._replace(run=_by_mamba_ssm(scan_fn, scan, second))
    elif (pscan := _try_import("mambapy.pscan", "pscan")) is not None:
        yield ("scan", "mambapy pscan"), forward._replace(run=_by_mambapy(pscan, scan))
    yield ("one layer", "matrix products"), Workload(_make_layer_products(shape, dtype, device))


def _make_inputs(shape: Shape, dtype, device, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the arguments of a scan and of a convolution, by name."""
    batch, length, d_inner, d_state = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    sequence, states = (batch, length, d_inner), (batch, length, d_state)
    u, delta, z, B, C = (normal(*s).to(dtype) for s in (sequence, sequence, sequence, states, states))
    A, D, bias = -normal(d_inner, d_state).exp(), normal(d_inner), normal(d_inner)
    scan = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    return scan, {"x": u, "weight": normal(d_inner, 4), "bias": bias}


def _make_positions(shape: Shape, device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the positions of tokens after dropping a third, and the resulting gap for the scans of a pruned model."""
    batch, length, d_inner, _ = shape
    kept = torch.rand(batch, length + length // 2, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :length]
    positions = kept.sort(1).values
    return positions.to(device), (gap_steps(positions).float().to(device), torch.rand(d_inner, device=device))


def _make_snakes(length: int, grid: tuple[int, int], device) -> Tensor:
    """Return the (4, length) paths over the first `length` tokens of a grid."""
    visits, _ = snakes(*grid)
    return visits[visits < length].view(4, length).to(device)


def _make_pruned_grid(u: Tensor, bias: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments of a convolution on a grid without a third of its tokens, by name."""
    batch, length, channels = u.shape
    kept = max(1, length * 2 // 3)
    positions, _ = _make_positions((batch, kept, channels, 1), u.device)
    weight = torch.randn(channels, 1, 7, 7, generator=torch.Generator().manual_seed(3)).to(bias)
    return {"x": u[:, :kept], "weight": weight, "bias": bias, "grid": grid, "positions": positions}


def _scan_snakes(z: Tensor, order: Tensor, backend: str | None = None, **inputs: Tensor) -> Tensor:
    """Run the four scans of a PlainMamba layer."""
    return scan_paths([ScanPath(**inputs, order=o) for o in order], z, delta_softplus=True, backend=backend)[0]


def _scan_both_ways(z: Tensor, gap=None, backend: str | None = None, **inputs: Tensor) -> Tensor:
    """Run the two scans of a Vim layer; the inputs of the second are named `u_b` and so on."""
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    paths = [
        ScanPath(**{name: inputs[name + suffix] for name in names}, gap=gap, reverse=suffix == "")
        for suffix in ("", "_b")
    ]
    return scan_paths(paths, z, delta_softplus=True, backend=backend)[0]


def _make_backward(op, inputs: dict[str, Tensor], **flags: Any) -> Callable[[], Any]:
    """Return a function that runs only the backward pass; the forward pass runs here."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = op(**leaves, **flags)
        grad = torch.ones_like(y)

    def run() -> None:
        with torch.inference_mode(False):
            torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)

    return run


def _try_import(module: str, name: str) -> Callable[..., Tensor] | None:
    """Import a function of another package; None if that fails."""
    try:
        return getattr(import_module(module), name)
    except Exception:  # includes a package that is installed but incompatible with this torch or this GPU
        return None


def _by_mamba_ssm(scan_fn, first: dict[str, Tensor], second: dict[str, Tensor] | None = None) -> Callable[[], Tensor]:
    """Return a call of mamba-ssm's CUDA scan, channels first; the second direction is flipped, as in published Vims."""
    forward, backward = (
        None if inputs is None else {k: v.transpose(1, 2).contiguous() if v.ndim == 3 else v for k, v in inputs.items()}
        for inputs in (first, second)
    )

    def scan(inputs: dict[str, Tensor]) -> Tensor:
        return scan_fn(**inputs, delta_softplus=True)

    def run() -> Tensor:
        y = scan(forward)
        if backward is None:
            return y
        flipped = {**backward, "u": backward["u"].flip(-1), "z": forward["z"].flip(-1)}
        return y + scan(flipped).flip(-1)

    return run


def _by_mambapy(pscan: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a call that computes a scan by mambapy's parallel scan, in float32.

    Its factors and inputs are (batch, length, d_inner, d_state).
    """

    def run() -> Tensor:
        u, delta, B, C, z = (inputs[name].float() for name in ("u", "delta", "B", "C", "z"))
        delta = F.softplus(delta + inputs["delta_bias"])
        states = pscan(torch.exp(delta[..., None] * inputs["A"]), (delta * u)[..., None] * B[:, :, None])
        return ((states @ C[..., None])[..., 0] + inputs["D"] * u) * F.silu(z)

    return run


def _make_layer_products(shape, dtype, device) -> Callable[[], None]:
    """Return a function with the matrix products of one Vim layer: in_proj, both x_proj and dt_proj, out_proj."""
    batch, length, d_inner, d_state = shape
    d_model = max(1, d_inner // 2)
    rank = -(-d_model // 16)
    sizes = [(d_model, 2 * d_inner), *2 * [(d_inner, rank + 2 * d_state)], *2 * [(rank, d_inner)], (d_inner, d_model)]
    pairs = [
        (torch.randn(batch * length, inputs, dtype=dtype, device=device),
         torch.randn(outputs, inputs, dtype=dtype, device=device))
        for inputs, outputs in sizes
    ]  # fmt: skip

    def run() -> None:
        for rows, weight in pairs:
            F.linear(rows, weight)

    return run
