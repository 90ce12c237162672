"""Compiles every Triton kernel for a GPU that need not be there, and prints what it takes of one, as JSON lines.

    python tests/ops/compile_triton.py 80 90 [float32]

The numbers are the GPUs' compute capabilities without the point; activations are bfloat16 unless float32 is asked for.

Registers are a thread's (255 at most), shared memory a program's, in bytes; `stack` and `spills` (instructions that
move registers to local memory and back) are 0 where everything fits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ssmcompress.ops.triton import conv, grid_conv, scan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a number of its own, since Triton keeps compiled kernels by it

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def dump(what: str) -> str:
            command = [TOOLS / "cuobjdump", f"--dump-{what}", file]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("resource-usage")
        found = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
        # Registers are spilled to the stack, so without one there is nothing to look for in 0.3 s of disassembly.
        code = dump("sass") if found["STACK"] else ""
    return {"registers": found["REG"], "stack": found["STACK"], "spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}


def compile_instead(case: dict, known: set):
    """What takes the place of a launch; a kernel that is known already is not printed again."""

    def launch(kernel, grid, like, arguments, **constants) -> None:
        taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
        compiled = kernel.warmup(**taken, **constants, grid=(1,))
        for one in compiled if isinstance(compiled, list) else [compiled]:
            if one.hash in known:
                continue
            known.add(one.hash)
            row = {"kernel": one.metadata.name, "sm": one.metadata.target.arch, **case}
            row |= resources(one.asm["cubin"]) | {"shared": one.metadata.shared, "warps": one.metadata.num_warps}
            print(json.dumps(row), flush=True)

    return launch


def scan_case(d_state: int, dtype: torch.dtype, length: int) -> dict:
    """Two paths of a pruned layer of Vim-small's width."""
    batch, channels, rank = 2, 768, 24
    sequence = batch, length, channels
    x_dbl = torch.zeros(batch, length, rank + 2 * d_state, dtype=dtype)
    return {
        "u": [torch.zeros(sequence, dtype=dtype) for _ in range(2)],
        "delta": [torch.zeros(sequence, dtype=dtype) for _ in range(2)],
        "A": [torch.zeros(channels, d_state) for _ in range(2)],
        "B": [x_dbl[..., rank : rank + d_state] for _ in range(2)],
        "C": [x_dbl[..., rank + d_state :] for _ in range(2)],
        "D": [torch.zeros(channels) for _ in range(2)],
        "bias": [torch.zeros(channels) for _ in range(2)],
        "steps": [torch.zeros(batch, length) for _ in range(2)],
        "gap_delta": [torch.zeros(channels) for _ in range(2)],
        "gap": [],
        "order": [],
        "z": torch.zeros(batch, length, 2 * channels, dtype=dtype).chunk(2, dim=-1)[1],
        "softplus": True,
        "reverse": [True, False],
    }


def compile_scans(case: dict, known: set, d_state: int, dtype: torch.dtype, length: int) -> None:
    scan.launch = compile_instead({**case, "length": length}, known)
    inputs = scan_case(d_state, dtype, length)
    forward = {"add": None, "score": None, "scored": 1}
    scan.processors = lambda device: 1
    scan.forward(**inputs, **forward)
    scan.forward(**inputs, **forward | {"score": "clip"})
    scan.backward(torch.zeros_like(inputs["u"][0]), **inputs)
    scan.processors = lambda device: 10**4  # so many that it goes in chunks
    scan.forward(**inputs, **forward)


def compile_bare_scan(known: set, dtype: torch.dtype) -> None:
    """One path, an order for each image, a gap of its own dtype, an odd width, and nothing that may be missing."""
    scan.launch = compile_instead({"case": "bare", "length": 197}, known)
    sequence = torch.zeros(2, 197, 37, dtype=dtype)
    order = torch.zeros(2, 197, dtype=torch.int64)
    states = torch.zeros(2, 197, 5)
    inputs = {"u": [sequence], "delta": [sequence], "A": [torch.zeros(37, 5)], "B": [states], "C": [states]}
    inputs |= {"D": [], "bias": [], "steps": [], "gap_delta": [], "gap": [sequence.double()], "order": [order]}
    inputs |= {"z": None, "softplus": False, "reverse": [False]}
    scan.processors = lambda device: 1
    scan.forward(**inputs, add=sequence, score="l2", scored=1)
    scan.backward(sequence, **inputs)


def compile_convs(case: dict, known: set, dtype: torch.dtype, length: int, channels: int = 768) -> None:
    conv.launch = compile_instead({**case, "length": length}, known)
    x = torch.zeros(2, length, 2 * channels, dtype=dtype).chunk(2, dim=-1)[0]
    weight, bias = torch.zeros(channels, 4), torch.zeros(channels)
    positions = torch.zeros(2, length, dtype=torch.int64)
    conv.forward(x, weight, bias, positions, True, False)
    conv.backward(torch.zeros_like(x), x, weight, bias, positions, True, True)


def compile_grid_convs(case: dict, known: set, dtype: torch.dtype, length: int, channels: int = 768) -> None:
    grid_conv.launch = compile_instead({**case, "length": length}, known)
    x = torch.zeros(2, length, 2 * channels, dtype=dtype).chunk(2, dim=-1)[0]
    positions = torch.arange(length).expand(2, -1)
    for window in (7, 3):
        grid_conv.forward(x, torch.zeros(channels, 1, window, window), torch.zeros(channels), positions, 15, 15, True)


def main(*arguments: str) -> None:
    name = next((word for word in arguments if not word.isdecimal()), "bfloat16")
    for capability in filter(str.isdecimal, arguments):
        compile_all(int(capability), name)


def compile_all(capability: int, name: str) -> None:
    driver.set_active(NoDevice(capability))
    scan.capability = lambda device: capability
    dtype, known = getattr(torch, name), set()
    compile_bare_scan(known, dtype)
    for length in (197, 138, 64):  # the last two add nothing
        for d_state in (16, 64):
            compile_scans({"d_state": d_state, "dtype": name}, known, d_state, dtype, length)
        compile_convs({"dtype": name}, known, dtype, length)
        compile_grid_convs({"dtype": name}, known, dtype, length)


if __name__ == "__main__":
    main(*sys.argv[1:])
