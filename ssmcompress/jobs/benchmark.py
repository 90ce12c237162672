"""Models and ops timed in one run, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.latency import benchmark, settings
from ..evaluation.op_benchmark import benchmark_ops
from ..models.base import TokenModel
from ..models.checkpoint import find_dense


@dataclass(frozen=True)
class BenchmarkRequest:
    """What is timed.

    Attributes:
        batch_sizes: images at a time. repeats: timed runs of each. dtype: "float32" or "bfloat16"; None: float32, and
            on a GPU both for ops.
        reference: whether models are also timed with the reference scan.
        ops: whether to time the ops. shape: (batch, length, d_inner, d_state) of them; None: the default ones.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 7
    dtype: str | None = None
    reference: bool = False
    ops: bool = False
    shape: tuple[int, ...] | None = None


def add_dense(models: Mapping[str, TokenModel]) -> dict[str, TokenModel]:
    """The models, with the dense model in front if there is a single one and it is pruned.

    Raises:
        InputError: the dense model is gone or has changed.
    """
    if len(models) != 1 or (only := next(iter(models.values()))).plan is None:
        return dict(models)
    name = "dense" if "dense" not in models else "dense model"
    return {name: find_dense(only), **models}


def benchmark_all(models: Mapping[str, TokenModel], request: BenchmarkRequest, device: torch.device) -> dict[str, Any]:
    """A JSON object with `settings`, `models` where there are any, and `ops` where they are asked for."""
    chosen = None if request.dtype is None else getattr(torch, request.dtype)
    dtype = chosen or torch.float32
    result: dict[str, Any] = {"settings": settings(device, dtype, request.repeats)}
    if models:
        result["models"] = benchmark(models, request.batch_sizes, request.repeats, dtype, request.reference)
    if request.ops:
        result["ops"] = benchmark_ops(request.shape, request.repeats, chosen, device)
        if not models:
            kinds = dict.fromkeys(row["dtype"] for row in result["ops"] if "dtype" in row)
            result["settings"]["dtype"] = " and ".join(kinds)
    return result
