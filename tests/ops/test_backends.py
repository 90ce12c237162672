"""Every backend of the ops against the float64 reference: on the CPU, on a GPU, and in Triton's interpreter."""

import math
from functools import lru_cache

import pytest
import torch
from conftest import make_vim
from op_cases import (
    BOTH,
    COMPUTING,
    CONV_LENGTHS,
    INTERPRETED,
    LENGTH,
    LENGTHS,
    STATES,
    assert_near,
    conv_case,
    crossed,
    device_of,
    grid_case,
    leaves,
    named,
    scan_case,
)

import ssmcompress
from ssmcompress.ops import (
    SCORES,
    ScanPath,
    causal_conv1d,
    grid_conv2d,
    rms_norm,
    scan_paths,
    selective_scan,
    use_backend,
)

each_backend = pytest.mark.parametrize("backend", COMPUTING)
both_ways = pytest.mark.parametrize("reverse", BOTH, ids=["forward", "backward"])


SIZE = (8, 8) if INTERPRETED else (12, 12)  # 5 and 10 tokens


@pytest.fixture
def vim():
    return make_vim(depth=2, image=SIZE)


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def upper_gradient(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backward(y, upper) -> None:
    y.backward(upper.to(y.device, y.dtype))


def named_by(sign: str, yes: str):
    """A name of each case of `crossed`, its flags in words."""
    return lambda case: f"L{case[0]}-{sign}{case[1]}-{'backward' if case[2] else 'forward'}-{yes * case[3]}"


@lru_cache(maxsize=2)  # backends take turns in one case
def exact_scan(length, d_state, reverse, gap):
    """(arguments, y, gradient of y, gradients of the arguments by name), in float64."""
    case = scan_case(length=length, d_state=d_state, gap=gap)
    exact = named(case, torch.float64)
    y = selective_scan(**exact, delta_softplus=True, reverse=reverse)
    upper = upper_gradient(y)
    backward(y, upper)
    return case, y.detach(), upper, {name: tensor.grad for name, tensor in exact.items()}


@each_backend
@pytest.mark.parametrize("sizes", crossed(LENGTHS, STATES), ids=named_by("N", "gap"))
def test_scan_and_its_gradients(sizes, backend):
    case, y, upper, gradients = exact_scan(*sizes)
    own = named(case, torch.float32, backend)
    found = selective_scan(**own, delta_softplus=True, reverse=sizes[2], backend=backend)
    assert_near(found, y, 1e-5)
    backward(found, upper)
    for name in case:
        assert_near(own[name].grad, gradients[name], 1e-4, name)


@each_backend
@pytest.mark.parametrize("sizes", crossed(CONV_LENGTHS, (1, 2, 4, 7)), ids=named_by("W", "pruned"))
def test_conv_and_its_gradients(sizes, backend):
    length, width, reverse, pruned = sizes
    case, positions = conv_case(length=length, width=width, pruned=pruned)
    exact, own = leaves(case, torch.float64), leaves(case, torch.float32, backend)
    y = causal_conv1d(*exact, positions, reverse=reverse)
    there = positions.to(device_of(backend)) if pruned else None
    found = causal_conv1d(*own, there, reverse=reverse, backend=backend)
    assert_near(found, y, 1e-5)
    upper = upper_gradient(y)
    backward(y, upper)
    backward(found, upper)
    for tensor, reference in zip(own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4)


GRIDS = [((1, 1), 1), ((1, 9), 4), ((9, 1), 9), ((4, 4), 1), ((5, 7), 20), ((7, 4), 27)]
if not INTERPRETED:
    GRIDS.append(((14, 14), 60))


@each_backend
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (7, 7), (3, 5)], ids=str)
@pytest.mark.parametrize(("grid", "kept"), GRIDS, ids=str)
def test_grid_conv_is_the_dense_one_with_zeros_at_pruned_positions(grid, kept, window, backend):
    tensors, positions = grid_case(grid, kept, window=window)
    x, weight, bias = tensors
    places = grid[0] * grid[1]
    index = positions[..., None].expand_as(x)
    everything = torch.zeros(2, places, 37, dtype=x.dtype).scatter(1, index, x).transpose(1, 2).unflatten(2, grid)
    padding = window[0] // 2, window[1] // 2
    y = torch.nn.functional.conv2d(everything, weight, bias, padding=padding, groups=37)
    expected = torch.nn.functional.silu(y).flatten(2).transpose(1, 2).gather(1, index)
    own = [t.detach() for t in leaves(tensors, torch.float32, backend)]
    there = positions.to(device_of(backend))
    assert_near(grid_conv2d(*own, grid=grid, positions=there, backend=backend), expected, 1e-5)


