"""Pruning, trimming, refitting, search and comparison of VideoMambas for images and for videos."""

import pytest
import torch
from conftest import images_of, make_video_mamba

import ssmcompress
from ssmcompress.compression.smaller_image import choose_image_size, shrink_image
from ssmcompress.models.inputs import to_batches
from ssmcompress.models.video_mamba import VideoMamba

KINDS = {"images": {}, "videos": {"frames": 4, "image": (8, 8)}}


@pytest.fixture(params=KINDS)
def model(request):
    return make_video_mamba(**KINDS[request.param])


@pytest.fixture
def inputs(model):
    return images_of(model, 24)


def error(model, dense, inputs):
    with torch.no_grad():
        return float((model(inputs) - dense(inputs)).square().mean())


def test_alignment_and_reconstruction_come_closer_to_the_dense_model(model, inputs):
    naive, aligned = (
        ssmcompress.prune(model, ssmcompress.calibrate(model, inputs, ratio=0.4, alignment=on)) for on in (False, True)
    )
    refitted = ssmcompress.reconstruct(aligned, model, inputs)
    errors = [error(made, model, inputs) for made in (naive, aligned, refitted)]
    assert errors[0] > errors[1] > errors[2] > 0
    found = ssmcompress.evaluate(refitted, inputs, dense=model)
    assert (found.images, found.agreement > 0) == (24, True)


@pytest.mark.parametrize("importance", ["clip", "l1", "l2", "clip-paths", "saliency", "random"])
def test_every_importance_ranks_tokens(model, inputs, importance):
    plan = ssmcompress.calibrate(model, inputs, ratio=0.4, importance=importance)
    _, decisions = ssmcompress.prune(model, plan).trace(inputs)
    assert all((decision.kept[:, 0] == 0).all() for decision in decisions)


def test_states_channels_layers_and_directions_are_trimmed_and_saved(model, inputs, tmp_path):
    smaller = ssmcompress.drop_directions(ssmcompress.drop_layers(model, [3]), {2: [0], 3: [1]})
    uncut = smaller = ssmcompress.trim_states(smaller, 2, inputs)
    smaller = ssmcompress.trim_channels(smaller, 24, inputs)
    smaller = ssmcompress.prune(smaller, ssmcompress.calibrate(smaller, inputs, ratio=0.3))
    smaller = ssmcompress.reconstruct(smaller, model, inputs, reference=uncut)
    loaded = ssmcompress.load(ssmcompress.save(smaller, tmp_path / "smaller"))
    assert (type(loaded), loaded.frames, loaded.config) == (VideoMamba, model.frames, smaller.config)
    assert loaded.config.layers[1] == (24, 2, (1,))
    assert ssmcompress.flops(loaded)["full"] < ssmcompress.flops(model)["full"] / 2
    with torch.no_grad():
        assert torch.equal(loaded(inputs), smaller(inputs))
    # In the last layer only the forward scan is left, which has seen nothing when it reads the token in front.
    with torch.no_grad():
        expected = smaller.readout(smaller.encode(inputs)[0])
        torch.testing.assert_close(smaller(inputs), expected, rtol=0, atol=1e-5)


def test_a_budget_is_met(model, inputs):
    small = ssmcompress.fit_budget(model, inputs, flops=0.6)
    assert ssmcompress.flops(small)["full"] <= 0.6 * ssmcompress.flops(model)["full"]
    plan = ssmcompress.search(model, inputs, flops=0.8)
    assert plan.stages


def test_methods_are_compared_by_python(model, inputs):
    rows = ssmcompress.compare(model, inputs, ratios=[0.3], methods=["naive", "clip, aligned"])["rows"]
    assert [row["method"] for row in rows] == ["dense", "naive", "clip, aligned"]


def test_smaller_frames_leave_their_number(model, inputs):
    size = choose_image_size(model, 0.5)
    assert size[0] < model.config.image_size[0]
    small = shrink_image(model, size, to_batches(model, inputs))
    assert small.frames == model.frames
    assert small.config.image_size == size
    assert ssmcompress.flops(small)["full"] <= 0.5 * ssmcompress.flops(model)["full"]


def test_features_on_the_grid_of_all_frames(model, inputs):
    pruned = ssmcompress.prune(model, ratio=0.3)
    features = pruned.forward_features(inputs)
    with torch.no_grad():
        torch.testing.assert_close(pruned.forward_head(features), pruned(inputs), rtol=0, atol=1e-5)
        (grid,) = model.forward_intermediates(inputs, indices=1, intermediates_only=True)
        rows, columns = model.config.grid
        assert grid.shape == (24, 16, rows, columns)
        tokens = model.encode(inputs)[0].features
        assert torch.equal(grid.flatten(2).mT, tokens[:, 1:])
    assert model.pretrained_cfg["input_size"] == model.input_shape
