"""Reconstruction: the regression, the layer-by-layer run, and its results in files, graphs and reports."""

import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import call, call_json, forked, refused
from conftest import BUNDLED, check_damage_is_refused, make_plain_mamba, make_vim, write_image
from onnx_runs import run_file
from safetensors.torch import load_file

import ssmcompress
from ssmcompress.compression.margin import margin_gradients
from ssmcompress.compression.reconstruct.both_models import LEAST_WEIGHT
from ssmcompress.compression.reconstruct.least_squares import Rows, refit, ridge_regression
from ssmcompress.data import open_images
from ssmcompress.data.batches import Batches
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import corrections_share, flops, flops_by_part
from ssmcompress.ops import gather_tokens

# ------------------------------------------------------------------------------------------------ the regression


def record_of(model):
    return model.find_record("reconstruction")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(x, t, w):
    rows = Rows.zeros(x.shape[1], t.shape[1])
    for part in torch.arange(len(x)).split(7):
        rows.add(x[part], t[part], w[part])
    return rows


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_ridge_regression_is_the_least_squares_optimum(penalty):
    x, t, w, old = draw(50, 6), draw(50, 4, seed=1), draw(50, seed=2).square(), draw(4, 6, seed=3)
    found = ridge_regression(rows_of(x, t, w), old, torch.full((6,), penalty, dtype=torch.float64))
    # The penalty as rows of its own: sqrt(penalty) * W = sqrt(penalty) * old.
    inputs = torch.cat([x * w.sqrt()[:, None], penalty**0.5 * torch.eye(6, dtype=torch.float64)])
    targets = torch.cat([t * w.sqrt()[:, None], penalty**0.5 * old.T])
    expected = torch.linalg.lstsq(inputs, targets).solution.T
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_the_error_of_a_weight_comes_from_the_sums():
    x, t, w, weight = draw(50, 6), draw(50, 4, seed=1), draw(50, seed=2).square(), draw(4, 6, seed=3)
    expected = (w[:, None] * (x @ weight.T - t).square()).sum()
    assert rows_of(x, t, w).error(weight) == pytest.approx(float(expected), rel=1e-12)


def test_a_refit_that_the_held_out_rows_do_not_confirm_is_not_made():
    x, old = draw(40, 6), draw(4, 6, seed=3)
    fitted = rows_of(x, draw(40, 4, seed=1), torch.ones(40))  # the targets are noise
    held_out = rows_of(draw(40, 6, seed=4), draw(40, 6, seed=4) @ old.T, torch.ones(40))
    found = refit(fitted, held_out, old)
    assert torch.equal(found.weight, old)
    assert (found.ridges, found.before, found.after) == ((), pytest.approx(0, abs=1e-12), found.before)


def test_each_group_of_inputs_has_its_own_ridge_and_one_of_noise_is_left_alone():
    x, true = draw(4000, 6), draw(4, 6, seed=1)
    t = x @ true.T + 0.1 * draw(4000, 4, seed=2)
    noise, other = draw(4000, 30, seed=3), draw(4000, 30, seed=4)
    # The additional inputs predict the noise on the fitted rows, but not on the held-out rows.
    told = torch.cat([x, (t - x @ true.T) @ draw(4, 30, seed=5) + 1e-3 * noise], dim=1)
    ones = torch.ones(4000)
    found = refit(rows_of(told, t, ones), rows_of(torch.cat([x, other], dim=1), t, ones), torch.zeros(4, 36), [6, 30])
    assert found.ridges[0] is not None
    assert found.ridges[1] is None
    torch.testing.assert_close(found.weight[:, :6], true, atol=0.05, rtol=0)
    assert found.weight[:, 6:].abs().max() < 1e-6


