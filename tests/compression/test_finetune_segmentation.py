"""Fine-tuning of segmentation models: joint augmentation of images and masks, and training on them."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ssmcompress
from ssmcompress.compression.finetune.examples import Examples
from ssmcompress.compression.finetune.loop import finetune
from ssmcompress.compression.finetune.losses import label_loss
from ssmcompress.compression.finetune.recipe import RECIPES, Recipe
from ssmcompress.compression.finetune.seeds import seed_rng
from ssmcompress.compression.finetune.state import StateFile
from ssmcompress.compression.reconstruct.levels import map_levels
from ssmcompress.data.batches import Batches
from ssmcompress.data.images import Images
from ssmcompress.errors import InputError
from ssmcompress.evaluation.measure import evaluate
from ssmcompress.jobs.finetune import FinetuneOptions, finetune_folder
from ssmcompress.jobs.requests import DataOptions
from ssmcompress.models.vim_upernet import VimUperNet, VimUperNetConfig
from ssmcompress.tasks import CLASSIFICATION, IGNORED, SEGMENTATION

SMALL = Recipe(epochs=1, batch_size=4, lr=1e-3, lr_images=4, ema=0.0)
PLAIN = replace(SMALL, min_scale=1.0, max_scale=1.0, flip=0.0, jitter=0.0)


@pytest.fixture(scope="module")
def segmenter() -> VimUperNet:
    """A model of 5 classes for images of 32 x 32 pixels."""
    config = VimUperNetConfig(
        d_model=16, depth=6, d_inner=32, d_state=4, dt_rank=1, d_conv=4, in_chans=3, num_classes=5, patch_size=(8, 8),
        stride=8, image_size=(32, 32), head_channels=8, out_layers=(1, 3, 5, 6), level="residual",
    )  # fmt: skip
    model, generator = VimUperNet(config), torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point() and not name.endswith(("_log", ".D", ".D_b")):
            value.normal_(0, 0.3, generator=generator)
    model.backbone.patch_embed.proj.weight.data *= 0.05  # otherwise the layers would have almost no effect
    for block in model.blocks:
        block.mixer.out_proj.weight.data *= 4
    model.classifier.weight.data *= 20
    return ssmcompress.load(model.eval())


@pytest.fixture(scope="module")
def pruned(segmenter):
    """With stages after layers 2 and 4, and maps of the levels after them."""
    model = ssmcompress.prune(segmenter, ratio=0.7, stages=[2, 4])
    return map_levels(model, segmenter, Batches(pairs(16), segmenter.fixed_transform()))


def read_picture(i: int, size=(32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))


def read_mask(i: int, size=(32, 32)) -> np.ndarray:
    mask = np.random.default_rng(1000 + i).integers(0, 5, size, dtype=np.uint8)
    mask[:3] = IGNORED
    return mask


def pairs(count=8, size=(32, 32), labelled=True, mask=read_mask) -> Images:
    masks = (lambda i: mask(i, size)) if labelled else None
    return Images("pairs", count, lambda i: read_picture(i, size), lambda i: f"image {i}", masks=masks)


def batches(model, source=None, **options) -> Batches:
    return Batches(source or pairs(), model.transform(), **options)


def augment(model, recipe, picture, mask, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    transform = Examples(model, batches(model), recipe, 0).reader.transform
    with seed_rng(seed):
        return transform.pair(picture, mask)


def parts_of(model, recipe, seed=0, epoch=0, first=0, **options):
    steps = Examples(model, batches(model, **options), recipe, seed).iterate_epoch(epoch, first)
    return [part for parts in steps for part in parts]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_loss(tuned) -> float:
    return tuned.model.find_record("finetuning").history[0]["loss"]


# ------------------------------------------------------------------------------------------------------ examples


def test_an_image_and_its_mask_have_the_same_geometry(segmenter):
    """A picture that is white where its mask has class 1 stays so at any scale, position and flip."""
    mask = np.zeros((40, 60), np.uint8)
    mask[5:22, 8:50], mask[22:38, 8:20], mask[:, 57:] = 1, 1, 1  # no symmetry
    picture = Image.fromarray(mask * 255).convert("RGB")
    mean, std = (torch.tensor(v)[:, None, None] for v in (segmenter.preprocessing.mean, segmenter.preprocessing.std))
    for seed in range(40):
        image, target = augment(segmenter, replace(SMALL, jitter=0.0), picture, mask, seed)
        assert image.shape == (3, 32, 32)
        assert (target.shape, target.dtype) == ((32, 32), torch.uint8)
        inside = target != IGNORED
        assert not image[:, ~inside].any()  # the mean colour
        grey = (image * std + mean)[0]
        clear = inside & ((grey < 0.2) | (grey > 0.8))  # the nearest pixel has a quarter of the weight at least
        assert clear.sum() > 0.8 * inside.sum()
        assert torch.equal(grey[clear] > 0.5, target[clear] == 1)
    # Small images are at the top left, and large ones fill the crop.
    counts = [int((augment(segmenter, SMALL, picture, mask, seed)[1] != IGNORED).sum()) for seed in range(40)]
    assert min(counts) < 20 * 28
    assert counts.count(32 * 32) > 15


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (20, 24)])
def test_at_scale_one_it_is_a_part_of_the_image_that_is_measured(segmenter, size):
    picture, mask = read_picture(0, size), read_mask(0, size)
    image, target = augment(segmenter, PLAIN, picture, mask, 1)
    whole = segmenter.transform()(picture)
    labels = F.interpolate(torch.from_numpy(mask)[None, None], size=whole.shape[1:], mode="nearest-exact")[0, 0]
    rows, columns = (side - 32 for side in whole.shape[1:])
    assert max(rows, columns) > 0 or size == (32, 32)
    found = [
        (top, left)
        for top in range(rows + 1)
        for left in range(columns + 1)
        if (image - whole[:, top : top + 32, left : left + 32]).abs().max() < 0.02  # that one is rounded to 8 bits
    ]
    assert len(found) == 1
    (top, left) = found[0]
    assert torch.equal(target, labels[top : top + 32, left : left + 32])


def test_half_of_the_images_are_mirrored(segmenter):
    picture, mask = read_picture(0), read_mask(0)
    straight, _ = augment(segmenter, PLAIN, picture, mask)
    mirrored = [augment(segmenter, replace(PLAIN, flip=0.5), picture, mask, seed) for seed in range(40)]
    flipped = [torch.equal(image, straight.flip(2)) for image, _ in mirrored]
    assert 10 < sum(flipped) < 30
    for (image, target), is_flipped in zip(mirrored, flipped, strict=True):
        expected = torch.from_numpy(mask)
        assert torch.equal(target, expected.flip(1) if is_flipped else expected)
        assert is_flipped or torch.equal(image, straight)


def test_colours_change_in_the_image_alone(segmenter):
    recipe = replace(SMALL, jitter=0.5)
    (image, target), (plain, same_target) = (
        augment(segmenter, changed, read_picture(0), read_mask(0)) for changed in (recipe, replace(recipe, jitter=0.0))
    )
    assert torch.equal(target, same_target)
    assert (image - plain).abs().mean() > 0.05


def test_a_crop_of_one_class_is_drawn_again(segmenter):
    """Class 1 is on the left, in a sixth of all crops; in a tenth, both classes have enough pixels."""
    mask = np.zeros((32, 128), np.uint8)
    mask[:, :16] = 1
    found = [1 in augment(segmenter, PLAIN, read_picture(0, mask.shape), mask, seed)[1] for seed in range(60)]
    assert sum(found) > 22


def test_examples_depend_on_nothing_but_seed_epoch_and_image(segmenter):
    def equal(one, other):
        return len(one) == len(other) and all(
            torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
            for a, b in zip(one, other, strict=True)
        )

    steps = parts_of(segmenter, SMALL)
    assert [tuple(part.targets.shape) for part in steps] == [(4, 32, 32)] * 2
    assert equal(steps, parts_of(segmenter, SMALL, workers=2))
    assert equal(steps[1:], parts_of(segmenter, SMALL, first=1))
    assert not equal(steps, parts_of(segmenter, SMALL, seed=1))
    assert not equal(steps, parts_of(segmenter, SMALL, epoch=1))
    examples = Examples(segmenter, batches(segmenter), SMALL, 0)
    assert torch.equal(examples[0, 3].image, examples[0, 3].image)
    assert not torch.equal(examples[0, 3].image, examples[1, 3].image)  # not only the order is another one
    halves = parts_of(segmenter, replace(SMALL, accumulate=2))
    assert sorted(p.targets.sum().item() for p in halves) != sorted(p.targets.sum().item() for p in steps)
    assert sum(int(p.targets.sum()) for p in halves) == sum(int(p.targets.sum()) for p in steps)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda i, size: read_mask(i, (32, 30)), "image .: height x width 32 x 30|image ., its mask: .*32 x 30"),
        (lambda i, size: read_mask(i, size) + np.uint8(3), "label 5 in .* classes 0 to 4"),
    ],
)
def test_a_mask_that_cannot_be_used_is_an_error(segmenter, workers, mask, message):
    data = batches(segmenter, pairs(mask=mask), workers=workers)
    with pytest.raises(InputError, match=message) as error:
        list(Examples(segmenter, data, SMALL, 0).iterate_epoch(0))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.8}, {"cutmix": 1.0}, {"erasing": 0.25}, {"smoothing": 0.1}, {"crop": 0.5},
        {"randaugment": "rand-m9"},
    ],
)  # fmt: skip
def test_what_has_no_meaning_for_masks_is_refused_by_name(segmenter, pruned, change):
    (name,) = change
    with pytest.raises(InputError, match=f"{name} .*only.*semantic segmentation: expected {name}"):
        finetune(pruned, batches(segmenter), dense=segmenter, recipe=replace(SMALL, **change))


def test_recipes_for_the_other_task_are_refused_before_anything_is_read(pruned, tmp_path, vim):
    options = FinetuneOptions(RECIPES["top-vim"])
    with pytest.raises(InputError, match="smoothing 0.1, mixup 0.8, cutmix 1.0"):
        finetune_folder(pruned, tmp_path / "out", options, DataOptions(data=str(tmp_path / "missing")))
    RECIPES["top-vim"].check_task(CLASSIFICATION)
    for change in ({"jitter": 0.0}, {"min_scale": 1.0}, {"max_scale": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(change))} .* only for segmentation"):
            Recipe(**change).check_task(vim.task)
    for change in ({"min_scale": 0.0}, {"min_scale": 3.0}, {"max_scale": 100.0}, {"jitter": 2.0}):
        with pytest.raises(InputError, match="_scale|jitter"):
            Recipe(**change)


# ------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def test_the_objective_is_of_labelled_pixels_and_of_the_teacher(segmenter, pruned):
    """At lr 0, without augmentation: the loss of all images on logits at the size of the head's finest map."""
    recipe = replace(PLAIN, batch_size=8, lr=0.0, warmup_lr=0.0, min_lr=0.0, teacher=0.25, features=2.0)
    with torch.enable_grad():
        found = first_loss(finetune(pruned, batches(segmenter), dense=segmenter, recipe=recipe))
    batch = next(iter(batches(segmenter)))
    ours, theirs = (model.encode(batch.images)[0] for model in (pruned, segmenter))
    logits, teacher = pruned.readout(ours), segmenter.readout(theirs)
    assert logits.shape[-1] < 32
    large = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    labels = F.cross_entropy(large, batch.labels.long(), ignore_index=IGNORED)
    kl = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
    at = theirs.features.gather(1, ours.explicit_positions()[..., None].expand_as(ours.features))
    cosine = 1 - F.cosine_similarity(ours.features, at, dim=2).mean()
    assert float(kl) > 1e-3
    assert found == pytest.approx(float(0.75 * labels + 0.25 * kl + 2 * cosine), rel=1e-5)


