"""Metrics for several views of each video."""

import numpy as np
import pytest
import torch
from tiny_video import make_tiny_video, tiny_video_is_known  # noqa: F401
from videos import write_frames

import ssmcompress
from ssmcompress.data import Batches, open_images
from ssmcompress.data.clips import Views
from ssmcompress.errors import InputError
from ssmcompress.evaluation.measure import compute_logits, measure
from ssmcompress.evaluation.views import predict


@pytest.fixture
def model():
    return make_tiny_video(classes=2)


@pytest.fixture
def videos(tmp_path):
    """Four videos wider than high, so that crops differ, in two classes."""
    for label in range(2):
        for i in range(2):
            write_frames(tmp_path / f"class{label}" / f"v{i}", 12 + i, (8, 24), base=40 * i + 90 * label)
    return open_images(tmp_path, 2, videos=True)


def test_probabilities_of_the_views_are_averaged(model):
    images = torch.randn(3, 6, *model.image_shape)
    expected = torch.stack([model(images[:, view]).softmax(1) for view in range(6)]).mean(0)
    torch.testing.assert_close(predict(model, images, Views(2, 3)).softmax(1), expected)


def test_a_mean_of_probabilities_is_no_mean_of_logits():
    """Two fully confident views have the same weight, regardless of the size of their logits."""

    class Shown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return images

    shown = torch.tensor([[[30.0, 0.0], [0.0, 0.5], [0.0, 31.0], [1.0, 0.0]]])
    assert shown.mean(1).argmax(1).item() == 1
    assert predict(Shown(), shown, Views(4, 1)).argmax(1).item() == 0


def test_one_view_is_the_clip_itself(model, videos):
    one = compute_logits(model, Batches(videos, model.transform(views=(1, 1)))).values
    torch.testing.assert_close(
        one.softmax(1), compute_logits(model, Batches(videos, model.transform())).values.softmax(1)
    )


def test_several_views_are_measured(model, videos):
    """Against views that are prepared, run and averaged one by one; agreement with the model itself is complete."""
    transform = model.transform(views=(2, 3))
    batches = Batches(videos, transform, batch_size=3)
    clips = torch.stack([transform(videos.read(i)) for i in range(4)])
    with torch.no_grad():
        mean = torch.stack([model(clips[:, view]).softmax(1) for view in range(6)]).mean(0)
    torch.testing.assert_close(compute_logits(model, batches).values.exp(), mean)
    result = measure({"dense": model, "model": model}, batches)["model"]
    assert result.images == 4
    assert result.top1 == pytest.approx(100 * np.mean(mean.argmax(1).numpy() == videos.labels))
    assert result.agreement == 100
    assert ssmcompress.evaluate(model, batches).top1 == result.top1


def test_views_are_for_measuring_alone(model, videos):
    """Functions that fit a model on batches reject views."""
    batches = Batches(videos, model.transform(views=(2, 3)))
    plan = ssmcompress.make_plan(model, ratio=0.5, importance="l2")
    with pytest.raises(InputError, match=r"\(4, 6, 3, 4, 8, 8\)"):
        ssmcompress.calibrate(model, batches, plan=plan)


@pytest.mark.parametrize("views", [(0, 1), (1, 0), (65, 1)])
def test_views_that_cannot_be_are_refused(model, views):
    with pytest.raises(InputError, match=rf"`views` {views[0]}x{views[1]}: expected clips and crops, 1 to 64 of each"):
        model.transform(views=views)


def test_models_of_images_have_no_views(vim):
    with pytest.raises(InputError, match="`views` are clips and crops of videos, and the model takes images"):
        vim.transform(views=(1, 1))
