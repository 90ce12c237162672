"""The commands on segmentation models: metrics, reports, budgets, comparisons, and rejected options."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, call_json, forked, refused
from PIL import Image
from segmenters import MAKERS, make_vim_upernet, scenes, write_scenes
from sklearn.metrics import confusion_matrix

import ssmcompress

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(params=MAKERS)
def checkpoint(request, tmp_path):
    """A segmentation model in mmseg's format that can be identified only by its weights."""
    model = MAKERS[request.param]()
    torch.save(
        {"meta": {"CLASSES": ("ground", "a", "b", "c", "d")}, "state_dict": model.state_dict()}, tmp_path / "s.pth"
    )
    return tmp_path / "s.pth"


@pytest.fixture
def data(tmp_path):
    write_scenes(tmp_path / "scenes", 24)
    return tmp_path / "scenes"


def test_inspect_says_what_it_is(checkpoint):
    value = call_json("inspect", checkpoint)
    assert value["task"] == "semantic segmentation"
    assert {"neck", "head"} & set(value["flops"]["by_part"])
    whole, backbone = (value["flops"][key] for key in ("full", "backbone"))
    ranges = value["range"]
    for axis, share in ranges["axes"].items():
        left = whole * share / 100 - (whole - backbone["full"])
        assert ranges["axes_backbone"][axis] == pytest.approx(100 * left / backbone["full"], abs=0.02)
    assert "of those of the backbone: " in call("inspect", checkpoint).stdout


def test_figures_are_those_of_an_independent_count(checkpoint, data):
    value = call_json("evaluate", checkpoint, "--data", data, "--short-side", 64)
    model, matrix = ssmcompress.load(checkpoint), np.zeros((5, 5))
    for picture, mask in zip(*scenes(24), strict=True):
        with torch.no_grad():
            found = model(model.transform()(Image.fromarray(picture))[None]).argmax(1)[0].numpy()
        matrix += confusion_matrix(mask.ravel(), found.ravel(), labels=range(5))
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    assert value["miou"] == pytest.approx(100 * np.mean((hits / union)[union > 0]), abs=1e-6)
    assert value["pixel_accuracy"] == pytest.approx(100 * hits.sum() / matrix.sum(), abs=1e-6)
    labelled = matrix.sum(1)
    assert value["class_accuracy"] == pytest.approx(100 * np.mean((hits / labelled)[labelled > 0]), abs=1e-6)
    other = call_json("evaluate", checkpoint, "--data", data, "--batch-size", 5)
    assert (other["miou"], other["images"]) == (pytest.approx(value["miou"], abs=1e-9), 24)
    assert "mIoU" in call("evaluate", checkpoint, "--data", data).stdout


def test_a_pruned_model_has_a_report_and_reloads(checkpoint, data):
    report = call_json(
        "prune", checkpoint, "--ratio", 0.3, "--stages", "2,4", "--data", data, "--no-latency", "-o", "m"
    )
    assert report["task"] == "segmentation"
    for column in ("dense", "naive", "aligned", "mapped", "pruned"):
        assert {"miou", "pixel_accuracy", "class_accuracy", "flops_backbone"} <= report[column].keys(), column
    dense, pruned = report["dense"], report["pruned"]
    heads = [model["flops"]["full"] - model["flops_backbone"]["full"] for model in (dense, pruned)]
    assert heads[0] == pytest.approx(heads[1])
    assert pruned["flops_backbone"]["full"] < dense["flops_backbone"]["full"]
    assert report["agreement"].keys() == {"pixels", "kl"}
    assert call_json("report", "m") == report
    text = call("report", "m").stdout
    assert "GFLOPs of the backbone" in text
    assert "mIoU" in text
    assert ssmcompress.load("m").classes == ("ground", "a", "b", "c", "d")
    again = call_json("evaluate", "m", "--data", data)
    assert again["agreement"]["pixels"] is not None
    call("report", "m", "--html", "page.html")


