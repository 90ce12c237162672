"""Vim against golden logits of the authors' code, and its blocks against dense ones."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, images_of, make_vim
from zeroed_blocks import run_zeroed

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.models.vim import VisionMamba
from ssmcompress.models.vim_block import FORTH_AND_BACK
from ssmcompress.models.vim_classifier import resize_pos_embed
from ssmcompress.ops import causal_conv1d, selective_scan
from ssmcompress.pruning.tokens import Tokens


@pytest.mark.parametrize(("name", "stride"), [("vim", None), ("vim_stride", 4)])
def test_golden_logits(name, stride):
    model = ssmcompress.load(GOLDEN / f"{name}.pth", stride=stride)
    golden = np.load(GOLDEN / f"{name}.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["images"])).numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"depth": 1, "d_model": 8, "classes": 3},
        {"channels": 1, "image": (28, 28), "patch": 2},
        {"image": (20, 20), "stride": 2},
        {"patch": 5, "image": (15, 15), "d_model": 40},
    ],
    ids=str,
)
def test_every_size_is_recognised_from_the_weights(sizes):
    made = make_vim(**sizes)
    found = ssmcompress.load(made.state_dict(), architecture="vim", stride=sizes.get("stride"))
    assert found.config == made.config
    x = torch.randn(2, made.config.in_chans, *made.config.image_size)
    with torch.no_grad():
        assert torch.equal(found(x), made(x))


def test_a_live_module_brings_its_stride():
    made = make_vim(image=(20, 20), stride=2)
    assert ssmcompress.load(made).config == made.config


def test_a_stride_that_leaves_pixels_unread_is_refused():
    state = make_vim(patch=2, image=(8, 8)).state_dict()
    with pytest.raises(InputError, match="`stride` 8: expected at most 2, the patch size"):
        ssmcompress.load(state, architecture="vim", stride=8)


def test_other_image_sizes_keep_the_class_token_entry_and_the_layout_of_the_grid():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 4), torch.linspace(0, 1, 4), indexing="ij")
    table = torch.stack([rows, columns], -1).view(1, 16, 2)
    table = torch.cat([table[:, :8], torch.full((1, 1, 2), 7.0), table[:, 8:]], 1)
    assert torch.equal(resize_pos_embed(table, (4, 4), (4, 4), VisionMamba.place_class_token), table)
    resized = resize_pos_embed(table, (4, 4), (6, 5), VisionMamba.place_class_token)
    assert resized.shape == (1, 31, 2)
    assert resized[0, 15].tolist() == [7.0, 7.0]
    patches = torch.cat([resized[:, :15], resized[:, 16:]], 1).view(6, 5, 2)
    assert (patches < 1.2).all()
    assert (patches[1:, :, 0] > patches[:-1, :, 0]).all()
    assert (patches[:, 1:, 1] > patches[:, :-1, 1]).all()


def test_other_image_sizes_run(vim):
    model = ssmcompress.load(vim.state_dict(), architecture="vim", image_size=(24, 20))
    assert model.config.grid == (6, 5)
    assert model.length == 31
    with torch.no_grad():
        assert model(torch.randn(2, 3, 24, 20)).shape == (2, 10)
        with pytest.raises(InputError, match="another image_size"):
            model(torch.randn(2, 3, 16, 16))


def test_a_grid_that_is_not_square_must_be_told():
    state = make_vim(image=(8, 24)).state_dict()
    with pytest.raises(InputError, match="no square grid"):
        ssmcompress.load(state)
    assert ssmcompress.load(state, architecture="vim", image_size=(8, 24)).config.grid == (2, 6)


def test_forward_prints_nothing_and_goes_on(vim, images, capfd):
    """The published pruning code prints and exits in its forward."""
    plan = ssmcompress.make_plan(vim)
    with torch.no_grad():
        ssmcompress.prune(vim, plan)(images)
    assert capfd.readouterr() == ("", "")


def spread_tokens(model, mask, seed=0):
    """(features of all positions, Tokens of the kept ones)."""
    everything = torch.randn(2, len(mask), model.config.d_model, generator=torch.Generator().manual_seed(seed))
    positions = mask.nonzero()[:, 0].expand(2, -1)
    return everything, Tokens(everything[:, mask], len(mask), 8, positions, orders=FORTH_AND_BACK)


def test_an_aligned_block_equals_a_dense_one_with_zeros_at_pruned_positions(vim):
    block, E = vim.blocks[0], vim.config.d_inner
    gap_delta = torch.rand(2, E, generator=torch.Generator().manual_seed(3))
    block.set_gap_delta(gap_delta)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    everything, tokens = spread_tokens(vim, mask)
    expected = (everything + run_zeroed(block, everything, mask, gap_delta) / 2)[:, mask]
    torch.testing.assert_close(block(tokens).features, expected, atol=1e-5, rtol=0)


def test_scores_are_the_backward_paths_gated_output_in_token_order(vim, images):
    """The published pruning code keeps scores in scan order, mirrored against its tokens, and unclipped."""
    tokens, block = vim.embed(images), vim.blocks[0]
    mixer = block.mixer
    x, z = mixer.in_proj(block.norm(tokens.features)).chunk(2, -1)
    u = causal_conv1d(x.flip(1), mixer.conv1d_b.weight, mixer.conv1d_b.bias)
    dt, B, C = mixer.x_proj_b(u).split(mixer.split, -1)
    y = selective_scan(u, mixer.dt_proj_b(dt), -mixer.A_b_log.exp(), B, C, mixer.D_b, z.flip(1), delta_softplus=True)
    y = y.flip(1)

    def scored(metric):
        return block(tokens, metric=metric).scores

    torch.testing.assert_close(scored("clip"), y.clamp(min=0).mean(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(scored("mean"), y.mean(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(scored("l1"), y.abs().mean(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(scored("l2"), y.pow(2).mean(-1).sqrt(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scored("delta"), block.deltas(tokens).mean((0, -1)), atol=1e-6, rtol=0)
    assert (scored("clip") > scored("mean")).all()


@pytest.mark.parametrize(("channels", "patch"), [(1, 4), (3, 8), (4, 16), (8, 8), (12, 8), (16, 4)])
def test_patches_under_autocast_are_those_without(channels, patch):
    """torch's bfloat16 convolution of 4 to 24 channels is wrong on processors with AMX."""
    model = make_vim(depth=1, channels=channels, image=(2 * patch, 2 * patch), patch=patch)
    images = images_of(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.embed(images).features
    expected = model.embed(images).features
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
