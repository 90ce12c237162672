"""VideoMamba for images and videos against golden logits of the authors' code, and published sizes."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, images_of, make_video_mamba, make_vim
from zeroed_blocks import run_zeroed

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops
from ssmcompress.models.video_mamba import VideoMamba, VideoMambaConfig
from ssmcompress.models.vim_block import FORTH_AND_BACK
from ssmcompress.models.vim_classifier import resize_pos_embed
from ssmcompress.pruning.tokens import Tokens

SIZES = {"images": {}, "videos": {"frames": 4, "image": (8, 8)}, "tubelets": {"frames": 6, "tubelet": 2}}


@pytest.fixture(params=SIZES)
def model(request):
    return make_video_mamba(**SIZES[request.param])


@pytest.mark.parametrize(("name", "options"), [("image", {"architecture": "video_mamba"}), ("video", {})])
def test_golden_logits(name, options):
    model = ssmcompress.load(GOLDEN / f"videomamba_{name}.pth", **options)
    golden = np.load(GOLDEN / f"videomamba_{name}.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["images"])).numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)


def test_a_golden_file_of_images_that_says_nothing_is_asked_about_and_is_no_vim():
    file, golden = GOLDEN / "videomamba_image.pth", np.load(GOLDEN / "videomamba_image.npz")
    state = torch.load(file, weights_only=True)
    with pytest.raises(InputError, match="a Vim or of a VideoMamba.*give `architecture`: 'vim' or 'video_mamba'"):
        ssmcompress.load(state)
    with torch.no_grad():
        logits = ssmcompress.load(state, architecture="vim")(torch.from_numpy(golden["images"])).numpy()
    assert np.abs(logits - golden["logits"]).max() > 1


@pytest.mark.parametrize("name", ["video-mamba", "videomamba", "VideoMamba", "video_mamba"])
def test_spellings_of_its_name(name):
    assert ssmcompress.load(make_video_mamba().state_dict(), architecture=name).architecture == "video_mamba"


@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES.values(),
        {"image": (20, 20), "stride": 2},
        {"frames": 3, "channels": 1, "image": (12, 12), "depth": 1},
    ],
    ids=str,
)
def test_every_size_is_recognised_from_the_weights(sizes):
    made = make_video_mamba(**sizes)
    found = ssmcompress.load(made.state_dict(), architecture="video_mamba", stride=sizes.get("stride"))
    assert found.config == made.config
    x = images_of(made)
    with torch.no_grad():
        assert torch.equal(found(x), made(x))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.backbone."])
@pytest.mark.parametrize("entry", [None, "model", "module", "state_dict"])
def test_weights_of_videos_are_recognised_wherever_a_file_has_them(video_mamba, prefix, entry):
    state = {f"{prefix}{key}": value for key, value in video_mamba.state_dict().items()}
    loaded = ssmcompress.load(state if entry is None else {entry: state, "epoch": 3})
    assert (loaded.architecture, loaded.frames, loaded.config) == ("video_mamba", 4, video_mamba.config)


def test_a_video_model_that_is_said_to_be_a_vim_is_refused_by_name(video_mamba, tmp_path):
    state = video_mamba.state_dict()
    torch.save(state, tmp_path / "vim_tiny.pth")
    with pytest.raises(InputError, match="the weights are a video_mamba's: rename it, or give `architecture`"):
        ssmcompress.load(tmp_path / "vim_tiny.pth")
    assert ssmcompress.load(tmp_path / "vim_tiny.pth", architecture="video_mamba").frames == 4
    with pytest.raises(InputError, match="`architecture` says vim, but the weights are a video_mamba's"):
        ssmcompress.load(state, architecture="vim")
    with pytest.raises(InputError, match="args.model 'vim_tiny' says vim, but the weights are a video_mamba's"):
        ssmcompress.load({"model": state, "args": argparse.Namespace(model="vim_tiny")})


@pytest.mark.parametrize(("said", "file"), [("vim_tiny", "videomamba_t16"), ("videomamba_tiny", "vim_t")])
def test_a_file_name_that_contradicts_the_arguments_is_noted(tmp_path, recwarn, said, file):
    """The arguments count, as they are written with the weights."""
    architecture = "vim" if said == "vim_tiny" else "video_mamba"
    content = {"model": make_video_mamba().state_dict(), "args": argparse.Namespace(model=said)}
    for name, noted in ((file, True), (said, False), ("x", False)):
        torch.save(content, tmp_path / f"{name}.pth")
        recwarn.clear()
        assert ssmcompress.load(tmp_path / f"{name}.pth").architecture == architecture
        notes = [str(warning.message) for warning in recwarn.list]
        assert (
            notes
            == [
                f"the name of the file says {'video_mamba' if architecture == 'vim' else 'vim'}, "
                f"but args.model '{said}' says {architecture}, which takes precedence"
            ]
            * noted
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("temporal_pos_embedding"), "'temporal_pos_embedding' is missing"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4)}), "expected 5 dimensions"),
        (lambda s: s.update({"temporal_pos_embedding": torch.zeros(1, 4, 8)}), "contradicting shapes: temporal"),
        (lambda s: s.update({"clip_decoder.0.weight": torch.zeros(2)}), "VideoMamba, masked pretraining"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 12, 16)}), "a VideoMamba with 12 class tokens"),
    ],
)
def test_weights_of_videos_that_are_not_whole_or_of_another_kind(video_mamba, change, message):
    state = video_mamba.state_dict()
    change(state)
    with pytest.raises(InputError, match=message):
        ssmcompress.load({"model": state, "args": argparse.Namespace(model="videomamba_tiny")})


def test_frames_and_places_make_the_embedding_of_a_token(video_mamba):
    """The class token in front has a place and no time; then frame after frame, each in raster order."""
    places, times = video_mamba.pos_embed.detach(), video_mamba.temporal_pos_embedding.detach()
    table = video_mamba.place_embedding()
    assert torch.equal(table[0, 0], places[0, 0])
    for frame in range(4):
        for patch in range(4):
            assert torch.equal(table[0, 1 + 4 * frame + patch], places[0, 1 + patch] + times[0, frame])
    video = images_of(video_mamba, 1)
    whole = video_mamba.embed(video).features
    changed = video.clone()
    changed[:, :, 2, :4, 4:] += 1  # the second patch of the third frame
    moved = (video_mamba.embed(changed).features - whole).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 + 4 * 2 + 1] == [int(video_mamba.patch_positions[2 * 2, 1])]


def test_a_saved_folder_loads_again(model, tmp_path):
    images = images_of(model)
    with torch.no_grad():
        for made in (model, ssmcompress.prune(model, ratio=0.3)):
            folder = ssmcompress.save(made, tmp_path / str(len(made.pruners)))
            loaded = ssmcompress.load(folder)
            assert type(loaded) is VideoMamba
            assert loaded.config == model.config
            assert torch.equal(loaded(images), made(images))


def test_the_json_of_a_vim_has_no_fields_of_videos():
    assert not {"frames", "tubelet", "residual_scale"} & make_vim().config.to_dict().keys()


# ------------------------------------------------------------------------------------------- other sizes


def test_other_image_sizes_keep_the_entry_of_the_class_token(video_mamba):
    assert VideoMamba.place_class_token(4) == 0
    table = video_mamba.pos_embed.detach()
    resized = resize_pos_embed(table, (2, 2), (3, 5), VideoMamba.place_class_token)
    assert resized.shape == (1, 16, 16)
    assert torch.equal(resized[:, 0], table[:, 0])
    model = ssmcompress.load(video_mamba.state_dict(), image_size=(12, 20))
    assert (model.input_shape, model.config.grid, model.length) == ((3, 4, 12, 20), (12, 5), 61)
    assert torch.equal(model.pos_embed, resized)
    with torch.no_grad():
        assert model(images_of(model)).shape == (5, 10)


def test_other_numbers_of_frames_interpolate_the_embedding_of_times(video_mamba, tmp_path):
    model = ssmcompress.load(video_mamba.state_dict(), frames=8)
    assert (model.frames, model.length) == (8, 33)
    expected = F.interpolate(video_mamba.temporal_pos_embedding.mT, 8, mode="linear").mT
    assert torch.equal(model.temporal_pos_embedding, expected)
    same = ssmcompress.load(video_mamba.state_dict(), frames=4)
    assert torch.equal(same.temporal_pos_embedding, video_mamba.temporal_pos_embedding)
    folder = ssmcompress.save(ssmcompress.prune(video_mamba, ratio=0.5), tmp_path / "pruned")
    longer = ssmcompress.load(folder, frames=8)
    assert longer.token_counts()[0] == 33 > longer.token_counts()[-1]
    with torch.no_grad():
        assert longer(images_of(model)).shape == (5, 10)


@pytest.mark.parametrize(("frames", "message"), [(0, "a multiple of 2"), (5, "a multiple of 2"), (1 << 20, "at most")])
def test_frames_that_are_no_whole_patches(frames, message):
    with pytest.raises(InputError, match=f"`frames` {frames}: expected .*{message}"):
        ssmcompress.load(make_video_mamba(**SIZES["tubelets"]).state_dict(), frames=frames)


def test_frames_are_of_models_of_videos_alone(vim):
    with pytest.raises(InputError, match="`frames`: inputs of this vim are images"):
        ssmcompress.load(vim, frames=8)
    with pytest.raises(InputError, match="`frames`: inputs of this video_mamba are images"):
        ssmcompress.load(make_video_mamba(), frames=8)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 4, 8, 8), r"use images\[None\] for one video"),
        ((2, 3, 8, 8), "this model takes videos of 4 frames, not images"),
        ((2, 4, 3, 8, 8), r"use videos.transpose\(1, 2\)"),
        ((2, 4, 8, 8, 3), r"use images.permute\(0, 4, 1, 2, 3\)"),
        ((2, 3, 6, 8, 8), "another number of `frames`"),
        ((2, 3, 4, 16, 16), "another image_size"),
    ],
)
def test_videos_of_another_shape(video_mamba, shape, advice):
    with pytest.raises(InputError, match=rf"expected \(batch, 3, 4, 8, 8\); .*{advice}"):
        video_mamba(torch.zeros(shape))


def test_videos_for_a_model_of_images(vim):
    with pytest.raises(InputError, match=r"expected \(batch, 3, 16, 16\); this model takes images, not videos"):
        vim(torch.zeros(2, 3, 4, 16, 16))


# ------------------------------------------------------------------------------------- parameters and FLOPs

PUBLISHED = {"T": (192, 24), "S": (384, 24), "M": (576, 32), "B": (768, 24)}
PARAMETERS = {"T": 7_148_008, "S": 25_796_584, "M": 74_217_448, "B": 97_598_440}
GFLOPS = {("T", None): 1.82, ("S", None): 5.91, ("M", None): 16.33, ("B", None): 20.89,
          ("T", 8): 14.5, ("S", 8): 47.1, ("M", 8): 130.0, ("T", 64): 116, ("S", 64): 376, ("M", 64): 1040}  # fmt: skip


def published(size, frames=None):
    """A model of a published size, without values."""
    width, depth = PUBLISHED[size]
    config = VideoMambaConfig(
        d_model=width, depth=depth, d_inner=2 * width, d_state=16, dt_rank=-(-width // 16), d_conv=4, in_chans=3,
        num_classes=1000, patch_size=(16, 16), stride=16, image_size=(224, 224), frames=frames,
    )  # fmt: skip
    with torch.device("meta"):
        return VideoMamba(config)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_of_the_published_sizes(size):
    assert sum(p.numel() for p in published(size).parameters()) == PARAMETERS[size]


@pytest.mark.parametrize(("size", "frames"), GFLOPS, ids=lambda v: str(v))
def test_flops_of_the_published_sizes(size, frames):
    model = published(size, frames)
    assert model.length == 1 + 196 * (frames or 1)
    assert flops(model)["full"] == pytest.approx(GFLOPS[size, frames], rel=5e-3)


@pytest.mark.parametrize("directions", [(0, 1), (0,), (1,)])
def test_flops_of_the_last_layer_are_those_of_the_steps_that_it_takes(model, directions):
    """The forward scan takes one step to the class token in front, the backward scan all."""
    last = model.config.depth
    if len(directions) == 1:
        model = ssmcompress.drop_directions(model, {last: [1 - directions[0]]})
    tokens, steps, block = model.embed(images_of(model, 2)), [], model.blocks[-1]
    assert block.directions == directions
    for path in directions:
        part, _ = tokens.span_to_protected(FORTH_AND_BACK[path].reverse)
        steps.append(part.features.shape[1])
    assert steps == [{0: 1, 1: model.length}[path] for path in directions]
    c, n, paths = model.config, model.length, len(directions)
    E, N, R, D, K = block.d_inner, block.d_state, c.dt_rank, c.d_model, c.d_conv
    whole = 2 * n * (last - 1)  # steps of the other layers
    parts = model.flops_by_part(model.token_counts(), "full")
    assert parts["x_proj"] == (whole + sum(steps)) * E * (R + 2 * N)
    assert parts["dt_proj"] == (whole + sum(steps)) * R * E
    assert parts["in_proj"] == n * D * 2 * E * (last - 1) + (n + 1) * D * E
    assert parts["out_proj"] == n * E * D * (last - 1) + E * D
    others = 2 * (n + K - 1) * E * K * (last - 1)
    assert parts["conv"] == others + (sum(steps) + paths * (K - 1)) * E * K
    window = c.in_chans * c.tubelet * c.patch_size[0] ** 2
    assert parts["embedding"] == c.patches * D * window
    # Products that are timed by themselves are those that are counted.
    products = sum(rows * weight.numel() for rows, weight in model.matrix_products())
    names = ("embedding", "in_proj", "x_proj", "dt_proj", "out_proj", "head")
    assert products == sum(parts[name] for name in names)


# ------------------------------------------------------------------------------------------------ the method


@torch.no_grad()
def test_the_last_layer_gives_the_logits_of_the_full_one(model):
    for made in (model, ssmcompress.prune(model, ratio=0.4)):
        images = images_of(model)
        expected = made.readout(made.encode(images)[0])
        torch.testing.assert_close(made(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
def test_dropping_nothing_changes_no_bit(model):
    images = images_of(model)
    assert torch.equal(ssmcompress.prune(model, ratio=0.0)(images), model(images))


@torch.no_grad()
def test_the_class_token_in_front_is_never_dropped_and_any_frame_may_lose_patches(video_mamba):
    pruned = ssmcompress.prune(video_mamba, ratio=0.5, stages=(1,))
    _, (decision,) = pruned.trace(images_of(video_mamba, 16))
    assert (decision.kept[:, 0] == 0).all()
    frames = (decision.kept[:, 1:] - 1) // 4
    assert set(frames.flatten().tolist()) == {0, 1, 2, 3}
    assert len({tuple(row) for row in frames.tolist()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_an_aligned_block_equals_a_dense_one_with_zeros_at_pruned_positions(model, seed):
    """For positions over all frames; the sum of both scans is not divided."""
    generator = torch.Generator().manual_seed(seed)
    block = model.blocks[0]
    gap_delta = torch.rand(2, block.d_inner, generator=generator)
    block.set_gap_delta(gap_delta)
    mask = torch.rand(model.length, generator=generator) < 0.5
    mask[0] = True
    everything = torch.randn(2, model.length, model.d_model, generator=generator)
    positions = mask.nonzero()[:, 0].expand(2, -1)
    tokens = Tokens(everything[:, mask], model.length, 0, positions, orders=FORTH_AND_BACK)
    expected = (everything + run_zeroed(block, everything, mask, gap_delta))[:, mask]
    torch.testing.assert_close(block(tokens).features, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_is_scored_by_the_backward_scan(model):
    """The forward scan has seen nothing when it reads the class token in front."""
    tokens, block = model.embed(images_of(model)), model.blocks[0]
    before = block(tokens, metric="clip").scores
    for name in ("conv1d", "x_proj", "dt_proj"):
        getattr(block.mixer, name).weight.zero_()
    assert torch.equal(block(tokens, metric="clip").scores, before)
    block.mixer.conv1d_b.weight.zero_()
    assert not torch.equal(block(tokens, metric="clip").scores, before)
