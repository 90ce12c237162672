"""PlainMamba against golden logits of the authors' code, its paths over the grid, and its blocks against dense ones."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, images_of, make_plain_mamba
from hypothesis import given, settings
from hypothesis import strategies as st

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops
from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.snakes import DOWN, LEFT, RIGHT, START, UP, snakes
from ssmcompress.ops import selective_scan
from ssmcompress.pruning.alignment import Alignment, ScanOrder
from ssmcompress.pruning.tokens import Tokens

sides = st.integers(1, 9)


@pytest.mark.parametrize("name", ["plain_mamba_l1", "plain_mamba_l3"])
def test_golden_logits(name):
    model = ssmcompress.load(GOLDEN / f"{name}.pth")
    golden = np.load(GOLDEN / f"{name}.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["images"])).numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)


def published(d_model, depth, stem_depth, dw_layers=()) -> PlainMamba:
    config = PlainMambaConfig(
        d_model=d_model, depth=depth, d_inner=2 * d_model, d_state=16, dt_rank=-(-d_model // 16), window=7,
        dw_layers=dw_layers, dw_window=3, stem_width=64, stem_depth=stem_depth, stem_window=7, in_chans=3,
        num_classes=1000, patch_size=16, stride=16, image_size=(224, 224),
    )  # fmt: skip
    with torch.device("meta"):
        return PlainMamba(config)


@pytest.mark.parametrize(
    ("sizes", "paper", "parameters"),
    [((192, 24, 1, (0,)), 3.01, 7_551_656), ((384, 24, 2), 8.07, 26_145_832), ((448, 36, 2), 14.43, 50_956_456)],
    ids=["L1", "L2", "L3"],
)
def test_flops_and_parameters_of_the_published_sizes(sizes, paper, parameters):
    model = published(*sizes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    found = flops(model)
    assert found["paper"] == pytest.approx(paper, rel=0.005)
    gate = model.config.depth * model.length * model.config.d_inner
    assert found["full"] * 1e9 == pytest.approx(found["paper"] * 1e9 + gate, abs=1)


# ----------------------------------------------------------------------------------------------------------- paths


@given(sides, sides)
@settings(deadline=None)
def test_each_path_visits_every_place_once_one_step_at_a_time(rows, columns):
    visits, labels = snakes(rows, columns)
    assert visits.shape == labels.shape == (4, rows * columns)
    moves = {RIGHT: (0, 1), LEFT: (0, -1), UP: (-1, 0), DOWN: (1, 0)}
    for path, kinds in zip(visits.tolist(), labels.tolist(), strict=True):
        assert sorted(path) == list(range(rows * columns))
        assert kinds[0] == START
        for (before, after), kind in zip(pairwise(path), kinds[1:], strict=True):
            there = after // columns - before // columns, after % columns - before % columns
            assert there == moves[kind]


@given(sides, sides)
@settings(deadline=None)
def test_the_first_and_third_start_in_the_corner_and_the_others_are_their_reverses(rows, columns):
    visits, labels = snakes(rows, columns)
    assert visits[0, 0] == visits[2, 0] == 0
    assert torch.equal(visits[1], visits[0].flip(0))
    assert torch.equal(visits[3], visits[2].flip(0))
    if columns > 1:
        assert labels[0, 1] == RIGHT
    if rows > 1:
        assert labels[2, 1] == DOWN


@st.composite
def masked_grids(draw):
    """(rows, columns, mask of the places that are kept, seed)."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    mask = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask[draw(st.integers(0, rows * columns - 1))] = True
    return rows, columns, torch.tensor(mask), draw(st.integers(0, 2**16))


def kept_ranks(visits, mask):
    """(steps of a full path that lead to kept places, in order; the kept token that each of them visits)."""
    ranks = [step for step, place in enumerate(visits.tolist()) if mask[place]]
    token = {place: index for index, place in enumerate(mask.nonzero()[:, 0].tolist())}
    return ranks, [token[visits[step].item()] for step in ranks]