@each_backend
@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("channels", [37, 150])  # below and beyond one block of channels
def test_grid_conv_and_its_gradients(channels, activation, pruned, backend):
    tensors, positions = grid_case((3, 4), 9 if pruned else 12, channels=channels)
    exact, own = leaves(tensors, torch.float64), leaves(tensors, torch.float32, backend)
    y = grid_conv2d(*exact, grid=(3, 4), positions=positions if pruned else None, activation=activation)
    there = positions.to(device_of(backend)) if pruned else None
    found = grid_conv2d(*own, grid=(3, 4), positions=there, activation=activation, backend=backend)
    assert_near(found, y, 1e-5)
    upper = upper_gradient(y)
    backward(y, upper)
    backward(found, upper)
    for tensor, reference in zip(own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4)


@each_backend
@pytest.mark.parametrize("channels", [1, 16, 64, 100, 200])
def test_grid_conv_of_any_width_without_a_bias(channels, backend):
    (x, weight, _), positions = grid_case((4, 4), 7, channels=channels)
    x, weight = (t.detach() for t in leaves((x, weight), torch.float32, backend))
    there = positions.to(device_of(backend))
    expected = grid_conv2d(x.double().cpu(), weight.double().cpu(), grid=(4, 4), positions=positions)
    assert_near(grid_conv2d(x, weight, grid=(4, 4), positions=there, backend=backend), expected, 1e-5)


@each_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_grid_conv_of_half_precision_and_rows_with_space_between(dtype, tolerance, backend):
    tensors, positions = grid_case((4, 4), 7)
    x, weight, bias = (t.detach() for t in leaves(tensors, torch.float32, backend))
    x = torch.cat([x, x], dim=-1).to(dtype)[..., :37]
    expected = grid_conv2d(
        x.double().cpu(), *(t.double().cpu() for t in (weight, bias)), grid=(4, 4), positions=positions
    )
    found = grid_conv2d(x, weight, bias, grid=(4, 4), positions=positions.to(x.device), backend=backend)
    assert found.dtype == dtype
    assert_near(found, expected, tolerance)


def test_tokens_without_positions_fill_the_grid_row_by_row():
    (x, weight, bias), _ = grid_case((4, 3), 8)
    positions = torch.arange(8)
    expected = grid_conv2d(x, weight, bias, grid=(4, 3), positions=positions)
    torch.testing.assert_close(grid_conv2d(x, weight, bias, grid=(4, 3)), expected)