def test_budgets_are_met_and_several_axes_searched(tmp_path):
    torch.save({"state_dict": make_vim_upernet(depth=4, out_layers=(1, 2, 3, 4)).state_dict()}, "s.pth")
    write_scenes(tmp_path / "many", 40)
    options = ("--data", tmp_path / "many", "--search-images", 16, "--stages", "1,2", "--no-latency")
    options = (*options, "--importance", "clip", "-o", "m")
    report = call_json("prune", "s.pth", "--flops", "85%", "--axes", "channels,tokens", *options)
    assert report["pruned"]["flops"]["full"] <= 0.85 * report["dense"]["flops"]["full"]
    assert {option["axis"] for option in report["search"]["axes"]} == {"channels", "tokens"}
    tokens = call_json("prune", "s.pth", "--flops", "92%", "--axes", "tokens", *options, "--force")
    assert tokens["stages"]
    assert tokens["pruned"]["flops"]["full"] <= 0.92 * tokens["dense"]["flops"]["full"]


def test_a_budget_can_be_the_backbone_s_alone(data, tmp_path):
    """The cost of neck and head does not depend on dropped tokens; here it is more than half of the total."""
    torch.save({"state_dict": make_vim_upernet().state_dict()}, "s.pth")
    options = ("--data", data, "--stages", "1,2", "--no-latency", "--no-reconstruct", "-o", "m")
    report = call_json("prune", "s.pth", "--flops-backbone", "80%", "--no-search", *options)
    shares = [report["pruned"][key]["full"] / report["dense"][key]["full"] for key in ("flops_backbone", "flops")]
    assert 0.7 < shares[0] <= 0.8 < shares[1]
    searched = call_json("prune", "s.pth", "--flops-backbone", "80%", "--dry-run", "--search-images", 8, *options[:5])
    assert searched["pruned"]["flops"]["full"] <= shares[1] * report["dense"]["flops"]["full"] * 1.05
    # The maps of the output levels are also fitted without a reconstruction, and the budget reserves FLOPs for them.
    for share in (60, 65, 70, 75):
        within = call_json("prune", "s.pth", "--flops-backbone", f"{share}%", "--no-search", *options, "--force")
        assert within["pruned"]["flops_backbone"]["full"] <= share / 100 * within["dense"]["flops_backbone"]["full"]
    far = call("prune", "s.pth", "--flops-backbone", "1%", "--no-search", *options, "--force", code=3).stderr
    assert "1.0% of the FLOPs of the backbone, " in far
    both = refused("prune", "s.pth", "--flops", "80%", "--flops-backbone", "80%", "--data", data)
    assert "--flops and --flops-backbone: expected one of them" in both
    classifier = refused("prune", make_classifier(tmp_path), "--flops-backbone", "80%", "--no-search")
    assert "--flops-backbone is for segmentation models, and this one classifies: give --flops" in classifier
    folder = ("prune", "s.pth", "--flops-backbone", "80%", "--no-search", *options[:-2], "--json")
    call(*folder)
    assert [path.name.startswith("s-fb0.80-s1-2") for path in Path("compressed").iterdir()] == [True]


def test_two_processes_measure_and_fit_what_one_does(tmp_path):
    """13 images, 5 at a time: nothing divides evenly."""
    torch.save({"state_dict": make_vim_upernet(depth=4, out_layers=(1, 2, 3, 4)).state_dict()}, "s.pth")
    data = tmp_path / "few"
    write_scenes(data, 13)
    command = ["prune", "s.pth", "--ratio", 0.3, "--stages", "1,2", "--data", data, "--batch-size", 5]
    command += ["--no-latency", "--eval-data", data]
    one = call_json(*command, "-o", "one")
    two = json.loads(forked("together", ["ssmcompress", *command, "-o", "two", "--json"]).stdout)
    for column in ("dense", "naive", "aligned", "mapped", "pruned"):
        for figure in ("miou", "pixel_accuracy", "class_accuracy"):
            assert one[column][figure] == pytest.approx(two[column][figure], abs=1e-9 if column == "dense" else 0.2)
    assert one["data"]["images"] == two["data"]["images"] == 13


