"""Every backend of the ops against the float64 reference, and the compiled one in the situations it may meet."""

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

import ssmcompress
from ssmcompress.models import VisionMamba
from ssmcompress.ops import causal_conv1d, rms_norm, selective_scan, use_backend
from ssmcompress.ops.cpu import entries

COMPUTING = ["reference", "cpu"]
LENGTHS, STATES = (1, 2, 63, 197, 1000), (1, 8, 16, 64)


def scan_case(batch=2, length=63, d_inner=37, d_state=16, gap=False, dtype=torch.float64, seed=0):
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


def leaves(tensors, dtype):
    return [t.to(dtype, copy=True).requires_grad_() for t in tensors]


def assert_near(found, expected, tolerance, what=""):
    """Largest difference as a share of the largest expected value."""
    scale = expected.abs().max().clamp(min=1e-12)
    error = ((found.double() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{what} {error:.1e}"


@pytest.mark.parametrize("gap", [False, True], ids=["", "gap"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("d_state", STATES, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"L{n}")
def test_scan_and_its_gradients(length, d_state, reverse, gap):
    case = scan_case(length=length, d_state=d_state, gap=gap)
    exact = leaves(case.values(), torch.float64)
    y = selective_scan(**dict(zip(case, exact, strict=True)), delta_softplus=True, reverse=reverse)
    upper = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(upper)
    for backend in COMPUTING:
        own = leaves(case.values(), torch.float32)
        arguments = dict(zip(case, own, strict=True))
        found = selective_scan(**arguments, delta_softplus=True, reverse=reverse, backend=backend)
        assert_near(found, y, 1e-5, backend)
        found.backward(upper.float())
        for name, tensor, reference in zip(case, own, exact, strict=True):
            assert_near(tensor.grad, reference.grad, 1e-4, f"{backend} {name}")


@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"L{n}")
def test_conv_and_its_gradients(length, width, reverse, pruned):
    case, positions = conv_case(length=length, width=width, pruned=pruned)
    exact = leaves(case, torch.float64)
    y = causal_conv1d(*exact, positions, reverse=reverse)
    upper = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(upper)
    for backend in COMPUTING:
        own = leaves(case, torch.float32)
        found = causal_conv1d(*own, positions, reverse=reverse, backend=backend)
        assert_near(found, y, 1e-5, backend)
        found.backward(upper.float())
        for tensor, reference in zip(own, exact, strict=True):
            assert_near(tensor.grad, reference.grad, 1e-4, backend)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("left_out", [{"D"}, {"z"}, {"delta_bias"}, {"D", "z", "delta_bias"}], ids=str)
def test_parts_of_the_scan_may_be_missing(left_out, reverse, backend):
    case = {k: v for k, v in scan_case(d_inner=17, d_state=3).items() if k not in left_out}
    exact, own = (leaves(case.values(), dtype) for dtype in (torch.float64, torch.float32))
    y = selective_scan(**dict(zip(case, exact, strict=True)), reverse=reverse)
    found = selective_scan(**dict(zip(case, own, strict=True)), reverse=reverse, backend=backend)
    assert_near(found, y, 1e-5)
    y.sum().backward()
    found.sum().backward()
    for tensor, reference in zip(own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("train", [False, True], ids=["", "train"])
def test_gap_as_a_product_and_a_result_to_add_to(backend, train):
    case = scan_case(d_inner=70)
    add = torch.randn_like(case["u"])
    steps, gap_delta = torch.randint(0, 9, (2, 63)), torch.rand(70, dtype=torch.float64)
    expected = selective_scan(**case, delta_softplus=True, gap=steps[..., None] * gap_delta) + add
    own = {k: v.float() for k, v in case.items()}
    gap_delta, add = (t.float().requires_grad_(train) for t in (gap_delta, add))
    found = selective_scan(**own, delta_softplus=True, gap=(steps, gap_delta), add=add, backend=backend)
    assert_near(found, expected, 1e-5)
    if train:
        found.sum().backward()
        leaf = gap_delta.detach().double().requires_grad_()
        selective_scan(**case, delta_softplus=True, gap=steps[..., None] * leaf).sum().backward()
        assert_near(gap_delta.grad, leaf.grad, 1e-4)
        assert (add.grad == 1).all()


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", [63, 600])
def test_gradients_of_all_else_beside_a_gap_as_a_product(length, reverse, backend):
    """What fine-tuning a pruned model needs; 600 tokens of 64 states are several chunks."""
    case, steps, gap_delta = scan_case(length=length, d_state=64), torch.randint(0, 9, (2, length)), torch.rand(37)
    exact, own = (leaves(case.values(), dtype) for dtype in (torch.float64, torch.float32))
    for tensors, by, gap in ((exact, "reference", gap_delta.double()), (own, backend, gap_delta)):
        arguments = dict(zip(case, tensors, strict=True))
        y = selective_scan(**arguments, delta_softplus=True, gap=(steps, gap), reverse=reverse, backend=by)
        y.square().sum().backward()
    for name, tensor, reference in zip(case, own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4, name)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_without_bias_or_activation(activation, reverse, backend):
    (x, weight, _), positions = conv_case(pruned=True)
    exact, own = leaves((x, weight), torch.float64), leaves((x, weight), torch.float32)
    for tensors, by in ((exact, "reference"), (own, backend)):
        y = causal_conv1d(*tensors, None, positions.int(), activation, reverse, by)
        y.square().sum().backward()
    for tensor, reference in zip(own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_what_is_not_finite_reaches_as_far_as_the_taps(width, backend):
    x = torch.zeros(1, 9, 3)
    x[0, 4] = torch.inf
    y = causal_conv1d(x, torch.ones(3, width), activation=None, backend=backend)
    assert [bool(t.isfinite().all()) for t in y[0]] == [not 4 <= t < 4 + width for t in range(9)]


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


def test_mistaken_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected weight \(192,\), found \(5,\)"):
        rms_norm(torch.ones(2, 192), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match="causal_conv1d"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 0))


@pytest.mark.parametrize("backend", COMPUTING)
def test_long_steps_and_fast_decay_give_no_nan(backend):
    case = scan_case(d_inner=32)
    case["delta"] = torch.linspace(-100, 100, 63, dtype=torch.float64)[None, :, None].expand(2, -1, 32)
    case["A"] = -torch.logspace(-4, 4, 32 * 16, dtype=torch.float64).view(32, 16)
    own = leaves(case.values(), torch.float32)
    found = selective_scan(**dict(zip(case, own, strict=True)), delta_softplus=True, backend=backend)
    assert_near(found, selective_scan(**case, delta_softplus=True), 1e-5)
    found.sum().backward()
    assert all(t.grad.isfinite().all() for t in own)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("where", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "gap"])
def test_nan_in_gives_nan_out(where, backend):
    case = scan_case(gap=True, dtype=torch.float32)
    case[where].flatten()[5] = torch.nan
    y = selective_scan(**case, delta_softplus=True, backend=backend)
    assert y.isnan().any()
    assert not y[1].isnan().any() or case[where].ndim < 3  # the other image has none of it


@pytest.mark.parametrize("backend", COMPUTING)
def test_strided_inputs_are_read_where_they_are(backend):
    case = scan_case(dtype=torch.float32)
    expected = selective_scan(**case, delta_softplus=True, backend=backend)
    spread = {k: torch.stack([v, torch.full_like(v, 7)], -1)[..., 0] for k, v in case.items()}  # every other number
    halves = {k: torch.cat([v, torch.full_like(v, 7)], -1).chunk(2, -1)[0] for k, v in case.items()}
    swapped = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in case.items()}
    for views in (spread, halves, swapped):
        assert_near(selective_scan(**views, delta_softplus=True, backend=backend), expected, 1e-6)
    (x, weight, bias), positions = conv_case(pruned=True)
    x, weight, bias = x.float(), weight.float(), bias.float()
    expected = causal_conv1d(x, weight, bias, positions, backend=backend)
    x2, weight2 = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, weight))
    positions2 = positions.T.contiguous().T
    assert_near(causal_conv1d(x2, weight2, bias, positions2, backend=backend), expected, 1e-6)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"length": 0}, {"batch": 0, "gap": True}], ids=str)
