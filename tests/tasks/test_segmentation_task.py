"""Segmentation: metrics from a confusion matrix of all pixels, and losses of single images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix

from ssmcompress.errors import InputError
from ssmcompress.tasks import IGNORED, SEGMENTATION, Evaluation, find_task, segmentation

CLASSES = 7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(images=5, classes=CLASSES, size=(9, 12), seed=0):
    return torch.randn(images, classes, *size, generator=seeded(seed))


def random_labels(images=5, size=(9, 12), seed=1, classes=5):
    """Labels without the last two classes of seven, a fifth of them ignored."""
    labels = torch.randint(0, classes, (images, *size), generator=seeded(seed), dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=seeded(seed + 1)) < 0.2] = IGNORED
    return labels


def figures_of(predictions, labels):
    """mIoU, pixel accuracy and class accuracy of class numbers, by scikit-learn's confusion matrix."""
    predictions, labels = np.concatenate([p.ravel() for p in predictions]), np.concatenate([m.ravel() for m in labels])
    there = labels != IGNORED
    matrix = confusion_matrix(labels[there], predictions[there], labels=range(CLASSES)).astype(float)
    hits, rows = np.diag(matrix), matrix.sum(1)
    union = rows + matrix.sum(0) - hits
    share = [hits[c] / rows[c] for c in range(CLASSES) if rows[c]]
    iou = [hits[c] / union[c] for c in range(CLASSES) if union[c]]
    return [100 * np.mean(iou), 100 * hits.sum() / matrix.sum(), 100 * np.mean(share)]


def measure(output, target, dense=None, parts=1, batch=2):
    """Figures from `parts` meters whose sums are added, each with its share of the images in batches."""
    meters = [SEGMENTATION.meter(output.shape[1]) for _ in range(parts)]
    for number, meter in enumerate(meters):
        rows = torch.arange(len(output))[number::parts]
        for i in rows.split(batch):
            meter.add(output[i], None if target is None else target[i], None if dense is None else dense[i])
    total = SEGMENTATION.meter(output.shape[1])
    total.sums += sum(meter.sums for meter in meters)
    return total.result()


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_figures_are_those_of_the_confusion_matrix_of_all_pixels(batch, parts):
    output, target = random_logits(), random_labels()
    output[:, 6] -= 20  # neither predicted nor labelled; class 5 is predicted only
    output += 3 * F.one_hot(target.long().clamp(max=6), CLASSES).movedim(-1, 1)
    result = measure(output, target, parts=parts, batch=batch)
    expected = figures_of(output.argmax(1).numpy(), target.numpy())
    assert [result.miou, result.pixel_accuracy, result.class_accuracy] == pytest.approx(expected, abs=1e-9)
    assert (result.images, result.labelled, result.agreement) == (5, True, None)


def test_all_figures_are_the_same_for_any_batches_and_processes():
    output, target, dense = random_logits(), random_labels(), random_logits(seed=3)
    expected = measure(output, target, dense).to_dict()
    for parts, batch in ((1, 5), (2, 1), (5, 1)):
        assert measure(output, target, dense, parts, batch).to_dict() == pytest.approx(expected, abs=1e-9)


def test_logits_are_resized_to_labels_of_another_size():
    output, target = random_logits(), random_labels(size=(31, 20))
    resized = F.interpolate(output, size=(31, 20), mode="bilinear", align_corners=False)
    expected = figures_of(resized.argmax(1).numpy(), target.numpy())
    result = measure(output, target)
    assert [result.miou, result.pixel_accuracy, result.class_accuracy] == pytest.approx(expected, abs=1e-9)
    assert result.loss == pytest.approx(float(SEGMENTATION.loss(output.double(), target).mean()), abs=1e-6)
    assert torch.equal(SEGMENTATION.loss(output, target), SEGMENTATION.loss(resized, target))
    right = (resized.argmax(1) == target) & (target != IGNORED)
    share = right.sum((1, 2)) / (target != IGNORED).sum((1, 2))
    assert torch.allclose(SEGMENTATION.accuracy(output, target), share)


@pytest.mark.parametrize("values", [1, 300, 1 << 23])
def test_the_classes_and_rows_worked_on_at_a_time_change_nothing(monkeypatch, values):
    output, target, dense = random_logits(), random_labels(size=(18, 24)), random_logits(seed=4)
    expected = measure(output, target, dense).to_dict()
    monkeypatch.setattr(segmentation, "RESIZED", values)
    monkeypatch.setattr(segmentation, "COMPARED", values)
    assert measure(output, target, dense).to_dict() == pytest.approx(expected, abs=1e-7)


