"""Triton kernels without a GPU: correct in the interpreter, and within the limits of the target GPUs.

TRITON_INTERPRET must be set before triton is imported and prevents compilation, so each runs in separate processes.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmcompress.errors import SsmCompressWarning
from ssmcompress.ops import dispatch, selective_scan

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton for this platform")

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """(exit code, all that was printed) of a Python process.

    Compiled kernels stay in Triton's own cache, by a hash of their source: compiling them takes 22 s for each device.
    """
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"},
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, **output)
    return done.returncode, done.stdout


def test_kernels_fit_the_registers():
    """`pytest -rP` shows each kernel's registers and shared memory."""
    code, printed = run("tests/ops/compile_triton.py", *map(str, CAPABILITIES))
    assert code == 0, printed
    rows = [json.loads(line) for line in printed.splitlines()]
    print("", *(" ".join(f"{k} {v}" for k, v in row.items()) for row in rows), sep="\n")
    for capability in CAPABILITIES:
        check_registers([row for row in rows if row["sm"] == capability], capability)
    assert {row["sm"] for row in rows} == set(CAPABILITIES)


def check_registers(rows, capability):
    names = {"scan_forward", "scan_chunks", "scan_backward", "conv_forward", "conv_backward", "grid_conv_forward"}
    assert {(row["kernel"], row["sm"]) for row in rows} == {(name, capability) for name in names}
    assert {row["d_state"] for row in rows if "d_state" in row} == {16, 64}
    assert {row["length"] for row in rows} == {197}, "another length compiled again"
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    assert all(0 < row["registers"] <= 255 and row["shared"] <= 48 * 1024 for row in rows)


def test_kernels_in_the_interpreter():
    tests = ("tests/ops/test_backends.py", "tests/ops/interpreted_triton.py")
    options = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")
    code, printed = run(*options, *tests, TRITON_INTERPRET="1")
    assert code == 0, printed


@pytest.fixture
def afresh():
    """No backend tried yet, before and after."""
    dispatch._try.cache_clear()
    yield
    dispatch._try.cache_clear()


def fake_scan(device="cuda", dtype=torch.bfloat16):
    with FakeTensorMode():
        u, states = torch.empty(2, 9, 5, device=device, dtype=dtype), torch.empty(2, 9, 3, device=device, dtype=dtype)
        return selective_scan(u, u, torch.empty(5, 3, device=device), states, states)


def test_cuda_tensors_go_to_triton_by_themselves(afresh, monkeypatch):
    from ssmcompress.ops import triton

    monkeypatch.setattr(triton, "check_driver", lambda: None)
    called = []
    monkeypatch.setattr(triton, "_scan", lambda *arguments: called.append(arguments) or triton._fake_scan(*arguments))
    y = fake_scan()
    assert len(called) == 1
    assert (y.shape, y.dtype, y.device.type) == ((2, 9, 5), torch.bfloat16, "cuda")
    fake_scan("cpu", torch.float32)
    assert len(called) == 1


def test_without_a_driver_the_ops_run_in_torch_and_say_so_once(afresh, monkeypatch):
    from ssmcompress.ops import triton

    def no_driver():
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr(triton, "check_driver", no_driver)
    with pytest.warns(SsmCompressWarning) as warned:
        shapes = [fake_scan().shape for _ in range(2)]
    assert shapes == [(2, 9, 5)] * 2
    expected = "triton cannot be used (no C compiler here): the ops run in plain torch, many times slower"
    assert [str(warning.message) for warning in warned] == [expected]


def test_without_triton_the_ops_run_in_torch_and_say_so(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton for this platform')")
    script = "from test_triton import fake_scan; print(tuple(fake_scan().shape), tuple(fake_scan().shape))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT / "tests" / "ops", ROOT))),
    }
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == "(2, 9, 5) (2, 9, 5)\n", result.stderr
    lines = [line.partition("Warning: ")[2] for line in result.stderr.splitlines() if "cannot be used" in line]
    assert lines == [
        "triton cannot be used (no Triton for this platform): the ops run in plain torch, many times slower"
    ]


def test_cpu_tensors_are_refused_outside_the_interpreter():
    u = torch.ones(1, 3, 2)
    with pytest.raises(ValueError, match="expected CUDA tensors, found cpu; .* TRITON_INTERPRET=1"):
        selective_scan(u, u, -torch.ones(2, 1), u[..., :1], u[..., :1], backend="triton")
