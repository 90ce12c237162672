"""Augmentation of videos: the same for every frame of a clip."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video import make_tiny_video, tiny_video_is_known  # noqa: F401
from videos import write_frames

from ssmcompress.compression.finetune.augmentation import training_transform
from ssmcompress.compression.finetune.examples import Examples
from ssmcompress.compression.finetune.recipe import Recipe
from ssmcompress.compression.finetune.seeds import seed_rng
from ssmcompress.data import Batches, Video, open_images
from ssmcompress.data.transforms import Preprocessing

PLAIN = Preprocessing((0.5,) * 3, (0.25,) * 3, 1.0, "bicubic", recorded=True)
# All random augmentations of timm that a recipe supports.
STRONG = Recipe(crop=0.3, flip=0.5, randaugment="rand-m9-mstd0.5-inc1", erasing=0.5)


def make_noise(frames=1, size=(20, 30), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("seed", range(12))
def test_equal_frames_stay_equal(seed):
    """A static video is static after augmentation, for any crop, flip and operations."""
    still = Image.fromarray(make_noise()[0])
    transform = training_transform(PLAIN, (8, 8), STRONG, frames=6)
    with seed_rng(seed):
        clip = transform(Video(9, lambda i: still))
    assert clip.shape == (3, 6, 8, 8)
    assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(1, 6))


def test_clips_are_augmented_anew():
    """Each call draws new frames and augmentations; the same seed gives the same ones."""
    pixels = make_noise(40)
    video = Video(40, lambda i: Image.fromarray(pixels[i]))
    transform = training_transform(PLAIN, (8, 8), STRONG, frames=4)
    with seed_rng(3):
        first, second = transform(video), transform(video)
    with seed_rng(3):
        again = transform(video)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_frames_are_drawn_from_their_parts():
    transform = training_transform(PLAIN, (8, 8), replace(STRONG, randaugment="", erasing=0.0), frames=4)
    seen = set()
    for _ in range(30):
        read = []
        transform(Video(40, lambda i, read=read: read.append(i) or Image.new("RGB", (8, 8))))
        assert [i // 10 for i in read] == [0, 1, 2, 3]
        seen.update(read)
    assert len(seen) > 20


@pytest.fixture
def training(tmp_path):
    for label in range(2):
        for i in range(4):
            write_frames(tmp_path / f"class{label}" / f"v{i}", 5, (8, 8), base=20 * i + 120 * label)
    videos = open_images(tmp_path, 2, videos=True)
    return Batches(videos, make_tiny_video(2).transform())


@pytest.mark.parametrize("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_videos_are_mixed_over_whole_frames(training, mixing):
    """With the same share, or in the same box, in every frame; targets have the share of the pixels."""
    recipe = Recipe(batch_size=8, crop=1.0, flip=0.0, randaugment="", erasing=0.0, smoothing=0.0, **mixing)
    examples = Examples(make_tiny_video(2), training, recipe, seed=0)
    plain = Examples(make_tiny_video(2), training, replace(recipe, mixup=0.0, cutmix=0.0), seed=0)
    for epoch in range(4):
        (mixed,), (whole,) = next(examples.iterate_epoch(epoch)), next(plain.iterate_epoch(epoch))
        assert mixed.images.shape == (8, 3, 4, 8, 8)
        other = whole.images.flip(0)
        shares = (mixed.images - other).double() / (whole.images - other)
        shares = shares[(whole.images - other).abs() > 0.5]
        kept = shares.mean().item()
        if "cutmix" in mixing:
            changed = (mixed.images != whole.images).any(1)  # (batch, frames, height, width)
            assert torch.equal(changed[:, 0], changed[:, 1])
            assert shares.unique().tolist() in ([0.0, 1.0], [0.0], [1.0])
        else:
            assert shares.std() < 1e-3
        same = whole.targets.argmax(1) == whole.targets.flip(0).argmax(1)
        found = mixed.targets[torch.arange(8), whole.targets.argmax(1)]
        assert found[~same].tolist() == pytest.approx([kept] * int((~same).sum()), abs=0.1)