def test_nothing_to_scan(shape, backend):
    own = scan_case(**shape, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in own.values()]
    y = selective_scan(**own, delta_softplus=True, backend=backend)
    assert y.shape == own["u"].shape
    y.sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in tensors)
    x = own["u"].detach()
    assert causal_conv1d(x, torch.ones(37, 4), backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_and_out(dtype, backend):
    case = scan_case(gap=True)
    own = leaves(case.values(), dtype)
    exact = [t.detach().double().requires_grad_() for t in own]  # rounded alike: the error is the op's own
    y = selective_scan(**dict(zip(case, exact, strict=True)), delta_softplus=True)
    found = selective_scan(**dict(zip(case, own, strict=True)), delta_softplus=True, backend=backend)
    assert found.dtype == dtype
    assert_near(found, y, 1e-2)
    y.sum().backward()
    found.sum().backward()
    for name, tensor, reference in zip(case, own, exact, strict=True):
        assert tensor.grad.dtype == dtype
        assert_near(tensor.grad, reference.grad, 2e-2, name)
    (x, weight, bias), positions = conv_case(pruned=True)
    x = x.to(dtype)
    expected = causal_conv1d(x.double(), weight, bias, positions)
    found = causal_conv1d(x, weight.float(), bias.float(), positions, backend=backend)
    assert found.dtype == dtype
    assert_near(found, expected, 1e-2)


def test_compiled_ops_pass_the_checks_of_torch():
    case = {k: v.requires_grad_() for k, v in scan_case(length=9, d_inner=5, d_state=3, dtype=torch.float32).items()}
    u, delta, A, B, C, D, z, bias = case.values()
    gap = torch.rand_like(u).requires_grad_()
    arguments = (u, delta, A, B, C, D, z, bias, None, None, gap, u.detach(), True, True)
    torch.library.opcheck(torch.ops.ssmcompress.selective_scan.default, arguments)
    (x, weight, bias), positions = conv_case(length=9, channels=5, pruned=True)
    tensors = leaves((x, weight, bias), torch.float32)
    torch.library.opcheck(torch.ops.ssmcompress.causal_conv1d.default, (*tensors, positions, True, False))


def everything():
    """Results of both ops, forward and backward, as bytes."""
    case = scan_case(batch=3, length=100, d_inner=150, gap=True, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in case.values()]
    y = selective_scan(**case, delta_softplus=True, backend="cpu")
    y.square().sum().backward()
    (x, weight, bias), positions = conv_case(batch=3, length=100, channels=150, pruned=True)
    others = leaves((x, weight, bias), torch.float32)
    causal_conv1d(*others, positions, backend="cpu").square().sum().backward()
    return b"".join(t.numpy().tobytes() for t in (y.detach(), *(t.grad for t in (*tensors, *others))))


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
    """The ops work all the same, and say that they compile."""
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    script = SCRIPT.replace(', backend="cpu"', "")
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("numba cannot be used (no numba for this Python)")


def test_a_model_computes_the_same_on_every_backend(vim, images):
    with torch.no_grad(), use_backend("reference"):
        expected = vim.double()(images.double())
    model: VisionMamba = vim.float()
    for backend in COMPUTING:
        with torch.no_grad(), use_backend(backend):
            assert_near(model(images), expected, 1e-5, backend)


@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
def test_a_model_trains_on_the_compiled_ops(vim, images, pruned):
    gradients = {}
    if pruned:
        vim = ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    for backend in COMPUTING:
        vim.zero_grad()
        with use_backend(backend):
            vim(images).square().sum().backward()
        gradients[backend] = [p.grad.double() for p in vim.parameters()]
    for found, expected in zip(*gradients.values(), strict=True):
        assert_near(found, expected, 1e-4)


def test_compiling_is_announced_once(caplog):
    entries._announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ssmcompress"):
        entries._announce()
        entries._announce()
    assert [r.message for r in caplog.records] == ["compiling the CPU kernels (10 to 20 s, kept for later runs)"]


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("shape", [(2, 63, 37), (1, 192), (0, 5), (3, 1)], ids=str)
def test_rms_norm(shape, backend):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    found = rms_norm(x.float(), weight.float(), 1e-5, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    half = rms_norm(x.bfloat16(), weight.float(), 1e-5, backend=backend)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=3e-2, atol=3e-2)
    leaf = x.float().requires_grad_()
    rms_norm(leaf, weight.float(), 1e-5, backend=backend).sum().backward()
    assert leaf.grad.shape == x.shape
