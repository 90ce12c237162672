"""Schedules, the pruner and calibration."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import images_of, make_vim
from hypothesis import given
from hypothesis import strategies as st

import ssmcompress
from ssmcompress.compression.calibrate import mean_deltas
from ssmcompress.compression.search.equal import plan_for_budget
from ssmcompress.data.any_batches import AnyBatches
from ssmcompress.errors import BudgetError, InputError
from ssmcompress.evaluation.flops import flops, remaining_share
from ssmcompress.ops import SCORES, causal_conv1d, selective_scan
from ssmcompress.pruning.alignment import Alignment
from ssmcompress.pruning.importance import IMPORTANCES
from ssmcompress.pruning.plan import Plan, Stage, default_stages, kept_count, token_counts
from ssmcompress.pruning.pruner import TokenPruner
from ssmcompress.pruning.tokens import Tokens


@pytest.mark.parametrize(
    ("depth", "stages"), [(24, (5, 10, 15)), (36, (8, 15, 23)), (8, (2, 3, 5)), (3, (1, 2)), (2, (1,))]
)
def test_default_stages_scale_with_depth(depth, stages):
    assert default_stages(depth) == stages


def test_a_model_of_one_layer_cannot_be_pruned():
    with pytest.raises(InputError, match="no place to prune"):
        default_stages(1)


@pytest.mark.parametrize(
    ("length", "ratio", "protected", "kept"),
    [
        (197, 0.3, True, 139),  # 1 + ceil(137.2)
        (197, 0.2, True, 158),
        (11, 0.3, True, 8),  # 10 * 0.7 is 7.000000000000001 in floating point
        (10, 0.3, False, 7),
        (196, 0.4, False, 118),
        (197, 0.0, True, 197),
        (197, 0.999999, True, 2),
        (10, 0.999999, False, 2),
        (2, 0.5, True, 2),
    ],
)
def test_kept_count(length, ratio, protected, kept):
    assert kept_count(length, ratio, protected) == kept


@given(st.integers(2, 1000), st.integers(1, 99), st.booleans())
def test_kept_count_is_exact_for_whole_percents(length, percent, protected):
    free = length - protected
    exact = -(-free * (100 - percent) // 100) + protected
    assert kept_count(length, percent / 100, protected) == min(length, max(2, exact))


def test_token_counts_of_vim_small():
    stages = [Stage(after, 0.2) for after in (5, 10, 15)]
    assert sorted(set(token_counts(24, 197, stages, True)), reverse=True) == [197, 158, 127, 102]


def pruner_tokens(scores, protected=2):
    scores = torch.as_tensor(scores)
    features = torch.arange(scores.numel()).float().view(*scores.shape, 1)
    return Tokens(features, length=scores.shape[1], protected=protected, scores=scores)


def test_the_class_token_is_kept_once_in_every_image_at_its_own_place():
    """The published pruning code protects it in the batch's first image only, and moves it to the middle."""
    scores = torch.rand(16, 9, generator=torch.Generator().manual_seed(0))
    scores[1:, 2] = -1.0  # the least important token in all images but the first
    kept = TokenPruner(0.5, "clip", 9, seed=0)(pruner_tokens(scores))
    assert kept.positions.shape == (16, 5)
    assert (kept.positions[:, 1:] > kept.positions[:, :-1]).all()
    assert ((kept.positions == 2).sum(1) == 1).all()
    index = kept.protected_index()
    assert (kept.positions.gather(1, index[:, None])[:, 0] == 2).all()
    assert torch.equal(kept.features[:, :, 0], torch.arange(16)[:, None] * 9.0 + kept.positions)


def test_a_second_stage_counts_positions_from_the_original_path():
    first = TokenPruner(0.5, "clip", 9, 0)(pruner_tokens([[0.0, 9, 1, 8, 2, 7, 3, 6, 4]]))
    assert first.positions.tolist() == [[1, 2, 3, 5, 7]]
    second = TokenPruner(0.5, "clip", 9, 0)(first.updated(first.features, torch.tensor([[1.0, 0, 2, 5, 4]])))
    assert second.positions.tolist() == [[2, 5, 7]]


