"""The command `compare` with several models."""

import csv
import json
from pathlib import Path

import pytest
import torch
from command_line import call, call_json, refused
from conftest import BUNDLED, make_plain_mamba, make_vim, make_vit, select_bundled_images

import ssmcompress

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
FEW = ("--ratios", 0.4, "--methods", "naive; smaller image", "--no-latency")


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": make_plain_mamba(channels=1, image=(32, 32)).state_dict()}, path)
    return path


def test_two_families_are_compared_on_the_same_pictures(plain, tmp_path):
    """The bundled Vim, a folder, and a PlainMamba, a file for images of another size."""
    images = select_bundled_images(24, tmp_path / "images.parquet")
    options = ("--data", images, *FEW[:4])
    result = call("compare", BUNDLED, plain, *options, "--image-size", 32, "--mean", "0.5", "--std", "0.5")
    folder = Path(f"compared/{BUNDLED.name}+plain")
    assert (
        f"wrote {folder}/compare.json, compare.csv, pareto.png and pareto.svg, and a folder for each" in result.stderr
    )
    assert "--image-size, --mean, --std: applied to files only; folders keep their own settings" in result.stderr
    for text in ("(vim, 28x28)", "(plain_mamba, 32x32)", "smaller image", "images/s", "at FLOPs", "12 images of"):
        assert text in result.stdout
    value = json.loads((folder / "compare.json").read_text())
    vim, other = value["models"]
    assert (vim["image_size"], other["image_size"]) == ([28, 28], [32, 32])
    assert vim["dense"]["top1"] > 70 > other["dense"]["top1"]
    recorded = ssmcompress.load(BUNDLED).preprocessing
    for name, mean in ((vim["name"], list(recorded.mean)), ("plain", [0.5])):
        alone = json.loads((folder / name / "compare.json").read_text())
        assert alone["settings"]["preprocessing"]["mean"] == mean
    assert len(list(csv.DictReader((folder / "compare.csv").open()))) == 6
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (folder / "pareto.svg").read_bytes()


def test_json_is_what_the_file_says_and_a_second_run_measures_nothing(checkpoint, class_folders, tmp_path):
    other = tmp_path / "other.pt"
    torch.save({"model": make_vim(seed=2).state_dict()}, other)
    arguments = ("compare", checkpoint, other, "--data", class_folders, *FEW, "-o", "c")
    first = call_json(*arguments)
    assert json.loads(Path("c/compare.json").read_text()) == first
    again = call_json(*arguments)
    assert again["rows"] == first["rows"]


def test_a_warning_is_called_one_once(checkpoint, class_folders):
    data = ("--data", class_folders, "--eval-data", class_folders, "--ratios", 0.4, "--methods", "clip, aligned")
    printed = call("compare", checkpoint, *data, "--no-latency").stdout
    assert "warning: all 20 measured images were used for calibration or training" in " ".join(printed.split())
    assert "warning: warning:" not in printed


def test_checkpoints_of_one_name_are_told_apart(checkpoint, class_folders, tmp_path):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "model.pt"
    torch.save({"model": make_vim(seed=2).state_dict()}, other)
    value = call_json("compare", checkpoint, other, "--data", class_folders, *FEW, "-o", "c")
    assert [about["name"] for about in value["models"]] == [f"{tmp_path.name}-model", "b-model"]
    assert value["rows"][0]["kl"] is None
    assert {row["model"] for row in value["rows"]} == {f"{tmp_path.name}-model", "b-model"}


def test_models_that_do_not_fit_together_are_refused_in_one_line(checkpoint, class_folders, tmp_path):
    seven = tmp_path / "seven.pt"
    torch.save({"model": make_vim(classes=7).state_dict()}, seven)
    given = ("compare", checkpoint, seven, "--data", class_folders)
    assert "seven: 7 classes, and model has 10: expected models with the same classes" in refused(*given)
    assert "is given twice" in refused("compare", checkpoint, checkpoint, "--data", class_folders)
    assert "give --data" in refused("compare", checkpoint, BUNDLED)
    line = refused("compare", checkpoint, class_folders, "--data", class_folders)
    assert "holds images; expected a checkpoint" in line
    assert "no such file" in refused("compare", checkpoint, "typo.pt", "--data", class_folders)


def test_options_of_files_are_refused_where_all_models_are_folders(class_folders, tmp_path):
    folders = [ssmcompress.save(make_vim(seed=seed), tmp_path / f"m{seed}") for seed in (1, 2)]
    line = refused("compare", *folders, "--data", class_folders, "--mean", "0.5", "--crop-pct", "90%")
    assert "--mean, --crop-pct: only for checkpoint files, but all models are folders; leave it out" in line


def test_a_method_is_left_out_with_a_note(checkpoint, class_folders, tmp_path):
    one_state = tmp_path / "one-state.pt"
    torch.save({"model": make_vim(d_state=1).state_dict()}, one_state)
    options = ("--data", class_folders, "--ratios", 0.4, "--methods", "naive; states, reconstructed", "--no-latency")
    result = call("compare", checkpoint, one_state, *options)
    assert "one-state: left out 'states, reconstructed', which trims states" in result.stderr
    assert "one-state: without 'states, reconstructed'" in result.stdout


def test_heads_are_for_the_files_that_have_some(checkpoint, class_folders, tmp_path):
    """With a ViT, the option is ignored for a Vim, with a note; with a Vim alone, it is rejected."""
    torch.save({"model": make_vit().state_dict()}, tmp_path / "vit.pth")
    options = ("--data", class_folders, *FEW, "--num-heads", 3)
    result = call("compare", checkpoint, tmp_path / "vit.pth", *options)
    assert "a model of type vim has no such option; the option is ignored" in result.stderr
    assert "(vit, 16x16)" in result.stdout
    assert "a model of type vim has no such option" in refused("compare", checkpoint, *options)
