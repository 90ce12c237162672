"""Trimming: chains against direct solves, sums against the model, and selected parts against random ones."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BUNDLED, images_of

import ssmcompress
from ssmcompress.compression.trim import states as states_module
from ssmcompress.compression.trim.activations import LayerInputs
from ssmcompress.compression.trim.chain import BlockSums, MapSums, drop_blocks, drop_channels
from ssmcompress.compression.trim.channels import channel_chains, cut_channels, trim_channels
from ssmcompress.compression.trim.layers import drop_directions, drop_layers
from ssmcompress.compression.trim.states import cut_states, state_chains, trim_states
from ssmcompress.errors import InputError

TINY = 1e-13  # a ridge too small to have an effect


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(error, target):
    return float(error.square().sum() / target.square().sum())


# ------------------------------------------------------------------------------------------------------ the chains

REST, WIDTH, BLOCKS = 2, 3, 4


def columns(index):
    return [*range(REST), *(REST + WIDTH * b + i for b in index for i in range(WIDTH))]


@pytest.fixture
def rows():
    """Correlated inputs, as the states of a scan are, and the old unknowns."""
    unknowns = REST + BLOCKS * WIDTH
    return draw(200, unknowns) @ draw(unknowns, unknowns, seed=1), draw(unknowns, seed=2)


def solve(rows, target, index):
    """Solve for the unknowns of the blocks `index` directly, and return them with their error."""
    part = rows[:, columns(index)]
    theta = torch.linalg.lstsq(part, target[:, None]).solution[:, 0]
    return theta, share(part @ theta - target, target)


def test_a_chain_over_blocks_equals_the_direct_solve_at_every_count(rows):
    x, theta = rows
    kept = list(drop_blocks(BlockSums(x.T @ x), theta, WIDTH, BLOCKS, TINY))
    assert [len(step.index) for step in kept] == [4, 3, 2, 1]
    assert torch.equal(kept[0].theta, theta)
    for step, fewer in itertools.pairwise(kept):
        assert set(fewer.index.tolist()) < set(step.index.tolist())
    for step in kept:
        assert step.index.tolist() == sorted(step.index.tolist())
        expected, loss = solve(x, x @ theta, step.index.tolist())
        torch.testing.assert_close(step.theta, expected, atol=1e-6, rtol=0)
        assert step.loss == pytest.approx(loss, abs=1e-9)


def test_the_first_block_dropped_is_the_one_that_the_others_make_up_for_best(rows):
    x, theta = rows
    first = list(drop_blocks(BlockSums(x.T @ x), theta, WIDTH, BLOCKS, TINY))[1]
    subsets = itertools.combinations(range(BLOCKS), BLOCKS - 1)
    assert first.loss == pytest.approx(min(solve(x, x @ theta, subset)[1] for subset in subsets), abs=1e-9)


def test_a_chain_over_some_of_the_blocks_follows_the_output_of_all(rows):
    x, theta = rows
    target, candidates = x @ theta, [0, 2, 3]
    part = x[:, columns(candidates)]
    sums = BlockSums(part.T @ part, part.T @ target, float(target.square().sum()))
    kept = list(drop_blocks(sums, theta[columns(candidates)], WIDTH, len(candidates), TINY))
    assert [len(step.index) for step in kept] == [3, 2, 1]
    for step in kept:
        expected, loss = solve(x, target, [candidates[i] for i in step.index.tolist()])
        torch.testing.assert_close(step.theta, expected, atol=1e-6, rtol=0)
        assert step.loss == pytest.approx(loss, abs=1e-9)


def test_the_ridge_holds_unknowns_that_the_rows_do_not_determine(rows):
    x, theta = rows
    x = x[:3]  # fewer rows than unknowns
    for step in drop_blocks(BlockSums(x.T @ x), theta, WIDTH, BLOCKS):
        assert step.theta.isfinite().all()
        assert step.theta.abs().max() < 3 * theta.abs().max()


def test_sums_that_are_not_finite_are_refused(rows):
    gram = rows[0].T @ rows[0]
    gram[1, 2] = gram[2, 1] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        list(drop_blocks(BlockSums(gram), rows[1], WIDTH, BLOCKS))


def channel_sums(x, weight, bias=False):
    mean = x.mean(0)
    return MapSums(weight, (x - mean).T @ (x - mean), mean) if bias else MapSums(weight, x.T @ x)


def test_a_chain_over_channels_equals_the_direct_solve_with_a_bias_and_without():
    x, u = 1 + draw(300, 10) @ draw(10, 10, seed=1), draw(300, 10, seed=2) @ draw(10, 10, seed=3)
    projection, inner = draw(6, 10, seed=4), draw(4, 10, seed=5)
    chain = drop_channels(channel_sums(x, projection, bias=True), [channel_sums(u, inner)], TINY)
    ones = torch.ones(300, 1, dtype=torch.float64)
    for count in (10, 7, 3, 1):
        index = chain.keep(count)
        weight, shift = chain.refit(chain.projection, index)
        expected = torch.linalg.lstsq(torch.cat([x[:, index], ones], dim=1), x @ projection.T).solution
        torch.testing.assert_close(torch.cat([weight, shift[:, None]], dim=1), expected.T, atol=1e-6, rtol=0)
        new_inner, none = chain.refit(chain.inner[0], index)
        torch.testing.assert_close(
            new_inner, torch.linalg.lstsq(u[:, index], u @ inner.T).solution.T, atol=1e-6, rtol=0
        )
        assert none is None
        outputs = (x - x.mean(0)) @ projection.T
        outer = share((x[:, index] - x[:, index].mean(0)) @ weight.T - outputs, outputs)
        errors = (u[:, index] @ new_inner.T - u @ inner.T).square().sum(0) / (u @ inner.T).square().sum(0)
        assert float(chain.costs[10 - count]) == pytest.approx(outer + 0.1 * float(errors.mean()), abs=1e-9)


def test_a_channel_that_nothing_reads_is_dropped_first_and_costs_nothing():
    x, weight = draw(100, 6), draw(4, 6, seed=1)
    weight[:, 2] = 0
    x[:, 4] = 0
    chain = drop_channels(channel_sums(x, weight), [], TINY)
    assert set(chain.order[:2].tolist()) == {2, 4}
    assert float(chain.costs[2]) == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ the models


def one_set(model):
    """The model with one set of scan parameters in each layer, so that errors of two do not add up."""
    if model.architecture == "plain_mamba":
        return model
    return drop_directions(model, {layer: [0] for layer in range(1, len(model.blocks) + 1)})


def equal_states(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@torch.no_grad()
def errors_after(model, cut, images):
    """For each layer, the weighted error of its update if only it is cut, relative to the update without a bias."""
    inputs, shares = LayerInputs(model, images), []
    for new in cut.blocks:
        block, error, power = inputs.block, 0.0, 0.0
        projection = block.get_submodule(block.channel_maps[1])
        inner = []
        hook = projection.register_forward_pre_hook(lambda _, args, inner=inner: inner.append(args[0]))
        for chunk, tokens in enumerate(inputs.chunks()):
            weights = inputs.weights(chunk, inputs.layer)[..., None]
            old, changed = block(tokens), new(tokens)
            update = inner.pop() @ projection.weight.T * block.residual_scale
            error += (weights * (changed.features - old.features).square()).sum()
            power += (weights * update.square()).sum()
        hook.remove()
        shares.append(float(error / power))
        inputs.advance()
    return shares


def test_the_loss_of_a_chain_is_the_error_of_the_layer(model, monkeypatch):
    monkeypatch.setattr(states_module, "drop_blocks", partial(drop_blocks, ridge=1e-7))
    model, images = one_set(model), images_of(model, 7)
    chains = state_chains(model, images)
    for n in (3, 2, 1):
        losses = [chains.loss(layer, n) for layer in range(1, len(model.blocks) + 1)]
        assert losses == pytest.approx(errors_after(model, cut_states(model, chains, n), images), rel=2e-2)
        assert min(losses) > 1e-6


def test_states_with_new_weights_err_less_than_any_with_their_old_ones(model):
    model, images = one_set(model), images_of(model, 7)
    refitted = errors_after(model, trim_states(model, 2, images), images)
    for index in itertools.combinations(range(4), 2):
        cut = copy.deepcopy(model)
        for block in cut.blocks:
            ((C, D),) = block.read_weights()
            block.cut_states([torch.tensor(index)], [(C[list(index)], D)])
        plain = errors_after(model, cut, images)
        assert all(new < 0.9 * old for new, old in zip(refitted, plain, strict=True))


@pytest.mark.parametrize("trim", [partial(trim_states, n=2), partial(trim_channels, e=16)])
def test_what_changes_the_decision_counts_more(vim, images, trim, monkeypatch):
    vim = one_set(vim)
    weighted = trim(vim, images=images)
    with monkeypatch.context() as patched:
        patched.setattr(LayerInputs, "weights", lambda self, chunk, layer: torch.ones_like(self.gradients[chunk][0]))
        equal = trim(vim, images=images)
    # After the last layer, only the class token is read.
    assert errors_after(vim, weighted, images)[-1] < 0.9 * errors_after(vim, equal, images)[-1]


def test_the_bias_makes_up_for_what_dropped_channels_add_on_average(plain_mamba):
    images = images_of(plain_mamba, 7)
    chains = channel_chains(plain_mamba, images)
    old, new = plain_mamba.blocks[0].mamba.out_proj, cut_channels(plain_mamba, chains, 8).blocks[0].mamba.out_proj
    inputs, outputs = LayerInputs(plain_mamba, images), []
    hook = old.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    for tokens in inputs.chunks():
        inputs.block(tokens)
    hook.remove()
    (x,), weights = outputs, inputs.weights(0, 1)[..., None]
    index = chains.layers[0].keep(8)
    error = new(x[..., index]) - old(x)
    assert (weights * error).sum((0, 1)).norm() < 1e-3 * (weights * error.abs()).sum((0, 1)).norm()


def test_where_memory_is_short_states_of_little_energy_are_left_out_first(model, monkeypatch):
    monkeypatch.setattr(states_module, "drop_blocks", partial(drop_blocks, ridge=1e-7))
    monkeypatch.setattr(states_module, "MOST_BYTES", 3 * 8 * (3 * 32) ** 2)  # for two states and D
    model, images = one_set(model), images_of(model, 7)
    chains = state_chains(model, images)
    assert all(sorted(chain.steps) == [1, 2] for (chain,) in chains.layers)
    for n in (2, 1):
        losses = [chains.loss(layer, n) for layer in range(1, len(model.blocks) + 1)]
        assert losses == pytest.approx(errors_after(model, cut_states(model, chains, n), images), rel=2e-2)
    silent = copy.deepcopy(model)
    for block in silent.blocks:
        ((C, _),) = block.read_weights()
        C[[0, 3]] = 0
    chosen = [chain.steps[2].index.tolist() for (chain,) in state_chains(silent, images).layers]
    assert chosen == [[1, 2]] * len(model.blocks)
    with pytest.raises(InputError, match="`n` 3 of layer 1.* memory"):
        cut_states(model, chains, 3)


def test_a_trimmed_model_has_a_record_and_runs_and_the_first_is_untouched(model):
    before, images = copy.deepcopy(model.state_dict()), images_of(model, 6)
    trimmed = trim_states(model, 2, images, name="noise")
    smaller = trim_channels(trimmed, [20] * 3 + [32], images[:4])
    assert [(block.d_state, block.d_inner) for block in smaller.blocks] == [(2, 20)] * 3 + [(2, 32)]
    assert [step.kind for step in smaller.steps] == ["states", "channels"]
    states, channels = (step.values for step in smaller.steps)
    assert (states["name"], states["images"], states["n"], len(states["losses"])) == ("noise", 6, [2] * 4, 4)
    assert (channels["name"], channels["images"], channels["e"]) == ("images", 4, [20] * 3 + [32])
    assert channels["costs"][3] == 0 < min(channels["costs"][:3])
    assert smaller(images).isfinite().all()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (model.steps, model.plan) == ((), None)


def test_what_is_saved_of_a_trimmed_model_computes_the_same(model, tmp_path):
    images = images_of(model, 3)
    trimmed = trim_channels(trim_states(model, [1, 2, 3, 4], images), 24, images)
    ssmcompress.save(trimmed, tmp_path / "trimmed")
    loaded = ssmcompress.load(tmp_path / "trimmed")
    assert torch.equal(loaded(images), trimmed(images))
    assert loaded.steps == trimmed.steps


@pytest.mark.parametrize("trim", ["states", "channels", "one per layer", "layers", "directions", "no directions"])
def test_dropping_nothing_changes_nothing_to_the_bit(model, trim):
    images = images_of(model)
    same = {
        "states": lambda: trim_states(model, 4, images),
        "channels": lambda: trim_channels(model, 32, images),
        "one per layer": lambda: trim_states(model, np.array([4, 4, 4, 4]), images),
        "layers": lambda: drop_layers(model, []),
        "directions": lambda: drop_directions(model, {}),
        "no directions": lambda: drop_directions(model, {2: []}),
    }[trim]()
    assert same is not model
    assert equal_states(same, model)
    assert (same.steps, same.plan, same.learnt) == ((), None, None)


def test_a_whole_number_is_the_most_that_layers_keep(model):
    trimmed = trim_states(trim_states(model, [1, 4, 4, 4], images_of(model)), 3, images_of(model))
    assert [block.d_state for block in trimmed.blocks] == [1, 3, 3, 3]
    assert trimmed.find_record("states").values["n"] == [1, 3, 3, 3]


@pytest.mark.parametrize(
    "value", [0, -1, 33, True, 2.0, None, "2", [2, 2], [2, 2, 2, 0], [2, 2, 2, 33], [2, 2, 2, "2"]]
)
def test_numbers_out_of_range_are_refused_by_name(vim, images, value):
    with pytest.raises(InputError, match="`n`"):
        trim_states(vim, value, images)
    with pytest.raises(InputError, match="`e`"):
        trim_channels(vim, value, images)


@pytest.mark.parametrize("trim", [trim_states, trim_channels])
def test_images_and_models_that_do_not_serve_are_refused(vim, images, trim):
    with pytest.raises(InputError, match="`images` has 1"):
        trim(vim, 2, images[:1])
    broken = images.clone()
    broken[2] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        trim(vim, 2, broken)
    with pytest.raises(InputError, match="drops tokens"):
        trim(ssmcompress.prune(vim, ratio=0.3), 2, images)
    with pytest.raises(InputError, match="`model`"):
        trim(torch.nn.Linear(2, 2), 2, images)


def test_images_of_a_folder_are_noted_as_learnt_from(vim, class_folders):
    trimmed = trim_states(vim, 2, class_folders)
    assert (trimmed.learnt.complete, len(trimmed.learnt.digests)) == (True, 20)
    assert trimmed.find_record("states").values["images"] == 20


def test_the_batches_of_a_loader_make_no_difference(vim, images):
    trimmed = trim_states(vim, 2, images)
    assert equal_states(trim_states(vim, 2, iter(images.split(2))), trimmed)


# ---------------------------------------------------------------------------------------- layers and directions


def test_a_dropped_layer_passes_its_input_on(model):
    images = images_of(model)
    without = drop_layers(model, [3, 1])
    tokens = model.embed(images)
    for layer in (2, 4):
        tokens = model.blocks[layer - 1](tokens)
    torch.testing.assert_close(without(images), model.readout(tokens), atol=1e-5, rtol=1e-5)
    assert without.find_record("layers").values == {"layers": [1, 3]}
    assert drop_layers(without, [2]).find_record("layers").values == {"layers": [1, 3, 4]}
    assert len(model.blocks) == 4


def test_dropped_directions_are_recorded_by_the_layers_of_the_dense_model(model):
    images, last = images_of(model), model.blocks[0].directions[-1]
    smaller = drop_directions(drop_layers(model, [1]), {1: [last], 3: [0]})
    smaller = drop_directions(drop_layers(smaller, [2]), {1: [last - 1] if last > 1 else []})
    expected = {"2": [last - 1, last] if last > 1 else [last], "4": [0]}
    assert smaller.find_record("directions").values == {"directions": expected}
    assert smaller.blocks[0].directions == tuple(range(len(model.blocks[0].directions) - len(expected["2"])))
    assert smaller(images).isfinite().all()
    assert not torch.allclose(smaller(images), drop_layers(model, [1, 3])(images))


@pytest.mark.parametrize("layers", [[0], [5], [1, 2, 3, 4], [True], ["1"], "12", 3, None, {1: 2}])
def test_layers_that_cannot_be_dropped_are_refused(vim, layers):
    with pytest.raises(InputError, match="`layers`"):
        drop_layers(vim, layers)


@pytest.mark.parametrize("directions", [{5: [0]}, {1: [2]}, {1: [0, 1]}, {"1": [0]}, {1: 0}, [1], None, {1: ["0"]}])
def test_directions_that_cannot_be_dropped_are_refused(vim, directions):
    with pytest.raises(InputError, match="`directions`"):
        drop_directions(vim, directions)


# ------------------------------------------------------------------------------------------------ a trained model


@pytest.fixture(scope="module")
def trained():
    """The bundled model, 16 images for fitting and 60 others for evaluation."""
    model = ssmcompress.load(BUNDLED)
    images = ssmcompress.open_images(BUNDLED / "images.parquet", 10)
    prepared = torch.cat([batch.images for batch in ssmcompress.Batches(images, model.transform(), range(76))])
    return model, prepared[:16], prepared[16:]


@torch.no_grad()
def divergence(model, dense, images):
    logits, expected = model(images).double().log_softmax(1), dense(images).double().log_softmax(1)
    return float((expected.exp() * (expected - logits)).sum(1).mean())


@pytest.fixture(scope="module")
def two_states(trained):
    model, fit, _ = trained
    return cut_states(model, state_chains(model, fit), 2)


def test_chosen_states_are_far_better_than_random_ones(trained, two_states):
    model, _, images = trained
    random = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in random.blocks:
        index = [torch.randperm(8, generator=generator)[:2].sort().values for _ in block.directions]
        sets = [(C[i], D) for i, (C, D) in zip(index, block.read_weights(), strict=True)]
        block.cut_states(index, sets)
    assert 10 * divergence(two_states, model, images) < divergence(random, model, images)
    assert divergence(two_states, model, images) < 0.03


def test_chosen_channels_are_far_better_than_random_ones(trained, two_states):
    model, fit, images = trained
    chains = channel_chains(two_states, fit)
    orders = [torch.randperm(128, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    layers = tuple(replace(chain, order=order) for chain, order in zip(chains.layers, orders, strict=True))
    random = cut_channels(two_states, replace(chains, layers=layers), 80)  # refitted as well
    chosen = cut_channels(two_states, chains, 80)
    assert 3 * divergence(chosen, model, images) < divergence(random, model, images)
    assert divergence(chosen, model, images) < 0.1
