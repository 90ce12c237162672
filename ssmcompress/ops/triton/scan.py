"""The selective scan over several paths in Triton: kernel arguments and launch shapes.

The arguments are those of the operators in `ssmcompress.ops.triton`: a list holds one tensor per path; an empty list
stands for a missing input.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import INTERPRETED, capability, dense, even_rows, launch, processors, sums
from .scan_backward import scan_backward
from .scan_kernels import scan_chunks, scan_forward

# Number of tokens whose states the backward pass holds in registers at a time.
HELD = 4
# Warps needed to keep a multiprocessor busy; with fewer, the tokens are split into chunks that run in parallel.
BUSY = 4
# A chunk is scanned twice, and its initial state is composed from all chunks before it.
FEWEST_CHUNKS, SHORTEST_CHUNK = 4, 12
# Channels of a one-warp program. Which is fastest depends on the device, so they are autotuned once for each number of
# channels, states and paths.
BLOCKS = (64, 32, 128)
SMALLEST_BLOCK = 32


@cache
def _tuned_forward(capability: int):
    # Four channels per thread exceed the available registers of sm_80: two instructions spill, in float32.
    shapes = [_shape(block, 1, capability) for block in BLOCKS if block < 128 or capability >= 90]
    configs = [triton.Config({"BLOCK": shape.pop("BLOCK")}, **shape) for shape in shapes]
    return triton.autotune(configs, key=["channels", "STATES", "PATHS"])(scan_forward)


def _shape(block: int, warps: int, capability: int, backward: bool = False) -> dict[str, int]:
    """Return the channels and warps of a program, and a limit on its registers.

    Without a limit, the assembler for sm_80 or sm_100 spills a few registers in order to fit more programs. With two
    channels of 16 states per thread, 200 registers are enough and allow 10 warps per multiprocessor; four channels, or
    the values kept by the backward pass, need all registers. For sm_90 nothing spills, and a limit makes the inner loop
    5 to 10 % longer. AMD's compiler accepts no limit.
    """
    shape = {"BLOCK": block, "num_warps": warps}
    if capability in (0, 90):
        return shape
    return shape | {"maxnreg": 200 if warps == 1 and block <= 64 and not backward else 255}


def forward(
    u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, add, softplus, reverse, score, scored
) -> tuple[Tensor, Tensor]:
    """Return y (batch, length, d_inner) and scores (batch, length), which are empty if `score` is None."""
    batch, length, channels = u[0].shape
    chunk, block, warps = forward_shape(u[0], A[0])
    blocks, chunks = triton.cdiv(channels, block), triton.cdiv(length, max(chunk, 1))
    y = u[0].new_empty(batch, length, channels)
    parts = u[0].new_empty((batch, blocks, length) if score else (0,), dtype=torch.float32)
    if y.numel():
        arguments = _arguments(u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, softplus, reverse)
        # The sum before the gate may exceed the range of float16.
        wide = sums(y, *y.shape) if len(u) > 1 and y.dtype == torch.float16 else y
        add = None if add is None else add.contiguous()
        arguments |= {"add": add, "y": y, "sums": wide, "scores": parts, "chunk": chunk}
        arguments |= {"ends": None, "decays": None, "SCORE": score, "SCORED": scored, "EVEN": channels % block == 0}
        grid, shape = (batch * blocks, chunks), _shape(block, warps, capability(y.device))
        if chunks > 1:
            slots = batch, len(u), chunks
            arguments["ends"] = y.new_empty(*slots, arguments["N"], channels, dtype=torch.float32)
            arguments["decays"] = y.new_empty(*slots, channels, dtype=torch.float32)
            launch(scan_chunks, grid, y, arguments, **shape)
        # Scores must be reproducible from run to run, so their partial sums must not depend on the autotuned shape.
        if block != BLOCKS[0] or score or channels % max(BLOCKS) or INTERPRETED:
            launch(scan_forward, grid, y, arguments, **shape)
        else:
            launch(
                _tuned_forward(capability(y.device)),
                lambda meta: (batch * triton.cdiv(channels, meta["BLOCK"]),),
                y,
                arguments,
            )
    scores = parts.sum(1) / channels if score else parts
    return y, scores.sqrt() if score == "l2" else scores / len(u) if score == "delta" else scores


def backward(dy, u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, softplus, reverse) -> list[list[Tensor]]:
    """Return the gradients of u, delta, A, B, C, D, bias, gap and z, each a list, empty for a missing input."""
    batch, length, channels = u[0].shape
    # With more channels and states, the values kept by a thread would not fit in its registers.
    states, warps = A[0].shape[1], _warps(A[0])
    block = 32 if warps == 1 else 16
    blocks, zs = triton.cdiv(channels, block), [] if z is None else [z]

    def new(tensors: list[Tensor], *shape: int) -> list[Tensor]:
        return [sums(dy, *shape) for _ in tensors]

    du, ddelta = ([torch.empty_like(t, memory_format=torch.contiguous_format) for t in ts] for ts in (u, delta))
    dgap, dz = new(gap, batch, length, channels), new(zs, batch, length, channels)
    # Partial sums over images or channels, so that no two programs add to the same element.
    dA, dD, dbias = new(A, batch, channels, states), new(D, batch, channels), new(bias, batch, channels)
    dB, dC = new(B, batch, blocks, length, states), new(C, batch, blocks, length, states)
    if dy.numel():
        arguments = _arguments(u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, softplus, reverse)
        outputs = {"dus": du, "ddeltas": ddelta, "dAs": dA, "dBs": dB, "dCs": dC, "dDs": dD, "dbiases": dbias}
        arguments |= {name: _each(tensors, len(u)) for name, tensors in (outputs | {"dgaps": dgap}).items()}
        entering = dy.new_empty(batch, triton.cdiv(length, HELD), arguments["N"], channels, dtype=torch.float32)
        arguments |= {"dy": dy.contiguous(), "dz": dz[0] if dz else None, "entering": entering, "CHUNK": HELD}
        shape = _shape(block, warps, capability(dy.device), backward=True)
        launch(scan_backward, (batch * blocks,), dy, arguments, **shape, EVEN=channels % block == 0)
    dA, dD, dbias = ([t.sum(0) for t in tensors] for tensors in (dA, dD, dbias))
    dB, dC = ([t.sum(1) for t in tensors] for tensors in (dB, dC))
    pairs = (du, u), (ddelta, delta), (dA, A), (dB, B), (dC, C), (dD, D), (dbias, bias), (dgap, gap), (dz, zs)
    return [[d.to(t.dtype) for d, t in zip(ds, ts, strict=True)] for ds, ts in pairs]


def forward_shape(u: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Return (tokens, channels, warps) of a program: all tokens and many channels if this keeps the device busy."""
    batch, length, channels = u.shape
    warps = _warps(A)
    wanted = BUSY * processors(u.device)
    if warps == 1 and batch * triton.cdiv(channels, BLOCKS[0]) >= wanted:
        return length, BLOCKS[0], warps
    programs = max(1, batch * triton.cdiv(channels, SMALLEST_BLOCK))
    chunks = min(triton.cdiv(wanted, programs * warps), length // SHORTEST_CHUNK)
    return triton.cdiv(length, chunks) if chunks >= FEWEST_CHUNKS else length, SMALLEST_BLOCK, warps


def _warps(A: Tensor) -> int:
    """Return the warps of a program: one per 16 states of a channel, at most 32."""
    return min(32, max(1, triton.next_power_of_2(A.shape[1]) // 16))


def _arguments(u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, softplus, reverse) -> dict[str, Any]:
    """Return the arguments of the kernels by parameter name."""
    z, z_stride = (None, 0) if z is None else even_rows(z)
    BC, state_stride = _same_strides([even_rows(t) for t in (*B, *C)])
    if max(z_stride, state_stride, u[0].shape[2]) * u[0].shape[1] >= 2**31:
        raise ValueError(f"selective_scan: {u[0].shape[1]} tokens need offsets beyond 32 bits")
    plain = {"us": u, "deltas": delta, "Ds": D, "biases": bias, "steps": steps, "gap_deltas": gap_delta, "gaps": gap}
    tensors = {name: [t.contiguous() for t in ts] for name, ts in (plain | {"orders": order}).items()}
    tensors |= {"Bs": BC[: len(B)], "Cs": BC[len(B) :]}
    return {name: _each(ts, len(u)) for name, ts in tensors.items()} | {
        "A": torch.stack([a.t() for a in A]),
        "z": z,
        "length": u[0].shape[1],
        "channels": u[0].shape[2],
        "state_stride": state_stride,
        "z_stride": z_stride,
        "order_stride": u[0].shape[1] if order and order[0].ndim > 1 else 0,
        "stride": u[0].shape[2],
        "PATHS": len(u),
        "REVERSE": tuple(reverse),
        "SOFTPLUS": softplus,
        "STATES": A[0].shape[1],
        "N": triton.next_power_of_2(A[0].shape[1]),
    }


def _same_strides(tensors: list[tuple[Tensor, int]]) -> tuple[list[Tensor], int]:
    """Return the tensors, copied if their row strides differ, and the common row stride."""
    distances = {stride for _, stride in tensors}
    if len(distances) == 1:
        return [tensor for tensor, _ in tensors], distances.pop()
    return [dense(tensor) for tensor, _ in tensors], tensors[0][0].shape[2]


def _each(tensors: list[Tensor], paths: int) -> tuple[Tensor | None, ...]:
    return tuple(tensors) or (None,) * paths
