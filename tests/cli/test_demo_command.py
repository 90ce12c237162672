"""`demo`: the whole pipeline on the bundled model and images."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import call, call_json, refused
from safetensors.torch import load_file

from ssmcompress.models.base import TokenModel

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The first 100 of the bundled images."""
    find = TokenModel.find_images

    def first(*arguments, **options):
        images = find(*arguments, **options)
        return replace(images, size=100, labels=images.labels[:100])

    monkeypatch.setattr(TokenModel, "find_images", first)


def test_demo():
    """The whole pipeline."""
    found = call_json("demo")
    assert (found["data"]["images"], found["data"]["labelled"]) == (50, True)
    assert found["dense"]["top1"] > found["aligned"]["top1"] > found["naive"]["top1"]
    assert found["reconstruction"]["images"] == 50
    assert found["onnx"]["passed"]
    assert found["pruned"]["flops"]["full"] < 0.65 * found["dense"]["flops"]["full"]
    assert "exists" in refused("demo", "--quiet")


def test_the_recipe_of_the_demo_makes_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    call("demo", "-o", "shown")
    recipe = Path("shown/recipe.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    call("run", recipe, "-o", "again", "--no-latency")
    shown, again = (load_file(folder / "model.safetensors") for folder in (recipe.parent, Path("again")))
    assert shown.keys() == again.keys()
    assert all(torch.equal(shown[name], again[name]) for name in shown)


def test_demo_without_the_packages_for_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = call("demo", "--json")
    assert json.loads(result.stdout)["onnx"] is None
    assert "no ONNX file: ONNX files need onnxruntime" in result.stderr
    assert "pip install 'ssmcompress[onnx]'" in result.stderr
    assert not list(Path.cwd().glob("compressed/*/*.onnx"))
