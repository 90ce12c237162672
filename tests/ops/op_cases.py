"""Arguments of the ops, their backends, and how results are compared; shared by the tests of ops."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def patch_language_once() -> None:
    """Make Triton's interpreter patch triton.language once for a kernel, not again for each device function it calls.

    That halves its time. It works on private parts of Triton 3.8; where these are missing, nothing is changed.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope is None:
        return

    def patch_what_is_left(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        left = any(tl.core.is_builtin(language.load) for language in languages)
        return patch(function) if left else scope()

    interpreter._patch_lang = patch_what_is_left


if INTERPRETED:
    patch_language_once()

_on_a_gpu = pytest.param(
    "triton",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
# Triton's kernels run on a GPU; or all alone in a process of their own, in the interpreter.
COMPUTING = ["triton"] if INTERPRETED else ["reference", "cpu", _on_a_gpu]
STATES = (1, 8, 16, 64)
# Five tokens are two chunks of the scan's backward kernel, the second with a single token; 19 are two tiles of the
# convolution's. A pass through five tokens takes the interpreter a second.
LENGTH = 5 if INTERPRETED else 63
LENGTHS = (1, 2, LENGTH) if INTERPRETED else (1, 2, LENGTH, 197, 1000)
CONV_LENGTHS = (1, 2, 19) if INTERPRETED else LENGTHS
BOTH = (False, True)


def crossed(lengths, sizes) -> list[tuple[int, int, bool, bool]]:
    """(length, size, flag, flag) cases: all of them up to 197 tokens, fewer where each takes a second.

    Those are of a 1000 tokens, and all in the interpreter. Any two values meet in one case; each size has another of
    the four pairs of flags.
    """
    pairs = list(itertools.product(BOTH, BOTH))
    turns = (3, 0, 1, 2), (1, 2, 3, 0), (0, 1, 2, 3)
    return [
        (length, size, *pair)
        for number, length in enumerate(lengths)
        for size, turn in zip(sizes, turns[number % 3], strict=True)
        for pair in ([pairs[turn]] if INTERPRETED or length >= 1000 else pairs)
    ]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def scan_case(batch=2, length=63, d_inner=37, d_state=16, gap=False, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    """Arguments of selective_scan by name, softplus on."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    sequence, states = (batch, length, d_inner), (batch, length, d_state)
    A = -torch.rand(d_inner, d_state, generator=g, dtype=torch.float64).to(dtype) - 0.1
    case = {"u": normal(*sequence), "delta": normal(*sequence), "A": A, "B": normal(*states), "C": normal(*states),
            "D": normal(d_inner), "z": normal(*sequence), "delta_bias": normal(d_inner)}  # fmt: skip
    return {**case, "gap": normal(*sequence).abs()} if gap else case


def conv_case(batch=2, length=63, channels=37, width=4, pruned=False, seed=0):
    """(x, weight, bias), positions; float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, length, channels), (channels, width), (channels,)
    tensors = tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    kept = [torch.randperm(3 * length, generator=g)[:length].sort().values for _ in range(batch)]
    return tensors, torch.stack(kept) if pruned else None


def grid_case(grid=(5, 7), kept=20, channels=37, window=(7, 7), batch=2, seed=0):
    """(x, weight, bias), positions of the kept tokens on the grid; float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, kept, channels), (channels, 1, *window), (channels,)
    tensors = tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    places = grid[0] * grid[1]
    return tensors, torch.stack([torch.randperm(places, generator=g)[:kept].sort().values for _ in range(batch)])


def leaves(tensors, dtype, backend="reference") -> list[Tensor]:
    """Copies that take gradients, where the backend computes."""
    return [t.to(device_of(backend), dtype, copy=True).requires_grad_() for t in tensors]


def named(case: dict[str, Tensor], dtype, backend="reference") -> dict[str, Tensor]:
    return dict(zip(case, leaves(case.values(), dtype, backend), strict=True))


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what="") -> None:
    """Largest difference as a share of the largest expected value."""
    scale = expected.abs().max().clamp(min=1e-12).cpu()
    error = ((found.double().cpu() - expected.double().cpu()).abs().max() / scale).item()
    assert error <= tolerance, f"{what} {error:.1e}"
