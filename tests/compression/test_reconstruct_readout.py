"""Corrections of the logits in models with mean pooling: their computation, saving, and removal."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import check_damage_is_refused, make_plain_mamba
from onnx_runs import run_file
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.compression.reconstruct import RefitOptions
from ssmcompress.evaluation.flops import corrections_share, flops, flops_by_part
from ssmcompress.jobs.report import describe_reconstruction
from ssmcompress.models.blocks import low_rank
from ssmcompress.models.class_corrections import max_readout_rank

WIDTH, CLASSES, SEGMENTS = 16, 10, 5  # 16 patches, at least three in a segment


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def corrected():
    """A pruned PlainMamba with a random correction, and images for it."""
    model = make_plain_mamba()
    model = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.4, stages=(1, 2)))
    assert (model.segments, model.d_model, model.config.num_classes) == (SEGMENTS, WIDTH, CLASSES)
    model.readout_correction = low_rank(SEGMENTS * (WIDTH + 1), 3, CLASSES)
    for i, linear in enumerate(model.readout_correction):
        linear.weight.data.copy_(draw(*linear.weight.shape, seed=i) / 10)
    return model.requires_grad_(False), draw(3, *model.image_shape)


def striped(count, seed):
    """Images (count, 3, 64, 64) of four stripes, each of a random colour with a little noise."""
    colours = draw(count, 3, 4, 1, seed=seed).repeat_interleave(16, dim=2).expand(-1, -1, -1, 64)
    return colours + 0.1 * draw(count, 3, 64, 64, seed=seed + 1)


def plain(model):
    """A copy without the correction."""
    model = copy.deepcopy(model)
    model.readout_correction = None
    return model


def test_it_is_a_map_of_all_tokens_in_segments(corrected):
    """The model's computation written out for each image, with the last features of dropped tokens."""
    model, images = corrected
    bare, tokens = plain(model), model.embed(images)
    last_seen = [{} for _ in images]
    for layer in range(1, len(model.blocks) + 1):
        before = tokens.explicit_positions()
        features = bare.blocks[layer - 1](tokens).features
        for b, seen in enumerate(last_seen):
            seen.update(zip(before[b].tolist(), features[b], strict=True))
        tokens, _ = model.step(layer, tokens)
    expected = bare.readout(tokens)
    for b, seen in enumerate(last_seen):
        rows, kept = torch.zeros(SEGMENTS, WIDTH), torch.zeros(SEGMENTS)
        for position, x in seen.items():
            rows[position * SEGMENTS // model.length] += x / x.square().mean().sqrt()
        for position in tokens.explicit_positions()[b].tolist():
            kept[position * SEGMENTS // model.length] += 1
        inwards, outwards = (linear.weight for linear in model.readout_correction)
        expected[b] += outwards @ (inwards @ torch.cat([rows.flatten(), kept]))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert (model(images) - bare(images)).abs().max() > 0.1
    torch.testing.assert_close(model(images[1:2]), model(images)[1:2], rtol=1e-4, atol=1e-4)


def test_narrow_models_and_autocast_compute_it_too(corrected):
    model, images = corrected
    correction = model(images) - plain(model)(images)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        narrow, bare = copy.deepcopy(model).to(kind), plain(model).to(kind)
        found = narrow(images.to(kind)) - bare(images.to(kind))
        assert found.dtype == kind
        # In bfloat16 some of the kept tokens differ.
        assert torch.nn.functional.cosine_similarity(found.flatten().float(), correction.flatten(), dim=0) > 0.95
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images) - plain(model)(images)
    assert torch.nn.functional.cosine_similarity(found.flatten().float(), correction.flatten(), dim=0) > 0.95


def test_gradients_reach_it(corrected):
    model = copy.deepcopy(corrected[0]).requires_grad_(True)
    model(corrected[1]).square().sum().backward()
    assert all(linear.weight.grad.abs().max() > 0 for linear in model.readout_correction)


def test_files_keep_it(corrected, tmp_path):
    model, images = corrected
    folder = ssmcompress.save(copy.deepcopy(model), tmp_path / "m")
    assert torch.equal(ssmcompress.load(folder).requires_grad_(False)(images), model(images))
    state = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in state.items() if not k.startswith("readout_correction.")}
    assert len(kept) == len(state) - 2
    save_file(kept, folder / "model.safetensors")  # a folder of an earlier version
    assert torch.equal(ssmcompress.load(folder).requires_grad_(False)(images), plain(model)(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("readout_correction.1.weight"), "expected matrices"),
        (lambda s: s.update({"readout_correction.0.weight": torch.zeros(3, 16)}), r"\(rank, 85\) and \(10, rank\)"),
        (lambda s: s.update({"readout_correction.2.weight": torch.zeros(3, 85)}), "do not fit the stages"),
        (lambda s: s["readout_correction.0.weight"].fill_(torch.nan), "not finite"),
    ],
)
def test_damaged_files_are_refused(corrected, tmp_path, change, message):
    check_damage_is_refused(copy.deepcopy(corrected[0]), tmp_path / "m", change, message)


