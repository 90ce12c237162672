"""Segmentation models with random weights, and images to segment."""

import numpy as np
import torch
from PIL import Image

import ssmcompress
from ssmcompress.models.plain_mamba_upernet import PlainMambaUperNet, PlainMambaUperNetConfig
from ssmcompress.models.vim_upernet import VimUperNet, VimUperNetConfig


def make_random(model):
    """The model with random weights, in eval mode, with statistics of its norms that are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point() and not name.endswith(("_log", ".D", ".D_b")):
            value.normal_(0, 0.3, generator=generator)
    return model.eval()


VIM_SIZES = {"d_model": 16, "depth": 6, "d_inner": 32, "d_state": 4, "dt_rank": 1, "d_conv": 4, "in_chans": 3,
             "num_classes": 5, "patch_size": (16, 16), "stride": 16, "image_size": (64, 64), "head_channels": 8,
             "out_layers": (1, 3, 5, 6), "level": "hidden"}  # fmt: skip
PLAIN_MAMBA_SIZES = {"d_model": 16, "depth": 6, "d_inner": 32, "d_state": 4, "dt_rank": 1, "window": 5,
                     "dw_layers": (1,), "dw_window": 3, "stem_width": 8, "stem_depth": 1, "stem_window": 7,
                     "in_chans": 3, "num_classes": 5, "patch_size": 16, "stride": 16, "image_size": (64, 64),
                     "head_channels": 8, "out_layers": (1, 3, 5, 6), "trained_grid": (4, 4)}  # fmt: skip


def make_vim_upernet(**changes) -> VimUperNet:
    return ssmcompress.load(make_random(VimUperNet(VimUperNetConfig(**VIM_SIZES | changes))))


def make_plain_mamba_upernet(**changes) -> PlainMambaUperNet:
    config = PlainMambaUperNetConfig(**PLAIN_MAMBA_SIZES | changes)
    return ssmcompress.load(make_random(PlainMambaUperNet(config)))


MAKERS = {"vim": make_vim_upernet, "plain_mamba": make_plain_mamba_upernet}


def scenes(count: int, side: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, side, side, 3) uint8 with two to four rectangles of a colour a class, and their masks."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(90, 130, (count, side, side, 3)).astype(np.uint8)
    masks = np.zeros((count, side, side), np.uint8)
    for picture, mask in zip(pictures, masks, strict=True):
        for _ in range(generator.integers(2, 5)):
            label, (top, left) = generator.integers(1, 5), generator.integers(0, side // 2, 2)
            height, width = generator.integers(side // 4, side // 2, 2)
            place = slice(top, top + height), slice(left, left + width)
            picture[place] = 40 * label + generator.integers(0, 20, 3)
            mask[place] = label
    return pictures, masks


def write_scenes(folder, count: int, side: int = 64, seed: int = 0) -> None:
    """Write scenes as folders images/ and annotations/."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number, (picture, mask) in enumerate(zip(*scenes(count, side, seed), strict=True)):
        Image.fromarray(picture).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(folder / "annotations" / f"{number:03}.png")


def scene_tensors(model, count: int, seed: int = 0) -> torch.Tensor:
    """Scenes as the model takes them, (count, 3, height, width)."""
    transform = model.fixed_transform()
    return torch.stack([transform(Image.fromarray(picture)) for picture in scenes(count, seed=seed)[0]])
