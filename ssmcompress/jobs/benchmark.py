"""Timing of models and ops in one run, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from ..evaluation.latency import REPEATS, benchmark, settings
from ..evaluation.op_benchmark import benchmark_ops
from ..evaluation.peers import describe_peers, make_peers
from ..evaluation.timings import LEAST_ROUNDS, system_load
from ..models.base import TokenModel
from ..models.checkpoint import find_dense
from ..models.modes import runs_in_eval_mode


@dataclass(frozen=True)
class BenchmarkRequest:
    """Options of a benchmark.

    Attributes:
        batch_sizes: the batch sizes. repeats: timed runs of each. dtype: "float32" or "bfloat16"; None: float32, and
            on a GPU both for ops.
        reference: whether models are also timed with the reference scan.
        peers: whether timm's DeiTs are timed in the same rounds; see `ssmcompress.evaluation.peers`.
        ops: whether to time the ops. shape: their (batch, length, d_inner, d_state); None: the default shapes.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = REPEATS
    dtype: str | None = None
    reference: bool = False
    peers: bool = False
    ops: bool = False
    shape: tuple[int, ...] | None = None


def add_dense(models: Mapping[str, TokenModel]) -> dict[str, TokenModel]:
    """Return the models, preceded by the dense model if there is only one and it is pruned.

    Raises:
        InputError: the dense model no longer exists or has changed.
    """
    if len(models) != 1 or (only := next(iter(models.values()))).plan is None:
        return dict(models)
    name = "dense" if "dense" not in models else "dense model"
    return {name: find_dense(only), **models}


@runs_in_eval_mode
def benchmark_all(models: Mapping[str, TokenModel], request: BenchmarkRequest, device: torch.device) -> dict[str, Any]:
    """Return a JSON object with `settings`, `warnings`, and `models` and `ops` if they were timed.

    Raises:
        InputError: there are no peers of the first model, or their package is not installed.
    """
    chosen = None if request.dtype is None else getattr(torch, request.dtype)
    dtype = chosen or torch.float32
    first = next(iter(models.values()), None)
    peers = make_peers(first) if request.peers and first is not None else {}
    result: dict[str, Any] = {"settings": settings(device, dtype, request.repeats), "warnings": []}
    about = result["settings"]
    if peers:
        about["versions"]["timm"] = metadata.version("timm")
        about["peers"] = describe_peers(first, peers)
    if models:
        rows = benchmark(models, request.batch_sizes, request.repeats, dtype, request.reference, peers)
        result |= {"models": rows, "warnings": list_doubts(rows, request.repeats)}
    if request.ops:
        result["ops"] = benchmark_ops(request.shape, request.repeats, chosen, device)
        if not models:
            kinds = dict.fromkeys(row["dtype"] for row in result["ops"] if "dtype" in row)
            about["dtype"] = " and ".join(kinds)
    about["load_after"] = system_load()
    return result


def list_doubts(rows: Sequence[Mapping[str, Any]], repeats: int) -> list[str]:
    """Return a line for each model whose speed-up over the first is not significant or cannot be determined.

    Args:
        rows: result of `ssmcompress.evaluation.latency.benchmark`. repeats: its number of rounds.
    """
    if any(row["times_faster_low"] is None for row in rows):
        return [f"{repeats} rounds are too few to tell a speed-up from noise: use {LEAST_ROUNDS} or more `repeats`"]
    first = rows[0]["model"]
    return [
        f"the speed-up of {row['model']} at batch {row['batch']} is {row['times_faster']:.2f} "
        f"({row['times_faster_low']:.2f} to {row['times_faster_high']:.2f}): it may be noise; use more `repeats`, "
        "or a quieter machine"
        for row in rows
        if row["model"] != first and row["times_faster_low"] <= 1 <= row["times_faster_high"]
    ]
