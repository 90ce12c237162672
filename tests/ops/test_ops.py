"""The ops against the equations they implement, and alignment against running the whole sequence."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcompress.ops import causal_conv1d, selective_scan, topk_tokens, use_backend
from ssmcompress.pruning.alignment import gap_steps

TOLERANCE = 1e-5


def case(batch=2, length=7, d_inner=3, d_state=2, dtype=torch.float32, seed=0):
    """Inputs of a scan: u, delta (before softplus), A, B, C, D, z, delta_bias."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    A = -torch.rand(d_inner, d_state, generator=g, dtype=torch.float64).to(dtype) - 0.1
    sequence = (batch, length, d_inner)
    return (normal(*sequence), normal(*sequence), A, normal(batch, length, d_state), normal(batch, length, d_state),
            normal(d_inner), normal(*sequence), normal(d_inner))  # fmt: skip


def equation(u, delta, A, B, C, D, z, bias, gap=None):  # noqa: PLR0913 (those of the op)
    """The recurrence of the op's docstring, one number at a time."""
    delta = F.softplus(delta + bias)
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for e in range(u.shape[2]):
            h = torch.zeros(A.shape[1], dtype=u.dtype)
            for t in range(u.shape[1]):
                decay = delta[b, t, e] + (0 if gap is None else gap[b, t, e])
                h = torch.exp(decay * A[e]) * h + delta[b, t, e] * B[b, t] * u[b, t, e]
                y[b, t, e] = (C[b, t] * h).sum() + D[e] * u[b, t, e]
    return y * F.silu(z)


@st.composite
def keep_masks(draw):
    """(mask of a path, its seed): at least one kept, any pattern at both ends."""
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=24))
    if not any(mask):
        mask[draw(st.integers(0, len(mask) - 1))] = True
    return torch.tensor(mask), draw(st.integers(0, 2**16))


def test_scan_is_the_recurrence():
    args = case(dtype=torch.float64)
    torch.testing.assert_close(selective_scan(*args, delta_softplus=True), equation(*args), atol=1e-12, rtol=0)


def test_reverse_scan_is_the_scan_of_the_flipped_sequence():
    u, delta, A, B, C, D, z, bias = case()
    expected = equation(u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, z.flip(1), bias).flip(1)
    found = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, reverse=True)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
@given(keep_masks())
@settings(deadline=None, max_examples=60)
def test_aligned_scan_equals_the_dense_scan_with_nothing_coming_in_where_pruned(reverse, drawn):
    mask, seed = drawn
    u, delta, A, B, C, D, z, bias = case(length=len(mask), seed=seed)
    delta, gap_delta = F.softplus(delta + bias), torch.rand(u.shape[2], generator=torch.Generator().manual_seed(seed))
    dense_u = torch.where(mask[:, None], u, 0)
    dense_delta = torch.where(mask[:, None], delta, gap_delta)
    expected = selective_scan(dense_u, dense_delta, A, B, C, D, z, reverse=reverse)[:, mask]

    steps = gap_steps(mask.nonzero().T.expand(2, -1), reverse)
    kept = [t[:, mask] for t in (u, delta, B, C, z)]
    pair = selective_scan(kept[0], kept[1], A, kept[2], kept[3], D, kept[4], gap=(steps, gap_delta), reverse=reverse)
    spelt_out = steps[..., None] * gap_delta
    tensor = selective_scan(kept[0], kept[1], A, kept[2], kept[3], D, kept[4], gap=spelt_out, reverse=reverse)
    torch.testing.assert_close(pair, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(tensor, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
@given(keep_masks())
@settings(deadline=None, max_examples=60)
def test_aligned_conv_equals_the_dense_conv_with_zeros_where_pruned(reverse, width, drawn):
    mask, seed = drawn
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((2, len(mask), 3), (3, width), (3,)))
    dense = torch.where(mask[:, None], x, 0).transpose(1, 2)
    taps = weight.flip(1) if reverse else weight
    padded = F.pad(dense, (0, width - 1) if reverse else (width - 1, 0))
    expected = F.silu(F.conv1d(padded, taps[:, None], bias, groups=3)).transpose(1, 2)[:, mask]

    positions = mask.nonzero()[:, 0]
    found = causal_conv1d(x[:, mask], weight[:, None], bias, positions, reverse=reverse)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_conv_without_positions_is_that_with_all_of_them():
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 4), torch.randn(3)
    for reverse in (False, True):
        dense = causal_conv1d(x, weight, bias, activation=None, reverse=reverse)
        told = causal_conv1d(x, weight, bias, torch.arange(9).expand(2, -1), None, reverse)
        torch.testing.assert_close(dense, told, atol=1e-6, rtol=0)


