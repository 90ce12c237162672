"""`benchmark`: models and ops."""

import json
import sys

import pytest
import torch
from command_line import call, call_json, refused
from conftest import make_vim
from segmenters import make_vim_upernet
from timm.models.vision_transformer import VisionTransformer

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_benchmark_of_models_side_by_side(checkpoint):
    torch.save({"model": make_vim(depth=2).state_dict()}, "other.pth")
    found = call_json("benchmark", checkpoint, "other.pth", "--batch-sizes", "1,3", "--repeats", 2, "--threads", 1)
    assert [(m["model"], m["batch"]) for m in found["models"]] == [
        (str(checkpoint), 1), ("other.pth", 1), (str(checkpoint), 3), ("other.pth", 3),
    ]  # fmt: skip
    assert (found["settings"]["threads"], found["settings"]["dtype"], found["settings"]["repeats"]) == (1, "float32", 2)
    assert {"torch", "numba", "ssmcompress"} <= set(found["settings"]["versions"])
    assert "ops" not in found
    shown = call("benchmark", "other.pth", "--repeats", 2, "--reference", "--dtype", "bfloat16").stdout
    assert "x reference" in shown
    assert "bfloat16, medians of 2 interleaved runs" in shown


def test_benchmark_of_a_pruned_folder_runs_beside_its_dense_model(checkpoint):
    call("prune", checkpoint, "--no-latency", "-o", "pruned")
    found = call_json("benchmark", "pruned", "--batch-sizes", 1, "--repeats", 1)["models"]
    assert [m["model"] for m in found] == ["dense", "pruned"]
    checkpoint.unlink()
    alone = call("benchmark", "pruned", "--batch-sizes", 1, "--repeats", 1, "--json")
    assert "the dense model was not timed" in alone.stderr
    assert [m["model"] for m in json.loads(alone.stdout)["models"]] == ["pruned"]


def test_the_load_is_taken_before_and_after(checkpoint, monkeypatch):
    loads = iter([0.25, 64000.0])
    for module in ("ssmcompress.evaluation.latency", "ssmcompress.jobs.benchmark"):
        monkeypatch.setattr(f"{module}.system_load", lambda: next(loads))
    shown = call("benchmark", checkpoint, "--batch-sizes", 1, "--repeats", 1).stdout
    assert "the machine was busy when the models were timed, with a load of 0.25 before and 64000 after" in shown
    loads = iter([0.25, 0.5])
    found = call_json("benchmark", checkpoint, "--batch-sizes", 1, "--repeats", 1)["settings"]
    assert (found["load"], found["load_after"]) == (0.25, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_are_timed_in_the_same_rounds(checkpoint, monkeypatch, dtype):
    """timm's patches of 16 pixels would make these images of 16 x 16 a single token."""
    rounds, kinds = [], []
    forward = VisionTransformer.forward

    def spy(model, images):
        result = forward(model, images)
        rounds.append((tuple(images.shape), tuple(result.shape)))
        kinds.append(result.dtype)
        return result

    monkeypatch.setattr(VisionTransformer, "forward", spy)
    options = ("--batch-sizes", 2, "--repeats", 6, "--reference", "--dtype", dtype)
    found = call_json("benchmark", checkpoint, "--peers", *options)
    names = ["timm deit_tiny_patch16_224", "timm deit_small_patch16_224"]
    assert [row["model"] for row in found["models"]] == [str(checkpoint), *names]
    for row in found["models"][1:]:
        assert row["times_faster_low"] <= row["times_faster"] <= row["times_faster_high"]
        assert row["ms"] > 0
        assert row["peak_mb"] > 0
        unknown = ("products_ms", "times_products", "reference_ms", "times_reference", "activations_mb")
        assert [row[key] for key in (*unknown, "times_fewer_flops")] == [None] * 6
    assert rounds == [((2, 3, 16, 16), (2, 10))] * 2 * 8  # warm-up, six rounds and the memory, of both
    assert set(kinds) == {getattr(torch, dtype)}
    about = found["settings"]
    assert about["peers"] == {"image_size": [16, 16], "patch_size": [4, 4], "tokens": 17}
    assert "timm" in about["versions"]
    shown = call("benchmark", checkpoint, "--peers", "--batch-sizes", 1, "--repeats", 1).stdout
    assert "images of 16x16 pixels in patches of 4x4 are 17 tokens" in shown


def test_peers_that_cannot_be(checkpoint, monkeypatch):
    assert "--peers: expected at least one model to compare with" in refused("benchmark", "--ops", "--peers")
    torch.save({"model": make_vim_upernet().state_dict()}, "segments.pth")
    assert "--peers are models for classification" in refused("benchmark", "segments.pth", "--peers")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "--peers needs the package timm: pip install timm" in refused("benchmark", checkpoint, "--peers")


def test_benchmark_of_ops():
    found = call_json("benchmark", "--ops", "--shape", "1,4,5,2", "--repeats", 1)
    assert {o["op"] for o in found["ops"]} == {
        "scan", "scan backward", "snakes", "conv", "conv backward", "conv 7x7 pruned", "one layer",
    }  # fmt: skip
    assert "ns/element" in call("benchmark", "--ops", "--shape", "1,4,5,2", "--repeats", 1).stdout
    assert "nothing to time" in refused("benchmark")
    assert "batch,length,d_inner,d_state" in refused("benchmark", "--ops", "--shape", "1,2,3")
    assert "numbers above 0" in refused("benchmark", "--ops", "--batch-sizes", "0")
