"""`demo`: the whole chain on what comes with the package."""

from dataclasses import replace

import pytest
from command_line import call_json, refused

from ssmcompress.models.base import TokenModel

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_demo(monkeypatch):
    """The whole chain, on the first 100 of the bundled images."""

    find = TokenModel.find_images

    def first(*arguments, **options):
        images = find(*arguments, **options)
        return replace(images, size=100, labels=images.labels[:100])

    monkeypatch.setattr(TokenModel, "find_images", first)
    found = call_json("demo")
    assert (found["data"]["images"], found["data"]["labelled"]) == (50, True)
    assert found["dense"]["top1"] > found["aligned"]["top1"] > found["naive"]["top1"]
    assert found["reconstruction"]["images"] == 50
    assert found["onnx"]["passed"]
    assert found["pruned"]["flops"]["full"] < 0.65 * found["dense"]["flops"]["full"]
    assert "exists" in refused("demo", "--quiet")