@given(masked_grids())
@settings(deadline=None, max_examples=60)
def test_aligned_scan_on_each_path_equals_the_dense_one_with_nothing_coming_in_where_pruned(drawn):
    rows, columns, mask, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    kept, length, E, N = int(mask.sum()), rows * columns, 3, 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, z, delta, B, C = (normal(1, kept, size) for size in (E, E, E, N, N))
    A, D, delta, gap_delta = -normal(E, N).exp(), normal(E), F.softplus(delta), normal(E).exp()
    positions = mask.nonzero().T
    for visits, labels in zip(*snakes(rows, columns), strict=True):
        path = ScanOrder(visits, labels=labels).over(positions)
        found = selective_scan(u, delta, A, B, C, D, z, gap=(path.gaps, gap_delta), order=path.order)
        ranks, tokens = kept_ranks(visits, mask)
        # The j-th kept token on the path, with the j-th delta, B and C, at the step where it stands.
        dense_u, dense_z, dense_delta = (
            torch.zeros(1, length, E),
            torch.zeros(1, length, E),
            gap_delta.expand(1, length, E),
        )
        dense_u, dense_z, dense_delta = (t.double().clone() for t in (dense_u, dense_z, dense_delta))
        dense_B, dense_C = normal(1, length, N), normal(1, length, N)
        dense_u[:, ranks], dense_z[:, ranks], dense_delta[:, ranks] = u[:, tokens], z[:, tokens], delta
        dense_B[:, ranks], dense_C[:, ranks] = B, C
        y = selective_scan(dense_u, dense_delta, A, dense_B, dense_C, D, dense_z)
        expected = torch.zeros_like(found)
        expected[:, tokens] = y[:, ranks]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        assert path.labels[0].tolist() == [labels[rank].item() for rank in ranks]


def test_positions_of_later_stages_are_counted_from_the_original_grid(plain_mamba):
    plan = ssmcompress.make_plan(plain_mamba, stages=(1, 2), ratio=(0.5, 0.4))
    pruned = ssmcompress.prune(plain_mamba, plan)
    images = images_of(plain_mamba)
    tokens = pruned.embed(images)
    for layer in (1, 2):
        tokens, _ = pruned.step(layer, tokens)
    assert tokens.positions.shape == (5, 5)
    for image, positions in enumerate(tokens.positions):
        mask = torch.zeros(16, dtype=torch.bool).index_fill(0, positions, True)
        for order, path in zip(tokens.orders, tokens.paths, strict=True):
            ranks, visited = kept_ranks(order.visits, mask)
            assert path.order[image].tolist() == visited
            assert path.labels[image].tolist() == [order.labels[rank].item() for rank in ranks]
            gaps = [after - before - 1 for before, after in pairwise(ranks)]
            assert path.gaps[image].tolist() == [0, *gaps]


# ---------------------------------------------------------------------------------------------------------- blocks


def dense_conv(features, conv, mask, grid):
    """A convolution over the whole grid with zeros at pruned places, at the kept ones."""
    everything = torch.zeros(features.shape[0], len(mask), features.shape[2])
    everything[:, mask] = features
    image = everything.transpose(1, 2).unflatten(2, grid)
    return conv(image).flatten(2).transpose(1, 2)[:, mask]


