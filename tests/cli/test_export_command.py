"""`export` and `verify`."""

import json
import os

import onnx
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
    assert found["session"] == {"intra_op_num_threads": 0, "config": {"session.intra_op.allow_spinning": "0"}}
    verified = call_json("verify", "compressed/model-r0.30", "m.onnx")
    assert verified["max_difference"] == found["max_difference"]
    assert "does not compute" in refused("verify", "compressed/model-r0.30", "m.onnx", "--atol", "0", code=4)
    assert not call_json("verify", "compressed/model-r0.30", "m.onnx", "--atol", "0", code=4)["passed"]
    assert call_json("report", "compressed/model-r0.30.safetensors") == call_json("report", "compressed/model-r0.30")
    again = ssmcompress.load("compressed/model-r0.30.safetensors").made_by
    assert again == folder.made_by
    assert again.command == f"ssmcompress prune {checkpoint} --no-latency --quiet"


def test_export_prints_the_session_options_and_notes_them_in_the_report():
    torch.save({"model": make_vim(depth=2).state_dict()}, "model.pt")
    call("prune", "model.pt", "--no-latency", "--quiet")
    printed = call("export", "--onnx", "--scan", "scan", "--no-latency").stdout
    line = "  session options in its metadata: intra_op_num_threads=all cores, session.intra_op.allow_spinning=0"
    assert line in printed.splitlines()
    session = call_json("report", "compressed/model-r0.30")["onnx"]["session"]
    assert session == {"intra_op_num_threads": 0, "config": {"session.intra_op.allow_spinning": "0"}}


def test_verify_refuses_odd_session_options_in_one_line():
    torch.save({"model": make_vim(depth=1).state_dict()}, "model.pt")
    call("export", "model.pt", "--onnx", "--scan", "scan", "--no-latency", "-o", "m.onnx")
    graph = onnx.load("m.onnx")
    onnx.helper.set_model_props(graph, {"ssmcompress": json.dumps({"session": {"config": 3}})})
    onnx.save(graph, "m.onnx")
    message = refused("verify", "model.pt", "m.onnx")
    assert "session.config is 3, expected an object; export the file again" in message
