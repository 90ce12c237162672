"""Warnings about accuracy at chance, low agreement and similar images."""

import json
from pathlib import Path

import pytest
import torch
from command_line import call, call_json
from conftest import make_vim, write_image

from ssmcompress.jobs import report_text
from ssmcompress.jobs.doubts import Subject, doubt_calibration, find_doubts
from ssmcompress.tasks import CLASSIFICATION, SEGMENTATION, Evaluation


@pytest.mark.parametrize(
    ("top1", "images", "classes", "expected"),
    [
        (0.0, 50, 1000, True),
        (2.0, 50, 1000, True),  # one of 50 is right now and then
        (0.1, 50_000, 1000, True),
        (0.2, 50_000, 1000, True),
        (1.2, 50_000, 1000, True),  # numbers sorted as strings: 12 of 1,000 classes keep their places
        (0.9, 5000, 1000, True),
        (1.0, 500, 1000, True),
        (5.0, 20, 1000, False),  # one of 20 is fifty times chance
        (3.5, 50_000, 1000, False),
        (5.4, 3680, 37, True),  # 2 of 37
        (9.0, 3680, 37, False),
        (0.0, 8, 1000, False),  # too few images to tell
        (6.0, 2000, 20, True),
        (10.0, 2000, 20, False),
        (10.0, 2000, 10, True),
        (14.0, 2000, 10, False),
        (50.0, 200, 2, True),
        (0.0, 3, 2, False),  # too few images to tell
        (100 / 3, 3, 2, False),
        (0.0, 8, 10, False),
        (100.0, 40, 10, False),
        (100.0, 40, 1, False),  # one class is always right
    ],
)
def test_what_counts_as_chance(top1, images, classes, expected):
    assert CLASSIFICATION.is_at_chance(Evaluation(images, True, top1=top1), classes) is expected


def dense_at_chance(**facts):
    (line,) = find_doubts(Subject(10, 100, **facts), Evaluation(100, True, top1=9.0), None)
    return line


def test_likely_causes_follow_from_what_is_known():
    assert "`mean` and `std`, which were assumed" in dense_at_chance(assumed=("mean", "std"))
    assert "check `std`, which was assumed" in dense_at_chance(assumed=("std",))
    assert "`mean`" not in dense_at_chance()
    assert "classes, which are numbered by their names" in dense_at_chance(by_name=True)
    more = find_doubts(Subject(1000, 50_000), Evaluation(50_000, True, top1=1.2), None)
    assert "1.2 % of 50000 images, hardly more than chance with 1000 classes" in more[0]
    for line in (dense_at_chance(), dense_at_chance(assumed=("mean", "std"), by_name=True)):
        assert "the dense model finds the class of 9 % of 100 images, no more than chance with 10 classes" in line
        assert "`stride` or `architecture`" in line


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"own_images": False}, "give `data`"),
        ({}, "refit later layers (`reconstruct`"),
        ({"refitted": True}, "keep more tokens (a lower `ratio`, a higher `flops`), or fine-tune"),
        ({"refitted": True, "tuned": True}, "fine-tune for more epochs"),
        ({"pruned": False}, "the dense model that this one was made from"),
    ],
    ids=str,
)
def test_the_next_lever_is_one_that_was_not_used(facts, advice):
    subject = Subject(10, 40, **{"pruned": True, **facts})
    (line,) = find_doubts(subject, Evaluation(40, False), Evaluation(40, False, agreement=47.5, kl=1.0))
    assert line.startswith("only 47.5 % of 40 images get the dense model's class")
    assert advice in line


def test_good_figures_and_missing_ones_are_no_reason_to_warn():
    subject = Subject(10, 40, pruned=True)
    good = Evaluation(40, True, top1=80.0, agreement=50.0, kl=0.1)
    assert find_doubts(subject, Evaluation(40, True, top1=82.0), good) == []
    assert find_doubts(subject, None, Evaluation(40, False)) == []


def test_without_the_dense_model_the_model_itself_is_judged():
    subject = Subject(10, 40, pruned=True)
    (line,) = find_doubts(subject, None, Evaluation(40, True, top1=10.0))
    assert line.startswith("the model finds")
    dense, pruned = Evaluation(40, True, top1=80.0), Evaluation(40, True, top1=10.0, agreement=20.0)
    (line,) = find_doubts(subject, dense, pruned)
    assert line.startswith("only 20 %")  # pruning explains it


@pytest.mark.usefixtures("in_an_empty_folder")
def test_commands_say_so(checkpoint, class_folders, tmp_path):
    """A model with random weights is at chance, and so are models made from it."""
    plain = call("evaluate", checkpoint, "--data", class_folders).stdout
    assert "warning: the dense model finds the class" in plain or "warning: the model finds the class" in plain
    assert "--mean and --std, which were assumed" in plain
    given = ("--data", class_folders, "--mean", 0.5, "--std", 0.5)
    quiet = call("evaluate", checkpoint, *given, "--json")
    assert json.loads(quiet.stdout)["warnings"]
    assert "warning: " in quiet.stderr
    assert "--mean" not in quiet.stderr
    options = ("--data", class_folders, "--eval-data", class_folders, "--no-latency")
    found = call_json("prune", checkpoint, "--ratio", 0.9, "--no-align", "--no-reconstruct", *options, "-o", "m")
    assert found["agreement"]["top1"] < 50
    assert [line.split(" ")[0] for line in found["warnings"]] == ["the", "only"]
    shown = call("report", "m", "--html", "page.html").stdout
    assert "refit later layers (--reconstruct" in shown
    with open("page.html") as page, open("m/README.md") as card:
        assert "<code>reconstruct</code>" in page.read()
        assert "warning: only" in card.read()
    compared = call("compare", checkpoint, *options, "--methods", "naive", "--ratios", "30%")
    assert "warning: the dense model finds" in compared.stdout