@pytest.mark.parametrize("dw", [False, True], ids=["", "dw"])
def test_an_aligned_block_equals_a_dense_one_with_nothing_coming_in_where_pruned(dw):
    """Written out from the paper's equations and the quirks of the published code."""
    model = make_plain_mamba(image=(48, 80), dw_layers=(1,) if dw else ())
    grid, block, E, N = (3, 5), model.blocks[1], model.config.d_inner, model.config.d_state
    gap_delta = torch.rand(1, E, generator=torch.Generator().manual_seed(3))
    block.set_gap_delta(gap_delta)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    # So small that the eps of a norm shows.
    features = 0.01 * torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))
    full = model.embed(images_of(model, 2))
    tokens = Tokens(features, 15, None, mask.nonzero().T.expand(2, -1), orders=full.orders)

    m = block.mamba
    x, z = m.in_proj(F.layer_norm(features, (16,), block.norm.weight, block.norm.bias, 1e-5)).chunk(2, -1)
    u = F.silu(dense_conv(x, m.conv2d, mask, grid))
    dt, B, C = m.x_proj(u).split([1, N, N], -1)
    delta = F.softplus(m.dt_proj(dt) + m.dt_proj.bias)
    total = 0
    for visits, labels in zip(*snakes(*grid), strict=True):
        ranks, visited = kept_ranks(visits, mask)
        dense_u, dense_delta, dense_B, dense_C = (torch.zeros(2, 15, size) for size in (E, E, N, N))
        dense_delta[:] = gap_delta
        dense_u[:, ranks], dense_delta[:, ranks] = u[:, visited], delta
        dense_B[:, ranks], dense_C[:, ranks] = B + m.direction_Bs[labels[ranks]], C
        y = torch.zeros_like(u)
        y[:, visited] = selective_scan(dense_u, dense_delta, -m.A_log.exp(), dense_B, dense_C, m.D)[:, ranks]
        total = total + y
    expected = features + m.out_proj(total * F.silu(z))
    if dw:
        conv, norm, _ = block.dw
        expected = F.gelu(
            norm(dense_conv(expected, conv, mask, grid).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        )
    torch.testing.assert_close(block(tokens).features, expected, atol=1e-5, rtol=0)


def test_the_bias_of_delta_counts_twice_where_nothing_comes_in_and_on_average(plain_mamba):
    images = images_of(plain_mamba)
    tokens, block = plain_mamba.embed(images), plain_mamba.blocks[0]
    m = block.mamba
    torch.testing.assert_close(block.bias_delta(), F.softplus(2 * m.dt_proj.bias)[None])
    x, _ = m.in_proj(block.norm(tokens.features)).chunk(2, -1)
    u = F.silu(m.conv2d(x.transpose(1, 2).unflatten(2, (4, 4)))).flatten(2).transpose(1, 2)
    delta = F.softplus(m.dt_proj(m.x_proj(u)[..., :1]) + m.dt_proj.bias)
    torch.testing.assert_close(block.deltas(tokens), delta[None])
    plan = ssmcompress.calibrate(plain_mamba, images)
    torch.testing.assert_close(plan.calibration.gap_deltas[0], delta.mean((0, 1))[None], rtol=1e-5, atol=1e-6)


def test_scores_are_of_the_gated_sum_of_all_paths(plain_mamba):
    tokens, block = plain_mamba.embed(images_of(plain_mamba)), plain_mamba.blocks[0]
    m, seen = block.mamba, []
    m.out_proj.register_forward_hook(lambda layer, received, given: seen.append(received[0]))
    scores = block(tokens, "clip").scores
    torch.testing.assert_close(scores, seen[0].relu().mean(-1))


@pytest.mark.parametrize("dw_layers", [(), (1,)], ids=str)
def test_without_alignment_kept_tokens_are_put_next_to_each_other(dw_layers):
    plain_mamba = make_plain_mamba(dw_layers=dw_layers)
    features = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(4))
    orders = plain_mamba.embed(images_of(plain_mamba, 2)).orders
    positions = torch.tensor([[0, 3, 7, 8, 9, 15]] * 2)
    block, naive = plain_mamba.blocks[1], Alignment(conv=False, scan=False)
    block.set_gap_delta(block.bias_delta())
    found = block(Tokens(features, 16, None, positions, alignment=naive, orders=orders)).features
    assert not torch.allclose(found, block(Tokens(features, 16, None, positions, orders=orders)).features, atol=1e-3)
    # On a grid as wide, tokens 0 to 5 see each other as the first six places do.
    paths = tuple(order.over(positions) for order in orders)
    moved = Tokens(features, 16, None, torch.arange(6).expand(2, -1), orders=orders, paths=paths)
    block.set_gap_delta(torch.zeros_like(block.bias_delta()))
    torch.testing.assert_close(found, block(moved).features)


def test_the_last_norm_has_an_eps_of_its_own(plain_mamba):
    tokens = plain_mamba.embed(images_of(plain_mamba))
    tokens = tokens.updated(0.001 * tokens.features)
    mean = F.layer_norm(tokens.features, (16,), *plain_mamba.backbone.ln1.parameters(), 1e-6).mean(1)
    torch.testing.assert_close(plain_mamba.readout(tokens), plain_mamba.head.fc(mean))