def test_grid_conv_says_what_does_not_fit():
    (x, weight, bias), positions = grid_case((4, 4), 7)
    for arguments, options, message in (
        ((x[0], weight), {}, r"expected x \(batch, length, channels\)"),
        ((x, weight[:, :, :6]), {}, "odd sides"),
        ((x, weight, bias[:3]), {}, r"expected bias \(37,\)"),
        ((x, weight), {"grid": (2, 3)}, "do not fit on a grid"),
        ((x, weight), {"positions": positions[:1]}, r"expected positions \(2, 7\)"),
        ((x, weight), {"activation": "gelu"}, "'silu' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            grid_conv2d(*arguments, **{"grid": (4, 4), **options})


@each_backend
@both_ways
@pytest.mark.parametrize("left_out", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
def test_parts_of_the_scan_may_be_missing(left_out, reverse, backend):
    case = {k: v for k, v in scan_case(length=LENGTH, d_inner=17, d_state=3).items() if k not in left_out}
    exact, own = named(case, torch.float64), named(case, torch.float32, backend)
    y = selective_scan(**exact, reverse=reverse)
    found = selective_scan(**own, reverse=reverse, backend=backend)
    assert_near(found, y, 1e-5)
    y.sum().backward()
    found.sum().backward()
    for name in case:
        assert_near(own[name].grad, exact[name].grad, 1e-4, name)


@each_backend
@pytest.mark.parametrize("train", [False, True], ids=["", "train"])
def test_gap_as_a_product_and_a_result_to_add_to(backend, train):
    case = scan_case(length=LENGTH, d_inner=70)
    add = torch.randn_like(case["u"])
    steps, gap_delta = torch.randint(0, 9, (2, LENGTH)), torch.rand(70, dtype=torch.float64)
    expected = selective_scan(**case, delta_softplus=True, gap=steps[..., None] * gap_delta) + add
    own = {k: v.detach() for k, v in named(case, torch.float32, backend).items()}
    own_gap, own_add = (t.requires_grad_(train) for t in leaves((gap_delta, add), torch.float32, backend))
    pair = steps.to(device_of(backend)), own_gap
    found = selective_scan(**own, delta_softplus=True, gap=pair, add=own_add, backend=backend)
    assert_near(found, expected, 1e-5)
    if train:
        found.sum().backward()
        leaf = gap_delta.requires_grad_()
        selective_scan(**case, delta_softplus=True, gap=steps[..., None] * leaf).sum().backward()
        assert_near(own_gap.grad, leaf.grad, 1e-4)
        assert (own_add.grad == 1).all()


@each_backend
@pytest.mark.parametrize("gap", [False, True], ids=["", "gap"])
@pytest.mark.parametrize("each", [False, True], ids=["one order", "of each image"])
@pytest.mark.parametrize(("length", "d_state"), [(LENGTH, 16)] if INTERPRETED else [(1, 4), (63, 16), (300, 64)])
def test_scan_in_an_order_and_its_gradients(length, d_state, each, gap, backend):
    """Against the plain scan over the gathered tokens; 300 tokens of 64 states are several chunks of the backward."""
    case = scan_case(length=length, d_state=d_state, gap=gap)
    exact, own = named(case, torch.float64), named(case, torch.float32, backend)
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    index = (order if each else order[:1].expand(2, -1))[..., None].expand_as(case["u"])
    gathered = {k: t.gather(1, index) if k in ("u", "z") else t for k, t in exact.items()}
    y = torch.zeros_like(index, dtype=torch.float64).scatter(1, index, selective_scan(**gathered, delta_softplus=True))
    order = (order if each else order[0]).to(device_of(backend))
    found = selective_scan(**own, delta_softplus=True, order=order, backend=backend)
    assert_near(found, y, 1e-5)
    upper = upper_gradient(y)
    backward(y, upper)
    backward(found, upper)
    for name in case:
        assert_near(own[name].grad, exact[name].grad, 1e-4, name)


@each_backend
@both_ways
@pytest.mark.parametrize("length", [LENGTH] if INTERPRETED else [63, 600])
def test_gradients_of_all_else_beside_a_gap_as_a_product(length, reverse, backend):
    """What fine-tuning a pruned model needs; 600 tokens of 64 states are several chunks."""
    d_state = 16 if INTERPRETED else 64  # the kernels of Triton have chunks of four tokens with any
    case, steps, gap_delta = scan_case(length=length, d_state=d_state), torch.randint(0, 9, (2, length)), torch.rand(37)
    exact, own = named(case, torch.float64), named(case, torch.float32, backend)
    device = device_of(backend)
    for arguments, by, gap in (
        (exact, "reference", (steps, gap_delta.double())),
        (own, backend, (steps.to(device), gap_delta.to(device))),
    ):
        y = selective_scan(**arguments, delta_softplus=True, gap=gap, reverse=reverse, backend=by)
        y.square().sum().backward()
    for name in case:
        assert_near(own[name].grad, exact[name].grad, 1e-4, name)


@each_backend
@both_ways
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_without_bias_or_activation(activation, reverse, backend):
    (x, weight, _), positions = conv_case(length=LENGTH, pruned=True)
    exact, own = leaves((x, weight), torch.float64), leaves((x, weight), torch.float32, backend)
    for tensors, by in ((exact, "reference"), (own, backend)):
        there = positions.int().to(device_of(by))
        causal_conv1d(*tensors, None, there, activation, reverse, by).square().sum().backward()
    for tensor, reference in zip(own, exact, strict=True):
        assert_near(tensor.grad, reference.grad, 1e-4)


@each_backend
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_what_is_not_finite_reaches_as_far_as_the_taps(width, backend):
    x = torch.zeros(1, 9, 3, device=device_of(backend))
    x[0, 4] = torch.inf
    y = causal_conv1d(x, torch.ones(3, width).to(x), activation=None, backend=backend)
    assert [bool(t.isfinite().all()) for t in y[0]] == [not 4 <= t < 4 + width for t in range(9)]


def test_mistaken_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected weight \(192,\), found \(5,\)"):
        rms_norm(torch.ones(2, 192), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match="causal_conv1d"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 0))


@each_backend
def test_long_steps_and_fast_decay_give_no_nan(backend):
    case = scan_case(length=LENGTH, d_inner=32)
    long = torch.linspace(-100, 100, LENGTH, dtype=torch.float64)
    case["delta"] = long[None, :, None].expand(2, -1, 32)
    case["A"] = -torch.logspace(-4, 4, 32 * 16, dtype=torch.float64).view(32, 16)
    own = named(case, torch.float32, backend)
    found = selective_scan(**own, delta_softplus=True, backend=backend)
    assert_near(found, selective_scan(**case, delta_softplus=True), 1e-5)
    found.sum().backward()
    assert all(t.grad.isfinite().all() for t in own.values())


@each_backend
@pytest.mark.parametrize("where", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "gap"])
def test_nan_in_gives_nan_out(where, backend):
    case = scan_case(length=5, d_inner=7, gap=True, dtype=torch.float32)
    case = {k: v.to(device_of(backend)) for k, v in case.items()}
    case[where].view(-1)[5] = torch.nan
    y = selective_scan(**case, delta_softplus=True, backend=backend)
    assert y.isnan().any()
    assert not y[1].isnan().any() or case[where].ndim < 3  # the other image has none of it


@each_backend
@pytest.mark.parametrize("length", [1, LENGTH])
def test_strided_inputs_are_read_where_they_are(backend, length):
    case = {k: v.to(device_of(backend)) for k, v in scan_case(length=length, dtype=torch.float32).items()}
    expected = selective_scan(**case, delta_softplus=True, backend=backend)
    spread = {k: torch.stack([v, torch.full_like(v, 7)], -1)[..., 0] for k, v in case.items()}  # every other number
    halves = {k: torch.cat([v, torch.full_like(v, 7)], -1).chunk(2, -1)[0] for k, v in case.items()}
    swapped = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in case.items()}
    first = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.ndim == 3 else v for k, v in case.items()}
    for views in (spread, halves, swapped, first):
        assert_near(selective_scan(**views, delta_softplus=True, backend=backend), expected, 1e-6)
    tensors, positions = conv_case(length=length, pruned=True)
    x, weight, bias = (t.detach() for t in leaves(tensors, torch.float32, backend))
    positions = positions.to(x.device)
    expected = causal_conv1d(x, weight, bias, positions, backend=backend)
    x2, weight2 = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, weight))
    x3 = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_near(causal_conv1d(x3, weight2, bias, positions, backend=backend), expected, 1e-6)
    positions2 = positions.T.contiguous().T
    assert_near(causal_conv1d(x2, weight2, bias, positions2, backend=backend), expected, 1e-6)


