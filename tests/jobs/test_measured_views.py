"""Views of the videos that a job measures."""

import pytest
import torch
from tiny_video import make_tiny_video, tiny_video_is_known  # noqa: F401
from videos import write_frames

from ssmcompress.data import Batches, open_images
from ssmcompress.errors import InputError
from ssmcompress.jobs.measuring import add_views
from ssmcompress.jobs.requests import MeasureOptions
from ssmcompress.models.inputs import to_batches


@pytest.fixture
def model():
    return make_tiny_video(2)


def test_what_is_found_of_videos_is_found_of_the_images_of_the_job(model, tmp_path):
    """Digests and unreadable videos; a batch takes as much memory as without views."""
    for i in range(3):
        write_frames(tmp_path / f"v{i}", 5)
    (tmp_path / "v1" / "frame_0.png").write_bytes(b"damaged")
    images = Batches(open_images(tmp_path, 2, videos=True), model.transform(), batch_size=64)
    viewed = add_views(model, images, MeasureOptions(views=(4, 3)))
    assert [batch.images.shape for batch in viewed] == [(2, 12, 3, 4, 8, 8)]
    assert viewed.batch_size == 5
    assert images.views is None
    assert (images.digests != 0).tolist() == [True, False, True]
    assert images.unreadable == {1}


def test_without_views_the_images_stay_as_they_are(model, tmp_path):
    write_frames(tmp_path / "v", 5)
    images = Batches(open_images(tmp_path, 2, videos=True), model.transform())
    assert add_views(model, images, MeasureOptions()) is images


def test_prepared_clips_have_no_views(model):
    images = to_batches(model, torch.randn(4, *model.image_shape))
    assert add_views(model, images, MeasureOptions()) is images
    with pytest.raises(InputError, match="`views` are made of videos, and these are prepared already"):
        add_views(model, images, MeasureOptions(views=(2, 1)))