@pytest.mark.parametrize("case", ["one row", "dead inputs", "all inputs dead", "no weight", "no target", "equal rows"])
def test_sums_that_determine_little_give_finite_weights(case):
    x, t, w, old = draw(30, 6), draw(30, 4, seed=1), torch.ones(30, dtype=torch.float64), draw(4, 6, seed=3)
    if case == "one row":
        x, t, w = x[:1], t[:1], w[:1]
    if case == "dead inputs":
        x[:, ::2] = 0
    if case == "all inputs dead":
        x[:] = 0
    if case == "no weight":
        w[:] = 0
    if case == "no target":
        t[:] = 0
    if case == "equal rows":
        x[:] = x[0]
    rows = rows_of(x, t, w)
    found = refit(rows, rows, old)
    assert found.weight.isfinite().all()
    assert found.after <= found.before
    if case == "dead inputs":
        assert torch.equal(found.weight[:, ::2], old[:, ::2])


def test_rows_that_are_not_finite_are_refused():
    x = draw(30, 6)
    x[3, 2] = torch.nan
    rows = rows_of(x, draw(30, 4), torch.ones(30))
    with pytest.raises(InputError, match="not finite"):
        refit(rows, rows, torch.zeros(4, 6))


# --------------------------------------------------------------------------------------------------- the models