def test_gap_of_the_first_token_on_the_path_has_no_effect():
    u, delta, A, B, C, *_ = case()
    gap = torch.zeros_like(u)
    gap[:, 0] = 5.0
    torch.testing.assert_close(
        selective_scan(u, delta.exp(), A, B, C, gap=gap), selective_scan(u, delta.exp(), A, B, C)
    )
    gap = gap.flip(1)
    backward = selective_scan(u, delta.exp(), A, B, C, gap=gap, reverse=True)
    torch.testing.assert_close(backward, selective_scan(u, delta.exp(), A, B, C, reverse=True))


def test_each_image_may_keep_its_own_positions():
    positions = torch.tensor([[0, 1, 5], [2, 3, 4]])
    assert gap_steps(positions).tolist() == [[0, 0, 3], [0, 0, 0]]
    assert gap_steps(positions, reverse=True).tolist() == [[0, 3, 0], [0, 0, 0]]


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(reverse):
    args = [t.requires_grad_() for t in case(length=4, dtype=torch.float64)]
    gap = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def scan(*inputs):
        return selective_scan(*inputs[:-1], delta_softplus=True, gap=inputs[-1], reverse=reverse)

    assert torch.autograd.gradcheck(scan, (*args, gap))
    positions = torch.tensor([[0, 2, 3, 7], [1, 2, 4, 5]])
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3), (3, 4), (3,)))
    assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, positions, reverse=reverse), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_keeps_a_float32_state(dtype):
    length = 401  # a bfloat16 state stops growing at 256, and cannot hold this number
    ones, A = torch.ones(1, length, 1, dtype=dtype), torch.zeros(1, 1)
    y = selective_scan(ones, ones, A, ones, ones)
    assert y.dtype == dtype
    torch.testing.assert_close(y[0, -1, 0].float(), torch.tensor(float(length)), rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(*(t.float() for t in (ones, ones, A, ones, ones)))
    assert y[0, -1, 0] == length


def test_softplus_is_the_identity_above_20():
    u, A = torch.ones(1, 1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)
    y = selective_scan(u, torch.full_like(u, 25.0), A, u, u, delta_softplus=True)
    assert y.item() == 25.0


def test_top_tokens_are_in_order_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert topk_tokens(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert topk_tokens(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert topk_tokens(torch.tensor([[5.0, 1.0, 9.0, 7.0]]), 3).tolist() == [[0, 2, 3]]
    many = torch.zeros(1, 5000)
    assert topk_tokens(many, 2500).tolist() == [list(range(2500))]


def test_shapes_that_do_not_fit_are_named():
    u, delta, A, B, C, *_ = case()
    with pytest.raises(ValueError, match=r"expected B \(2, 7, 2\), found \(2, 6, 2\)"):
        selective_scan(u, delta, A, B[:, 1:], C)
    with pytest.raises(ValueError, match="gap steps"):
        selective_scan(u, delta, A, B, C, gap=(torch.zeros(2, 6), torch.zeros(3)))
    with pytest.raises(ValueError, match="positions"):
        causal_conv1d(u, torch.zeros(3, 4), positions=torch.arange(6))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        selective_scan(u, delta, A, B, C, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend"), use_backend("fast"):
        pass
