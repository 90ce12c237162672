"""Triton-specific tests, run in its interpreter by `test_triton.py`: operators, and memory traffic."""

import pytest
import torch
from op_cases import conv_case, grid_case, leaves, named, scan_case
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from ssmcompress.evaluation.op_benchmark import _by_mamba_ssm, _make_inputs, _make_positions, _scan_both_ways
from ssmcompress.ops import ScanPath, causal_conv1d, scan_paths, selective_scan
from ssmcompress.ops.triton import INTERPRETED, limits
from ssmcompress.ops.triton.launch import launch

assert INTERPRETED, "set TRITON_INTERPRET=1 before Python starts"
OPS = torch.ops.ssmcompress


def both_ways(dtype=torch.float32, gap=True, **sizes):
    cases = [named(scan_case(**sizes, gap=gap, seed=seed), dtype) for seed in range(2)]
    z = cases[0].pop("z")
    del cases[1]["z"]
    return [ScanPath(**case, reverse=number == 0) for number, case in enumerate(cases)], z


def test_operators_pass_the_checks_of_torch():
    paths, z = both_ways(batch=1, length=3, d_inner=5, d_state=3)
    u, delta, A, B, C, D, bias, gap, reverse, *_ = (list(field) for field in zip(*paths, strict=True))
    arguments = (u, delta, A, B, C, D, bias, [], [], gap, [], z, None, True, reverse, None, 2)
    torch.library.opcheck(OPS.scan_paths.default, arguments)
    torch.library.opcheck(OPS.scan_paths.default, (*arguments[:15], "clip", 1), test_utils="test_faketensor")
    (x, weight, bias), positions = conv_case(batch=1, length=3, channels=5, pruned=True)
    tensors = leaves((x, weight, bias), torch.float32)
    torch.library.opcheck(OPS.triton_causal_conv1d.default, (*tensors, positions, True, False))
    tensors, positions = grid_case((2, 3), 4, channels=5, window=(3, 3))
    plain = [t.float() for t in tensors]
    torch.library.opcheck(OPS.triton_grid_conv2d.default, (*plain, positions, 2, 3, True))


def test_graphs_of_torch_hold_the_operators():
    case = scan_case(batch=1, length=4, d_inner=5, d_state=3, dtype=torch.float32)

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, z, bias):
            y = selective_scan(u, delta, A, B, C, D, z, bias, True, backend="triton")
            return causal_conv1d(y, torch.ones(5, 4), backend="triton")

    expected = Scan()(*case.values())
    program = torch.export.export(Scan(), tuple(case.values()))
    assert {"ssmcompress::scan_paths", "ssmcompress::triton_causal_conv1d"} <= {
        node.target.name().removesuffix(".default") for node in program.graph.nodes if hasattr(node.target, "name")
    }
    compiled = torch.compile(Scan(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case.values()), expected)


