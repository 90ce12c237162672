"""The compiled CPU kernels with threads, forks, caches, and torch's transforms and tracing."""

import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_vim
from numba import cfunc
from numba.core import event
from op_cases import conv_case, grid_case, leaves, scan_case

import ssmcompress
from ssmcompress.ops import causal_conv1d, grid_conv2d, rms_norm, selective_scan, use_backend
from ssmcompress.ops.cpu import entries


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    expected = everything()
    norm = rms_norm(torch.ones(2, 5), torch.ones(5), 0.5, backend="cpu")
    torch.set_default_dtype(dtype)
    try:
        assert everything() == expected
        ones = torch.ones(2, 5, dtype=torch.float32)
        assert torch.equal(rms_norm(ones, ones[0], 0.5, backend="cpu"), norm)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mixed_dtypes_are_left_to_the_reference():
    case = scan_case(dtype=torch.float32)
    expected = selective_scan(**case, delta_softplus=True, backend="reference")
    assert torch.equal(selective_scan(**{**case, "z": case["z"].double()}, delta_softplus=True), expected)


def test_a_second_derivative_is_refused():
    case = {k: v.requires_grad_() for k, v in scan_case(dtype=torch.float32).items()}
    y = selective_scan(**case, delta_softplus=True, backend="cpu")
    (first,) = torch.autograd.grad(y.sum(), case["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_graphs_of_torch_hold_the_ops():
    case = scan_case(batch=1, length=9, d_inner=5, d_state=3, dtype=torch.float32)

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, z, bias):
            return causal_conv1d(selective_scan(u, delta, A, B, C, D, z, bias, True), torch.ones(5, 4))

    expected = Scan()(*case.values())
    program = torch.export.export(Scan(), tuple(case.values()))
    assert {"ssmcompress::selective_scan", "ssmcompress::causal_conv1d"} <= {
        node.target.name().removesuffix(".default") for node in program.graph.nodes if hasattr(node.target, "name")
    }
    torch.testing.assert_close(program.module()(*case.values()), expected)
    compiled = torch.compile(Scan(), backend="aot_eager")
    torch.testing.assert_close(compiled(*case.values()), expected)


@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
def test_a_whole_model_is_one_graph_of_torch(images, pruned):
    vim = make_vim(depth=2)
    if pruned:
        vim = ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    with torch.no_grad():
        compiled = torch.compile(vim, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), vim(images))


def test_compiled_ops_pass_the_checks_of_torch():
    case = {k: v.requires_grad_() for k, v in scan_case(length=9, d_inner=5, d_state=3, dtype=torch.float32).items()}
    u, delta, A, B, C, D, z, bias = case.values()
    gap = torch.rand_like(u).requires_grad_()
    for order, reverse in ((None, True), (torch.arange(9).flip(0), False)):
        arguments = (u, delta, A, B, C, D, z, bias, None, None, gap, u.detach(), order, True, reverse)
        torch.library.opcheck(torch.ops.ssmcompress.selective_scan.default, arguments)
    (x, weight, bias), positions = conv_case(length=9, channels=5, pruned=True)
    tensors = leaves((x, weight, bias), torch.float32)
    torch.library.opcheck(torch.ops.ssmcompress.causal_conv1d.default, (*tensors, positions, True, False))
    tensors, positions = grid_case((3, 4), 5, channels=5)
    tensors = leaves(tensors, torch.float32)
    torch.library.opcheck(torch.ops.ssmcompress.grid_conv2d.default, (*tensors, positions, 3, 4, True))


def everything():
    """Results of both ops, forward and backward, as bytes."""
    case = scan_case(batch=3, length=100, d_inner=150, gap=True, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in case.values()]
    y = selective_scan(**case, delta_softplus=True, backend="cpu")
    y.square().sum().backward()
    (x, weight, bias), positions = conv_case(batch=3, length=100, channels=150, pruned=True)
    others = leaves((x, weight, bias), torch.float32)
    causal_conv1d(*others, positions, backend="cpu").square().sum().backward()
    grid, positions = grid_case((9, 9), 50, channels=150)
    on_grid = grid_conv2d(*(t.float() for t in grid), grid=(9, 9), positions=positions, backend="cpu")
    results = y.detach(), on_grid, *(t.grad for t in (*tensors, *others))
    return b"".join(t.numpy().tobytes() for t in results)