def test_gradients_of_labels_are_those_of_the_task():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, 5, (3, 16, 16), generator=generator).byte()
    targets[:, :4] = IGNORED
    factors = torch.tensor([1.0, 2.0, 3.0])
    values, gradients = [], []
    for function in (SEGMENTATION.loss, lambda *pair: label_loss(SEGMENTATION, *pair)):
        value = function(logits, targets)
        values.append(value.detach())
        gradients.append(torch.autograd.grad((factors * value).sum(), logits)[0])
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients)


def test_a_segmenter_comes_closer_to_its_teacher_and_keeps_its_norms(segmenter, pruned):
    """Without masks; statistics and weights of batch norms do not change."""
    data = batches(segmenter, pairs(labelled=False))
    before = evaluate(pruned, data, dense=segmenter)
    recipe = replace(PLAIN, epochs=12, batch_size=8, lr=3e-4, lr_images=8, ramp=0.3)
    tuned = finetune(pruned, data, dense=segmenter, recipe=recipe).model
    assert evaluate(tuned, data, dense=segmenter).kl < 0.7 * before.kl
    one, other = weights(pruned), weights(tuned)
    norms = [name for name in one if ".bn." in name or "norm" in name]
    assert norms
    assert all(torch.equal(one[name], other[name]) for name in norms)
    changed = ("decode_head.conv_seg.weight", "backbone.layers.0.mixer.in_proj.weight", "backbone.fpn1.0.weight")
    assert not any(torch.equal(one[name], other[name]) for name in changed)
    assert [name for name in one if name.startswith("level_maps.") and not torch.equal(one[name], other[name])]