@each_backend
@pytest.mark.parametrize("shape", [{"batch": 0}, {"length": 0}, {"batch": 0, "gap": True}], ids=str)
def test_nothing_to_scan(shape, backend):
    own = named(scan_case(**shape), torch.float32, backend)
    y = selective_scan(**own, delta_softplus=True, backend=backend)
    assert y.shape == own["u"].shape
    y.sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in own.values())
    x = own["u"].detach()
    assert causal_conv1d(x, torch.ones(37, 4).to(x), backend=backend).shape == x.shape


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_and_out(dtype, backend):
    case = scan_case(length=LENGTH, gap=True)
    own = named(case, dtype, backend)
    exact = named({k: v.detach() for k, v in own.items()}, torch.float64)  # rounded alike: the error is the op's own
    y = selective_scan(**exact, delta_softplus=True)
    found = selective_scan(**own, delta_softplus=True, backend=backend)
    assert found.dtype == dtype
    assert_near(found, y, 1e-2)
    y.sum().backward()
    found.sum().backward()
    for name in case:
        assert own[name].grad.dtype == dtype
        assert_near(own[name].grad, exact[name].grad, 2e-2, name)
    tensors, positions = conv_case(length=LENGTH, pruned=True)
    x, weight, bias = (t.detach() for t in leaves(tensors, torch.float32, backend))
    x = x.to(dtype)
    expected = causal_conv1d(x.double().cpu(), *tensors[1:], positions)
    found = causal_conv1d(x, weight, bias, positions.to(x.device), backend=backend)
    assert found.dtype == dtype
    assert_near(found, expected, 1e-2)


