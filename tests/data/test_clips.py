"""Which frames and crops of a video a model sees, and how they are prepared."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_folders import Recorder
from videos import make_frames

from ssmcompress.data import Batches, Images, Video
from ssmcompress.data.clips import VideoTransform, Views
from ssmcompress.data.frames import draw_frames, sample_frames
from ssmcompress.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, cut_crops
from ssmcompress.progress import use_front_end

PLAIN = Preprocessing((0.0,) * 3, (1.0,) * 3, 1.0, "bilinear", recorded=True)


def make_video(count, size=(8, 8)):
    frames = make_frames(count, size)
    return Video(count, lambda i: Image.fromarray(frames[i]))


def read_numbers(clip):
    """The frame numbers (...,) of a clip (..., channels, frames, height, width) of `make_video`."""
    return (clip[..., 0, :, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize(
    ("length", "frames", "numbers"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (200, 4, [25, 75, 125, 175]),
        (7, 2, [1, 5]),
        (2, 4, [0, 0, 1, 1]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_frames_are_the_centres_of_equal_parts(length, frames, numbers):
    assert sample_frames(length, frames) == numbers
    assert read_numbers(VideoTransform(PLAIN, (8, 8), frames)(make_video(length))) == numbers


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 10))
def test_frames_of_each_clip_lie_in_their_parts(length, frames, clips):
    """Ordered, one per part, and symmetric in time for mirrored offsets: no clip is biased to an end of the video."""
    for a, b in Views(clips).offsets():
        numbers = sample_frames(length, frames, (a, b))
        assert all(t * length <= (i + 1) * frames and i * frames < (t + 1) * length for t, i in enumerate(numbers))
        assert numbers == sorted(numbers)
        mirrored = [length - 1 - i for i in sample_frames(length, frames, (b - a, b))][::-1]
        assert all(abs(i - j) <= 1 for i, j in zip(numbers, mirrored, strict=True))


@given(st.integers(1, 400), st.integers(1, 64), st.integers(0, 99))
def test_drawn_frames_lie_in_their_parts(length, frames, seed):
    torch.manual_seed(seed)
    numbers = draw_frames(length, frames)
    assert all(t * length <= (i + 1) * frames and i * frames < (t + 1) * length for t, i in enumerate(numbers))


def test_a_frame_is_prepared_as_an_image():
    """With the same resizing, crop and normalisation, and stacked after the channels."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 30, 44, 3), dtype=np.uint8)
    values = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 0.8, "bicubic", recorded=True)
    clip = VideoTransform(values, (16, 20), 5)(Video(5, lambda i: Image.fromarray(frames[i])))
    expected = torch.stack([values.transform((16, 20))(Image.fromarray(frame)) for frame in frames], 1)
    assert clip.shape == (3, 5, 16, 20)
    assert torch.equal(clip, expected)


def test_frames_of_videos_are_not_cropped_on_the_shorter_side_by_default():
    assert Preprocessing.default(3, (224, 224), video=True).crop_pct == 1.0
    assert Preprocessing.default(3, (224, 224)).crop_pct == 0.875


def test_grey_models_get_one_channel():
    grey = Preprocessing((0.5,), (0.5,), 1.0, recorded=True)
    assert VideoTransform(grey, (8, 8), 3)(make_video(3)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("size", "places"), [((8, 20), (0, 6, 12)), ((20, 8), (0, 6, 12)), ((8, 8), (0, 0, 0))])
def test_crops_lie_along_the_longer_side(size, places):
    values = np.arange(size[0] * size[1], dtype=np.int32).reshape(size)
    crops = [np.asarray(crop) for crop in cut_crops(Image.fromarray(values), (8, 8), 3)]
    top = [(p, 0) if size[0] > size[1] else (0, p) for p in places]
    assert all(np.array_equal(crop, values[y : y + 8, x : x + 8]) for crop, (y, x) in zip(crops, top, strict=True))


def test_views_are_the_crops_of_each_clip():
    """4 x 3 views: clips at fifths of the parts, crops of each next to each other; 1 x 1 is the clip without views."""
    video = make_video(40, (8, 20))
    views = VideoTransform(PLAIN, (8, 8), 4, Views(4, 3))(video)
    assert views.shape == (12, 3, 4, 8, 8)
    assert read_numbers(views[::3]) == [[2, 12, 22, 32], [4, 14, 24, 34], [6, 16, 26, 36], [8, 18, 28, 38]]
    assert read_numbers(views)[0] == read_numbers(views)[1] == read_numbers(views)[2]
    assert (views[:3, 1, 0, 0, 0] * 255 / 8).round().tolist() == [0, 6, 12]  # the columns where the crops begin
    single = VideoTransform(PLAIN, (8, 8), 4, Views(1, 1))(video)
    assert torch.equal(single[0], VideoTransform(PLAIN, (8, 8), 4)(video))


def test_views_have_names():
    assert [Views(*v).describe() for v in ((1, 1), (4, 3), (2, 1))] == [
        "1 clip x centre crop",
        "4 clips x 3 crops",
        "2 clips x centre crop",
    ]


def test_repeated_frames_are_noted_once():
    videos = Images("clips", 3, lambda i: make_video(2 + i), str)
    recorder = Recorder()
    with use_front_end(recorder):
        batches = Batches(videos, VideoTransform(PLAIN, (8, 8), 4), batch_size=1)
        assert [read_numbers(batch.images) for batch in batches] == [[[0, 0, 1, 1]], [[0, 1, 1, 2]], [[0, 1, 2, 3]]]
    assert len(set(recorder.lines)) == 1
    assert "fewer than the 4 frames" in recorder.lines[0]
    assert recorder.lines[0].startswith("clips: ")


def test_frames_are_read_once():
    read = []
    frames = make_frames(30)
    video = Video(30, lambda i: read.append(i) or Image.fromarray(frames[i]))
    VideoTransform(PLAIN, (8, 8), 4, Views(3, 2))(video)
    VideoTransform(PLAIN, (8, 8), 4)(video)
    assert len(read) == len(set(read))


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [2, 3],
        "2x3",
        {"clips": 2},
        {"clips": 0, "crops": 1},
        {"clips": True, "crops": 1},
        {"clips": "2", "crops": 3},
    ],
    ids=str,
)
def test_what_no_views_are_in_json_is_told(value):
    assert Views.from_json(value) is None
    assert Views.from_json(Views(2, 3)._asdict()) == (2, 3)