def test_pruned_tokens_cost_the_cpu_kernel_and_nothing_else(plain_mamba, monkeypatch):
    """The convolution of a pruned grid does not go over all of it."""
    from ssmcompress.ops import compiled, reference

    pruned = ssmcompress.prune(plain_mamba, ssmcompress.make_plan(plain_mamba, ratio=0.5, stages=(2,)))
    seen = []
    monkeypatch.setattr(compiled, "_grid_conv", lambda x, *others: seen.append(x.shape[1]) or torch.zeros_like(x))
    on_grid = reference.grid_conv2d
    monkeypatch.setattr(reference, "grid_conv2d", lambda x, *others: seen.append(x.shape[1]) or on_grid(x, *others))
    for alignment in (Alignment(), Alignment(conv=False)):
        pruned.alignment = alignment
        with torch.no_grad():
            pruned(images_of(pruned, 1))
    assert seen == 2 * [16, 16, 8, 8]


def test_autocast_computes_in_bfloat16_what_float32_does(plain_mamba):
    images = images_of(plain_mamba)
    pruned = ssmcompress.prune(plain_mamba, ssmcompress.make_plan(plain_mamba, importance="random"))
    with torch.no_grad():
        expected = pruned(images)
        with torch.autocast("cpu", torch.bfloat16):
            tokens, found = pruned.embed(images), pruned(images)
    assert (tokens.features.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("pool", [False, True])
def test_the_mean_is_of_kept_tokens_or_of_all_as_they_were_last_seen(plain_mamba, pool):
    plan = ssmcompress.make_plan(plain_mamba, stages=(1, 2), ratio=0.5, alignment=Alignment(pool=pool))
    pruned, images = ssmcompress.prune(plain_mamba, plan), images_of(plain_mamba)
    with torch.no_grad():
        tokens, last = pruned.embed(images), torch.zeros(5, 16, 16)
        for layer in range(1, 5):
            before = pruned.blocks[layer - 1](tokens)
            last.scatter_(1, before.explicit_positions()[..., None].expand(-1, -1, 16), before.features)
            tokens, _ = pruned.step(layer, tokens)
        seen = F.layer_norm(last if pool else tokens.features, (16,), *pruned.backbone.ln1.parameters(), 1e-6)
        torch.testing.assert_close(pruned(images), pruned.head.fc(seen.mean(1)), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"depth": 1, "d_model": 8, "classes": 3},
        {"channels": 1, "image": (32, 32), "window": 7},
        {"dw_layers": (0, 2), "stem_depth": 2},
        {"stem_depth": 0, "d_model": 40, "d_state": 7},
    ],
    ids=str,
)
def test_any_size_is_recognised_from_its_weights(sizes):
    model = make_plain_mamba(**sizes)
    found = ssmcompress.load(model.state_dict())
    assert found.config == model.config
    assert found.state_dict().keys() == model.state_dict().keys()


def test_an_mmcv_file_with_averages_beside_the_weights(plain_mamba, tmp_path):
    state = plain_mamba.state_dict()
    averages = {"ema_" + key.replace(".", "_"): torch.zeros_like(value) for key, value in state.items()}
    file = tmp_path / "model.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": {**averages, **state}, "optimizer": {}}, file)
    found = ssmcompress.load(file)
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 112), (100, 70), (31, 33)], ids=str)
def test_other_image_sizes(plain_mamba, size):
    model = ssmcompress.load(plain_mamba, image_size=size)
    rows, columns = model.config.grid
    images = images_of(model, 2)
    assert model.backbone.patch_embed(images).shape[2:] == (rows, columns)
    with torch.no_grad():
        assert model(images).isfinite().all()
        pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.4))
        assert pruned(images).isfinite().all()


def test_the_position_embedding_of_another_grid_is_interpolated(plain_mamba):
    table = plain_mamba.backbone.pos_embed
    image = table.transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(image, (3, 6), mode="bicubic").flatten(2).transpose(1, 2)
    found = ssmcompress.load(plain_mamba, image_size=(48, 96)).backbone.pos_embed
    torch.testing.assert_close(found, expected)