@pytest.fixture(scope="module")
def rebuilt():
    """A dense model, a pruned model, and its reconstructions without and with a correction."""
    dense = make_plain_mamba(depth=2)
    images = striped(400, seed=3)
    pruned = ssmcompress.prune(dense, ssmcompress.make_plan(dense, ratio=0.6, stages=(1,)))
    without = ssmcompress.reconstruct(pruned, dense, images, options=RefitOptions(class_corrections=False))
    return dense, pruned, without, ssmcompress.reconstruct(pruned, dense, images)


def test_reconstruction_fits_it_where_it_helps_on_images_held_out(rebuilt):
    dense, pruned, without, found = rebuilt
    assert pruned.readout_correction is None
    assert without.readout_correction is None
    assert found.readout_correction is not None
    unseen = striped(100, seed=5)
    kl = [ssmcompress.evaluate(m, [(unseen, torch.zeros(100, dtype=torch.long))], dense=dense).kl
          for m in (without, found)]  # fmt: skip
    assert kl[1] < 0.95 * kl[0]
    record = found.find_record("reconstruction")
    assert record.fits[-1].weight == "head.fc"
    assert len(record.fits[-1].ridges) == 2
    assert record.kl_after < without.find_record("reconstruction").kl_after


def test_a_second_reconstruction_goes_on_from_it(rebuilt):
    dense, _, _, found = rebuilt
    again = ssmcompress.reconstruct(found, dense, striped(400, seed=3))
    before, after = (m.find_record("reconstruction") for m in (found, again))
    assert after.kl_before == pytest.approx(before.kl_after, rel=1e-4)
    assert again.readout_correction is not None


def test_it_is_counted(rebuilt):
    dense, pruned, _, found = rebuilt
    added = sum(2 * WIDTH * correction[0].out_features for correction in found.corrections.values())
    added += (SEGMENTS * (WIDTH + 1) + CLASSES) * found.readout_correction[0].out_features
    counts = found.token_counts()
    added += WIDTH * (counts[-1] + counts[0] + counts[1])  # the sums: at the end, and before and after the stage
    assert flops_by_part(found)["corrections"] == pytest.approx(added / 1e9)
    assert 0 < added <= corrections_share(pruned, (1,)) * flops(dense)["full"] * 1e9


def test_a_model_that_drops_nothing_gets_none(rebuilt):
    dense = rebuilt[0]
    trimmed = ssmcompress.trim_states(dense, 2, striped(64, seed=3))
    found = ssmcompress.reconstruct(trimmed, dense, striped(64, seed=3))
    assert found.readout_correction is None


def test_the_report_tells_its_rank(rebuilt):
    found, without = (describe_reconstruction(rebuilt[i], 0.0) for i in (3, 2))
    assert found["readout_correction_rank"] == rebuilt[3].readout_correction[0].out_features
    assert without["readout_correction_rank"] is None
    assert json.loads(json.dumps(found))["readout_correction_rank"] >= 1


def test_onnx_computes_it_for_any_batch(rebuilt, tmp_path):
    model = copy.deepcopy(rebuilt[3]).requires_grad_(False)
    assert model.corrections
    assert model.readout_correction is not None
    assert ssmcompress.export_onnx(model, tmp_path / "m.onnx").passed
    for batch in (1, 3):
        x = striped(batch, seed=7)
        np.testing.assert_allclose(run_file(tmp_path / "m.onnx", x), model(x).numpy(), atol=1e-4)


def test_its_rank_is_bounded_for_many_classes():
    assert max_readout_rank(10, 910) == 9  # two factors of that rank have as many values as the matrix
    assert max_readout_rank(1000, 2702) == 64


@pytest.mark.parametrize("size", [(32, 32), (96, 64)])
def test_it_is_taken_along_to_other_image_sizes(rebuilt, tmp_path, size):
    """The number of segments does not change, although it would be lower for 4 tokens and higher for 24."""
    folder = ssmcompress.save(copy.deepcopy(rebuilt[3]), tmp_path / "m")
    model = ssmcompress.load(folder, image_size=size)
    assert model.segments == SEGMENTS
    assert model(draw(2, 3, *size)).isfinite().all()