def noise(count, seed):
    """Images whose patches are correlated: each image has its own colour."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 1, 1, generator=generator) + torch.randn(count, 3, 16, 16, generator=generator) / 2


@pytest.fixture(scope="module")
def many():
    return noise(300, seed=2)


@pytest.fixture(scope="module")
def dense():
    return make_vim()


@pytest.fixture(scope="module")
def pruned(dense, many):
    return ssmcompress.prune(dense, ssmcompress.calibrate(dense, many, ratio=0.4, stages=(1, 2)))


@pytest.fixture(scope="module")
def rebuilt(dense, pruned, many):
    return ssmcompress.reconstruct(pruned, dense, many, name="noise")


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_dense_model_is_followed_more_closely_on_images_not_used(dense, pruned, rebuilt):
    unseen = noise(64, seed=3)
    before, after = (ssmcompress.evaluate(m, unseen, dense=dense).kl for m in (pruned, rebuilt))
    assert after < 0.8 * before  # with random weights, a linear map can recover little
    record = record_of(rebuilt)
    assert (record.name, record.images, record.held_out, record.kept) == ("noise", 300, 60, True)
    assert record.kl_after < 0.8 * record.kl_before


def test_no_weight_is_worse_than_the_old_one_on_the_images_held_out(rebuilt):
    fits = record_of(rebuilt).fits
    assert [fit.weight for fit in fits] == [
        f"layers.{i}.{name}"
        for i in (1, 2, 3)
        for name in ("mixer.x_proj", "mixer.x_proj_b", "mixer.out_proj", "class_correction")
    ] + ["head"]
    assert all(fit.after <= fit.before for fit in fits)
    assert sum(fit.after < fit.before for fit in fits) >= 5


def test_arguments_layers_before_the_first_stage_and_parameter_names_stay(dense, pruned, rebuilt, many):
    kept = copy.deepcopy(pruned), copy.deepcopy(dense)
    ssmcompress.reconstruct(pruned, dense, many[:8])
    assert same_weights(pruned, kept[0])
    assert same_weights(dense, kept[1])
    assert all(parameter.grad is None for parameter in dense.parameters())
    before, after = pruned.state_dict(), rebuilt.state_dict()
    assert before.keys() == {k for k in after if not k.startswith(("corrections.", "class_corrections."))}
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed <= {f"{fit.weight}.{kind}" for fit in record_of(rebuilt).fits for kind in ("weight", "bias")}


def test_the_result_is_the_same_to_the_last_bit_for_any_batches(dense, pruned, rebuilt, many):
    for batches in (many.split(7), [(part, torch.zeros(len(part))) for part in many.split(64)], iter(many.split(33))):
        assert same_weights(ssmcompress.reconstruct(pruned, dense, batches), rebuilt)


def test_where_nothing_is_pruned_nothing_changes(dense, many):
    plan = ssmcompress.make_plan(dense, ratio=0.0)
    pruned = ssmcompress.prune(dense, plan)
    found = ssmcompress.reconstruct(pruned, dense, many)
    assert same_weights(found, pruned)
    assert record_of(found) is None
    # The same with tokens missing in the counts only: all maps are already correct.
    pruned = ssmcompress.prune(dense, ssmcompress.make_plan(dense, ratio=0.5, stages=(1,)))
    pruned.pruners["1"].ratio = 0.0
    found = ssmcompress.reconstruct(pruned, dense, many)
    assert same_weights(found, pruned)
    assert not any(fit.ridges for fit in record_of(found).fits)


def test_rows_weigh_what_an_error_does_to_the_margin(dense, many):
    found = margin_gradients(dense, many[:3])
    assert [tuple(point.shape) for point in found] == [(3, 17)] * 5
    best = dense(many[:3]).topk(2).indices
    tokens = dense.embed(many[:3])
    for layer in range(5):
        features = tokens.features.detach().requires_grad_()
        later = tokens.updated(features)
        for block in dense.blocks[layer:]:
            later = block(later)
        logits = dense.readout(later)
        (logits.gather(1, best[:, :1]) - logits.gather(1, best[:, 1:])).sum().backward()
        torch.testing.assert_close(found[layer], features.grad.square().sum(-1), rtol=1e-3, atol=1e-9)
        if layer < 4:
            tokens = dense.blocks[layer](tokens)
    others = torch.arange(17) != dense.protected  # at the end, only the class token is read
    assert found[4][:, others].abs().max() == 0


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_a_projection_is_the_weighted_regression_of_the_dense_features(many, make):
    """Computed from the definition for a model of two layers, with the ridge that was chosen."""
    dense = make(depth=2)
    block, (name,) = dense.blocks[1], dense.blocks[1].refitted[-1]
    old, scale = block.get_submodule(name), block.residual_scale
    many = F.interpolate(many, dense.config.image_size)
    pruned = ssmcompress.prune(dense, ssmcompress.make_plan(dense, ratio=0.4, stages=(1,)))
    with torch.no_grad():
        found = ssmcompress.reconstruct(pruned, dense, many)
        inputs, targets, weights = [], [], []
        all_weights = margin_gradients(dense, many)[2]
        for k, images in enumerate(many.split(32)):
            full = dense.blocks[0](dense.embed(images))
            kept, _ = pruned.step(1, pruned.embed(images))
            mean = kept.with_pruned_sum(full, dense.memory).pruned_mean()
            seen = []
            new = found.blocks[1].get_submodule(name)
            hook = new.register_forward_hook(lambda _, x, y, to=seen: to.append(x[0]))
            found.blocks[1](kept)
            hook.remove()
            count = kept.features.shape[1]
            ones = torch.ones(*seen[0].shape[:2], 0 if old.bias is None else 1)
            inputs.append(torch.cat([seen[0], ones, mean[:, None].expand(-1, count, -1)], dim=-1))
            targets.append((gather_tokens(block(full).features, kept.positions) - kept.features) / scale)
            weight = all_weights[32 * k : 32 * k + 32] / all_weights.mean() + LEAST_WEIGHT
            weights.append(weight.gather(1, kept.positions))
        fitted = torch.arange(len(many)) % 5 != 1
        x, t, w = (torch.cat(values)[fitted].double() for values in (inputs, targets, weights))
        x, t, w = x.flatten(0, 1), t.flatten(0, 1), w.flatten()
        fit = next(fit for fit in record_of(found).fits if fit.weight.endswith(name))
        groups = [x.shape[1] - 16, 16]
        units = torch.cat([part.mean().expand(len(part)) for part in (w[:, None] * x.square()).sum(0).split(groups)])
        ridges = torch.tensor([1e12 if r is None else r for r in fit.ridges]).repeat_interleave(torch.tensor(groups))
        biases = [[linear.bias[:, None]] if linear.bias is not None else [] for linear in (old, new)]
        old = torch.cat([old.weight, *biases[0], torch.zeros(16, 16)], dim=1).double()
        penalty = (units * ridges).sqrt()
        expected = torch.linalg.lstsq(
            torch.cat([x * w.sqrt()[:, None], penalty.diag()]),
            torch.cat([t * w.sqrt()[:, None], penalty[:, None] * old.T]),
        ).solution.T
        mapped = expected[:, : groups[0]]
        torch.testing.assert_close(torch.cat([new.weight, *biases[1]], 1).double(), mapped, atol=1e-5, rtol=1e-4)
        # The correction keeps 98 % of the gain on the held-out images, unless this needs half of its rank.
        thin = found.corrections["2"]
        thinner = torch.cat([mapped, (thin[1].weight @ thin[0].weight).double() / scale], dim=1)
        x, t, w = (
            torch.cat(values)[~fitted].double().flatten(0, 1)
            for values in (inputs, targets, [w[..., None] for w in weights])
        )
        before, whole, after = (((x @ m.T - t).square() * w).sum() for m in (old, expected, thinner))
        assert before - after >= (0.98 * (before - whole) if thin[0].out_features < 8 else 0)


def test_a_correction_is_added_to_all_kept_tokens_of_an_image(rebuilt, many):
    """The model's computation step by step: the mean of all tokens pruned so far, each scaled to mean square 1."""
    rebuilt = copy.deepcopy(rebuilt)
    rebuilt.class_corrections.clear()
    layer = max(map(int, rebuilt.corrections))
    with torch.no_grad():
        tokens, lost = rebuilt.embed(many[:4]), []
        for i in range(1, layer + 1):
            before = tokens
            expected = rebuilt.blocks[i - 1](tokens).features
            if str(i) in rebuilt.corrections:
                scaled = [f / f.square().mean(-1, keepdim=True).sqrt() for f in lost]
                mean = torch.stack([torch.cat([f[b] for f in scaled]).mean(0) for b in range(4)])
                expected = expected + rebuilt.corrections[str(i)](mean)[:, None]
            tokens, decision = rebuilt.step(i, before)
            if decision is None:
                torch.testing.assert_close(tokens.features, expected, rtol=1e-4, atol=1e-4)
                continue
            kept = [set(row) for row in decision.kept.tolist()]
            index = [
                [j for j, p in enumerate(row) if p in kept[b]] for b, row in enumerate(decision.candidates.tolist())
            ]
            gone = [[j for j in range(expected.shape[1]) if j not in row] for row in index]
            torch.testing.assert_close(
                tokens.features, gather_tokens(expected, torch.tensor(index)), rtol=1e-4, atol=1e-4
            )
            lost.append(gather_tokens(expected, torch.tensor(gone)))


