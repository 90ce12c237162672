"""`benchmark`: models and ops."""

import json

import pytest
import torch
from command_line import call, call_json, refused
from conftest import make_vim

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


def test_benchmark_of_ops():
    found = call_json("benchmark", "--ops", "--shape", "1,4,5,2", "--repeats", 1)
    assert {o["op"] for o in found["ops"]} == {
        "scan", "scan backward", "snakes", "conv", "conv backward", "conv 7x7 pruned", "one layer",
    }  # fmt: skip
    assert "ns/element" in call("benchmark", "--ops", "--shape", "1,4,5,2", "--repeats", 1).stdout
    assert "nothing to time" in refused("benchmark")
    assert "batch,length,d_inner,d_state" in refused("benchmark", "--ops", "--shape", "1,2,3")
    assert "numbers above 0" in refused("benchmark", "--ops", "--batch-sizes", "0")