MAMBA, STEM = "backbone.layers.0.mamba", "backbone.patch_embed.stem.0.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: s.pop("backbone.layers.1.mamba.A_log"), {}, "1 missing .backbone.layers.1.mamba.A_log"),
        (lambda s: s.pop("backbone.layers.0.mamba.A_log"), {}, "looks like a PlainMamba, but .* is missing"),
        (lambda s: s.pop("head.fc.weight"), {}, "'head.fc.weight' is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), {}, "1 unknown .extra"),
        (lambda s: s.update({"backbone.layers.99999999.norm.bias": torch.zeros(1)}), {}, "layer numbers go up to"),
        (lambda s: s.update({"backbone.ln1.weight": torch.ones(15)}), {}, "contradicting shapes: backbone.ln1.weight"),
        (lambda s: s.update({"backbone.pos_embed": torch.zeros(1, 15, 16)}), {}, "no square grid"),
        (lambda s: s["backbone.pos_embed"].fill_(torch.nan), {}, "not finite"),
        (lambda s: None, {"stride": 8}, "stride 8: a PlainMamba's patches, 16 pixels here, do not overlap"),
        (lambda s: None, {"image_size": (64, 10)}, "smaller than the patches"),
        (lambda s: None, {"image_size": (64, 64, 3)}, "expected a whole number of pixels"),
        (lambda s: None, {"image_size": 64.5}, "expected a whole number of pixels"),
        (lambda s: s.update({f"{MAMBA}.conv2d.weight": torch.zeros(32, 1, 4, 4)}), {}, "expected a square one of odd"),
        (lambda s: s.update({f"{MAMBA}.conv2d.weight": torch.zeros(32, 1, 3, 5)}), {}, "expected a square one of odd"),
        (lambda s: s.update({"backbone.layers.0.dw.0.weight": torch.zeros(16, 1, 2, 2)}), {}, "expected a square one"),
        (lambda s: s.update({STEM: torch.zeros(8, 3, 6, 6)}), {}, "expected a square one of odd"),
        (lambda s: None, {"image_size": (10**6, 10**6)}, "at most 8192"),
    ],
)
def test_what_is_no_plain_mamba_is_refused(plain_mamba, change, options, message):
    state = {key: value.clone() for key, value in plain_mamba.state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=message):
        ssmcompress.load(state, **options)


def test_a_grid_that_is_not_square_must_be_told():
    state = make_plain_mamba(image=(32, 64)).state_dict()
    with pytest.raises(InputError, match="no square grid"):
        ssmcompress.load({**state, "backbone.pos_embed": torch.zeros(1, 8, 16)})
    model = ssmcompress.load(state, image_size=(32, 64))
    assert model.config.grid == (2, 4)
    assert ssmcompress.load(model).config == model.config


def test_names_that_are_not_mmcvs_are_told_the_ones_that_are(plain_mamba):
    state = {key.removeprefix("backbone."): value for key, value in plain_mamba.state_dict().items()}
    with pytest.raises(InputError, match="plain_mamba has backbone.patch_embed.projection.weight"):
        ssmcompress.load(state)


def test_a_folder_that_says_another_architecture_than_its_weights_is_refused(plain_mamba, tmp_path):
    file = ssmcompress.save(plain_mamba, tmp_path / "m") / "config.json"
    file.write_text(file.read_text().replace('"plain_mamba"', '"vim"'))
    with pytest.raises(InputError, match="says vim, but the weights are a plain_mamba's"):
        ssmcompress.load(tmp_path / "m")


@pytest.mark.parametrize("ratio", [0.5, 0.9999], ids=["8 left", "2 left"])
def test_any_batch_goes_through_a_graph_made_with_one_of_another_size(ratio, tmp_path):
    """The counts of kept tokens, 2 and 8, are those of the examples' batches, too; export_onnx's example has 2."""
    model = make_plain_mamba(depth=2)
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, stages=(1,), ratio=ratio))
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(pruned, (images_of(pruned, pruned.token_counts()[-1]),), dynamic_shapes=dynamic)
        for batch in (1, 3, 8):
            images = images_of(pruned, batch)
            torch.testing.assert_close(program.module()(images), pruned(images), atol=1e-5, rtol=1e-5)
    if pruned.token_counts()[-1] == 2:  # test_export.py has graphs of other counts
        assert ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(scan="scan")).passed


