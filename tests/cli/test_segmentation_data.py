"""Data for segmentation in commands: masks without labels, rotated photographs, folders of masks for a classifier."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TUNE, call, call_json, refused
from conftest import make_vim
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from segmenters import make_vim_upernet, scenes, write_scenes

import ssmcompress
from ssmcompress.data.batches import Batches, sample_indices
from ssmcompress.data.images import ORIENTATION, Images, decode
from ssmcompress.data.masks import drop_empty_masks
from ssmcompress.errors import InputError
from ssmcompress.jobs.finetune import check_masks
from ssmcompress.jobs.images import TrainingImages
from ssmcompress.progress import hold_notes
from ssmcompress.tasks import SEGMENTATION

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
PRUNE = ("--ratio", 0.3, "--stages", "2,4", "--no-latency", "--no-reconstruct")


@pytest.fixture
def checkpoint():
    torch.save({"state_dict": make_vim_upernet().state_dict()}, "s.pth")
    return "s.pth"


@pytest.fixture
def classifier():
    torch.save({"model": make_vim().state_dict()}, "c.pth")
    return "c.pth"


def fill_masks(folder, label, names="*"):
    for file in Path(folder, "annotations").glob(f"{names}.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), label)).save(file)


# ------------------------------------------------------------------------------------------ no labelled pixel


@pytest.fixture(params=[255, 0])
def empty(request):
    """Data without a labelled pixel, as an option of commands."""
    write_scenes(Path("b"), 12)
    fill_masks("b", request.param)
    return "--data", "b", *(["--reduce-zero-label"] if request.param == 0 else [])


def test_measuring_says_that_no_pixel_has_a_label(checkpoint, empty):
    value = call_json("evaluate", checkpoint, *empty)
    assert (value["miou"], value["data"]["labelled"]) == (None, False)
    (line,) = value["warnings"]
    assert line.startswith("no labelled pixel in 12 masks (255 is ignored; with `reduce_zero_label`, 0 too)")
    said = call("evaluate", checkpoint, *empty)
    assert "no labelled pixel in 12 masks" in said.stdout
    assert "b: no labelled pixel in 12 masks (255 is ignored; with --reduce-zero-label, 0 too)" in said.stderr
    report = call_json("prune", checkpoint, *empty, *PRUNE, "-o", "m")
    assert report["data"]["labelled"] is False
    assert any(line.startswith("no labelled pixel in 12 masks") for line in report["warnings"])
    assert "accuracy was not measured: no labels in b" in call("report", "m").stdout
    value = call_json("compare", checkpoint, *empty, *PRUNE[2:5], "--methods", "naive", "--ratios", "0.3")
    assert any(line.startswith("no labelled pixel in 12 masks") for line in value["warnings"])


def test_training_by_labels_that_no_pixel_has_is_refused(checkpoint, empty):
    call("prune", checkpoint, *empty, *PRUNE, "-o", "m")
    line = refused("finetune", "m", *empty, *TUNE, "--no-teacher", "-o", "t")
    assert "b: no labelled pixel in " in line
    assert " masks (255 is ignored" in line
    report = call_json("finetune", "m", *empty, *TUNE, "--epochs", 1, "-o", "t")
    assert (report["finetuning"]["labels"], report["finetuning"]["teacher"]) == (False, True)
    opened = ssmcompress.open_images("b", 5, task=SEGMENTATION, reduce_zero_label="--reduce-zero-label" in empty)
    with pytest.raises(InputError, match="has no labels"):
        ssmcompress.finetune(ssmcompress.load("m"), opened)


def test_a_search_by_labels_that_no_pixel_has_is_refused(checkpoint, empty):
    options = ("--flops", "85%", "--axes", "tokens", "--stages", "1,2", "--by-labels", "--search-images", 8)
    said = call("prune", checkpoint, *empty, *options, "-o", "m", code=2).stderr
    assert said.endswith("error: b has no labels to judge by\n")


def test_labels_in_other_images_than_those_used(checkpoint):
    """One image of twelve has labels: it is used for evaluation with some seeds, and for fitting with the others."""
    write_scenes(Path("one"), 12)
    for names in ("00[1-9]", "01*"):
        fill_masks("one", 255, names)
    assert call_json("evaluate", checkpoint, "--data", "one")["data"]["labelled"] is True
    labelled = {}
    for seed in range(4):
        found = call_json("prune", checkpoint, "--data", "one", "--seed", seed, *PRUNE, "-o", f"m{seed}")
        labelled[found["data"]["labelled"]] = seed
        warned = any(line.startswith("no labelled pixel in 6 masks") for line in found["warnings"])
        assert warned != found["data"]["labelled"]
    assert labelled.keys() == {True, False}


def test_labels_that_are_held_out_or_measured_on_alone(checkpoint):
    write_scenes(Path("many"), 12)
    write_scenes(Path("few"), 3)
    call("prune", checkpoint, "--data", "many", *PRUNE, "-o", "m")
    fill_masks("few", 255)
    options = ("--data", "few", "--eval-data", "many", *TUNE, "--no-teacher", "-o", "t")
    assert "no labelled pixel in 3 masks" in refused("finetune", "m", *options)
    report = call_json("finetune", "m", "--data", "many", "--eval-data", "few", *TUNE, "--no-teacher", "-o", "t")
    assert report["data"]["labelled"] is False
    assert any(line.startswith("no labelled pixel in 3 masks") for line in report["warnings"])


@pytest.mark.parametrize("seed", range(2))
def test_the_last_epoch_is_used_if_no_pixel_held_out_has_a_label(seed):
    """32 of 640 images are held out."""
    model = make_vim_upernet()
    labels = np.full((640, 4, 4), 255, np.uint8)
    source = Images("big", 640, lambda i: Image.new("RGB", (4, 4)), str, masks=lambda i: labels[i])
    held, trained = sample_indices(640, 32, seed)
    labels[trained[5]] = 1
    images = TrainingImages(*(Batches(source, model.transform(), index) for index in (trained, held, [0])))
    with hold_notes() as notes:
        assert check_masks(images).held_out is None
    assert list(notes) == [
        "big: no labelled pixel in 32 masks (255 is ignored; with `reduce_zero_label`, 0 too) that were held out to "
        "choose the epoch; the last epoch is used"
    ]
    labels[held[3]] = 1
    assert check_masks(images) is images


def test_data_is_opened_by_reading_masks_up_to_the_first_label():
    read = []

    def mask(i):
        read.append(i)
        if i == 3:
            raise InputError("damaged")
        return np.full((2, 2), 255 if i < 2 else 0, np.uint8)

    images = Images("x", 9, lambda i: None, str, masks=mask)
    assert drop_empty_masks(images) is images
    assert read == [0, 1, 2]
    damaged = replace(images, masks=lambda i: mask(3))
    assert drop_empty_masks(damaged) is damaged  # the error is raised where it is read


# ------------------------------------------------------------------------------------------------ orientation


def save_rotated(picture, path, orientation, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_mask_belongs_to_the_picture_as_it_is_shown(orientation, suffix):
    """Orientation as in mmcv. Both sides, and all corners, differ."""
    Path("r/images").mkdir(parents=True)
    Path("r/annotations").mkdir()
    pixels = scenes(1)[0][0][:32, :48]
    save_rotated(Image.fromarray(pixels), f"r/images/a.{suffix}", orientation)
    with Image.open(f"r/images/a.{suffix}") as stored:
        stored.load()
        shown = ImageOps.exif_transpose(stored)
    mask = (np.asarray(shown.convert("L")) > 128).astype(np.uint8)
    Image.fromarray(mask).save("r/annotations/a.png")
    images = ssmcompress.open_images("r", 5, task=SEGMENTATION)
    assert np.array_equal(images.read(0), shown)
    assert images.masks(0).shape == images.read(0).size[::-1]
    model = make_vim_upernet()
    (batch,) = Batches(images, model.transform())
    assert torch.equal(batch.images[0], model.transform()(shown))
    if orientation > 4:
        Image.fromarray(mask.T).save("r/annotations/a.png")
        with pytest.raises(InputError, match="height x width 32 x 48, the image 48 x 32"):
            list(Batches(ssmcompress.open_images("r", 5, task=SEGMENTATION), model.transform()))


def test_a_png_file_may_say_after_its_pixels_that_it_is_rotated():
    Path("r/images").mkdir(parents=True)
    Path("r/annotations").mkdir()
    save_rotated(Image.fromarray(scenes(1)[0][0][:32, :48]), "r/images/a.png", 6)
    data = Path("r/images/a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    assert end < last
    Path("r/images/a.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    Image.fromarray(np.zeros((48, 32), np.uint8)).save("r/annotations/a.png")
    images = ssmcompress.open_images("r", 5, task=SEGMENTATION)
    assert images.read(0).size == (32, 48)
    (batch,) = Batches(images, make_vim_upernet().transform())
    assert batch.labels.shape == (1, 48, 32)


def test_all_images_for_segmentation_are_read_as_shown():
    """Also folders without masks, shards and tables; classifiers get the stored pixels."""
    pixels = scenes(1)[0][0][:32, :48]
    Path("flat").mkdir()
    save_rotated(Image.fromarray(pixels), "flat/a.png", 6)
    with tarfile.open("s.tar", "w") as tar:
        tar.add("flat/a.png", "a.png")
    stream = io.BytesIO()
    Image.fromarray(np.zeros((48, 32), np.uint8)).save(stream, "PNG")
    row = {"image": [{"bytes": Path("flat/a.png").read_bytes(), "path": None}]}
    masks = {"annotation": [{"bytes": stream.getvalue(), "path": None}]}
    for name, columns in (("plain.parquet", row), ("masked.parquet", row | masks)):
        Dataset.from_dict(columns, Features({key: ImageFeature() for key in columns})).to_parquet(name)
    for name in ("flat", "s.tar", "plain.parquet", "masked.parquet"):
        assert np.array_equal(ssmcompress.open_images(name, 5, task=SEGMENTATION).read(0), np.rot90(pixels, 3)), name
        if name != "masked.parquet":
            assert np.array_equal(ssmcompress.open_images(name, 5).read(0), pixels), name


def test_damaged_exif_data_lose_no_picture(tmp_path):
    pixels = scenes(1)[0][0][:32, :48]
    for data in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff", b"Exif\0\0nothing of the kind"):
        Image.fromarray(pixels).save("a.jpg", exif=data)
        assert decode(Path("a.jpg"), shown=True).size == (48, 32)
    save_rotated(Image.fromarray(pixels), "a.png", 77)
    assert np.array_equal(decode(Path("a.png"), shown=True), pixels)


# ------------------------------------------------------------------------------------------ data for other tasks


@pytest.mark.parametrize("place", ["{}", "{}:train", "{}/train"])
def test_a_classifier_is_told_that_data_has_masks(classifier, place):
    write_scenes(Path("d" if place == "{}" else "d/train"), 4)
    torch.save({"model": make_vim(classes=2).state_dict()}, "two.pth")
    name = place.format("d")
    for file in (classifier, "two.pth"):
        for command in (["evaluate"], ["prune", "--ratio", 0.3, "--no-latency"]):
            line = refused(command[0], file, "--data", name, *command[1:])
            assert f"{name} holds images and masks for segmentation (d" in line
            assert "and the model classifies whole images: give class folders, or d" in line
    inner = "d/images" if place == "{}" else "d/train/images"
    assert call_json("evaluate", classifier, "--data", inner)["data"]["labelled"] is False


def test_a_classifier_is_told_of_the_layout_of_ade20k(classifier):
    for split in ("training", "validation"):
        write_scenes(Path(split), 2)
        for kind in ("images", "annotations"):
            Path("ade", kind).mkdir(parents=True, exist_ok=True)
            Path(split, kind).rename(Path("ade", kind, split))
    for name in ("ade", "ade:validation"):
        assert f"{name} holds images and masks for segmentation" in refused("evaluate", classifier, "--data", name)


def test_folders_that_lie_too_deep_are_named(checkpoint):
    write_scenes(Path("d/e/f"), 4)
    line = refused("evaluate", checkpoint, "--data", "d")
    assert "holds images and masks for segmentation" in line
    assert "give the folder that contains both, d/e/f" in line
    for name in ("d/e/f", "d/e"):
        assert call_json("evaluate", checkpoint, "--data", name)["data"]["labelled"] is True


def test_masks_in_class_folders_are_no_images_of_their_class():
    torch.save({"model": make_vim(classes=2).state_dict()}, "two.pth")
    for name in ("a", "b"):
        write_scenes(Path("d", name), 2)
    assert "d holds images and masks for segmentation (d/a/images and d/a/annotations)" in refused(
        "evaluate", "two.pth", "--data", "d"
    )


def test_a_class_may_be_called_images(classifier):
    torch.save({"model": make_vim(classes=2).state_dict()}, "two.pth")
    for label, name in enumerate(("images", "drawings")):
        Path("k", name).mkdir(parents=True)
        Image.fromarray(scenes(2)[0][label]).save(f"k/{name}/a.png")
    assert call_json("evaluate", "two.pth", "--data", "k")["data"]["labelled"] is True


@pytest.mark.parametrize("option", ["--reduce-zero-label", "--no-reduce-zero-label"])
@pytest.mark.parametrize("command", ["evaluate", "prune", "compare"])
def test_labels_of_masks_are_no_option_for_a_classifier(classifier, class_folders, option, command):
    for data in ((), ("--data", class_folders)):
        line = refused(command, classifier, option, *data)
        assert "--reduce-zero-label is for the masks of semantic segmentation, the task is image classification" in line


def test_sizes_that_are_given_leave_colours_assumed(checkpoint):
    write_scenes(Path("d"), 4)
    said = call("evaluate", checkpoint, "--data", "d", "--short-side", 64).stderr
    assert "preprocessing is not in the file; assumed: --mean 0.485,0.456,0.406, --std 0.229,0.224,0.225\n" in said
    call("prune", checkpoint, "--data", "d", "--short-side", 64, *PRUNE, "-o", "m")
    with open("m/config.json") as file:
        assert json.load(file)["preprocessing"]["assumed"] == ["mean", "std"]
    assert ssmcompress.load("m").preprocessing.defaults == ("mean", "std")
    assert "not in the file" not in call("evaluate", "m", "--data", "d").stderr  # it is in the folder now
    given = ("--short-side", 64, "--mean", 0.5, "--std", 0.5)
    assert "not in the file" not in call("evaluate", checkpoint, "--data", "d", *given).stderr