def test_how_masks_count_classes_is_remembered(data):
    """0 is not a class in these masks: the metrics are for four classes that count from 1."""
    torch.save({"state_dict": make_vim_upernet(num_classes=4).state_dict()}, "s.pth")
    options = ("--ratio", 0.3, "--stages", "2", "--data", data, "--no-latency", "--no-reconstruct")
    report = call_json("prune", "s.pth", *options, "--reduce-zero-label", "-o", "m")
    told = call_json("evaluate", "m", "--data", data, "--reduce-zero-label")
    assert call_json("evaluate", "m", "--data", data)["miou"] == told["miou"]
    said = call("evaluate", "m").stderr  # the recorded data
    assert "masks count classes from 1" in said
    assert report["pruned"]["miou"] is not None
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps(config | {"reduce_zero_label": "yes"}))
    assert "reduce_zero_label 'yes': expected true or false" in refused("evaluate", "m", "--data", data)


def test_images_without_masks_are_told_in_words_of_the_task(checkpoint, data):
    shutil.copytree(data / "images", "alone")
    said = call("evaluate", checkpoint, "--data", "alone").stderr
    assert "nothing to measure: no labels in alone" in said
    assert "labels are masks: folders images/ and annotations/" in said


def test_a_comparison_has_rows_of_levels(data, tmp_path):
    torch.save({"state_dict": make_vim_upernet().state_dict()}, "s.pth")
    methods = "zero-filled;naive;naive, mapped;clip, aligned, mapped"
    options = ("--stages", "2,4", "--ratios", "0.4", "--methods", methods, "--data", data, "--no-latency")
    value = call_json("compare", "s.pth", *options, "-o", "c")
    rows = {row["method"]: row for row in value["rows"]}
    assert list(rows) == ["dense", "naive", "zero-filled", "naive, mapped", "clip, aligned, mapped"]
    assert value["task"] == "segmentation"
    assert rows["naive, mapped"]["kl"] < rows["naive"]["kl"]
    assert all(row["miou"] is not None for row in rows.values())
    with open("c/compare.csv") as file:
        columns = next(csv.reader(file))
    assert {"miou", "pixel_accuracy", "agreement", "kl"} <= set(columns)
    assert "mIoU" in call("compare", "s.pth", *options, "-o", "c").stdout
    line = refused("compare", "s.pth", "--methods", "smaller image", "--data", data, "-o", "d")
    assert "'smaller image' is only for classifiers" in line


def test_all_tokens_can_enter_the_last_layers_again(checkpoint, data):
    options = ("--ratio", 0.3, "--stages", "2", "--reenter", 2, "--data", data, "--no-latency", "-o", "m")
    report = call_json("prune", checkpoint, *options)
    assert report["plan"]["reenter"] == 2
    assert ssmcompress.load("m").token_counts() == [16, 16, 12, 12, 16, 16, 16]
    assert "--reenter needs --ratio" in refused("prune", checkpoint, "--flops", "80%", "--reenter", 1, "--data", data)


def test_what_is_not_for_the_task_is_refused(checkpoint, data, tmp_path, class_folders):
    assert "decode_head" in refused("inspect", make_classifier(tmp_path), "--task", "segmentation")
    assert "not a model for image classification" in refused("inspect", checkpoint, "--task", "classification")
    classifier = make_classifier(tmp_path)
    line = refused("prune", classifier, "--architecture", "vim", "--reenter", 1, "--data", class_folders)
    assert "read out every position" in line
    assert "crop" in refused("evaluate", checkpoint, "--data", data, "--crop-pct", "0.9")


def make_classifier(folder):
    from conftest import make_vim

    torch.save({"model": make_vim().state_dict()}, folder / "c.pth")
    return folder / "c.pth"


def test_masks_that_do_not_belong_are_errors_of_one_line(checkpoint, data):
    mask = data / "annotations" / "003.png"
    pixels = np.asarray(Image.open(mask)).copy()
    pixels[0, :3] = 9
    Image.fromarray(pixels).save(mask)
    line = refused("evaluate", checkpoint, "--data", data)
    assert "label 9 in 3 pixels" in line
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(mask)
    assert "003" in refused("evaluate", checkpoint, "--data", data)
    mask.unlink()
    line = refused("evaluate", checkpoint, "--data", data)
    assert "1 of 24 images" in line