def test_ties_go_to_the_first_class_as_in_argmax(monkeypatch):
    output = torch.randint(0, 2, (2, CLASSES, 6, 6), generator=seeded()).float()
    for values in (40, 1 << 23):
        monkeypatch.setattr(segmentation, "RESIZED", values)
        assert SEGMENTATION.accuracy(output, output.argmax(1)).tolist() == [1, 1]


def test_predictions_in_ignored_pixels_do_not_count():
    output, target = random_logits(), random_labels()
    expected = measure(output, target).to_dict()
    output[:, 3] += 50.0 * (target == IGNORED)
    assert measure(output, target).to_dict() == pytest.approx(expected)


def test_comparison_with_the_dense_model():
    output, dense = random_logits(), random_logits(seed=2)
    result = measure(output, None, dense)
    assert (result.miou, result.loss, result.labelled) == (None, None, False)
    same = (output.argmax(1) == dense.argmax(1)).double().mean((1, 2))
    assert result.agreement == pytest.approx(100 * float(same.mean()))
    assert torch.allclose(SEGMENTATION.agreement(dense, output).double(), same)
    theirs, ours = dense.double().log_softmax(1), output.double().log_softmax(1)
    kl = (theirs.exp() * (theirs - ours)).sum(1).mean((1, 2))
    assert torch.allclose(SEGMENTATION.distance(dense.double(), output.double()), kl)
    assert result.kl == pytest.approx(float(kl.mean()), abs=1e-9)
    itself = measure(dense, None, dense)
    assert (itself.agreement, itself.kl) == (100, 0)


def test_distance_has_a_temperature_and_a_gradient():
    output, dense = random_logits().requires_grad_(), random_logits(seed=2)
    hot = SEGMENTATION.distance(dense, output, 4.0)
    assert torch.allclose(hot, SEGMENTATION.distance(dense / 4, output / 4))
    hot.sum().backward()
    softmax = [(logits / 4).softmax(1) for logits in (output.detach(), dense)]
    assert torch.allclose(output.grad, (softmax[0] - softmax[1]) / 4 / (9 * 12), atol=1e-7)


def test_loss_is_the_mean_over_the_labelled_pixels_of_an_image():
    output, target = random_logits().requires_grad_(), random_labels()
    target[2] = IGNORED
    loss = SEGMENTATION.loss(output, target)
    for i in (0, 1, 3, 4):
        there = target[i] != IGNORED
        expected = F.cross_entropy(output[i][:, there].T, target[i][there].long())
        assert torch.allclose(loss[i], expected)
    assert loss[2] == 0
    assert SEGMENTATION.accuracy(output, target)[2] == 0
    loss.sum().backward()
    assert output.grad.isfinite().all()
    assert not output.grad[2].any()
    assert output.grad[1].any()


def test_margin_is_the_mean_lead_of_the_best_class():
    output = torch.zeros(2, 3, 4, 5)
    output[0, 1], output[0, 2] = 3, 1
    output[1, 0, :2] = 5
    assert SEGMENTATION.margin(output).tolist() == [2, 2.5]


def test_no_labelled_pixel_at_all_gives_no_accuracy():
    result = measure(random_logits(), torch.full((5, 4, 4), IGNORED))
    assert (result.miou, result.pixel_accuracy, result.class_accuracy, result.loss) == (None, None, None, 0)
    assert not SEGMENTATION.is_at_chance(result, CLASSES)


# ------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            torch.full((1, 2, 2), 12, dtype=torch.uint8),
            r"^label 12 in 4 pixels: the model has classes 0 to 10, and 255",
        ),
        (torch.tensor([[[3, -1], [255, 40]]]), r"^label -1 in 1 pixel: .*`reduce_zero_label` shifts labels"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            r"masks \(2, 3\) int64: expected class numbers, \(images, height, width\)",
        ),
        (torch.zeros(1, 2, 2), r"masks \(1, 2, 2\) float32: expected class numbers"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "masks .* bool"),
    ],
)
def test_targets_that_do_not_fit_the_model(target, message):
    with pytest.raises(InputError, match=message) as error:
        SEGMENTATION.check_target(target, 11)
    assert "\n" not in str(error.value)


def test_targets_that_fit():
    for dtype in (torch.uint8, torch.int16, torch.int64):
        SEGMENTATION.check_target(torch.tensor([[[0, 10, 255]]], dtype=dtype), 11)
    with pytest.raises(InputError, match="a model of 256 classes: expected 255 at most"):
        SEGMENTATION.check_target(torch.zeros(1, 2, 2, dtype=torch.int64), 256)


def test_a_meter_needs_the_number_of_classes():
    with pytest.raises(ValueError, match="number of classes"):
        SEGMENTATION.meter()


