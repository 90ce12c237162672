"""Videos passed as tensors, loaders and lists."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from ssmcompress.data.any_batches import AnyBatches
from ssmcompress.data.items import InputSpec
from ssmcompress.errors import InputError

SPEC = InputSpec((3, 4, 8, 10))
VIDEOS = torch.randn(5, 3, 4, 8, 10)
LABELS = torch.tensor([0, 1, 2, 1, 0])


def read(data, **options):
    return AnyBatches(data, SPEC, **options).read_all()


@pytest.mark.parametrize(
    "data",
    [
        VIDEOS,
        VIDEOS.numpy(),
        list(VIDEOS),
        list(VIDEOS.split(2)),
        DataLoader(VIDEOS, 2),
        [{"pixel_values": VIDEOS}],
        (VIDEOS, None),
        [(VIDEOS[:3], LABELS[:3]), (VIDEOS[3:], LABELS[3:])],
    ],
    ids=["tensor", "array", "singles", "batches", "loader", "dict", "pair", "labelled"],
)
def test_videos_are_read_from_what_a_caller_has(data):
    assert torch.equal(read(data, labelled=False).images, VIDEOS)


@pytest.mark.parametrize(
    "data",
    [(VIDEOS, LABELS), DataLoader(TensorDataset(VIDEOS, LABELS), 2), list(zip(VIDEOS, LABELS, strict=True))],
    ids=["pair", "loader", "items"],
)
def test_labels_are_read_with_videos(data):
    videos, labels = read(data)
    assert torch.equal(videos, VIDEOS)
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (VIDEOS.transpose(1, 2), r"\(5, 4, 3, 8, 10\): expected \(batch, 3, 4, 8, 10\), channels before frames: "
                                 r"images.permute\(0, 2, 1, 3, 4\)"),
        (VIDEOS.movedim(1, 4), r"channels first: images.permute\(0, 4, 1, 2, 3\)"),
        (VIDEOS[:, :, :2], r"\(5, 3, 2, 8, 10\): expected \(batch, 3, 4, 8, 10\)"),
        (VIDEOS[:, :, 0], r"\(5, 3, 8, 10\): expected images \(count, channels, frames, height, width\)"),
        (VIDEOS[0, 0], r"\(4, 8, 10\): expected images \(count, channels, frames, height, width\)"),
        (VIDEOS.to(torch.uint8), "images are uint8: expected floats"),
        ([VIDEOS[0, 0]], r"\(4, 8, 10\): expected \(batch, channels, frames, height, width\)"),
        ([Image.new("RGB", (10, 8))], "PIL images: the model takes videos"),
        ([(VIDEOS, VIDEOS)], "these are images again"),
    ],
    ids=["frames-first", "channels-last", "frames", "images", "image", "pixels", "items", "pictures", "two-views"],
)  # fmt: skip
def test_other_shapes_are_refused_with_the_way_out(data, message):
    with pytest.raises(InputError, match=message):
        read(data)


def test_the_way_out_of_a_refusal_is_one():
    for order in ((0, 2, 1, 3, 4), (0, 2, 3, 4, 1)):
        with pytest.raises(InputError, match="permute") as refused:
            read(VIDEOS.permute(order))
        back = [int(i) for i in str(refused.value).rpartition("permute(")[2].rstrip(")").split(",")]
        assert torch.equal(read(VIDEOS.permute(order).permute(back)).images, VIDEOS)


def test_images_of_as_many_dimensions_are_refused_by_a_model_of_images():
    with pytest.raises(
        InputError, match=r"a tensor \(5, 3, 4, 8, 10\): expected images \(count, channels, height, width"
    ):
        AnyBatches(VIDEOS, InputSpec((3, 8, 10)))
    with pytest.raises(InputError, match="expected images"):
        AnyBatches(np.zeros((5, 3, 4, 8, 10), np.float32))