def test_positions_and_orders_that_point_outside_touch_no_other_memory():
    """Invalid numbers are the caller's responsibility, but must not crash."""
    (x, weight, bias), _ = grid_case((3, 4), 5, channels=5)
    wild = torch.tensor([[-(2**40), 3, 12, 2**40, 2**62]] * 2)
    y = torch.ops.ssmcompress.grid_conv2d(x.float(), weight.float(), bias.float(), wild, 3, 4, True)
    alone = grid_conv2d(x[:, 1:2].float(), weight.float(), bias.float(), grid=(3, 4), positions=torch.tensor([3]))
    torch.testing.assert_close(y[:, 1:2], alone)
    case = {k: v.requires_grad_() for k, v in scan_case(length=5, dtype=torch.float32).items()}
    selective_scan(**case, order=wild, backend="cpu").sum().backward()


def test_results_repeat_to_the_bit_with_any_number_of_threads():
    before = torch.get_num_threads()
    expected = everything()
    try:
        for threads in (1, 2, 3, before):
            torch.set_num_threads(threads)
            assert everything() == expected
    finally:
        torch.set_num_threads(before)


def test_two_python_threads_at_once():
    expected, found = everything(), []
    workers = [threading.Thread(target=lambda: found.extend(everything() for _ in range(5))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 10


def _in_child(queue) -> None:
    case = scan_case(batch=1, length=50, d_inner=150, dtype=torch.float32)
    queue.put(selective_scan(**case, delta_softplus=True, backend="cpu").numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_use():
    case = scan_case(batch=1, length=50, d_inner=150, dtype=torch.float32)
    expected = selective_scan(**case, delta_softplus=True, backend="cpu")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    try:
        assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    finally:
        child.kill()


SCRIPT = """
import logging, torch
from ssmcompress.ops import selective_scan
u, A = torch.ones(1, 3, 2), -torch.ones(2, 1)
print(selective_scan(u, u, A, u[..., :1], u[..., :1], backend="cpu").sum().item())
"""


@pytest.mark.parametrize("fault", ["no folder", "damaged file"])
def test_compiled_code_that_cannot_be_kept_or_read(fault, tmp_path):
    """The ops still work, and announce that they compile."""
    package = tmp_path / "ssmcompress"
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(Path(ssmcompress.__file__).parent, package, ignore=ignored)
    cache = package / "ops" / "cpu" / "__pycache__"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/dev/null"}
    if fault == "no folder":
        cache.write_text("a file where the folder should be")
    else:
        everything()  # so that there is something to damage
        ours = Path(entries.__file__).parent / "__pycache__"
        shutil.copytree(ours, cache, ignore=lambda _, names: [n for n in names if "scan_forward" not in n])
        for source in (package / "ops" / "cpu").glob("*.py"):
            original = Path(entries.__file__).parent / source.name
            os.utime(source, ns=(original.stat().st_atime_ns, original.stat().st_mtime_ns))
        damaged = list(cache.iterdir())
        assert damaged
        for file in damaged:
            file.write_bytes(file.read_bytes()[:100])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(2 * (3 + 2 * math.exp(-1) + math.exp(-2)))
    assert result.stderr == "compiling the CPU kernels (10 to 20 s, kept for later runs)\n"


def test_the_backend_is_chosen_by_dtype_and_can_be_forced(monkeypatch):
    case = scan_case(dtype=torch.float32)
    automatic = selective_scan(**case, delta_softplus=True)
    assert torch.equal(automatic, selective_scan(**case, delta_softplus=True, backend="cpu"))
    with use_backend("reference"):
        reference = selective_scan(**case, delta_softplus=True)
    assert not torch.equal(automatic, reference)
    with pytest.raises(ValueError, match="found torch.float64"):
        selective_scan(**scan_case(), backend="cpu")


def test_without_numba_the_ops_run_in_torch_and_say_so(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('no numba for this Python')")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(ssmcompress.__file__).parents[1])]),
    }
    script = SCRIPT.replace(', backend="cpu"', "")
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "SsmCompressWarning: numba cannot be used (no numba for this Python)" in result.stderr


def test_compiling_is_announced_once(caplog):
    entries._announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ssmcompress"):
        entries._announce()
        entries._announce()
    assert [r.message for r in caplog.records] == ["compiling the CPU kernels (10 to 20 s, kept for later runs)"]


def test_only_compiling_is_announced(caplog):
    """A kernel that is loaded from the cache is not, however long that takes; nor is what another thread compiles."""

    def compile_function():
        return cfunc("float64(float64)")(lambda x: x + 1)

    def compile_in_another_thread():
        thread = threading.Thread(target=compile_function)
        thread.start()
        thread.join()

    everything()  # so that there is something in the cache
    for call, announced in (
        (lambda: entries._compiled.__wrapped__("conv_forward", False), False),
        (lambda: announce_during(compile_in_another_thread), False),
        (lambda: announce_during(compile_function), True),
    ):
        entries._announce.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="ssmcompress"):
            call()
        assert bool(caplog.records) == announced


def announce_during(call):
    with event.install_listener("numba:run_pass", entries._Announcer()):
        call()
