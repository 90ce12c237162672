"""Classification as a task: its measures, one value an image, and what its meter adds up."""

import pytest
import torch
import torch.nn.functional as F

from ssmcompress.errors import InputError
from ssmcompress.tasks import CLASSIFICATION, Evaluation, find_task
from ssmcompress.tasks.base import image_losses, mean_loss


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 7, generator=generator), torch.randn(40, 7, generator=generator)


@pytest.fixture
def labels():
    return torch.arange(40) % 7


def test_distance_is_the_divergence_from_the_dense_model(outputs):
    ours, dense = outputs
    for temperature in (1.0, 3.0):
        p, q = (dense / temperature).softmax(1), (ours / temperature).softmax(1)
        expected = (p * (p / q).log()).sum(1)
        torch.testing.assert_close(CLASSIFICATION.distance(dense, ours, temperature), expected)
    assert (CLASSIFICATION.distance(dense, dense) == 0).all()


def test_a_class_number_is_the_probability_of_one(outputs, labels):
    ours, _ = outputs
    one_hot = F.one_hot(labels, 7).float()
    torch.testing.assert_close(CLASSIFICATION.loss(ours, labels), CLASSIFICATION.loss(ours, one_hot))
    assert torch.equal(CLASSIFICATION.accuracy(ours, labels), CLASSIFICATION.accuracy(ours, one_hot))
    assert CLASSIFICATION.accuracy(one_hot, labels).tolist() == [1.0] * 40


def test_losses_are_those_beyond_the_dense_models(outputs, labels):
    ours, dense = outputs
    assert mean_loss(CLASSIFICATION, dense, dense, labels) == 0
    expected = F.cross_entropy(ours.double(), labels) - F.cross_entropy(dense.double(), labels)
    assert mean_loss(CLASSIFICATION, ours, dense, labels) == pytest.approx(float(expected))
    assert image_losses(CLASSIFICATION, ours, dense).shape == (40,)


def test_the_margin_is_between_the_two_best_classes():
    output = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, -1.0]])
    assert CLASSIFICATION.margin(output).tolist() == [2.0, 0.0]
    assert CLASSIFICATION.margin(output[:, :1]).shape == (2,)


def test_sums_of_parts_are_those_of_the_whole(outputs, labels):
    ours, dense = outputs
    whole = CLASSIFICATION.meter()
    whole.add(ours, labels, dense)
    parts = [CLASSIFICATION.meter() for _ in range(3)]
    for meter, rows in zip(parts, torch.arange(40).split(17), strict=True):
        for k in rows.split(5):
            meter.add(ours[k], labels[k], dense[k])
    parts[0].sums += parts[1].sums + parts[2].sums
    assert parts[0].result() == whole.result()
    result = whole.result()
    assert (result.images, result.labelled) == (40, True)
    assert result.top1 == pytest.approx(100 * float((ours.argmax(1) == labels).float().mean()))
    assert result.kl == pytest.approx(float(CLASSIFICATION.distance(dense, ours).mean()), abs=1e-6)


def test_figures_that_were_not_measured_are_none(outputs):
    meter = CLASSIFICATION.meter()
    meter.add(outputs[0], None, None)
    assert meter.result() == Evaluation(40, False, top1=None, top5=None, agreement=None, kl=None, loss=None)
    few = CLASSIFICATION.meter()
    few.add(outputs[0][:, :5], torch.zeros(40, dtype=torch.long), None)
    assert few.result().top5 is None
    with pytest.raises(AttributeError, match="'miou': the figures are top1"):
        _ = meter.result().miou


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(InputError, match="label 7: the model has classes 0 to 6"):
        CLASSIFICATION.check_target(torch.tensor([0, 7]), 7)
    with pytest.raises(InputError, match="label -1: .*; leave out the labels of unlabelled images"):
        CLASSIFICATION.check_target(torch.tensor([0, -1]), 7)


def test_tasks_have_names():
    assert find_task(None) is find_task("classification") is CLASSIFICATION
    with pytest.raises(ValueError, match="unknown task 'x': expected one of classification, segmentation"):
        find_task("x")
