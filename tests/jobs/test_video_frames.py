"""Pictures of videos: their frames in rows, with the patches that are kept, and maps, in the same places."""

import io

import numpy as np
import pytest
import torch
from conftest import images_of, make_video_mamba
from PIL import Image

import ssmcompress
from ssmcompress.evaluation.attention_maps import choose_layers
from ssmcompress.jobs.frames import count_columns, find_grid, tile_frames, to_picture
from ssmcompress.jobs.pictures import FRAMES_SIDE, draw_kept_tokens, show_pixels, title_columns
from ssmcompress.jobs.survey import MapOptions, attend_all
from ssmcompress.pruning.plan import Plan, Stage


@pytest.mark.parametrize(("times", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (8, 4), (12, 4), (16, 4), (64, 8)])
def test_frames_in_a_row(times, columns):
    assert count_columns(times) == columns


def test_frames_lie_from_left_to_right_and_from_top_to_bottom():
    frames = torch.arange(6)[:, None, None] * 100 + torch.arange(6).view(2, 3)
    tiled = tile_frames(frames.reshape(12, 3), 6)
    assert tiled.shape == (4, 9)
    for frame in range(6):
        top, left = 2 * (frame // 3), 3 * (frame % 3)
        assert torch.equal(tiled[top : top + 2, left : left + 3], frames[frame])
    assert torch.equal(tile_frames(frames[0], 1), frames[0])


def test_a_picture_has_the_first_frame_of_each_patch_where_the_patch_is():
    model = make_video_mamba(frames=8, tubelet=2, image=(8, 12))
    video = torch.zeros(3, 8, 8, 12)
    video += torch.arange(8).view(1, 8, 1, 1)
    picture = to_picture(model, video)
    assert picture.shape == (3, 16, 24)
    assert find_grid(model) == (4, 6)
    assert [int(picture[0, 8 * (n // 2), 12 * (n % 2)]) for n in range(4)] == [0, 2, 4, 6]
    positions = tile_frames(model.patch_positions, 4)
    assert [int(positions[2 * (n // 2), 3 * (n % 2)]) for n in range(4)] == [1, 7, 13, 19]


def test_the_picture_of_kept_tokens(video_mamba):
    pruned = ssmcompress.prune(video_mamba, Plan((Stage(1, 0.5),)))
    videos = images_of(pruned, 2)
    sheet = np.asarray(Image.open(io.BytesIO(draw_kept_tokens(pruned, videos))).convert("RGB"))
    assert title_columns(pruned) == ["4 frames", "after layer 1:\n9 of 17 kept"]
    gap = sheet.shape[1] - 2 * FRAMES_SIDE
    shown, dimmed = sheet[-FRAMES_SIDE:, :FRAMES_SIDE], sheet[-FRAMES_SIDE:, FRAMES_SIDE + gap :]
    side = FRAMES_SIDE // 4  # pixels of a patch: two frames of two patches in a row
    same = [[(shown[r : r + side, c : c + side] == dimmed[r : r + side, c : c + side]).all()
             for c in range(0, FRAMES_SIDE, side)] for r in range(0, FRAMES_SIDE, side)]  # fmt: skip
    kept = pruned.trace(videos)[1][0].kept[1]
    assert same == torch.isin(tile_frames(pruned.patch_positions, 4), kept).tolist()
    assert sum(map(sum, same)) == 8


def test_maps_of_videos_lie_as_the_frames_do(video_mamba):
    pruned = ssmcompress.prune(video_mamba, Plan((Stage(1, 0.5),)))
    videos = images_of(pruned, 3)
    options = MapOptions(choose_layers(4, None), "row")
    found = attend_all({"pruned": pruned}, videos, options)["pruned"]
    assert found.maps.shape == found.kept.shape == (3, 4, 4)
    assert show_pixels(pruned, videos[0]).size == (16, 16)
    for image in range(3):
        assert torch.equal(found.kept[image], torch.isin(found.places[0], found.decisions[0].kept[image]))
        assert (found.maps[image][~found.kept[image]] == 0).all()
        assert found.maps[image][found.kept[image]].abs().min() > 0


def test_maps_are_of_the_class_token_in_front(video_mamba):
    """Its row is zero for a patch whose value the scans cannot read."""
    model, videos, options = video_mamba, images_of(video_mamba, 1), MapOptions((4,), "row")
    maps = attend_all({"dense": model}, videos, options)["dense"].maps
    with torch.no_grad():
        for name in ("D_b", "D"):
            getattr(model.layers[3].mixer, name).zero_()
        model.layers[3].mixer.x_proj_b.weight.zero_()  # no B and C on the backward path, which alone reads patches
    gone = attend_all({"dense": model}, videos, options)["dense"].maps
    assert maps.abs().min() > 0 == gone.abs().max()
