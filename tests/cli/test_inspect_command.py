"""`inspect`: description of a checkpoint."""

import pytest
import torch
from command_line import call, call_json, refused
from conftest import make_vim

from ssmcompress.models.vim import VimConfig, VisionMamba

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_inspect(checkpoint):
    found = call_json("inspect", checkpoint)
    assert (found["architecture"]["type"], found["architecture"]["depth"]) == ("vim", 4)
    assert found["params"] == sum(p.numel() for p in make_vim().parameters())
    assert sum(found["flops"]["by_part"].values()) == pytest.approx(found["flops"]["full"])
    assert set(found["flops"]["by_part"]) == {
        "embedding", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "head",
    }  # fmt: skip
    assert 0 < found["range"]["min_percent"] < 100
    text = call("inspect", checkpoint).stdout
    assert "4 layers" in text
    assert "dt_proj" in text


def test_inspect_of_published_sizes(tmp_path):
    """Through the command, on files: zeros of the published shapes."""
    for d_model, full, paper in ((192, 1.823, 1.449), (384, 5.912, 5.077)):
        with torch.device("meta"):
            names = VisionMamba(
                VimConfig(d_model, 24, 2 * d_model, 16, d_model // 16, 4, 3, 1000, (16, 16), 16, (224, 224))
            ).state_dict()
        torch.save({k: torch.zeros(v.shape, dtype=torch.float16) for k, v in names.items()}, tmp_path / "vim.pth")
        found = call_json("inspect", tmp_path / "vim.pth")["flops"]
        assert found["full"] == pytest.approx(full, rel=5e-3)
        assert found["paper"] == pytest.approx(paper, rel=5e-3)


def test_inspect_of_a_single_layer(tmp_path):
    torch.save({"model": make_vim(depth=1).state_dict()}, tmp_path / "v.pth")
    found = call_json("inspect", tmp_path / "v.pth")
    as_run = round(100 * found["flops"]["as_run"] / found["flops"]["full"], 2)
    assert found["range"].pop("axes").keys() == {"states", "channels", "all"}
    assert found["range"] == {"stages": [], "min_percent": as_run, "max_percent": 100}
    assert "no place to prune" in refused("prune", tmp_path / "v.pth")
