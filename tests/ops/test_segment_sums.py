"""Sums of normalised tokens over segments, on each backend."""

import pytest
import torch
from op_cases import COMPUTING, assert_near, device_of

from ssmcompress.ops import segment_sums


def make_case(batch, tokens, channels, segments, seed=0):
    """x, index and sums of an earlier call, float64; the last segment has no token if there are several."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    index = torch.randint(max(1, segments - 1), (batch, tokens), generator=g)
    return x, index, torch.randn(batch, segments * (channels + 1), generator=g, dtype=torch.float64)


def write_out(x, index, segments, eps, sums, sign):
    """The definition, token by token."""
    batch, tokens, channels = x.shape
    result, counts = torch.zeros(batch, segments, channels, dtype=x.dtype), torch.zeros(batch, segments, dtype=x.dtype)
    if sums is not None:
        result += sums[:, : segments * channels].reshape(batch, segments, channels)
    for b in range(batch):
        for t in range(tokens):
            result[b, index[b, t]] += sign * x[b, t] / (x[b, t].square().mean() + eps).sqrt()
            counts[b, index[b, t]] += 1
    return torch.cat([result.flatten(1), counts], dim=1)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 20, 16, 4), (2, 9, 37, 14), (2, 31, 192, 1), (2, 5, 33, 3)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("adds", [False, True])
def test_it_is_the_sum_of_scaled_tokens_in_each_segment(shape, sign, adds, backend):
    x, index, sums = make_case(*shape)
    sums, device = sums if adds else None, device_of(backend)
    expected = write_out(x, index, shape[3], 0.1, sums, sign)
    moved = [None if t is None else t.to(device, torch.float32) for t in (x, sums)]
    found = segment_sums(moved[0], index.to(device), shape[3], 0.1, moved[1], sign, backend=backend)
    assert found.dtype == torch.float32
    assert_near(found, expected, 1e-5)
    half = segment_sums(moved[0].bfloat16(), index.to(device), shape[3], 0.1, moved[1], sign, backend=backend)
    assert half.dtype == torch.float32
    assert_near(half, expected, 0.02)
    exact = segment_sums(x, index, shape[3], 0.1, sums, sign)
    assert exact.dtype == torch.float64
    assert_near(exact, expected, 1e-12)


@pytest.mark.parametrize("backend", COMPUTING)
def test_gradients_reach_tokens_and_sums(backend):
    x, index, sums = make_case(2, 9, 5, 3)
    leaves = [t.to(device_of(backend), torch.float32).requires_grad_() for t in (x, sums)]
    weights = torch.randn(2, 18, generator=torch.Generator().manual_seed(1))
    found = segment_sums(leaves[0], index.to(leaves[0].device), 3, 0.1, leaves[1], -1, backend=backend)
    (found * weights.to(found.device)).sum().backward()
    exact = [t.clone().requires_grad_() for t in (x, sums)]
    (write_out(exact[0], index, 3, 0.1, exact[1], -1) * weights).sum().backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        assert_near(leaf.grad, expected.grad, 1e-5)


@pytest.mark.parametrize("backend", COMPUTING)
def test_rows_may_lie_anywhere_in_memory(backend):
    """Tokens and indices that are views, and one row of indices for all images."""
    x, index, _ = make_case(2, 12, 16, 3)
    x, index = x.float().to(device_of(backend)), index.to(device_of(backend))
    found = segment_sums(x[:, ::2], index[:1, ::2].expand(2, -1), 3, 0.1, backend=backend)
    expected = segment_sums(x[:, ::2].contiguous(), index[:1, ::2].repeat(2, 1), 3, 0.1, backend="reference")
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("backend", COMPUTING)
def test_without_tokens_the_sums_stay(backend):
    sums = torch.ones(2, 15, device=device_of(backend))
    x, index = sums.new_zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64, device=sums.device)
    expected = torch.cat([torch.ones(2, 12), torch.zeros(2, 3)], dim=1)
    assert torch.equal(segment_sums(x, index, 3, 0.1, sums, backend=backend).cpu(), expected)
    assert not segment_sums(x, index, 3, 0.1, backend=backend).any()


def test_results_do_not_depend_on_the_number_of_threads():
    x, index, sums = (t.float() if t.is_floating_point() else t for t in make_case(16, 60, 64, 14))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(segment_sums(x, index, 14, 0.1, sums))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_shapes_that_do_not_match_are_refused():
    x, index = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected index \(2, 3\), found \(2, 2\)"):
        segment_sums(x, index[:, :2], 5, 0.1)
    with pytest.raises(ValueError, match=r"expected sums \(2, 25\), found \(2, 5\)"):
        segment_sums(x, index, 5, 0.1, torch.ones(2, 5))
