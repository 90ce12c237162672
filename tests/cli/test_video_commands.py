"""Commands on a video model, and `--views`."""

import json
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from tiny_video import make_tiny_video, tiny_video_is_known  # noqa: F401
from videos import write_frames

import ssmcompress
from ssmcompress.data import Batches, open_images

# `prune` draws the kept tokens of frames with the module that arranges them.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tiny.pt and with videos in two classes."""
    root = tmp_path_factory.mktemp("videos")
    torch.save(make_tiny_video(2).state_dict(), root / "tiny.pt")
    for label in range(2):
        for i in range(6):
            write_frames(root / "data" / f"class{label}" / f"v{i}", 6 + i, (8, 24), base=15 * i + 100 * label)
    return root


@pytest.fixture
def folder(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return files


def evaluate(folder, *options):
    return json.loads(call("evaluate", folder / "tiny.pt", "--data", folder / "data", "--json", *options).stdout)


def test_the_view_is_named(folder):
    value = evaluate(folder)
    assert value["views"] == {"clips": 1, "crops": 1}
    assert value["images"] == 12
    shown = call("evaluate", folder / "tiny.pt", "--data", folder / "data").stdout
    assert "view of each video: 1 clip x centre crop\n" in shown


def test_several_views_are_averaged(folder):
    value = evaluate(folder, "--views", "2x3")
    assert value["views"] == {"clips": 2, "crops": 3}
    model = ssmcompress.load(folder / "tiny.pt")
    batches = Batches(open_images(folder / "data", 2, videos=True), model.transform(views=(2, 3)))
    assert value["top1"] == ssmcompress.evaluate(model, batches).top1
    shown = call("evaluate", folder / "tiny.pt", "--data", folder / "data", "--views", "2X3").stdout
    assert "view of each video: 2 clips x 3 crops, the mean of their probabilities" in shown


def test_the_batch_size_changes_no_figure(folder):
    values = [evaluate(folder, "--views", "2x3", "--batch-size", size) for size in ("1", "5", "64")]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("views", ["4", "0x3", "3x", "axb", "4x3x2", "-1x3"])
def test_other_texts_are_refused(folder, views):
    assert f"--views {views}: expected CLIPSxCROPS, such as 4x3" in refused(
        "evaluate", folder / "tiny.pt", f"--views={views}"
    )


def test_too_many_views_are_refused(folder):
    assert "--views 99x1: expected clips and crops, 1 to 64 of each" in refused(
        "evaluate", folder / "tiny.pt", "--data", folder / "data", "--views", "99x1"
    )


@pytest.mark.parametrize("command", [("evaluate",), ("prune", "-o", "out"), ("compare", "-o", "out")])
def test_models_of_images_have_no_views(folder, checkpoint, class_folders, command):
    message = refused(*command, checkpoint, "--data", class_folders, "--views", "2x1")
    assert "--views are clips and crops of videos, and the model takes images" in message
    assert not Path("out").exists()


def test_a_comparison_goes_on_with_the_same_views(folder):
    options = ("compare", folder / "tiny.pt", "--data", folder / "data", "--methods", "l1; l2", "--ratios", "0.5")
    options = (*options, "--no-latency", "-o", "out")
    call(*options, "--views", "2x1")
    assert json.loads(Path("out/compare.json").read_text())["settings"]["views"] == {"clips": 2, "crops": 1}
    call(*options, "--views", "2x1")
    assert "other views of each video" in refused(*options)


def test_class_folders_of_pictures_are_refused(folder):
    for label in range(2):
        write_frames(Path(f"pictures/class{label}"), 4, (8, 8))
    message = refused("evaluate", folder / "tiny.pt", "--data", "pictures")
    assert "2 folders of pictures (class0, class1), as many as the model has classes" in message


def test_sample_photographs_stand_in(folder):
    value = json.loads(call("evaluate", folder / "tiny.pt", "--dense", folder / "tiny.pt", "--json").stdout)
    assert value["data"]["name"] == "sample photographs"
    assert value["agreement"]["top1"] == 100


def test_a_pruned_model_is_measured_on_the_views_and_remembers_its_data(folder):
    """The report, its table and the model card name the views; the recipe repeats them."""
    options = ("--ratio", "0.5", "--importance", "l2", "--no-latency", "-o", "out")
    call("prune", folder / "tiny.pt", "--data", folder / "data", "--views", "2x3", *options)
    report = json.loads(Path("out/report.json").read_text())
    assert report["views"] == {"clips": 2, "crops": 3}
    assert report["data"]["images"] == report["calibration"]["images"] == 6
    assert "2 clips x 3 crops" in call("report", "out").stdout
    assert "2 clips x 3 crops" in Path("out/README.md").read_text()
    assert "views: 2x3" in Path("out/recipe.yaml").read_text()
    card = call("push", "out", "owner/name", "--license", "mit", "--dry-run").stdout
    assert "video-classification" in card
    assert "6 videos, 2 clips x 3 crops" in card
    value = json.loads(call("evaluate", "out", "--json").stdout)  # on the videos that the folder names
    assert value["images"] == 12
    assert value["agreement"]["top1"] is not None
    call("run", "out/recipe.yaml", "-o", "again")
    again = ssmcompress.load("again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in ssmcompress.load("out").state_dict().items())


def test_a_pruned_model_is_fine_tuned(folder):
    options = ("--ratio", "0.5", "--importance", "l2", "--no-latency", "-o", "out")
    call("prune", folder / "tiny.pt", "--data", folder / "data", *options)
    recipe = ("--set", "batch_size=4", "--set", "cutmix=1.0", "--epochs", "1")
    call("finetune", "out", "--data", folder / "data", *recipe, "--views", "1x3", "--no-latency", "-o", "tuned")
    assert json.loads(Path("tuned/report.json").read_text())["views"] == {"clips": 1, "crops": 3}