def test_masks_without_a_labelled_pixel_are_a_reason_to_warn():
    nothing = Evaluation(8, False, miou=None, agreement=90.0)
    subject = Subject(5, 8, pruned=True, masks=8, task=SEGMENTATION)
    line = "no labelled pixel in 8 masks (255 is ignored; with `reduce_zero_label`, 0 too): the accuracy of {} was not"
    for dense, who in ((nothing, "the dense model"), (None, "the model")):
        (found,) = find_doubts(subject, dense, nothing)
        assert found.startswith(line.format(who))
    assert find_doubts(Subject(5, 8, task=SEGMENTATION), nothing, nothing) == []
    assert find_doubts(subject, None, Evaluation(8, True, miou=40.0, chance=20.0)) == []


def test_a_page_escapes_what_is_not_code():
    marked = report_text._mark_code("a `mean` <b>")
    assert marked == "a <code>mean</code> &lt;b&gt;"
    assert report_text._mark_code("odd ` <") == "odd ` &lt;"


@pytest.mark.usefixtures("in_an_empty_folder")
def test_default_preprocessing_is_said_once_and_remembered(tmp_path):
    torch.save(make_vim(depth=2).state_dict(), "vim.pt")
    for i in range(4):
        write_image(tmp_path / "images" / f"{i}.png", i)
    options = ("--data", tmp_path / "images", "--no-latency", "--no-reconstruct")
    said = call("prune", "vim.pt", *options, "-o", "m").stderr
    line = "preprocessing is not in the file; assumed: --mean 0.485,0.456,0.406, --std 0.229,0.224,0.225, --crop-pct 1"
    assert said.count(line) == 1
    with open("m/config.json") as file:
        assert json.load(file)["preprocessing"]["assumed"] is True
    assert "preprocessing was assumed: mean 0.485" in call("report", "m").stdout
    assert line not in call("evaluate", "m", "--data", tmp_path / "images").stderr  # it is in the folder now
    assert line in call("evaluate", "vim.pt", "--data", tmp_path / "images").stderr
    assert line not in call("evaluate", "vim.pt", "--data", tmp_path / "images", "--quiet").stderr
    cropped = call("prune", "vim.pt", *options, "--crop-pct", "90%", "-o", "c").stderr
    assert "assumed: --mean 0.485,0.456,0.406, --std 0.229,0.224,0.225, --interpolation bicubic\n" in cropped
    given = call("prune", "vim.pt", *options, "--mean", 0.5, "--std", 0.5, "--crop-pct", "90%", "-o", "n")
    assert "assumed" not in given.stderr + given.stdout
    with open("n/config.json") as file:
        preprocessing = json.load(file)["preprocessing"]
    assert preprocessing["crop_pct"] == 0.9
    assert "assumed" not in preprocessing


@pytest.mark.parametrize(
    ("images", "distinct", "classes", "words"),
    [
        (1024, 1024, {"seen": 640, "of": 1000}, []),  # as a random choice of ImageNet has
        (1024, 1024, None, []),
        (8, 4, {"seen": 1, "of": 10}, []),  # too few for it to be no accident
        (64, 32, None, ["only 32 of 64 images"]),
        (1024, 1024, {"seen": 50, "of": 1000}, ["only 50 of 1000 classes"]),
        (64, 64, {"seen": 5, "of": 10}, ["only 5 of 10 classes"]),
        (64, 64, {"seen": 6, "of": 10}, []),
        (64, 3, {"seen": 1, "of": 10}, ["only 3 of 64", "only 1 of 10 classes"]),
    ],
)
def test_images_to_calibrate_on_that_are_alike_are_told(images, distinct, classes, words):
    lines = doubt_calibration({"images": images, "distinct": distinct, "classes": classes})
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_reports_of_earlier_versions_say_nothing_of_it():
    assert doubt_calibration({"name": "x", "images": 64}) == doubt_calibration({}) == []


@pytest.mark.usefixtures("in_an_empty_folder")
def test_prune_says_so_of_copies_of_an_image(checkpoint):
    for label in range(10):
        for copy in range(8):
            write_image(Path("same") / f"class{label}" / f"{copy}.png", seed=label % 2)
    arguments = "prune", checkpoint, "--ratio", 0.3, "--data", "same", "--no-latency", "--no-reconstruct", "-o", "m"
    shown = " ".join(call(*arguments).stdout.split())
    assert "only 2 of 40 images to calibrate on are different: give more (--data)" in shown
    found = json.loads(Path("m/report.json").read_text())["calibration"]
    assert (found["images"], found["distinct"]) == (40, 2)
    assert found["classes"]["of"] == 10
    assert found["classes"]["seen"] > 5