def test_a_reconstructed_model_can_be_reconstructed_again(dense, rebuilt, many):
    again = ssmcompress.reconstruct(rebuilt, dense, many)
    assert record_of(again).kl_before == pytest.approx(record_of(rebuilt).kl_after, rel=0.05)
    assert record_of(again).kl_after <= record_of(again).kl_before or not record_of(again).kept


def test_no_files_are_left_and_none_are_kept_when_it_fails(dense, pruned, many, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ssmcompress.reconstruct(pruned, dense, many[:8])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError):
        ssmcompress.reconstruct(pruned, dense, torch.cat([many[:40], torch.full((1, 3, 16, 16), torch.nan)]))
    assert not list(tmp_path.iterdir())


def test_two_processes_add_their_sums(dense, pruned, tmp_path):
    """Each process has half of the images; 40 of 80, so that every fifth image is the same."""
    images = noise(80, seed=4)
    whole = ssmcompress.reconstruct(pruned, dense, images)
    torch.save((dense, pruned, images), tmp_path / "given.pt")
    (tmp_path / "work.py").write_text(
        "import sys, torch, torch.distributed as dist, ssmcompress\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "rank, folder = dist.get_rank(), sys.argv[1]\n"
        "dense, pruned, images = torch.load(f'{folder}/given.pt', weights_only=False)\n"
        "found = ssmcompress.reconstruct(pruned, dense, images[40 * rank : 40 * rank + 40], distributed=True)\n"
        "torch.save((found.state_dict(), found.find_record('reconstruction')), f'{folder}/found{rank}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    forked("together", ["python", tmp_path / "work.py", tmp_path])
    (first, record), (second, _) = (torch.load(tmp_path / f"found{r}.pt", weights_only=False) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert (record.images, record.held_out) == (80, 16)
    for ours, theirs in zip(record.fits, record_of(whole).fits, strict=True):
        assert (ours.weight, ours.ridges) == (theirs.weight, theirs.ridges)
        assert (ours.before, ours.after) == pytest.approx((theirs.before, theirs.after), rel=1e-4)
        assert (ours.half is None) == (theirs.half is None) == (not ours.ridges)
        assert ours.half == (None if theirs.half is None else pytest.approx(theirs.half, rel=1e-4))


# ----------------------------------------------------------------------------------------- what a user may bring


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_few_images_give_a_sound_model(dense, pruned, many, count):
    found = ssmcompress.reconstruct(pruned, dense, many[:count])
    assert (record_of(found).images, record_of(found).held_out) == (count, 1)
    assert all(value.isfinite().all() for value in found.state_dict().values())
    assert record_of(found).kl_after < record_of(found).kl_before or same_weights(found, pruned)


def test_the_same_image_again_counts_once(dense, pruned, many):
    twice = ssmcompress.reconstruct(pruned, dense, many[:6].repeat(3, 1, 1, 1))
    assert same_weights(twice, ssmcompress.reconstruct(pruned, dense, many[:6]))
    for images in (many[:1], many[:1].repeat(9, 1, 1, 1), torch.zeros(5, 3, 16, 16)):
        with pytest.raises(InputError, match="1 different images: reconstruction needs at least 2"):
            ssmcompress.reconstruct(pruned, dense, images)


def test_constant_images_give_a_sound_model(dense, pruned):
    grey = torch.linspace(-1, 1, 12)[:, None, None, None].expand(-1, 3, 16, 16)
    found = ssmcompress.reconstruct(pruned, dense, grey)
    assert found(grey).isfinite().all()
    assert record_of(found).kl_after < record_of(found).kl_before or same_weights(found, pruned)


def test_features_that_are_not_finite_are_refused(dense, pruned, many):
    images = many.clone()
    images[50, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        ssmcompress.reconstruct(pruned, dense, images)


def test_models_that_do_not_belong_together_are_refused(dense, pruned, many):
    with pytest.raises(InputError, match="in this order"):
        ssmcompress.reconstruct(dense, pruned, many)
    with pytest.raises(InputError, match=r"images \(3, 3, 8, 16\): expected \(batch, 3, 16, 16\)"):
        ssmcompress.reconstruct(pruned, dense, [many[:3], many[:3, :, :8]])
    with pytest.raises(InputError, match="differ in architecture"):
        ssmcompress.reconstruct(pruned, make_vim(depth=5), many)


def test_a_model_that_comes_no_closer_is_left_as_it_was(dense, pruned, many, monkeypatch):
    from ssmcompress.compression.reconstruct import split_rows as module

    def worse(fitted, held_out, weight, groups):
        return module.Refit(-3 * weight.double(), (1.0, *[None] * (len(groups) - 1)), 1.0, 0.0)

    monkeypatch.setattr(module, "refit", worse)
    found = ssmcompress.reconstruct(pruned, dense, many[:10])
    assert not record_of(found).kept
    assert same_weights(found, pruned)


def test_the_block_of_images_depends_on_the_model_alone(dense):
    assert dense.chunk_size() == 32
    assert 1 <= make_vim(depth=2, d_model=768, image=(512, 512), patch=16).chunk_size() < 8


# ------------------------------------------------------------------------------------- files, graphs and reports


def test_a_folder_keeps_it(rebuilt, many, tmp_path):
    loaded = ssmcompress.load(ssmcompress.save(rebuilt, tmp_path / "m"))
    assert same_weights(loaded, rebuilt)
    assert record_of(loaded) == record_of(rebuilt)
    with torch.no_grad():
        assert torch.equal(loaded(many[:5]), rebuilt(many[:5]))
    again = ssmcompress.load(ssmcompress.save(loaded, tmp_path / "n"))
    assert (record_of(again), flops(again)) == (record_of(rebuilt), flops(rebuilt))


def test_corrections_are_counted(pruned, rebuilt):
    added = sum(2 * 16 * correction[0].out_features for correction in rebuilt.corrections.values())
    # Maps from the update, and the sums and the number of tokens of five segments, then the sums: in the layers, and at
    # the stages over the tokens before and after.
    added += sum((16 + 5 * 17 + 16) * correction[0].out_features for correction in rebuilt.class_corrections.values())
    counts = rebuilt.token_counts()
    added += 16 * (
        sum(counts[int(layer) - 1] for layer in rebuilt.class_corrections) + counts[0] + 2 * counts[1] + counts[2]
    )
    assert 0 < added <= corrections_share(pruned, (1, 2)) * flops(make_vim())["full"] * 1e9
    assert flops_by_part(rebuilt)["corrections"] == added / 1e9
    assert flops(rebuilt)["full"] == pytest.approx(flops(pruned)["full"] + added / 1e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("corrections.2.0.weight"), "expected matrices"),
        (lambda s: s.update({"corrections.2.0.weight": torch.zeros(3, 5)}), "expected matrices"),
        (lambda s: s.update({"corrections.2.0.weight": torch.zeros(7)}), "expected matrices"),
        (lambda s: s.update({"corrections.1.0.weight": torch.zeros(3, 16)}), "do not fit the stages"),
        (lambda s: s.update({"corrections.9.0.weight": torch.zeros(3, 16)}), "do not fit the stages"),
        (lambda s: s["corrections.2.0.weight"].fill_(torch.inf), "not finite"),
        (lambda s: s.update({"corrections.2.0.weight": s["corrections.2.0.weight"].double() * 1e300}), "not finite"),
        (
            lambda s: s.update({f"corrections.2.{i}.weight": torch.zeros(*((0, 16), (16, 0))[i]) for i in (0, 1)}),
            "matri",
        ),
    ],
)
def test_damaged_corrections(rebuilt, tmp_path, change, message):
    check_damage_is_refused(rebuilt, tmp_path / "m", change, message)


@pytest.mark.parametrize("value", [3, {}, {"fits": 3}, {"fits": [{"weight": "x", "ridges": "a"}]}])
def test_a_damaged_record(rebuilt, tmp_path, value):
    file = ssmcompress.save(rebuilt, tmp_path / "m") / "config.json"
    config = json.loads(file.read_text())
    config["pruning"]["reconstruction"] = value
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="not a record of a reconstruction"):
        ssmcompress.load(tmp_path / "m")