@pytest.mark.parametrize("metric", [n for n, i in IMPORTANCES.items() if i.ranks and i.block_metric in (None, *SCORES)])
def test_every_metric_prunes_each_image_alike_in_any_batch(model, metric):
    images = images_of(model)
    plan = ssmcompress.calibrate(model, images, stages=(1, 2, 3), ratio=(0.2, 0.3, 0.4), importance=metric)
    pruned = ssmcompress.prune(model, plan)
    with torch.no_grad():
        together, decisions = pruned.trace(images)
        for i in range(len(images)):
            alone, own = pruned.trace(images[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)
            for ours, theirs in zip(own, decisions, strict=True):
                assert torch.equal(ours.kept[0], theirs.kept[i])
    assert pruned.token_counts() == ([17, 14, 11, 7, 7] if model.protected else [16, 13, 10, 6, 6])


def test_random_depends_on_the_seed_alone(vim, images):
    def kept(seed):
        plan = ssmcompress.make_plan(vim, importance="random", seed=seed, ratio=0.5)
        return [d.kept.tolist() for d in ssmcompress.prune(vim, plan).trace(images)[1]]

    assert kept(1) == kept(1)
    pruned = ssmcompress.prune(vim, ssmcompress.make_plan(vim, importance="random", ratio=0.5))
    draws = [pruner.draw for pruner in pruned.pruners.values()]
    assert not torch.equal(draws[0], draws[1])
    assert kept(1) != kept(2)


def test_alignment_matters_and_each_half_does(model):
    images = images_of(model)

    def logits(**alignment):
        plan = ssmcompress.make_plan(model, ratio=0.5, alignment=Alignment(**alignment))
        with torch.no_grad():
            return ssmcompress.prune(model, plan)(images)

    found = [logits(conv=c, scan=s) for c in (True, False) for s in (True, False)]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(found) for b in found[:i])


def test_a_ratio_of_zero_changes_nothing(model):
    images = images_of(model)
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.0))
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), model(images), atol=1e-6, rtol=0)


def test_pruning_leaves_its_argument_and_parameter_names_alone(model):
    images = images_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        logits = model(images)
        pruned = ssmcompress.prune(model, ssmcompress.make_plan(model))
        assert torch.equal(model(images), logits)
    assert model.plan is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert set(dict(pruned.named_parameters())) == set(dict(model.named_parameters()))
    with pytest.raises(InputError, match="by this plan it would have"):
        ssmcompress.prune(pruned, ssmcompress.make_plan(model, ratio=0.1))


def test_gradients_reach_every_layer_of_a_pruned_model(model):
    images = images_of(model)
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model))
    pruned(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


def test_calibrated_deltas_are_means_over_images_and_tokens(model):
    images = images_of(model)
    tokens = model.embed(images)
    first = model.blocks[0].deltas(tokens)
    found = mean_deltas(model, AnyBatches([images[:2], images[2:]]))
    torch.testing.assert_close(found[0], first.mean((1, 2)), atol=1e-6, rtol=1e-5)
    assert [d.shape for d in found] == [(len(first), model.config.d_inner)] * 4


def test_calibration_does_not_depend_on_the_batch_size_and_says_what_was_kept(model):
    images = images_of(model)
    plan = ssmcompress.make_plan(model, stages=(1, 3), ratio=0.5)
    one, other = (ssmcompress.calibrate(model, images.split(size), plan).calibration for size in (1, 4))
    for a, b in zip(one.gap_deltas + one.kept + one.scores, other.gap_deltas + other.kept + other.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert one.images == 5
    assert [round(k.sum().item()) for k in one.kept] == ([9, 5] if model.protected else [8, 4])
    assert model.protected is None or all(k[model.protected] == 1 for k in one.kept)


def test_a_calibrated_plan_survives_json(model):
    images = images_of(model)
    plan = ssmcompress.calibrate(model, images, ratio=0.4, importance="l2")
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    with torch.no_grad():
        assert torch.equal(ssmcompress.prune(model, again)(images), ssmcompress.prune(model, plan)(images))


def test_a_plan_of_another_model_is_refused(vim, images):
    plan = ssmcompress.calibrate(vim, images)
    with pytest.raises(InputError, match="4 layers, this one has 5"):
        ssmcompress.prune(make_vim(depth=5), plan)
    with pytest.raises(InputError, match="another model"):
        ssmcompress.prune(make_vim(d_model=24), plan)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(4, 0.3), "the model has 4 layers"),
        (Stage(0, 0.3), "stage is 1 to 3"),
        (Stage(1, 1.0), "below 1"),
        (Stage(1, -0.1), "at least 0"),
        (Stage(1, math.nan), "ratio nan"),
        (Stage(1, 0.3, "best"), "unknown importance 'best'"),
    ],
)
def test_bad_stages_are_refused(vim, stage, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.prune(vim, Plan((stage,)))


def test_stages_out_of_order_or_twice_are_refused(vim):
    for stages in ((2, 1), (1, 1)):
        with pytest.raises(InputError, match="rising order"):
            ssmcompress.make_plan(vim, stages=stages)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"stages": 3},
        {"stages": [{"after": 1}]},
        {"stages": [], "seed": "x"},
        "plan",
        {"stages": [{"after": math.inf, "ratio": 0.3}]},
        {"stages": [{"after": 1, "ratio": 10**400}]},
        {"stages": [], "seed": 1e30},
        {"stages": [], "calibration": {"name": "", "images": 1, "gap_deltas": [None]}},
    ],
)
def test_what_is_no_plan_is_refused(value):
    with pytest.raises(InputError, match="not a pruning plan"):
        Plan.from_dict(value)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