# -------------------------------------------------------------------------------------------------------- chance


def scenes(images=12, classes=150, seed=0):
    """Labels of blocks of 4 x 4 pixels, of classes whose frequency falls as that of ADE20K's, 8 of them an image."""
    generator = np.random.default_rng(seed)
    share = 1 / (np.arange(classes) + 1.0)
    blocks = [
        generator.choice(generator.choice(classes, 8, replace=False, p=share / share.sum()), (8, 8))
        for _ in range(images)
    ]
    return torch.from_numpy(np.kron(np.stack(blocks), np.ones((1, 4, 4), np.int64)).astype(np.uint8))


def predict(labels, classes=150, right=0.6, seed=0):
    """Logits of a model that is right in that share of the pixels, and names a class of the image elsewhere."""
    generator = np.random.default_rng(seed)
    other = np.stack([generator.choice(mask.ravel(), mask.shape) for mask in labels.numpy()])
    chosen = np.where(generator.random(labels.shape) < right, labels.numpy(), other)
    return F.one_hot(torch.from_numpy(chosen).long(), classes).movedim(-1, 1).float()


def test_a_working_model_is_above_chance():
    labels = scenes()
    for right in (0.1, 0.6, 1.0):
        assert not SEGMENTATION.is_at_chance(measure(predict(labels, right=right), labels), 150)


def test_shifted_labels_and_broken_models_are_at_chance():
    labels = scenes()
    output = predict(labels)
    shifted = measure(output, torch.where(labels == 0, IGNORED, labels - 1))
    constant = measure(torch.zeros_like(output), labels)
    noise = measure(torch.randn(output.shape, generator=seeded()), labels)
    elsewhere = measure(output.roll(1, 0), labels)
    for result in (shifted, constant, noise, elsewhere):
        assert SEGMENTATION.is_at_chance(result, 150), result
    assert constant.chance >= constant.miou > 0
    text = SEGMENTATION.describe_chance(constant, 150)
    assert "on 12 images, no more than" in text
    assert any("`reduce_zero_label`" in cause for cause in SEGMENTATION.causes_of_chance(False))


def test_labels_that_agree_by_accident_are_hardly_more_than_chance():
    def at_chance(miou, chance):
        return SEGMENTATION.is_at_chance(Evaluation(20, True, miou=miou, chance=chance), 150)

    assert [at_chance(0.9, 0.34), at_chance(1.1, 0.34)] == [True, False]
    assert [at_chance(2.9, 2.0), at_chance(3.1, 2.0)] == [True, False]
    assert [at_chance(27.0, 27.0), at_chance(28.0, 27.0)] == [True, False]
    assert "hardly more" in SEGMENTATION.describe_chance(Evaluation(20, True, miou=0.9, chance=0.34), 150)


def test_a_binary_model_that_finds_the_object_is_above_chance():
    labels = (scenes() == 0).to(torch.uint8)
    assert not SEGMENTATION.is_at_chance(measure(predict(labels, 2, right=0.5), labels), 2)
    background = F.one_hot(torch.zeros(labels.shape, dtype=torch.int64), 2).movedim(-1, 1).float()
    assert SEGMENTATION.is_at_chance(measure(background, labels), 2)


def test_few_images_and_images_of_one_class_tell_nothing():
    labels = torch.zeros(12, 8, 8, dtype=torch.uint8)
    perfect = measure(F.one_hot(labels.long(), 3).movedim(-1, 1).float(), labels)
    assert perfect.miou == 100
    assert not SEGMENTATION.is_at_chance(perfect, 3)
    few = measure(torch.zeros(2, 150, 32, 32), scenes()[:2])
    assert not SEGMENTATION.is_at_chance(few, 150)


# ------------------------------------------------------------------------------------------------------- naming


def test_figures_are_named_in_order():
    assert find_task("segmentation") is SEGMENTATION
    names = [(figure.name, figure.report_key) for figure in SEGMENTATION.figures]
    assert names == [
        ("miou", "miou"),
        ("pixel_accuracy", "pixel_accuracy"),
        ("class_accuracy", "class_accuracy"),
        ("agreement", "pixels"),
        ("kl", "kl"),
    ]
    result = measure(random_logits(), random_labels(), random_logits(seed=2))
    assert SEGMENTATION.describe(result, compared=True) == {"pixels": result.agreement, "kl": result.kl}
    assert list(SEGMENTATION.describe(None, compared=False)) == ["miou", "pixel_accuracy", "class_accuracy"]
    assert "12 % of the pixels of 40 images" in SEGMENTATION.describe_likeness(12.0, 40)
