"""`export` and `verify`."""

import os

import pytest
import torch
from command_line import call, call_json, refused
from conftest import make_vim

import ssmcompress

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_export_as_one_file_that_every_command_takes(images):
    checkpoint = os.path.abspath("model.pt")
    torch.save({"model": make_vim(depth=2).state_dict()}, checkpoint)
    call("prune", checkpoint, "--no-latency", "--quiet")
    assert call_json("export") == {"file": str(os.path.abspath("compressed/model-r0.30.safetensors"))}
    one, folder = ssmcompress.load("compressed/model-r0.30.safetensors"), ssmcompress.load("compressed/model-r0.30")
    assert torch.equal(one(images), folder(images))
    assert call_json("inspect", "compressed/model-r0.30.safetensors")["pruned"]
    assert call_json("evaluate", "compressed/model-r0.30.safetensors")["images"] == 64
    found = call_json("export", "compressed/model-r0.30.safetensors", "--onnx", "--no-latency", "-o", "m.onnx")
    assert found["passed"]
    verified = call_json("verify", "compressed/model-r0.30", "m.onnx")
    assert verified["max_difference"] == found["max_difference"]
    assert "does not compute" in refused("verify", "compressed/model-r0.30", "m.onnx", "--atol", "0", code=4)
    assert not call_json("verify", "compressed/model-r0.30", "m.onnx", "--atol", "0", code=4)["passed"]
    assert call_json("report", "compressed/model-r0.30.safetensors") == call_json("report", "compressed/model-r0.30")
    again = ssmcompress.load("compressed/model-r0.30.safetensors").made_by
    assert again == folder.made_by
    assert again.command == f"ssmcompress prune {checkpoint} --no-latency --quiet"