def test_onnx_computes_the_corrections_for_any_batch(many, tmp_path):
    """After the stage a layer computed for all tokens, and the last one, computed for the class token alone."""
    dense = make_vim(depth=3)
    pruned = ssmcompress.prune(dense, ssmcompress.calibrate(dense, many[:150], ratio=0.4, stages=(1,)))
    rebuilt = ssmcompress.reconstruct(pruned, dense, many[:150], name="/home/somebody/images")
    assert set(rebuilt.corrections) == set(rebuilt.class_corrections) == {"2", "3"}
    assert ssmcompress.export_onnx(rebuilt, tmp_path / "m.onnx").passed
    assert b"somebody" not in (tmp_path / "m.onnx").read_bytes()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            np.testing.assert_allclose(run_file(tmp_path / "m.onnx", x), rebuilt(x).numpy(), atol=1e-4)


def test_a_trained_model_comes_closer_with_few_images():
    dense = ssmcompress.load(BUNDLED)
    images = open_images(BUNDLED / "images.parquet", 10)
    fitted, unseen = (Batches(images, dense.transform(), range(start, start + 96)) for start in (0, 96))
    pruned = ssmcompress.prune(dense, ssmcompress.calibrate(dense, fitted, ratio=0.3))
    rebuilt = ssmcompress.reconstruct(pruned, dense, fitted)
    before, after = (ssmcompress.evaluate(model, unseen, dense=dense) for model in (pruned, rebuilt))
    assert after.kl < 0.6 * before.kl
    assert after.top1 > before.top1 + 5


