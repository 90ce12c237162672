"""The ops alone: every backend that runs here beside the reference, other packages and the products of one layer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .benchmark import spread, timings
from .ops import causal_conv1d, selective_scan

# batch, length, d_inner, d_state: a layer of Vim-small at 224 pixels, batch 8.
SHAPE = (8, 197, 768, 16)


def benchmark_ops(
    shape: tuple[int, int, int, int] = SHAPE,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Time the scan (bias, softplus, D and gate in it) and the convolution, forward and backward.

    Args:
        shape: (batch, length, d_inner, d_state).
        dtype: of the activations.

    Returns:
        For each a JSON value: `op`, `by`, milliseconds (`ms`, `ms_low`, `ms_high`), `ns_per_element`, an element being
        one state of one channel at one token in scans, else one channel, and `times_faster` than the reference.
    """
    device = torch.device(device)
    scan, conv = _inputs(shape, dtype, device)
    backends = ["reference", "cpu"] if device.type == "cpu" else ["reference"]
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for backend in backends:
        calls["scan", backend] = lambda b=backend: selective_scan(**scan, delta_softplus=True, backend=b)
        calls["conv", backend] = lambda b=backend: causal_conv1d(**conv, backend=b)
    for backend in backends:
        calls["scan backward", backend] = _backward(selective_scan, scan, backend, {"delta_softplus": True})
        calls["conv backward", backend] = _backward(causal_conv1d, conv, backend, {})
    if device.type == "cpu" and (pscan := _mambapy()) is not None:
        calls["scan", "mambapy pscan"] = lambda: _scan_by(pscan, **scan)
    calls["one layer", "matrix products"] = _layer_products(shape, dtype, device)
    times = timings(calls, device, repeats, "timing ops")
    batch, length, d_inner, d_state = shape
    rows = []
    for (op, by), values in sorted(times.items(), key=lambda item: _ORDER.index(item[0][0])):
        row = {"op": op, "by": by, **spread(values)}
        elements = batch * length * d_inner * (d_state if op.startswith("scan") else 1)
        row["ns_per_element"] = 1e6 * row["ms"] / elements if op != "one layer" else None
        slow = times.get((op, "reference"))
        row["times_faster"] = spread(slow)["ms"] / row["ms"] if slow else None
        rows.append(row)
    return rows


_ORDER = ("scan", "scan backward", "conv", "conv backward", "one layer")


def _inputs(shape, dtype, device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch, length, d_inner, d_state = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    sequence, states = (batch, length, d_inner), (batch, length, d_state)
    u, delta, z, B, C = (normal(*s).to(dtype) for s in (sequence, sequence, sequence, states, states))
    A, D, bias = -normal(d_inner, d_state).exp(), normal(d_inner), normal(d_inner)
    scan = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    return scan, {"x": u, "weight": normal(d_inner, 4), "bias": bias}


def _backward(op, inputs: dict[str, Tensor], backend: str, flags: dict[str, bool]) -> Callable[[], Any]:
    """The backward pass alone, of a forward that ran before."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = op(**leaves, **flags, backend=backend)
        upper = torch.ones_like(y)

    def run() -> None:
        with torch.inference_mode(False):
            torch.autograd.grad(y, list(leaves.values()), upper, retain_graph=True)

    return run


def _mambapy() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        return import_module("mambapy.pscan").pscan
    except ImportError:
        return None


def _scan_by(pscan, u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The same work through a parallel scan over factors and inputs (batch, length, d_inner, d_state)."""
    u, delta, B, C, z = (t.float() for t in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias)
    states = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
    return ((states @ C[..., None])[..., 0] + D * u) * F.silu(z)


def _layer_products(shape, dtype, device) -> Callable[[], None]:
    """The matrix products of one Vim layer of this d_inner: in_proj, both x_proj and dt_proj, out_proj."""
    batch, length, d_inner, d_state = shape
    d_model = max(1, d_inner // 2)
    rank = -(-d_model // 16)
    sizes = [(d_model, 2 * d_inner), *2 * [(d_inner, rank + 2 * d_state)], *2 * [(rank, d_inner)], (d_inner, d_model)]
    pairs = [
        (torch.randn(batch * length, taken, dtype=dtype, device=device),
         torch.randn(given, taken, dtype=dtype, device=device))
        for taken, given in sizes
    ]  # fmt: skip

    def run() -> None:
        for rows, weight in pairs:
            F.linear(rows, weight)

    return run