def snakes(height, width):
    """Four ways through a grid, one step at a time, each (tokens,): along the rows and back, along the columns."""
    grid = torch.arange(height * width).view(height, width)
    rows, columns = grid.clone(), grid.T.clone()
    rows[1::2], columns[1::2] = rows[1::2].flip(1), columns[1::2].flip(1)
    along, down = rows.flatten(), columns.flatten()
    return [along, along.flip(0), down, down.flip(0)]


def paths_case(kind: str, dtype, backend="reference"):
    """(paths that take gradients, z): two of one raster, both ways, or four through a grid that share u and delta."""
    device, count = device_of(backend), 2 if kind == "both ways" else 4
    # In the interpreter four paths are of one tile of channels, since two paths are of two.
    d_inner = 7 if INTERPRETED and count == 4 else 37
    cases = [scan_case(length=6, d_inner=d_inner, d_state=5, gap=kind != "snakes", seed=seed) for seed in range(count)]
    z = leaves([cases[0].pop("z")], dtype, backend)[0]
    shared = named({k: cases[0][k] for k in ("u", "delta")}, dtype, backend)
    paths = []
    for number, case in enumerate(cases):
        case.pop("z", None)
        own = named(case, dtype, backend)
        if kind == "both ways":
            paths.append(ScanPath(**own, reverse=number == 0))
        else:
            order = snakes(2, 3)[number].to(device)
            if kind == "of each image" and number != 1:
                order = torch.stack([order, order.roll(2)])
            paths.append(ScanPath(**{**own, **shared}, order=order))
    return paths, z


def spelt_out(paths, z):
    """The sum step by step, in float64, each path's gated share besides."""
    total, shares = 0, []
    for path in paths:
        u = path.u.double()
        batch, length, _ = u.shape
        order = torch.arange(length).flip(0) if path.reverse else torch.arange(length)
        steps = order
        if path.order is not None:
            order, steps = path.order, torch.arange(length)
        order = order.expand(batch, -1)
        delta = torch.nn.functional.softplus(path.delta + path.delta_bias)
        gap = torch.zeros_like(delta) if path.gap is None else path.gap
        rows = []
        for b in range(batch):
            h, outs = torch.zeros(u.shape[2], path.A.shape[1], dtype=torch.float64), [None] * length
            for step, token in zip(steps, order[b], strict=True):
                entering = (delta[b, step] * u[b, token])[:, None] * path.B[b, step]
                h = torch.exp((delta[b, step] + gap[b, step])[:, None] * path.A) * h + entering
                outs[token] = h @ path.C[b, step] + path.D * u[b, token]
            rows.append(torch.stack(outs))
        shares.append(torch.stack(rows))
        total = total + shares[-1]
    gate = torch.nn.functional.silu(z)
    return total * gate, [share * gate for share in shares]


@each_backend
@pytest.mark.parametrize("kind", ["both ways", "snakes", "of each image"])
def test_paths_together_are_the_sum_of_each(kind, backend):
    exact, exact_z = paths_case(kind, torch.float64)
    y, shares = spelt_out(exact, exact_z)
    paths, z = paths_case(kind, torch.float32, backend)
    for scored, metric in ((1, "clip"), (None, "l2"), (2, "mean"), (None, "l1"))[: 4 if kind == "both ways" else 1]:
        found, scores = scan_paths(iter(paths), z, True, metric, scored, backend=backend)
        assert_near(found, y, 1e-5)
        assert_near(scores, SCORES[metric](sum(shares[: scored or len(shares)])), 1e-5, metric)
        assert not scores.requires_grad
    found, scores = scan_paths(paths, z, True, "clip-paths", 1, backend=backend)
    assert_near(found, y, 1e-5)
    assert_near(scores, sum(share.relu().mean(-1) for share in shares) / len(shares), 1e-5)
    deltas = [torch.nn.functional.softplus(p.delta + p.delta_bias).mean(-1) for p in exact]
    found, scores = scan_paths(paths, z, True, "delta", backend=backend)
    assert_near(scores, sum(deltas) / len(deltas), 1e-5)
    assert not scores.requires_grad
    upper = upper_gradient(y)
    backward(y, upper)
    backward(found, upper)
    assert_near(z.grad, exact_z.grad, 1e-4, "z")
    for own, reference in zip(paths, exact, strict=True):
        for name in ("u", "delta", "A", "B", "C", "D", "delta_bias", "gap"):
            if getattr(own, name) is not None:
                assert_near(getattr(own, name).grad, getattr(reference, name).grad, 1e-4, name)


