"""`evaluate`: accuracy, agreement, and unreadable images."""

import json

import pytest
import torch
from command_line import call, call_json
from conftest import BUNDLED

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_unreadable_images_are_skipped_and_counted(checkpoint, class_folders):
    (class_folders / "class3" / "broken.png").write_bytes(b"no image")
    result = call("evaluate", checkpoint, "--data", class_folders, "--json")
    assert json.loads(result.stdout)["images"] == 20
    assert "skipped 1 unreadable images" in result.stderr
    found = call_json("prune", checkpoint, "--data", class_folders, "--no-latency")
    assert len(found["data"]["unreadable"]) + len(found["calibration"]["unreadable"]) == 1


def test_evaluate_says_when_the_dense_model_is_gone(checkpoint):
    call("prune", checkpoint, "--no-latency", "--quiet", "-o", "m")
    assert call_json("evaluate", "m")["agreement"]["kl"] >= 0
    checkpoint.unlink()
    result = call("evaluate", "m", "--json")
    assert "agreement was not measured: the dense model" in result.stderr
    assert "agreement" not in json.loads(result.stdout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_bundled_images_on_a_gpu():
    pytest.importorskip("datasets", reason="a machine with a GPU may lack it")
    there = call_json("evaluate", BUNDLED, "--device", "cuda")
    here = call_json("evaluate", BUNDLED, "--device", "cpu")
    assert (there["top1"], there["top5"], there["images"]) == (here["top1"], here["top5"], here["images"])
