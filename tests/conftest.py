"""Small models and images that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

# One thread for each of the processes that the tests run in (pytest-xdist), and for those that they start: models as
# small as these only lose time to a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import ssmcompress
from ssmcompress.models import TokenModel
from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.vim import VimConfig, VisionMamba

GOLDEN = Path(__file__).parent / "golden"
BUNDLED = Path(ssmcompress.__file__).parent / "assets" / "vim-fashion-mnist"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, only files that speak of one: a machine with a GPU may lack what the others import."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "gpu" not in collection_path.read_text().lower() or None
    return None


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    """As the commands have it on a GPU, where torch rounds them to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_vim(depth=4, d_model=16, image=(16, 16), patch=4, channels=3, seed=0, **others) -> VisionMamba:
    """A Vim with random weights, spread widely enough that tokens differ in importance.

    Args:
        others: `classes`, `stride`, `d_state`.
    """
    stride, d_state, classes = (others.pop(k, v) for k, v in (("stride", None), ("d_state", 4), ("classes", 10)))
    assert not others, others
    config = VimConfig(
        d_model=d_model,
        depth=depth,
        d_inner=2 * d_model,
        d_state=d_state,
        dt_rank=-(-d_model // 16),
        d_conv=4,
        in_chans=channels,
        num_classes=classes,
        patch_size=(patch, patch),
        stride=stride or patch,
        image_size=image,
    )
    generator = torch.Generator().manual_seed(seed)
    model = VisionMamba(config)
    for name, value in model.state_dict().items():
        if not name.endswith(("norm.weight", "norm_f.weight", "_log", "D", "D_b")):
            value.normal_(0, 0.3, generator=generator)
    return ssmcompress.load(model, image_size=image)


def make_plain_mamba(depth=4, d_model=16, image=(64, 64), channels=3, seed=0, **others) -> PlainMamba:
    """A PlainMamba with random weights, and a stem of 8 channels where the published ones have 64.

    Args:
        others: `classes`, `d_state`, `window`, `dw_layers`, `stem_depth`.
    """
    defaults = {"classes": 10, "d_state": 4, "window": 5, "dw_layers": (), "stem_depth": 1}
    assert others.keys() <= defaults.keys(), others
    classes, d_state, window, dw_layers, stem_depth = (defaults | others).values()
    config = PlainMambaConfig(
        d_model=d_model,
        depth=depth,
        d_inner=2 * d_model,
        d_state=d_state,
        dt_rank=-(-d_model // 16),
        window=window,
        dw_layers=dw_layers,
        dw_window=3 if dw_layers else 0,
        stem_width=8,
        stem_depth=stem_depth,
        stem_window=7,
        in_chans=channels,
        num_classes=classes,
        patch_size=16,
        stride=16,
        image_size=image,
    )
    generator = torch.Generator().manual_seed(seed)
    model = PlainMamba(config)
    for name, value in model.state_dict().items():
        if not name.endswith(("norm.weight", "ln1.weight", "_log", "D", "running_var", "batches_tracked")):
            value.normal_(0, 0.3, generator=generator)
    return ssmcompress.load(model, image_size=image)


@pytest.fixture
def vim() -> VisionMamba:
    return make_vim()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain_mamba() -> PlainMamba:
    return make_plain_mamba()


@pytest.fixture(params=["vim", "plain_mamba"])
def model(request) -> TokenModel:
    """One of each architecture; `images_of` has what it takes."""
    return request.getfixturevalue(request.param)


def images_of(model: TokenModel, count=5, seed=1) -> torch.Tensor:
    shape = count, model.config.in_chans, *model.config.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def checkpoint(vim, tmp_path) -> Path:
    """A training checkpoint as hustvl's code writes it."""
    import argparse

    path = tmp_path / "model.pt"
    torch.save({"model": vim.state_dict(), "epoch": 3, "args": argparse.Namespace(model="vim", lr=1e-3)}, path)
    return path


def write_image(path: Path, seed: int, size=(16, 16), mode="RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Ten classes of two images each."""
    root = tmp_path / "images"
    for label in range(10):
        for i in range(2):
            write_image(root / f"class{label}" / f"{i}.png", seed=10 * label + i)
    return root


@pytest.fixture
def in_an_empty_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture
def pruned_folder(checkpoint, class_folders) -> Path:
    """A folder that `prune` wrote, in the working folder."""
    from command_line import call

    call("prune", checkpoint, "--ratio", "0.5", "--data", class_folders, "--no-latency", "-o", "pruned")
    return Path("pruned")