@each_backend
def test_a_sum_of_paths_may_leave_the_range_of_float16_before_its_gate(backend):
    case = named(scan_case(length=3, d_inner=5, d_state=2), torch.float16, backend)
    z = torch.full_like(case.pop("z"), -8).detach()
    case = {k: v.detach() for k, v in case.items()} | {"u": torch.ones_like(case["u"]).detach()}
    path = ScanPath(**case | {"D": torch.full_like(case["D"], 6e4).detach()})
    y, _ = scan_paths([path] * 3, z, True, backend=backend)
    assert_near(y, torch.full(y.shape, 3 * 6e4 * -8 / (1 + math.exp(8))), 1e-2)


@each_backend
@pytest.mark.parametrize("score", SCORES)
def test_a_token_that_is_not_a_number_scores_none(score, backend):
    case = {k: v.detach() for k, v in named(scan_case(length=4, d_inner=5, d_state=2), torch.float32, backend).items()}
    z = case.pop("z")
    case["delta"][0, 2, 3] = torch.nan
    _, scores = scan_paths([ScanPath(**case)], z, True, score, backend=backend)
    assert scores.isnan()[0].tolist() == [False, False, True, score != "delta"]
    assert not scores[1].isnan().any()


@each_backend
def test_a_wide_gap_beside_narrow_inputs(backend):
    case = scan_case(length=5, d_inner=7, d_state=3, gap=True)
    own = {k: v.detach() for k, v in named(case, torch.float32, backend).items()}
    wide = own | {"gap": own["gap"].double()}
    found = selective_scan(**wide, delta_softplus=True, backend=backend)
    assert_near(found, selective_scan(**case, delta_softplus=True), 1e-5)


@each_backend
@pytest.mark.parametrize("kind", ["both ways", "snakes"])
def test_few_tokens_in_chunks_side_by_side(kind, backend, monkeypatch):
    """How a large device works on a single image."""
    if backend == "triton":
        from ssmcompress.ops.triton import scan

        monkeypatch.setattr(scan, "processors", lambda device: 10**6)
        monkeypatch.setattr(scan, "SHORTEST_CHUNK", 1)
        assert scan.forward_shape(torch.zeros(1, 6, 37), torch.zeros(37, 5))[0] < 6
    exact, exact_z = paths_case(kind, torch.float64)
    y, shares = spelt_out(exact, exact_z)
    paths, z = paths_case(kind, torch.float32, backend)
    found, scores = scan_paths(paths, z, True, "clip", 1, backend=backend)
    assert_near(found, y, 1e-5)
    assert_near(scores, SCORES["clip"](shares[0]), 1e-5)
    alone, expected = scan_paths(paths[1:2], z, True, backend=backend)[0], shares[1]
    assert_near(alone, expected, 1e-5)


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def test_paths_that_do_not_fit_are_refused():
    paths, z = paths_case("snakes", torch.float32)
    with pytest.raises(ValueError, match="at least one path"):
        scan_paths([], z)
    with pytest.raises(ValueError, match="unknown score 'best'"):
        scan_paths(paths, z, score="best")
    with pytest.raises(ValueError, match=r"expected an order \(6,\) or \(2, 6\)"):
        scan_paths([paths[0]._replace(order=torch.arange(5))], z)
    with pytest.raises(ValueError, match="and reverse"):
        scan_paths([paths[0]._replace(reverse=True)], z)
    with pytest.raises(ValueError, match="D is given for all paths or for none"):
        scan_paths([paths[0], paths[1]._replace(D=None)], z)
    for scored in (0, 5, -1):
        with pytest.raises(ValueError, match=f"from 1 to the 4 paths there are, found {scored}"):
            scan_paths(iter(paths), z, score="clip", scored=scored)
    short = ScanPath(**{k: v[:, :3] if v.ndim == 3 else v for k, v in paths[0]._asdict().items() if _is_tensor(v)})
    long = ScanPath(**{k: v for k, v in paths[0]._asdict().items() if _is_tensor(v) and k != "order"})
    with pytest.raises(ValueError, match="expected all paths as the first"):
        scan_paths([long, short._replace(order=None)])


