"""Weights of a compressed model for the code that its checkpoint was published with."""

import pytest
import timm
import torch
from conftest import GOLDEN, images_of, make_plain_mamba, make_vim, make_vit

import ssmcompress
from ssmcompress import progress
from ssmcompress.errors import InputError
from ssmcompress.models.dense_weights import dense_state_dict
from ssmcompress.models.state_dict import find_state_dict

FILES = {"vim": "vim.pth", "plain_mamba": "plain_mamba_l3.pth", "vit": "deit.pth"}


@pytest.fixture(scope="module")
def parts():
    """A Vim, as it is pruned, and as it is reconstructed."""
    dense = make_vim(depth=3)
    pruned = ssmcompress.prune(dense, ratio=0.4, stages=[1])
    return dense, pruned, ssmcompress.reconstruct(pruned, dense, images_of(dense, 30, seed=3))


@pytest.mark.parametrize("architecture", FILES)
def test_golden_weights_go_there_and_back(architecture):
    heads = {"num_heads": 3} if architecture == "vit" else {}
    model = ssmcompress.load(GOLDEN / FILES[architecture], **heads)
    state = dense_state_dict(model)
    published, _ = find_state_dict(torch.load(GOLDEN / FILES[architecture], weights_only=False))
    assert {k: v.shape for k, v in state.items()} == {k: published[k].shape for k in state}
    again = ssmcompress.load(state, architecture=architecture, image_size=model.config.image_size, **heads)
    torch.testing.assert_close(again(images_of(model)), model(images_of(model)), rtol=0, atol=0)


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_a_model_with_fewer_states_and_channels_in_all_layers_is_dense(make):
    dense = make(depth=3)
    images = images_of(dense, 30, seed=3)
    model = ssmcompress.trim_channels(ssmcompress.trim_states(dense, 2, images), 24, images)
    with progress.hold_notes() as notes:
        state = dense_state_dict(model)
    assert any("d_inner=24 (was 32), d_state=2 (was 4)" in note for note in notes)
    again = ssmcompress.load(state, architecture=model.architecture, image_size=model.config.image_size)
    assert again.plan is None
    assert again.config == model.config
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@torch.no_grad()
def test_timm_loads_a_distilled_deit_with_both_its_classifiers():
    model = make_vit(distillation_token=True, d_model=192, heads=3, depth=12, patch=16, image=(32, 32))
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10, mlp_ratio=2.0)
    theirs.load_state_dict(dense_state_dict(model))
    images = images_of(model)
    expected = model(images)
    torch.testing.assert_close(theirs.eval()(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_tensors_are_copies(parts):
    state = dense_state_dict(parts[0])
    assert not state["head.weight"].requires_grad
    state["head.weight"].zero_()
    assert parts[0].head.weight.any()


@pytest.mark.parametrize("index", [1, 2], ids=["pruned", "reconstructed"])
def test_dropping_and_corrections_are_not_in_weights(parts, index):
    model = parts[index]
    with pytest.raises(InputError, match=r"tokens are dropped after layers 1, .*strict=False returns its weights"):
        dense_state_dict(model)
    with progress.hold_notes() as notes:
        state = dense_state_dict(model, strict=False)
    assert any("tokens are dropped after layers 1" in note for note in notes)
    assert state.keys() == parts[0].state_dict().keys()
    torch.testing.assert_close(state["layers.2.mixer.out_proj.weight"], model.layers[2].mixer.out_proj.weight.detach())
    assert ssmcompress.load(state, architecture="vim").config == parts[0].config


def test_corrections_alone_are_refused(parts):
    model = ssmcompress.reconstruct(
        ssmcompress.trim_channels(parts[0], 20, images_of(parts[0], 30)), parts[0], images_of(parts[0], 30)
    )
    dense_state_dict(model)
    model.corrections["2"] = torch.nn.Linear(16, 16, bias=False)
    with pytest.raises(InputError, match="corrections of 256 parameters"):
        dense_state_dict(model)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dense, images: ssmcompress.drop_directions(dense, {2: [1]}), "layers 2 have lost scan directions"),
        (lambda dense, images: ssmcompress.trim_states(dense, [4, 2, 3], images), r"differ in states \(4, 2, 3\)"),
        (lambda dense, images: ssmcompress.trim_channels(dense, [32, 20, 32], images), r"channels \(32, 20, 32\)"),
    ],
)
def test_layers_that_published_code_cannot_have_are_refused(parts, change, message, strict):
    model = change(parts[0], images_of(parts[0], 30))
    with pytest.raises(InputError, match=message):
        dense_state_dict(model, strict=strict)


def test_a_model_without_classes_is_refused():
    model = make_vim(depth=2)
    model.reset_classifier(0)
    with pytest.raises(InputError, match="no classifier"):
        dense_state_dict(model)