def test_a_budget_is_met_closely_and_never_exceeded(budget):
    model = make_vim(image=(32, 32))
    pruned = ssmcompress.prune(model, plan_for_budget(model, budget, None))
    share = flops(pruned)["full"] / flops(model)["full"]
    assert min(budget, remaining_share(model, ())) - 0.02 < share <= budget


def test_a_budget_out_of_reach_is_refused(vim):
    for budget in (0.05, 1.0):
        with pytest.raises(BudgetError, match="out of reach"):
            plan_for_budget(vim, budget, None)


def dense_with_masks(model, images, pruned):
    """Logits of `pruned` computed by the dense model alone: every layer sees all positions, the pruned ones masked.

    A pruned position brings no input to conv or scan, and decays the state by the gap delta of its layer.
    """
    _, decisions = pruned.trace(images)
    kept = {stage.after: d.kept for stage, d in zip(pruned.plan.stages, decisions, strict=True)}
    x = model.embed(images).features
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer, (block, other) in enumerate(zip(model.blocks, pruned.blocks, strict=True), 1):
        mixer = block.mixer
        u0, z = mixer.in_proj(block.norm(x)).chunk(2, -1)
        u0, total = torch.where(mask[..., None], u0, 0), 0
        for path, reverse in enumerate((False, True)):
            conv, x_proj, dt_proj, A_log, D = mixer.parameters_of(path)
            u = causal_conv1d(u0, conv.weight, conv.bias, reverse=reverse)
            dt, B, C = x_proj(u).split(mixer.split, -1)
            delta = F.softplus(dt_proj(dt))
            if other.mixer.gap_delta is not None:
                delta = torch.where(mask[..., None], delta, other.mixer.gap_delta[path])
            u = torch.where(mask[..., None], u, 0)
            total = total + selective_scan(u, delta, -A_log.exp(), B, C, D, z, reverse=reverse)
        x = x + mixer.out_proj(total / 2)
        if layer in kept:
            mask = torch.zeros_like(mask).scatter(1, kept[layer], True)
    return model.head(model.norm_f(x[:, model.protected]))


@pytest.mark.parametrize("gap", ["calibrated", "bias"])
def test_a_pruned_model_equals_the_dense_one_with_pruned_positions_masked(vim, images, gap):
    with torch.no_grad():
        plan = ssmcompress.calibrate(vim, images, stages=(1, 2, 3), ratio=0.4, gap=gap)
        pruned = ssmcompress.prune(vim, plan)
        torch.testing.assert_close(pruned(images), dense_with_masks(vim, images, pruned), atol=1e-5, rtol=0)


def test_each_later_layer_gets_its_own_gap_delta(vim, images):
    calibrated = ssmcompress.calibrate(vim, images, stages=(2,))
    model = ssmcompress.prune(vim, calibrated)
    assert [block.mixer.gap_delta is None for block in model.blocks] == [True, True, False, False]
    for layer in (2, 3):
        assert torch.equal(model.blocks[layer].mixer.gap_delta, calibrated.calibration.gap_deltas[layer])
    by_bias = ssmcompress.prune(vim, ssmcompress.make_plan(vim, stages=(2,)))
    for layer in (2, 3):
        bias = torch.stack([vim.blocks[layer].mixer.dt_proj.bias, vim.blocks[layer].mixer.dt_proj_b.bias])
        assert torch.equal(by_bias.blocks[layer].mixer.gap_delta, F.softplus(bias))
    with torch.no_grad():
        assert not torch.equal(model(images), by_bias(images))


def test_a_plan_says_what_its_gaps_are(vim, images):
    def plan(**options):
        return ssmcompress.calibrate(vim, images, **options)

    assert plan().gap == "calibrated"
    assert plan(gap="bias").gap == "bias"
    assert plan(alignment=Alignment(conv=True, scan=False)).gap == "bias"
    assert ssmcompress.prune(vim, ssmcompress.make_plan(vim)).plan.gap == "bias"
    with pytest.raises(InputError, match="needs calibration images"):
        ssmcompress.prune(vim, Plan((Stage(1, 0.3),), gap="calibrated"))


def test_the_plans_tensors_are_not_the_models(vim, images):
    plan = ssmcompress.calibrate(vim, images, stages=(1,))
    model = ssmcompress.prune(vim, plan)
    model.blocks[1].mixer.gap_delta.zero_()
    assert plan.calibration.gap_deltas[1].abs().min() > 0