@each_backend
def test_autocast_reaches_the_projections_and_not_the_state(backend, vim, images):
    device = device_of(backend)
    vim, images = vim.to(device), images.to(device)
    with torch.no_grad(), use_backend(backend):
        expected = vim(images)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = vim(images)
    assert found.dtype == torch.bfloat16
    assert_near(found, expected, 5e-2)
    assert not torch.equal(found.float(), expected)


@each_backend
def test_a_model_computes_the_same_on_every_backend(vim, images, backend):
    with torch.no_grad(), use_backend("reference"):
        expected = vim.double()(images.double())
    vim, images = vim.float().to(device_of(backend)), images.to(device_of(backend))
    with torch.no_grad(), use_backend(backend):
        assert_near(vim(images), expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("score", [None, "clip"])
def test_a_batch_that_fills_a_gpu(score, dtype):
    """The form that is tuned, and paths one after the other over many tokens."""
    first, second = ({k: v.cuda() for k, v in scan_case(64, 197, 768, seed=i, dtype=dtype).items()} for i in (0, 1))
    z = first.pop("z")
    del second["z"]
    paths = [ScanPath(**first, reverse=True), ScanPath(**second)]
    with use_backend("reference"):
        wide = [ScanPath(*(t.float() if isinstance(t, torch.Tensor) else t for t in path)) for path in paths]
        expected, expected_scores = scan_paths(wide, z.float(), True, score, 1)
    found, scores = scan_paths(paths, z, True, score, 1, backend="triton")
    assert_near(found, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    if score:
        assert_near(scores, expected_scores, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_vim_small_gives_the_same_logits_on_a_gpu():
    model = make_vim(depth=24, d_model=384, classes=1000, image=(224, 224), patch=16, d_state=16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".weight") and parameter.ndim > 1:
                parameter.mul_(0.1)  # so that 24 layers do not blow rounding up
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for vim in (model, ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.2))):
        with torch.no_grad():
            expected = vim.cpu()(images)
            found = vim.cuda()(images.cuda()).cpu()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(found.argmax(1), expected.argmax(1))


@each_backend
@pytest.mark.parametrize("metric", [*SCORES, "random"])
def test_a_pruned_model_keeps_the_same_tokens_on_every_backend(vim, images, backend, metric):
    plan = ssmcompress.make_plan(vim, ratio=0.4, importance=metric)
    pruned = ssmcompress.prune(vim, plan)
    with torch.no_grad(), use_backend("reference"):
        expected, decisions = pruned.trace(images)
    there = pruned.to(device_of(backend))
    with torch.no_grad(), use_backend(backend):
        found, own = there.trace(images.to(device_of(backend)))
    assert_near(found, expected, 1e-5)
    for mine, reference in zip(own, decisions, strict=True):
        assert torch.equal(mine.kept.cpu(), reference.kept)


@each_backend
@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
def test_a_model_trains_on_the_compiled_ops(vim, images, pruned, backend):
    if pruned:
        vim = ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    gradients = []
    for by in ("reference", backend):
        vim.zero_grad()
        vim.to(device_of(by))
        with use_backend(by):
            vim(images.to(device_of(by))).square().sum().backward()
        gradients.append([p.grad.double().cpu() for p in vim.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert_near(found, expected, 1e-4)


@each_backend
@pytest.mark.parametrize("shape", [(2, 63, 37), (1, 192), (0, 5), (3, 1)], ids=str)
def test_rms_norm(shape, backend):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    leaf, own = leaves((x, weight), torch.float32, backend)
    found = rms_norm(leaf.detach(), own.detach(), 1e-5, backend=backend)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    half = rms_norm(leaf.detach().bfloat16(), own.detach(), 1e-5, backend=backend)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double().cpu(), expected, rtol=3e-2, atol=3e-2)
    rms_norm(leaf, own.detach(), 1e-5, backend=backend).sum().backward()
    assert leaf.grad.shape == x.shape