# -------------------------------------------------------------------------------------------------- reconstruction


def coloured(count, seed):
    """Images whose patches are correlated: each image has its own colour."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 1, 1, generator=generator) + torch.randn(count, 3, 64, 64, generator=generator) / 2


def test_reconstruction_follows_the_dense_model_more_closely_and_any_batches_give_the_same(plain_mamba, tmp_path):
    images = coloured(120, seed=2)
    pruned = ssmcompress.prune(plain_mamba, ssmcompress.calibrate(plain_mamba, images, ratio=0.5, stages=(1, 2)))
    rebuilt = ssmcompress.reconstruct(pruned, plain_mamba, images)
    unseen = coloured(64, seed=3)
    before, after = (ssmcompress.evaluate(m, unseen, dense=plain_mamba).kl for m in (pruned, rebuilt))
    assert after < 0.8 * before
    assert [fit.weight for fit in rebuilt.find_record("reconstruction").fits] == [
        f"backbone.layers.{i}.mamba.{name}" for i in (1, 2, 3) for name in ("x_proj", "out_proj")
    ] + ["head.fc"]
    again = ssmcompress.reconstruct(pruned, plain_mamba, images.split(7))
    loaded = ssmcompress.load(ssmcompress.save(rebuilt, tmp_path / "m"))
    for other in (again, loaded):
        assert all(torch.equal(other.state_dict()[k], v) for k, v in rebuilt.state_dict().items())


def test_a_plan_that_aligns_nothing_stays_so_and_pool_needs_a_mean(plain_mamba, vim):
    plan = ssmcompress.make_plan(plain_mamba, ratio=0.5, stages=(1,), alignment=False)
    images = coloured(30, seed=2)
    rebuilt = ssmcompress.reconstruct(ssmcompress.prune(plain_mamba, plan), plain_mamba, images)
    assert rebuilt.alignment == Alignment(conv=False, scan=False, pool=False)
    with pytest.raises(InputError, match="reads out no mean"):
        ssmcompress.prune(vim, ssmcompress.make_plan(vim, alignment=Alignment(pool=True)))


@pytest.mark.parametrize("better", [False, True])
def test_reconstruction_reads_out_the_mean_that_serves_better(plain_mamba, better, monkeypatch, tmp_path):
    """The classifier's inputs are corrupted if the other mean is read out."""
    readout = PlainMamba.readout

    def spoilt(model, tokens):
        if model.plan is not None and tokens.alignment.pool != better:
            nothing = None if tokens.pruned_sum is None else 0 * tokens.pruned_sum
            tokens = replace(tokens, features=0 * tokens.features, pruned_sum=nothing)
        return readout(model, tokens)

    monkeypatch.setattr(PlainMamba, "readout", spoilt)
    images = coloured(60, seed=2)
    pruned = ssmcompress.prune(plain_mamba, ssmcompress.make_plan(plain_mamba, ratio=0.5, stages=(1,)))
    rebuilt = ssmcompress.reconstruct(pruned, plain_mamba, images)
    assert rebuilt.find_record("reconstruction").kept
    assert rebuilt.alignment.pool == rebuilt.plan.alignment.pool == better
    loaded = ssmcompress.load(ssmcompress.save(rebuilt, tmp_path / "m"))
    assert loaded.alignment == rebuilt.alignment
    with torch.no_grad():
        assert torch.equal(loaded(images), rebuilt(images))


def test_reconstruction_passes_layers_that_end_in_a_convolution():
    model = make_plain_mamba(dw_layers=(0, 2))
    images = images_of(model, 40)
    pruned = ssmcompress.prune(model, ssmcompress.calibrate(model, images, stages=(1,), ratio=0.5))
    rebuilt = ssmcompress.reconstruct(pruned, model, images)
    names = [fit.weight for fit in rebuilt.find_record("reconstruction").fits]
    assert [name for name in names if ".layers.2." in name] == []
    assert "backbone.layers.3.mamba.out_proj" in names
    assert "3" not in rebuilt.corrections
    assert rebuilt.find_record("reconstruction").kl_after < rebuilt.find_record("reconstruction").kl_before