def test_a_second_derivative_is_refused():
    case = named(scan_case(length=3, d_inner=5, d_state=2), torch.float32)
    y = selective_scan(**case, delta_softplus=True, backend="triton")
    (first,) = torch.autograd.grad(y.sum(), case["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, found torch.float64"):
        selective_scan(**scan_case(length=3), backend="triton")


class Traffic:
    """Numbers that kernels read from and write to a tensor."""

    def __init__(self, monkeypatch):
        self.read, self.written = [], []
        builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counting_load(pointers, mask, *others):
            self.read.append(pointers.data[mask.data])
            return load(pointers, mask, *others)

        def counting_store(pointers, value, mask, *others):
            self.written.append(pointers.data[mask.data])
            return store(pointers, value, mask, *others)

        monkeypatch.setattr(builder, "create_masked_load", counting_load)
        monkeypatch.setattr(builder, "create_masked_store", counting_store)

    def of(self, tensor: torch.Tensor) -> tuple[float, float]:
        """(reads, writes) of a tensor as multiples of its size."""
        first = tensor.data_ptr()
        end = first + tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        counts = (sum(((a >= first) & (a < end)).sum() for a in part) for part in (self.read, self.written))
        reads, writes = (int(count) / tensor.numel() for count in counts)
        return reads, writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scan_reads_its_inputs_once_and_writes_its_result_once(dtype, monkeypatch):
    """B and C once for each block of channels. A program reads its last token a second time: nothing is left to
    load ahead."""
    batch, length, channels, states, block = 2, 10, 192, 16, 64
    case = scan_case(batch=batch, length=length, d_inner=channels, d_state=states)
    case = {k: v.to(dtype) if v.ndim == 3 else v.float() for k, v in case.items()}
    traffic = Traffic(monkeypatch)
    y = selective_scan(**case, delta_softplus=True, backend="triton")
    once = (length + 1) / length
    for name in ("u", "delta", "z"):
        assert traffic.of(case[name]) == (once, 0), name
    for name in ("B", "C"):
        assert traffic.of(case[name]) == pytest.approx((once * channels / block, 0)), name
    for name in ("D", "delta_bias"):
        assert traffic.of(case[name]) == (batch, 0), name  # by every image
    assert traffic.of(y) == (0, 1)


def test_two_paths_read_z_once_and_their_sum_once(monkeypatch):
    """The score adds a reading of z, on the way that it is made on, and none of y."""
    length = 10
    paths, z = both_ways(torch.float32, length=length, d_inner=64, d_state=16, gap=False)
    once = (length + 1) / length
    for score, of_z in ((None, once), ("clip", 2 * once)):
        traffic = Traffic(monkeypatch)
        y, _ = scan_paths(paths, z, True, score, 1, backend="triton")
        for path in paths:
            assert traffic.of(path.u) == traffic.of(path.delta) == (once, 0)
        assert traffic.of(z) == (of_z, 0)
        assert traffic.of(y) == (1, 2)


def test_a_convolution_reads_a_token_once_for_each_tap(monkeypatch):
    (x, weight, bias), positions = conv_case(length=16, channels=64, pruned=True)
    x, weight, bias = x.float(), weight.float(), bias.float()
    traffic = Traffic(monkeypatch)
    y = causal_conv1d(x, weight, bias, positions, backend="triton")
    reads, _ = traffic.of(x)
    assert 1 < reads < 4  # four where nothing is pruned
    assert traffic.of(y) == (0, 1)


def test_the_work_that_is_timed_on_a_gpu():
    """The calls of `benchmark --ops --device cuda` that need no GPU."""
    shape = (2, 6, 33, 4)
    (first, _), (second, _) = (_make_inputs(shape, torch.float32, "cpu", seed) for seed in (0, 1))
    twice = {**first, **{f"{name}_b": tensor for name, tensor in second.items() if name != "z"}}
    y = _scan_both_ways(**twice, backend="triton")
    torch.testing.assert_close(y, _scan_both_ways(**twice, backend="reference"), atol=1e-4, rtol=1e-4)

    def like_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # noqa: PLR0913 (those of the op)
        u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="reference").transpose(1, 2)

    alone = _by_mamba_ssm(like_mamba_ssm, first)().transpose(1, 2)
    expected = selective_scan(**first, delta_softplus=True, backend="reference")
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    assert _by_mamba_ssm(like_mamba_ssm, first, second)().shape == (2, 33, 6)
    positions, (steps, _) = _make_positions(shape, "cpu")
    assert (positions.diff() > 0).all()
    assert torch.equal(steps[:, 1:].long(), positions.diff() - 1)
    out = torch.empty(2 * limits._BLOCK)
    launch(limits._exponentials, (2,), out, {"out": out, "rounds": 3}, BLOCK=limits._BLOCK)
    x = torch.arange(limits._BLOCK) / limits._BLOCK
    for _ in range(3):
        x = torch.exp2(x - 1)
    torch.testing.assert_close(out, x.repeat(2))


def test_gradients_under_checkpointing():
    """It returns the saved tensors of a backward once, and rejects a second reading."""
    case = scan_case(batch=1, length=5, d_inner=32, d_state=4)
    case = {name: tensor.float() for name, tensor in case.items()}

    def gradient(run):
        u = case["u"].clone().requires_grad_()
        y = run(lambda u: selective_scan(**{**case, "u": u}, delta_softplus=True, backend="triton"), u)
        return torch.autograd.grad(y.square().sum(), u)[0]

    plain = gradient(lambda scan, u: scan(u))
    kept = gradient(lambda scan, u: checkpoint(scan, u, use_reentrant=False))
    assert torch.equal(kept, plain)
