"""Corrections of the class token: their computation, cases in which they are exact, and saving."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BUNDLED, check_damage_is_refused, make_plain_mamba, make_vim
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.data import open_images
from ssmcompress.data.batches import Batches
from ssmcompress.errors import InputError
from ssmcompress.models.blocks import low_rank
from ssmcompress.models.class_corrections import MAX_INPUTS, ClassCorrection, choose_segments, count_inputs
from ssmcompress.models.rewrite import prune

SIZE = (48, 48)  # 145 tokens: 14 segments


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def corrected():
    """A pruned Vim with random corrections after the layers 2, 3 and 4 of 4, and images for it."""
    model = make_vim(image=SIZE)
    model = prune(model, ssmcompress.make_plan(model, ratio=0.4, stages=(1, 2)))
    segments = choose_segments(model.length, 16)
    for layer in (2, 3, 4):
        correction = ClassCorrection(16, segments, 3)
        for i, linear in enumerate(correction):
            linear.weight.data.copy_(draw(*linear.weight.shape, seed=10 * layer + i) / 10)
        model.class_corrections[str(layer)] = correction
    return model.requires_grad_(False), draw(3, 3, *SIZE)


def plain(model):
    """A copy without the corrections."""
    model = copy.deepcopy(model)
    model.class_corrections.clear()
    return model


def test_the_number_of_segments_follows_from_the_model():
    assert choose_segments(197, 64) == 14  # the rows of a 14 x 14 grid
    assert choose_segments(50, 64) == 14
    assert choose_segments(5, 64) == 1
    for width in (192, 384, 768, 1536, 5000):
        segments = choose_segments(197, width)
        assert segments == 1 or count_inputs(width, segments) <= MAX_INPUTS
    assert choose_segments(197, 192) == 14  # a Vim-tiny
    assert choose_segments(197, 768) == 2


def test_a_correction_is_a_map_of_the_update_and_of_all_tokens_in_segments(corrected):
    """The model's computation written out for each image, with the last features of dropped tokens."""
    model, images = corrected
    tokens, bare = model.embed(images), plain(model)
    length, count = model.length, choose_segments(model.length, 16)
    assert (length, count) == (145, 14)
    last_seen = [{} for _ in images]
    for layer in range(1, 5):
        before = tokens
        result = bare.blocks[layer - 1](before).features
        if str(layer) in model.class_corrections:
            for b in range(len(images)):
                positions = before.explicit_positions()[b].tolist()
                here = dict(zip(positions, before.features[b], strict=True))
                rows, kept = torch.zeros(count, 16), torch.zeros(count)
                for position in range(length):
                    x = here.get(position, last_seen[b].get(position))
                    rows[position * count // length] += x / x.square().mean().sqrt()
                    kept[position * count // length] += position in here
                place = positions.index(model.protected)
                update = result[b, place] - before.features[b, place]
                inwards, outwards = (linear.weight for linear in model.class_corrections[str(layer)])
                result[b, place] += outwards @ (inwards @ torch.cat([update, rows.flatten(), kept]))
        tokens, decision = model.step(layer, before)
        for b in range(len(images)):
            position_of = before.explicit_positions()[b].tolist()
            after = dict(zip(position_of, result[b], strict=True))
            for position, features in zip(tokens.explicit_positions()[b].tolist(), tokens.features[b], strict=True):
                torch.testing.assert_close(features, after.pop(position), rtol=1e-4, atol=1e-4)
            last_seen[b].update(after)
            assert bool(after) == (decision is not None)


def test_the_last_layer_computed_for_the_class_token_alone_gives_the_same(corrected):
    model, images = corrected
    torch.testing.assert_close(model(images), model.readout(model.encode(images)[0]), rtol=1e-4, atol=1e-5)
    assert (model(images) - plain(model)(images)).abs().max() > 0.01
    for batch in (images[:1], images[1:]):  # each image by itself
        rows = slice(0, 1) if len(batch) == 1 else slice(1, None)
        torch.testing.assert_close(model(batch), model(images)[rows], rtol=1e-4, atol=1e-5)


def test_the_mean_of_dropped_tokens_follows_from_their_sums_in_segments(corrected):
    """Corrections of all tokens use that mean; no second sum is computed for them."""
    model, images = copy.deepcopy(corrected[0]), corrected[1]
    model.corrections["4"] = low_rank(16, 2)
    without_stages = copy.deepcopy(model)
    without_stages.pruners.clear()
    tokens, expected = model.embed(images), None
    for layer in (1, 2):
        every = replace(without_stages.step(layer, tokens)[0], pruned_sum=expected)
        tokens, _ = model.step(layer, tokens)
        expected = tokens.with_pruned_sum(every, model.memory).pruned_sum
        torch.testing.assert_close(tokens.pruned_sum, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1


def test_narrow_models_and_autocast_compute_it_too(corrected):
    model, images = corrected
    expected = model(images)
    narrow = copy.deepcopy(model).half()(images.half())
    assert (narrow - expected).abs().max() < 0.01 * expected.abs().max()
    # In bfloat16 some of the kept tokens differ.
    with torch.autocast("cpu", torch.bfloat16):
        results = [model(images)]
    results.append(copy.deepcopy(model).bfloat16()(images.bfloat16()))
    for result in results:
        assert F.cosine_similarity(result.float().flatten(), expected.flatten(), dim=0) > 0.95
    wide = copy.deepcopy(model).double()
    assert wide(images.double()).dtype == torch.float64
    torch.testing.assert_close(wide(images.double()).float(), expected, rtol=1e-3, atol=1e-4)


def test_gradients_reach_it(corrected):
    model, images = corrected
    model = copy.deepcopy(model).requires_grad_(True)
    model(images).square().sum().backward()
    for correction in model.class_corrections.values():
        assert all(linear.weight.grad.abs().max() > 0 for linear in correction)


def test_files_keep_it(corrected, tmp_path):
    model, images = corrected
    model = copy.deepcopy(model)
    folder = ssmcompress.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(ssmcompress.load(folder)(images), model(images))
    state = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in state.items() if not k.startswith("class_corrections.")}
    save_file(kept, folder / "model.safetensors")  # a folder of an earlier version
    torch.testing.assert_close(ssmcompress.load(folder)(images), plain(model)(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("class_corrections.3.1.weight"), "expected matrices"),
        (lambda s: s.update({"class_corrections.3.0.weight": torch.zeros(3, 16)}), r"\(rank, 254\)"),
        (lambda s: s.update({"class_corrections.1.0.weight": torch.zeros(3, 254)}), "do not fit the stages"),
        (lambda s: s.update({"class_corrections.3.2.weight": torch.zeros(3, 254)}), "do not fit the stages"),
        (lambda s: s["class_corrections.2.0.weight"].fill_(torch.nan), "not finite"),
    ],
)
def test_damaged_files_are_refused(corrected, tmp_path, change, message):
    check_damage_is_refused(copy.deepcopy(corrected[0]), tmp_path / "m", change, message)


def test_a_model_without_a_class_token_takes_none(tmp_path):
    model = make_plain_mamba()
    model = prune(model, ssmcompress.make_plan(model, ratio=0.4, stages=(1,)))
    file = ssmcompress.save(model, tmp_path / "m") / "model.safetensors"
    state = load_file(file)
    state |= {f"class_corrections.2.{i}.weight": torch.zeros(*shape) for i, shape in enumerate(((1, 33), (16, 1)))}
    save_file(state, file)
    with pytest.raises(InputError, match="do not fit the stages"):
        ssmcompress.load(tmp_path / "m")


def test_a_trained_model_comes_closer_with_them():
    dense = ssmcompress.load(BUNDLED)
    images = open_images(BUNDLED / "images.parquet", 10)
    fitted, unseen = (Batches(images, dense.transform(), range(*ends)) for ends in ((0, 160), (160, 240)))
    plan = ssmcompress.calibrate(dense, fitted, stages=(2,), ratio=0.7, importance="saliency")
    rebuilt = ssmcompress.reconstruct(ssmcompress.prune(dense, plan), dense, fitted)
    assert rebuilt.class_corrections
    fits = [fit for fit in rebuilt.find_record("reconstruction").fits if fit.weight.endswith("class_correction")]
    assert [fit.weight for fit in fits] == [f"layers.{i}.class_correction" for i in (2, 3, 4, 5)]
    assert all(fit.after <= fit.before for fit in fits)
    with_them, without = (ssmcompress.evaluate(m, unseen, dense=dense).kl for m in (rebuilt, plain(rebuilt)))
    assert with_them < 0.95 * without
