"""The commands for a VMamba: stages in its last layers, budgets, and options that are for other models."""

import pytest
import torch
from command_line import call_json, refused
from conftest import make_vmamba, write_image

SIZE = ("--image-size", "64x48")
QUICK = ("--search-images", 8, "--no-latency")


@pytest.fixture
def vmamba(in_an_empty_folder):
    model = make_vmamba(depths=(2, 2), channels=3)
    torch.save({"model": model.publish(dict(model.state_dict()))}, "vssm.pth")
    return "vssm.pth"


def test_a_search_with_a_stage_in_the_last_layer_is_used_again(vmamba, class_folders):
    options = (*SIZE, "--data", class_folders, *QUICK, "--stages", "1,4")
    first = call_json("prune", vmamba, *options, "--flops", "80%", "-o", "m")
    again = call_json("prune", vmamba, *options, "--flops", "80%", "--sensitivity", "m", "-o", "n")
    assert again["stages"] == first["stages"]
    assert {stage["after"] for stage in first["stages"]} <= {1, 4}


def test_a_loss_is_kept_by_dropping_tokens_alone(vmamba, tmp_path):
    for number in range(40):
        write_image(tmp_path / "many" / f"class{number % 10}" / f"{number}.png", seed=number)
    options = (*SIZE, "--data", tmp_path / "many", "--search-images", 16, "--no-latency", "--no-reconstruct")
    report = call_json(
        "prune", vmamba, *options, "--max-drop", "60", "--stages", "1,3", "--importance", "l2", "-o", "m"
    )
    assert report["search"]["drop"]["points"] <= 60
    assert report["trims"] == {}
    assert report["stages"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reenter", 1), "--reenter is for models that read out every position"),
        (("--merge", 4), "importance 'keys': layer 1 of a vmamba has none"),
        (("--stride", 8), "the tokens of a VMamba are 4 pixels apart"),
        (("--flops-backbone", "90%"), "--flops-backbone is for segmentation models"),
    ],
    ids=["reenter", "merge", "stride", "backbone"],
)
def test_options_for_other_models_are_refused(vmamba, class_folders, options, message):
    assert message in refused("prune", vmamba, *SIZE, *options, "--data", class_folders)
