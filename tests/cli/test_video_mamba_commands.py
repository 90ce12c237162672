"""The commands on a VideoMamba for videos, from folders of frames to a verified ONNX file and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, call_json, refused
from conftest import images_of, make_video_mamba
from PIL import Image

import ssmcompress
from ssmcompress.models.video_mamba import VideoMamba

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def files(tmp_path):
    """A checkpoint of four frames of 8 pixels and three classes, and two videos of noise for each class."""
    model = make_video_mamba(depth=3, frames=4, image=(8, 8), classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    generator = np.random.default_rng(1)
    for video in range(9):
        folder = tmp_path / "videos" / f"class{video // 3}" / f"v{video}"
        folder.mkdir(parents=True)
        for frame in range(5):
            pixels = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{frame}.png")
    return tmp_path


def test_prune_visualize_export_and_fine_tune(files):
    model, data = files / "model.pt", ("--data", files / "videos")
    report = call_json("prune", model, "--ratio", 0.4, *data, "--no-latency", "-o", "small")
    assert report["views"] == {"clips": 1, "crops": 1}
    assert json.loads(Path("small/config.json").read_text())["architecture"]["frames"] == 4
    loaded = ssmcompress.load("small")
    assert type(loaded) is VideoMamba
    assert Image.open("small/kept_tokens.png").size[1] > 336
    call("visualize", "small", *data, "--images", 2)
    shown = json.loads(Path("small/attention/visualize.json").read_text())
    assert (shown["grid"], np.shape(shown["images"][0]["variants"]["aligned"]["map"])) == ([4, 4], (4, 4))
    exported = call_json("export", "small", "--onnx", *data, "--no-latency")
    assert exported["max_difference"] < 1e-4
    assert all(stage["same"] == exported["images"] for stage in exported["stages"])
    call("finetune", "small", *data, "--epochs", 1, "--set", "batch_size=4", "--no-latency", "-o", "tuned")
    assert ssmcompress.load("tuned", frames=8)(images_of(make_video_mamba(frames=8, image=(8, 8)), 2)).shape == (2, 3)


def test_inspect_names_videos_and_frames(files):
    shown = call("inspect", files / "model.pt").stdout
    assert "video classification;" in shown
    assert shown.startswith("video_mamba, 3 layers, videos 8x8 of 4 frames, 17 tokens, ")
    assert "GFLOPs of one video" in shown
    assert "videos 8x8 of 6 frames, 25 tokens" in call("inspect", files / "model.pt", "--frames", 6).stdout


def test_a_model_of_images_has_no_frames(files, checkpoint):
    assert "--frames: inputs of this vim are images" in refused("inspect", checkpoint, "--frames", 8)
