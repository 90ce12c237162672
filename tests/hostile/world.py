"""The valid data from which hostile inputs are made: models, labelled pictures, a pruned folder."""

from __future__ import annotations

import argparse
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES, EACH, SIDE = 12, 2, 32
MODEL_NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DONE = "done"


class World:
    """Files under `root`, made by `build`, which no case may change.

    Attributes:
        vim: a checkpoint of 10 classes whose logits the original implementation has computed.
        vim12: one of 12 classes. images: 12 class folders of pictures whose labels are the classes that `vim12` gives
            them, so that reading them right means 100 % top-1. plain: some of them without labels.
        pruned: a folder that `prune` made of `vim12`. one: the same as a file. onnx: the same as a graph.
    """

    def __init__(self, root: Path):
        self.root = root
        self.vim, self.vim12 = root / "vim.pth", root / "vim12.pth"
        self.images, self.plain = root / "images", root / "plain"
        self.pruned, self.one = root / "pruned", root / "one.safetensors"
        self._baselines: dict[tuple[str, ...], Any] = {}

    @cached_property
    def golden(self) -> dict[str, np.ndarray]:
        """Images (3, 3, 32, 32) and logits (3, 10) of the original implementation for `vim`."""
        return dict(np.load(GOLDEN / "vim.npz"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """The state dict in `vim`."""
        import torch

        return torch.load(self.vim, weights_only=False)["model"]

    @cached_property
    def pictures(self) -> list[tuple[int, np.ndarray]]:
        """(label, pixels (32, 32, 3) uint8), EACH of every class in the order of classes, far from ties."""
        import ssmcompress

        model = ssmcompress.load(self.vim12)
        pixels = draw_pictures(600)
        top = model(normalise(pixels)).detach().topk(2).values
        labels, margins = model(normalise(pixels)).argmax(1), top[:, 0] - top[:, 1]
        found = []
        for label in range(CLASSES):
            rows = [i for i in range(len(pixels)) if labels[i] == label and margins[i] > 0.02][:EACH]
            assert len(rows) == EACH, f"class {label} has {len(rows)} pictures"
            found += [(label, pixels[i]) for i in rows]
        return found

    def label_of(self, picture: Image.Image) -> int:
        """The class that `vim12` gives a picture that is prepared as torchvision prepares it."""
        import torch
        from torchvision.transforms import v2 as transforms

        import ssmcompress

        bicubic = transforms.InterpolationMode.BICUBIC
        prepare = transforms.Compose([transforms.Resize(SIDE, bicubic), transforms.CenterCrop(SIDE)])
        pixels = np.asarray(prepare(picture.convert("RGB")))
        with torch.no_grad():
            return int(ssmcompress.load(self.vim12)(normalise(pixels[None])).argmax())

    @cached_property
    def onnx(self) -> Path:
        """`pruned` as a graph, made on first use."""
        file = self.root / "model.onnx"
        if not file.exists():
            _run("export", self.pruned, "--onnx", "--scan", "scan", "--no-latency", "-o", file)
        return file

    def baseline(self, *arguments: Any) -> Any:
        """The JSON output of a command for undamaged inputs."""
        key = tuple(map(str, arguments))
        if key not in self._baselines:
            self._baselines[key] = json.loads(_run(*arguments, "--json"))
        return self._baselines[key]


def normalise(pixels: np.ndarray) -> Any:
    """Model inputs (images, 3, height, width) of pixels (images, height, width, 3)."""
    import torch

    values = (pixels.astype(np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2)


def draw_pictures(count: int) -> np.ndarray:
    """Pictures (count, 32, 32, 3) of gradients and noise."""
    random = np.random.default_rng(7)
    corners = random.uniform(0, 255, (count, 2, 2, 3))
    t = np.linspace(0, 1, SIDE)
    weights = np.stack([np.outer(a, b) for a in (1 - t, t) for b in (1 - t, t)], -1)
    smooth = np.einsum("hwc,ncd->nhwd", weights, corners.reshape(count, 4, 3))
    noise = random.normal(0, random.uniform(0, 60, (count, 1, 1, 1)), smooth.shape)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def build(root: Path) -> World:
    """Create the files of a world, unless they exist."""
    world = World(root)
    if (root / DONE).exists():
        return world
    import torch

    import ssmcompress

    root.mkdir(parents=True, exist_ok=True)
    content = torch.load(GOLDEN / "vim.pth", weights_only=False)
    content["args"] = argparse.Namespace(model=MODEL_NAME)
    torch.save(content, world.vim)
    state = dict(content["model"])
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(CLASSES, state["head.weight"].shape[1], generator=generator)
    state |= {"head.weight": weight, "head.bias": torch.zeros(CLASSES)}
    content = {"model": state, "args": argparse.Namespace(model=MODEL_NAME)}
    torch.save(content, world.vim12)
    with torch.no_grad():  # every class gets its share of the pictures
        logits = ssmcompress.load(world.vim12)(normalise(draw_pictures(600)))
        state["head.weight"] = weight / logits.std(0)[:, None]
        state["head.bias"] = -logits.mean(0) / logits.std(0)
    torch.save(content, world.vim12)
    for k, (label, picture) in enumerate(world.pictures):
        file = world.images / f"class{label:02d}" / f"{k % EACH}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    world.plain.mkdir()
    for k, (_, picture) in enumerate(world.pictures[:6]):
        Image.fromarray(picture).save(world.plain / f"{k}.png")
    _run("prune", world.vim12, "--ratio", "0.5", "--data", world.images, "--no-latency", "-o", world.pruned)
    _run("export", world.pruned, "-o", world.one)
    (root / DONE).touch()
    return world


def _run(*arguments: Any) -> str:
    from .sandbox import call

    folder = os.getcwd()
    run = call([str(a) for a in arguments])
    assert run.code == 0, f"{arguments}: exit {run.code}, {run.stderr}"
    assert os.getcwd() == folder
    return run.stdout
