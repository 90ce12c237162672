"""Preprocessing that keeps the aspect ratio of images and of their masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_folders import Recorder

from ssmcompress.data.dense import DensePreprocessing
from ssmcompress.data.transforms import Preprocessing
from ssmcompress.errors import InputError
from ssmcompress.progress import use_front_end

IMAGENET = DensePreprocessing.default(3, (512, 512))


def plain(**sizes):
    """Preprocessing that leaves values on a 0..1 scale."""
    return DensePreprocessing((0.0,) * 3, (1.0,) * 3, **sizes)


def photo(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 683, (512, 683)),
        (256, 341, (512, 682)),
        (1000, 600, (853, 512)),
        (333, 500, (512, 769)),  # 768.77
        (100, 1000, (205, 2048)),  # 204.8: the longer side is the limit
        (512, 512, (512, 512)),
    ],
)
def test_sizes_are_those_of_mmsegmentation(height, width, expected):
    assert IMAGENET.new_size(height, width) == expected


def test_a_limit_of_the_longer_side_and_no_resize():
    assert IMAGENET.changed(long_side=600).new_size(100, 200) == (300, 600)
    assert plain().new_size(77, 300) == (77, 300)
    assert plain(short_side=8).new_size(1, 4000) == (1, 32)


def test_the_whole_image_is_resized_without_antialias_and_normalised():
    picture = photo(90, 130)
    found = DensePreprocessing.default(3, (40, 40)).transform()(picture)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(40, 58), mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    assert found.shape == (3, 40, 58)
    assert torch.allclose(found, ((resized + 0.5).floor() - mean) / std, atol=1e-5)
    assert (found - (resized - mean) / std).abs().max() > 1e-3  # rounded to 8 bits


def test_halves_are_rounded_up():
    picture = Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8)).convert("RGB")
    assert (plain(short_side=1).transform()(picture) * 255).flatten().tolist() == [1, 1, 1]


def test_sides_are_enlarged_to_multiples_each_by_itself():
    picture = photo(90, 130)
    first = plain(short_side=40).transform()(picture)
    found = plain(short_side=40, multiple=32).transform()(picture)
    again = F.interpolate(255 * first[None], size=(64, 64), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(found, (again + 0.5).floor() / 255, atol=1e-6)
    same = plain(short_side=64).transform()(photo(64, 96))
    assert torch.equal(plain(short_side=64, multiple=32).transform()(photo(64, 96)), same)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_fits_any_model(mode, channels):
    found = DensePreprocessing.default(channels, (16, 16)).transform()(photo(20, 30).convert(mode))
    assert (found.shape, found.dtype) == ((channels, 16, 24), torch.float32)


def test_a_crop_is_the_centre_and_small_images_are_padded_with_the_mean():
    picture = photo(20, 31)
    whole = plain().transform()(picture)
    assert torch.equal(plain().transform(crop=(10, 16))(picture), whole[:, 5:15, 7:23])
    values = DensePreprocessing((0.5,) * 3, (0.5,) * 3)
    padded = values.transform(crop=(24, 16))(picture)
    assert torch.equal(padded[:, :20], values.transform()(picture)[:, :, 7:23])
    assert not padded[:, 20:].any()


def test_masks_keep_their_size_in_testing():
    mask = np.arange(90 * 130, dtype=np.int64).reshape(90, 130).astype(np.uint8)
    transform = plain(short_side=40, multiple=32).transform()
    image, target = transform.pair(photo(90, 130), mask)
    assert image.shape == (3, 64, 64)
    assert torch.equal(target, torch.from_numpy(mask))


@pytest.mark.parametrize("multiple", [None, 32])
@pytest.mark.parametrize("size", [(90, 130), (40, 25), (128, 64)])
def test_masks_follow_their_images_into_a_crop(size, multiple):
    blocks = np.random.default_rng(1).integers(0, 5, (-(-size[0] // 16), -(-size[1] // 16)))
    mask = np.kron(blocks, np.ones((16, 16), int))[: size[0], : size[1]].astype(np.uint8)
    picture = Image.fromarray(np.repeat(mask[..., None] * 50, 3, axis=2))
    transform = plain(short_side=60, multiple=multiple).transform(crop=(48, 80))
    image, target = transform.pair(picture, mask)
    assert (image.shape, target.shape, target.dtype) == ((3, 48, 80), (48, 80), torch.uint8)
    assert torch.equal(image, transform(picture))
    there = target != 255
    assert bool((image[:, ~there] == 0).all())
    shown = (image[0] * 255 / 50).round()
    assert float((shown == target)[there].float().mean()) > 0.85  # others are the edges, which are blurred
    resized = plain(short_side=60, multiple=multiple).transform()(picture).shape[1:]
    assert int(there.sum()) == min(resized[0], 48) * min(resized[1], 80)


def test_an_unresized_crop_of_a_mask_is_exact():
    mask = np.random.default_rng(0).integers(0, 9, (20, 31), dtype=np.uint8)
    _, target = plain().transform(crop=(10, 40)).pair(photo(20, 31), mask)
    assert torch.equal(target[:, :31], torch.from_numpy(mask)[5:15])
    assert bool((target[:, 31:] == 255).all())


def test_preprocessing_is_saved_and_changed():
    for values in (IMAGENET, plain(short_side=8, long_side=20, multiple=32), plain()):
        assert DensePreprocessing.from_dict(values.to_dict(), 3) == values
    assert IMAGENET.to_dict()["assumed"] is True
    changed = IMAGENET.changed(mean=(0.5,), short_side=256, multiple=32, long_side=None)
    assert (changed.mean, changed.short_side, changed.long_side, changed.multiple) == ((0.5,) * 3, 256, None, 32)
    assert changed.assumed  # the standard deviation still is
    assert not changed.changed(std=0.5 * np.ones(3)).assumed
    assert changed.changed(multiple=0, short_side=0).new_size(50, 60) == (50, 60)
    assert IMAGENET.changed() is IMAGENET


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_pct": 0.9}, "`crop_pct`: images of a segmentation model are resized by `short_side`"),
        ({"std": (0.0,)}, "positive deviations"),
        ({"mean": (1.0, 2.0)}, "`mean` 1,2: 2 values, the model has 3 channels"),
        ({"short_side": -4}, "`short_side` -4: expected a number of pixels"),
        ({"multiple": 1.5}, "`multiple` 1.5: expected a number of pixels"),
        ({"short_side": True}, "`short_side` True"),
        ({"long_side": 100}, "`long_side` 100: expected at least `short_side`, 512"),
    ],
)
def test_values_that_cannot_be_used(change, message):
    with pytest.raises(InputError, match=message):
        IMAGENET.changed(**change)


def test_a_block_that_is_none():
    with pytest.raises(InputError, match="not a preprocessing block"):
        DensePreprocessing.from_dict({"mean": [0.5]}, 1)


def test_assumed_values_are_noted():
    recorder = Recorder()
    with use_front_end(recorder):
        IMAGENET.transform()
        IMAGENET.changed(short_side=8).transform()
        IMAGENET.changed(short_side=8, mean=(0.5,)).transform()
        IMAGENET.changed(mean=(0.5,), std=(0.5,)).transform()
    start = "preprocessing is not in the file; assumed: "
    assert recorder.lines == [
        f"{start}`mean` 0.485,0.456,0.406, `std` 0.229,0.224,0.225, `short_side` 512",
        f"{start}`mean` 0.485,0.456,0.406, `std` 0.229,0.224,0.225",
        f"{start}`std` 0.229,0.224,0.225",
    ]


@pytest.mark.parametrize("kind", [DensePreprocessing, Preprocessing])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_assumed_is_remembered_for_each_value(kind, channels):
    values = kind.default(channels, (64, 64))
    size = {"short_side": 8} if kind is DensePreprocessing else {"crop_pct": 0.9}
    for given, rest in (({}, ("mean", "std")), ({"mean": (0.4,)}, ("std",)), ({"std": (0.4,)}, ("mean",))):
        changed = values.changed(**size, **given)
        assert changed.assumed
        assert tuple(name for name in ("mean", "std") if name in changed.defaults) == rest
        read = kind.from_dict(changed.to_dict(), channels)
        assert (read.defaults, read.recorded, changed.recorded) == (changed.defaults, True, False)
        assert read.changed(**size).recorded  # so that the note is not repeated
    assert "assumed" not in values.changed(mean=(0.4,), std=(0.4,)).to_dict()
    assert kind.from_dict({**values.to_dict(), "assumed": "mean"}, channels).assumed is False
