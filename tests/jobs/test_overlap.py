"""Overlap of fitting and evaluation images, counted by content regardless of file names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TUNE, call, call_json, refused
from conftest import make_vim, write_image
from PIL import Image
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.data import Batches, open_images
from ssmcompress.data.batches import sample_indices
from ssmcompress.data.content import digest_picture, hash_contents
from ssmcompress.errors import InputError
from ssmcompress.jobs.images import choose_measured, split_training_images, train_test_split
from ssmcompress.jobs.requests import DataOptions
from ssmcompress.models.inputs import to_batches
from ssmcompress.models.learnt import ALL, SOME, LearntFrom
from ssmcompress.progress import hold_notes

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

QUICK = ("--no-latency", "--no-reconstruct", "--stages", 2)


def read(model, folder, index=None) -> Batches:
    batches = Batches(open_images(folder, 10), model.transform(), index)
    for _ in batches:
        pass
    return batches


def to_table(folder: Path, file: Path) -> Path:
    """The pictures of class folders as a parquet table, in another order."""
    import datasets

    files = sorted(folder.rglob("*.png"))[::-1]
    encoded, labels = [{"bytes": f.read_bytes(), "path": None} for f in files], [int(f.parent.name[5:]) for f in files]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features).to_parquet(str(file))
    return file


def without_learnt(folder: Path, name=None, value=None) -> None:
    """Remove or replace the recorded images of a folder, as in folders of older versions."""
    file = folder / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if k not in (ALL, SOME)}
    save_file(state | ({name: value} if name else {}), file)


# -------------------------------------------------------------------------------------------------------- content


def test_a_picture_is_the_same_in_any_file_that_keeps_its_pixels(tmp_path):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8))
    stored = {"a.png": grey, "b.bmp": grey.convert("RGB"), "c.webp": grey.convert("RGB"), "d.gif": grey.convert("P")}
    for name, picture in stored.items():
        picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    images = open_images(tmp_path, 10)
    assert len({digest_picture(images.read(i)) for i in range(len(images))}) == 1
    others = [grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey.crop((0, 0, 7, 8)), grey.rotate(180)]
    assert len({digest_picture(picture) for picture in [grey, *others]}) == 4


def test_pixels_in_another_shape_are_another_picture():
    pixels = np.zeros((4, 6), np.uint8)
    assert digest_picture(Image.fromarray(pixels)) != digest_picture(Image.fromarray(pixels.reshape(6, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_digests_depend_on_neither_workers_nor_preprocessing(vim, class_folders, workers):
    one = read(vim, class_folders)
    other = Batches(open_images(class_folders, 10), make_vim(image=(32, 32)).transform(), workers=workers)
    assert len(list(other)) == 1
    assert np.array_equal(one.digests, other.digests)
    assert np.count_nonzero(one.digests) == 20


# ---------------------------------------------------------------------------------------------------------- prune


def test_prune_counts_a_table_of_the_pictures_of_a_folder(checkpoint, class_folders, tmp_path):
    table = to_table(class_folders, tmp_path / "table.parquet")
    found = call_json("prune", checkpoint, "--data", class_folders, "--eval-data", table, "--samples", 7, *QUICK)
    assert (found["data"]["images"], found["data"]["overlap"]) == (20, 7)
    assert "7 of the 20 measured images were also used for calibration" in " ".join(call("report").stdout.split())


def test_repeated_pictures_are_each_counted(checkpoint, class_folders, tmp_path):
    """Half of the images are copies of the others, so wherever the split is, copies are on its other side."""
    for file in class_folders.rglob("0.png"):
        shutil.copy(file, file.with_name("1.png"))
    found = call_json("prune", checkpoint, "--data", class_folders, *QUICK)
    images, (calibrated, measured) = open_images(class_folders, 10), sample_indices(20, 10, 0)
    learnt = {digest_picture(images.read(i)) for i in calibrated}
    expected = sum(digest_picture(images.read(i)) in learnt for i in measured)
    assert (found["data"]["images"], found["data"]["overlap"]) == (10, expected)
    assert expected


# ------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_says_that_images_were_calibrated_on(checkpoint, class_folders, tmp_path):
    call("prune", checkpoint, "--data", class_folders, "--eval-data", class_folders, *QUICK, "--samples", 5, "-o", "p")
    result = call("evaluate", "p", "--data", f"{class_folders}/../images", "--json")
    assert json.loads(result.stdout)["data"]["overlap"] == 5
    assert "5 of the 20 measured images were also used for calibration" in result.stderr
    write_image(tmp_path / "others" / "x.png", 777)
    result = call("evaluate", "p", "--data", tmp_path / "others", "--json")
    assert json.loads(result.stdout)["data"]["overlap"] == 0
    assert "calibration or training" not in result.stderr
    result = call("evaluate", checkpoint, "--data", class_folders, "--json")
    assert json.loads(result.stdout)["data"]["overlap"] is None
    assert "calibration or training" not in result.stderr


def test_one_file_remembers_too(checkpoint, class_folders):
    call("prune", checkpoint, "--data", class_folders, "--eval-data", class_folders, *QUICK, "--samples", 5, "-o", "p")
    call("export", "p", "-o", "p.safetensors")
    assert call_json("evaluate", "p.safetensors", "--data", class_folders)["data"]["overlap"] == 5


def test_a_folder_that_does_not_say_is_not_taken_for_one_that_learnt_nothing(checkpoint, class_folders):
    call("prune", checkpoint, "--data", class_folders, *QUICK, "-o", "p")
    without_learnt(Path("p"))
    result = call("evaluate", "p", "--data", class_folders, "--json")
    assert json.loads(result.stdout)["data"]["overlap"] is None
    assert "used for calibration or training is not known" in result.stderr
    found = call_json("finetune", "p", "--data", class_folders, *TUNE, "-o", "f")
    assert found["data"]["overlap"] is None
    assert "is not known" in " ".join(call("report", "f").stdout.split())
    # What is known of it suffices where all of them were trained on.
    found = call_json("finetune", "p", "--data", class_folders, "--eval-data", class_folders, *TUNE, "-o", "g")
    assert found["data"]["overlap"] == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ALL, torch.zeros(2, 2, dtype=torch.int64)),
        (ALL, torch.zeros(3)),
        (SOME, torch.tensor(5)),
    ],
)
def test_damaged_digests_are_refused(checkpoint, class_folders, name, value):
    call("prune", checkpoint, "--data", class_folders, *QUICK, "-o", "p")
    without_learnt(Path("p"), name, value)
    assert "expected digests of images" in refused("evaluate", "p", "--data", class_folders)


# ----------------------------------------------------------------------------------------------------- fine-tuning


def test_finetune_counts_an_image_once_under_any_path(checkpoint, class_folders, tmp_path):
    """Every measured image was calibrated on, trained on, or both."""
    table = to_table(class_folders, tmp_path / "table.parquet")
    call("prune", checkpoint, "--data", class_folders, *QUICK, "-o", "p")
    found = call_json("finetune", "p", "--data", class_folders, "--eval-data", table, *TUNE, "-o", "f")
    assert (found["data"]["images"], found["data"]["overlap"]) == (20, 20)
    assert "all 20 measured images were used for calibration or training" in " ".join(
        call("report", "f").stdout.split()
    )
    assert "all 20 measured images were used for calibration or training" in " ".join(
        Path("f/README.md").read_text().split()
    )


def test_finetune_measures_on_images_that_the_earlier_prune_did_not_calibrate_on(checkpoint, class_folders):
    """19 of 20 images are used for calibration, so the remaining one is used for evaluation."""
    call("prune", checkpoint, "--data", class_folders, "--eval-data", class_folders, *QUICK, "--samples", 19, "-o", "p")
    result = call("finetune", "p", "--data", class_folders, *TUNE, "-o", "f", "--json")
    found = json.loads(result.stdout)
    assert (found["data"]["images"], found["data"]["overlap"]) == (1, 0)
    assert "measured on 1 image instead of 2: the model has already seen the others of" in result.stderr
    assert len(ssmcompress.load("f").learnt.digests) == 19
    call("prune", checkpoint, "--data", class_folders, *QUICK, "--samples", 10, "-o", "q")
    found = call_json("finetune", "q", "--data", class_folders, *TUNE, "-o", "g")
    assert (found["data"]["images"], found["data"]["overlap"]) == (2, 0)


def test_where_all_images_were_learnt_from_the_report_says_so(checkpoint, class_folders):
    call("prune", checkpoint, "--data", class_folders, "--eval-data", class_folders, *QUICK, "-o", "p")
    result = call("finetune", "p", "--data", class_folders, *TUNE, "-o", "f", "--json")
    found = json.loads(result.stdout)
    assert (found["data"]["images"], found["data"]["overlap"]) == (2, 2)
    assert "measured on 2 images that the model has already seen: no new ones among 20 of" in result.stderr
    assert "say nothing about other images" in " ".join(call("report", "f").stdout.split())


def test_a_second_fine_tuning_knows_what_the_first_one_learnt_from(checkpoint, class_folders, tmp_path):
    for i in range(12):
        write_image(tmp_path / "others" / f"class{i % 10}" / f"{i}.png", 100 + i)
    call("prune", checkpoint, "--data", class_folders, *QUICK, "-o", "p")
    call("finetune", "p", "--data", class_folders, *TUNE, "-o", "f")
    found = call_json("finetune", "f", "--data", tmp_path / "others", "--eval-data", class_folders, *TUNE, "-o", "g")
    assert (found["data"]["images"], found["data"]["overlap"]) == (20, len(ssmcompress.load("f").learnt.digests))


def test_copies_across_the_split_are_counted(checkpoint, class_folders):
    for file in class_folders.rglob("0.png"):
        shutil.copy(file, file.with_name("1.png"))
    found = call_json(
        "prune", checkpoint, "--data", class_folders, *QUICK, "--finetune-epochs", 1, *TUNE[2:], "-o", "p"
    )
    train, test = train_test_split(20, 0)
    images = open_images(class_folders, 10)
    learnt = {digest_picture(images.read(i)) for i in train}
    assert found["data"]["images"] == 2
    assert ssmcompress.load("p").learnt.digests.tolist() == sorted(learnt)
    expected = sum(digest_picture(images.read(i)) in learnt for i in test)
    assert found["data"]["overlap"] == expected
    assert expected


def test_earlier_columns_are_copied_for_images_of_the_same_content_alone(checkpoint, class_folders):
    arguments = "--data", class_folders, "--eval-data", "measured", *QUICK
    shutil.copytree(class_folders, "measured")
    call("prune", checkpoint, *arguments, "-o", "p")
    same = call_json("finetune", "p", *arguments[:4], *TUNE, "-o", "f")
    assert "naive" in same
    for file in Path("measured").rglob("*.png"):
        write_image(file, seed=500 + int(file.parent.name[5:]))
    other = call_json("finetune", "p", *arguments[:4], *TUNE, "-o", "g")
    assert "naive" not in other
    assert other["data"]["overlap"] == 0
    assert {k: same["data"][k] for k in ("name", "images")} == {k: other["data"][k] for k in ("name", "images")}


def test_earlier_columns_are_not_copied_if_labels_preprocessing_or_dtype_differ(checkpoint, class_folders):
    """The same pictures in other classes, another mean, another dtype: the old figures do not belong in the table."""
    shutil.copytree(class_folders, "measured")
    call("prune", checkpoint, "--data", class_folders, "--eval-data", "measured", *QUICK, "-o", "p")
    options = "finetune", "p", "--data", class_folders, "--no-teacher", *TUNE[2:], "--epochs", 1
    assert "naive" in call_json(*options, "--eval-data", "measured", "-o", "same")
    assert "naive" not in call_json(*options, "--eval-data", "measured", "--mean", "0.1,0.2,0.3", "-o", "mean")
    assert "naive" not in call_json(*options, "--eval-data", "measured", "--dtype", "bfloat16", "-o", "dtype")
    shutil.copytree("measured", "permuted")
    for label in range(10):
        shutil.rmtree(f"permuted/class{label}")
        shutil.copytree(f"measured/class{(label + 1) % 10}", f"permuted/class{label}")
    assert "naive" not in call_json(*options, "--eval-data", "permuted", "-o", "labels")


def test_a_hash_of_images_is_of_pairs_of_content_and_label():
    digests, labels = np.array([7, 5, 0, 2**64 - 1], np.uint64), [1, 2, 9, 0]
    order = [3, 1, 0, 2]
    shuffled = digests[order], [labels[i] for i in order]
    assert hash_contents(digests, labels) == hash_contents(*shuffled)
    assert hash_contents(digests, labels) == hash_contents(digests, [1, 2, 4, 0])  # of one that was not read
    assert hash_contents(digests, labels) != hash_contents(digests, [2, 1, 9, 0])
    assert hash_contents(digests, labels) != hash_contents(digests, None)
    assert hash_contents(digests, None) == hash_contents(digests[order], None)


def test_the_tenth_is_the_usual_one_where_nothing_of_it_was_learnt_from(vim, class_folders):
    images, options = open_images(class_folders, 10), DataOptions(str(class_folders))
    train, test = train_test_split(20, 0)
    assert choose_measured(images, LearntFrom(), options) == test
    elsewhere = LearntFrom().add(read(vim, class_folders, train[:5]))
    with hold_notes() as notes:
        assert choose_measured(images, elsewhere, options) == test
    assert not notes
    pruned = ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    pruned.learnt = LearntFrom().add(read(vim, class_folders, test[:1]))
    with hold_notes() as notes:
        parts = split_training_images(pruned, options)
    assert len(parts.measured.index) == 2
    assert not set(parts.measured.index) & {test[0], *parts.training.index}
    assert sorted([*parts.measured.index, *parts.training.index]) == list(range(20))
    said = f"1 of the measured images of {class_folders} replaces one that the model has already seen"
    assert said in notes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_is_hashed_once_however_often_it_is_read(vim, class_folders, monkeypatch, workers):
    batches = Batches(open_images(class_folders, 10), vim.transform(), workers=workers)
    first = [batch.images for batch in batches]
    digests = batches.digests.copy()
    monkeypatch.setattr("ssmcompress.data.batches.digest_picture", lambda picture: pytest.fail("hashed again"))
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.cat(first))
    assert np.array_equal(batches.digests, digests)


# --------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("repeated", [0, 2])
def test_compare_recognises_images_that_are_given_as_tensors(vim, repeated):
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:repeated], x[repeated:] + 1])
    found = ssmcompress.compare(vim, x, eval_data=other, ratios=[0.4], methods=["naive"])
    assert found["overlap"] == repeated
    assert sum("2 of the 8 measured images were also used for calibration" in line for line in found["warnings"]) == (
        repeated > 0
    )


def test_compare_says_that_it_cannot_tell(vim, class_folders):
    x = torch.randn(4, 3, 16, 16)
    found = ssmcompress.compare(vim, str(class_folders), eval_data=x, ratios=[0.4], methods=["naive"])
    assert found["overlap"] is None
    assert any("is not known: prepared images cannot be compared with pictures" in line for line in found["warnings"])


# ---------------------------------------------------------------------------------------------- search and library


def test_images_of_an_earlier_search_count(checkpoint, class_folders, tmp_path):
    """The sensitivity was measured on other images than the model is calibrated on."""
    for i in range(20):
        write_image(tmp_path / "others" / f"class{i % 10}" / f"{i}.png", 100 + i)
    budget = "--flops", "75%", "--axes", "tokens", "--no-latency"
    call("prune", checkpoint, *budget, "--data", tmp_path / "others", "-o", "first")
    found = call_json(
        "prune", checkpoint, *budget, "--data", class_folders, "--eval-data", tmp_path / "others",
        "--sensitivity", "first", "-o", "second",
    )  # fmt: skip
    assert (found["calibration"]["images"], found["data"]["overlap"]) == (20, 10)
    value = json.loads(Path("first/sensitivity.json").read_text())
    assert len(value["digests"]) == 10
    del value["digests"]
    Path("first/sensitivity.json").write_text(json.dumps(value))
    again = "--data", class_folders, "--eval-data", tmp_path / "others", "--sensitivity", "first", "-o", "third"
    assert call_json("prune", checkpoint, *budget, *again)["data"]["overlap"] is None


def test_tensors_passed_in_python_are_unknown_images(vim, class_folders):
    plan = ssmcompress.calibrate(vim, torch.randn(4, 3, 16, 16), ratio=0.4)
    pruned = ssmcompress.prune(vim, plan)
    assert LearntFrom(complete=False).count(read(vim, class_folders)) is None
    refitted = ssmcompress.reconstruct(pruned, vim, read(vim, class_folders, range(8)))
    assert (len(refitted.learnt.digests), refitted.learnt.complete) == (8, False)
    prepared = to_batches(vim, torch.cat([batch.images for batch in read(vim, class_folders)]))
    assert len(list(prepared)) == 1
    assert LearntFrom().add(read(vim, class_folders)).count(prepared) is None
    assert LearntFrom().add(prepared).count(read(vim, class_folders)) is None
    refitted.learnt = LearntFrom()
    assert not ssmcompress.reconstruct(refitted, vim, torch.randn(4, 3, 16, 16)).learnt.complete


def test_what_was_learnt_from_survives_its_file(vim, class_folders, tmp_path):
    pruned = ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    for learnt in (None, LearntFrom(), LearntFrom().add(np.array([5, 2**64 - 1, 5, 0], np.uint64)).add(None)):
        pruned.learnt = learnt
        loaded = ssmcompress.load(ssmcompress.save(pruned, tmp_path / "m", force=True)).learnt
        if learnt is None:
            assert loaded is None
        else:
            assert loaded.complete == learnt.complete
            assert np.array_equal(loaded.digests, learnt.digests)
    assert loaded.digests.tolist() == [5, 2**64 - 1]
    with pytest.raises(InputError, match="damaged"):
        LearntFrom.from_tensors(loaded.to_tensors() | LearntFrom().to_tensors())