def test_the_best_epoch_is_the_one_with_the_lowest_objective(segmenter, pruned):
    """At a learning rate that destroys the model, the weights before the first step are the best."""
    held_out = batches(segmenter, pairs(6))
    recipe = replace(SMALL, epochs=2, lr=1.0, clip_grad=0.0)
    tuned = finetune(pruned, batches(segmenter), dense=segmenter, recipe=recipe, held_out=held_out)
    record = tuned.model.find_record("finetuning")
    assert (record.epoch, record.labels, record.held_out) == (0, True, 6)
    assert same(weights(tuned.model), weights(pruned))
    assert {"miou", "pixel_accuracy", "agreement", "kl"} <= record.history[0]["held_out"].keys()
    assert "pixel_accuracy" in record.history[0]


def test_a_segmenters_run_cut_off_goes_on_to_the_same_weights(segmenter, pruned, tmp_path):
    """With a ramp, during which each stage drops at least one token, as required by the level maps."""
    state, recipe = tmp_path / "state.pt", replace(SMALL, epochs=2, ramp=0.8, accumulate=2)
    data = batches(segmenter)

    def interrupt(figures, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"dense": segmenter, "recipe": recipe}
    whole = finetune(pruned, data, **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, batches(segmenter), state=state, log=interrupt, **options)
    half = ssmcompress.load(state)
    assert half.level_maps
    resumed = finetune(pruned, batches(segmenter), state=StateFile(state, resume=True), **options)
    assert same(weights(whole.last), weights(resumed.last))
    other = batches(segmenter, pairs(mask=lambda i, size: read_mask(i + 1, size)))
    with pytest.raises(InputError, match="to another run, with .*other labels"):
        finetune(pruned, other, state=StateFile(state, resume=True), **options)


def test_an_unpruned_segmenter_is_refused_and_masks_count_as_labels(segmenter, pruned):
    with pytest.raises(InputError, match="prunes nothing"):
        finetune(segmenter, batches(segmenter), dense=segmenter, recipe=SMALL)
    with pytest.raises(InputError, match="no labels, and there is no dense model"):
        finetune(pruned, batches(segmenter, pairs(labelled=False)), recipe=SMALL)
    classes = replace(pairs(labelled=False), labels=(0,) * 8)
    with pytest.raises(InputError, match="masks .*expected class numbers"):
        finetune(pruned, batches(segmenter, classes), recipe=SMALL)
    assert np.isfinite(first_loss(finetune(pruned, batches(segmenter), recipe=SMALL)))