@pytest.fixture
def in_an_empty_folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.mark.usefixtures("in_an_empty_folder")
class TestPrune:
    def test_data_is_reconstructed_on_by_default(self, checkpoint, class_folders):
        options = ("--data", class_folders, "--samples", 8, "--no-latency", "--ratio", 0.4)
        found = call_json("prune", checkpoint, *options)
        block = found["reconstruction"]
        assert (block["name"], block["images"], block["held_out"]) == (str(class_folders), 8, 2)
        assert block["seconds"] > 0
        assert [f["weight"] for f in block["fits"]][-1] == "head"
        assert all(f["after"] <= f["before"] for f in block["fits"])
        for name in ("dense", "naive", "aligned", "pruned"):
            assert found[name]["top1"] is not None
        assert found["pruned"]["flops"]["full"] >= found["aligned"]["flops"]["full"]
        without = call_json("prune", checkpoint, *options, "--no-reconstruct")
        assert without["reconstruction"] is None
        assert "aligned" not in without
        assert without["pruned"] == found["aligned"]
        assert without["naive"] == found["naive"]
        assert os.path.isdir("compressed/model-r0.40-no-reconstruct")
        call("report", "compressed/model-r0.40", "--html", "r.html")
        text = call("report", "compressed/model-r0.40").stdout
        assert "weights refitted on 8 images" in text
        assert "aligned" in text
        for file in ("r.html", "compressed/model-r0.40/README.md"):
            assert "layers.3.mixer" in Path(file).read_text()

    def test_without_images_of_ones_own_only_on_request(self, checkpoint):
        assert call_json("prune", checkpoint, "--no-latency")["reconstruction"] is None
        found = call_json("prune", checkpoint, "--no-latency", "--reconstruct", "--samples", 6, "-o", "m")
        assert found["reconstruction"]["images"] == 6

    def test_a_single_image_calibrates_but_does_not_reconstruct(self, checkpoint, tmp_path):
        for i in range(2):
            write_image(tmp_path / "two" / f"{i}.png", i)
        options = ("--data", tmp_path / "two", "--no-latency")
        assert call_json("prune", checkpoint, *options)["reconstruction"] is None
        assert "at least 2" in refused("prune", checkpoint, *options, "--reconstruct", "-o", "m")
        for i in range(6):
            write_image(tmp_path / "same" / f"{i}.png", 1)
        assert call_json("prune", checkpoint, "--data", tmp_path / "same", "-o", "n")["reconstruction"] is None

    def test_a_budget_holds_with_the_corrections(self, checkpoint, class_folders):
        for share in (0.5, 0.7, 0.9):
            options = ("--data", class_folders, "--flops", share, "--no-latency", "-o", f"m{share}")
            found = call_json("prune", checkpoint, *options)
            assert share - 0.06 < found["pruned"]["flops"]["full"] / found["dense"]["flops"]["full"] <= share

    def test_no_alignment_is_reconstructed_too(self, checkpoint, class_folders):
        found = call_json("prune", checkpoint, "--data", class_folders, "--no-align", "--no-latency")
        assert "aligned" not in found
        assert found["naive"]["flops"]["full"] <= found["pruned"]["flops"]["full"]
        assert found["reconstruction"]["images"] == 10

    def test_the_files_are_the_same_for_any_batch_size(self, checkpoint, class_folders):
        for size in (1, 7, 64):
            call("prune", checkpoint, "--data", class_folders, "--no-latency", "--batch-size", size, "-o", f"m{size}")
        states = [load_file(f"m{size}/model.safetensors") for size in (1, 7, 64)]
        for state in states[1:]:
            assert state.keys() == states[0].keys()
            assert all(torch.equal(state[k], states[0][k]) for k in state)
