"""Paths given by their parameters: a factor of delta and its weight, and the logarithm of -A."""

import pytest
import torch
from op_cases import scan_case

from ssmcompress.ops import ScanPath, rms_norm, scan_paths, selective_scan
from ssmcompress.ops import cpu as cpu_module
from ssmcompress.ops.selective_scan import Expander


def make(dtype=torch.float32, rank=3, d_inner=40, order=None, gap=None):
    """A path by its parameters, and its gate."""
    batch, length, d_state, generator = 2, 30, 5, torch.Generator().manual_seed(0)
    case = scan_case(batch=batch, length=length, d_inner=d_inner, d_state=d_state, dtype=torch.float32)
    factor, weight = (torch.randn(*s, generator=generator) for s in ((batch, length, rank), (d_inner, rank)))
    A_log = torch.randn(d_inner, d_state, generator=generator)
    u, B, C, z, factor, weight = (t.to(dtype) for t in (case["u"], case["B"], case["C"], case["z"], factor, weight))
    bias = case["delta_bias"]
    return ScanPath(u, factor, A_log, B, C, case["D"], bias, gap, False, order, weight, log_A=True), z


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are run."""
    names, launch = [], cpu_module._launch
    monkeypatch.setattr(cpu_module, "_launch", lambda name, *others: names.append(name) or launch(name, *others))
    return names


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("d_inner", [5, 40, 400])
@pytest.mark.parametrize("extra", ["", "order", "gap", "reverse"])
def test_they_give_what_the_expanded_path_gives(rank, d_inner, extra, launches):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)) if extra == "order" else None
    gap = (torch.rand(2, 30), torch.rand(d_inner)) if extra == "gap" else None
    path, z = make(rank=rank, d_inner=d_inner, order=order, gap=gap)
    path = path._replace(reverse=extra == "reverse")
    expected, _ = scan_paths([path.expanded()], z, delta_softplus=True, backend="reference")
    found, scores = scan_paths([path], z, delta_softplus=True, score="clip")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(scores, expected.relu().mean(-1), rtol=1e-4, atol=1e-5)
    assert launches == ["scan_forward"]


def test_bfloat16_keeps_delta_and_the_states_wide():
    """What is computed inside is not rounded to bfloat16, so only the inputs and the result are."""
    path, z = make(dtype=torch.bfloat16)
    wide = path._replace(**{name: getattr(path, name).float() for name in ("u", "delta", "B", "C", "delta_weight")})
    expected, _ = scan_paths([wide.expanded()], z.float(), delta_softplus=True, backend="reference")
    found, _ = scan_paths([path], z, delta_softplus=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)


def test_narrow_inputs_and_readouts_are_read_as_they_are(launches):
    case = scan_case(batch=2, length=30, d_inner=40, d_state=5, dtype=torch.float32)
    narrow = {k: v.bfloat16() if k in ("u", "delta", "z", "B", "C") else v for k, v in case.items()}
    expected = selective_scan(**{k: v.float() for k, v in narrow.items()}, delta_softplus=True, backend="reference")
    found = selective_scan(**narrow, delta_softplus=True)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
    assert launches == ["scan_forward"]


def test_gradients_are_those_of_the_expanded_path():
    path, z = make()
    leaves = [path.delta, path.delta_weight, path.A, path.u]
    results = []
    for by_parameters in (True, False):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        y, _ = scan_paths([path if by_parameters else path.expanded()], z, delta_softplus=True)
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_score_delta_is_that_of_the_expanded_path():
    path, z = make()
    _, expected = scan_paths([path.expanded()], z, delta_softplus=True, score="delta")
    _, found = scan_paths([path], z, delta_softplus=True, score="delta")
    torch.testing.assert_close(found, expected)


def test_what_consecutive_paths_share_is_computed_once():
    path, _ = make()
    expand = Expander()
    first, second = expand(path), expand(path._replace(B=path.C))
    assert second.delta is first.delta
    assert second.A is first.A
    assert second.B is path.C
    assert expand(path._replace(A=path.A + 1)).A is not first.A
    assert expand(first) == first


@pytest.mark.parametrize(
    "change",
    [
        {"delta": torch.zeros(2, 30, 4)},
        {"delta_weight": torch.zeros(41, 3)},
        {"delta": torch.zeros(2, 30, 0), "delta_weight": torch.zeros(40, 0)},
    ],
)
def test_shapes_that_do_not_match(change):
    path, z = make()
    with pytest.raises(ValueError, match=r"delta_weight \(d_inner, rank\)"):
        scan_paths([path._replace(**change)], z)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_norms_write_in_the_dtype_that_is_asked_for(backend, grad):
    x, weight = torch.randn(3, 7, 50), torch.rand(50).requires_grad_(grad)
    expected = rms_norm(x, weight, 1e-5, backend="reference")
    found = rms_norm(x, weight, 1e-5, backend=backend, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)
    assert rms_norm(x.bfloat16(), weight, 1e-5, backend=backend, dtype=torch.float32).dtype == torch.float32
