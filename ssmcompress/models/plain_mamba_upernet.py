"""UperNet on a PlainMamba (ChenhongyiYang, downstream/mmsegmentation): images of any size, four levels of stride 16.

Module and parameter names are those of the published checkpoints (mmseg's, `backbone.` and `decode_head.`). The output
layers are inferred from the norms of the output levels, `norm_layer{i}` after the 0-based layer i.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..pruning.alignment import ScanOrder
from ..pruning.tokens import Tokens
from .base import Expected
from .families import HEAD_OF_SEGMENTATION, StateDict
from .features import NamePatterns
from .plain_mamba_block import (
    PatchEmbed,
    PlainMambaBlock,
    PlainMambaConfig,
    count_bytes,
    count_layers,
    read_backbone_sizes,
)
from .precision import LayerNorm, embed_patches, widen
from .reading import LARGEST_SIDE, Shapes, infer_grid, resize_grid
from .snakes import snakes
from .statements import Statements
from .upernet import HEAD_OPTIONS, HINTS, UperNet, UperNetConfig, check_out_layers, read_head, strip_training

Size = tuple[int, int]

NORM_KEY = re.compile(r"backbone\.norm_layer(\d{1,6})\.weight")


@dataclass(frozen=True, kw_only=True)
class PlainMambaUperNetConfig(UperNetConfig, PlainMambaConfig):
    """Sizes of a PlainMamba with UperNet head; all but `image_size` and `directions` can be inferred from its weights.

    Attributes:
        image_size: the image size for which FLOPs are counted; the model takes any size.
        trained_grid: (rows, columns) of the position embedding, which is resized for all other grids.
    """

    trained_grid: Size

    @property
    def grid(self) -> Size:
        """The size of the patch grid, (rows, columns), of an image of `image_size`."""
        return self.grid_of(self.image_size)

    def grid_of(self, size: Size) -> Size:
        """Return the patch grid (rows, columns) of an image of (height, width) pixels; edge patches may be partial."""
        rows, columns = (-(-side // self.patch_size) for side in size)
        return rows, columns


class PaddedPatchEmbed(PatchEmbed):
    """Images (batch, channels, height, width) of any size -> patches (batch, d_model, rows, columns)."""

    def forward(self, images: Tensor) -> Tensor:
        x, side = self.convs(self.stem(images)), self.projection.stride[0]
        height, width = x.shape[-2:]
        return embed_patches(self.projection, F.pad(x, (0, -width % side, 0, -height % side)))


class Backbone(nn.Module):
    def __init__(self, c: PlainMambaUperNetConfig):
        super().__init__()
        self.patch_embed = PaddedPatchEmbed(c)
        rows, columns = c.trained_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, c.d_model))
        self.layers = nn.ModuleList(PlainMambaBlock(c, layer) for layer in range(c.depth))
        self.ln1 = LayerNorm(c.d_model, eps=1e-6)
        for layer in c.out_layers[:-1]:
            setattr(self, norm_name(layer), LayerNorm(c.d_model, eps=1e-6))


def norm_name(layer: int) -> str:
    """Return the name of the norm of the output level after a layer (1-based)."""
    return f"norm_layer{layer - 1}"


class PlainMambaUperNet(UperNet):
    """UperNet on a PlainMamba of any size. `forward`: images (B, C, H, W) of any size -> logits (B, classes, H, W)."""

    architecture, families = "plain_mamba_upernet", ("plain_mamba",)
    config_class = PlainMambaUperNetConfig
    telling_keys = (
        "backbone.patch_embed.projection.weight",
        "backbone.layers.0.mamba.direction_Bs",
        "backbone.norm_layer5.weight",
        HEAD_OF_SEGMENTATION,
    )
    no_weight_decay = NamePatterns(["*A_log", "*pos_embed", "*direction_Bs"])
    multiple = 32
    # Of PlainMamba's configurations; all published models have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        **HEAD_OPTIONS,
        "final_norm": Expected((True,), "a norm after the last layer"),
        "use_rms_norm": Expected((False,), "LayerNorm"),
    }

    def __init__(self, config: PlainMambaUperNetConfig):
        super().__init__(config)
        self.backbone = Backbone(config)
        visits, labels = snakes(*config.grid)
        self.register_buffer("visits", visits, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    def embed(self, images: Tensor) -> Tokens:
        self.check(images)
        patches = self.backbone.patch_embed(images)
        grid = tuple(patches.shape[-2:])
        features = widen(patches.flatten(2).transpose(1, 2))
        features = features + resize_grid(self.backbone.pos_embed, self.config.trained_grid, grid)
        orders = self._orders(grid, features.device)
        return Tokens(features, grid[0] * grid[1], alignment=self.alignment, orders=orders, grid=grid, dropped=())

    def _orders(self, grid: Size, device: torch.device) -> tuple[ScanOrder, ...]:
        """Return the scan paths over a grid."""
        if grid == self.config.grid:
            visits, labels = self.visits, self.labels
        elif torch.compiler.is_compiling():  # traced tensors must not be cached
            visits, labels = (table.to(device) for table in snakes(*grid))
        else:
            visits, labels = cached_snakes(grid, device)
        return tuple(ScanOrder(v, labels=kinds) for v, kinds in zip(visits, labels, strict=True))

    def read_values(self, layer: int, values: Tensor) -> Tensor:
        norm = self.backbone.ln1 if layer == len(self.blocks) else getattr(self.backbone, norm_name(layer))
        return norm(values)

    def normalise(self, features: Tensor) -> Tensor:
        return self.backbone.ln1(features)

    def drop_layers(self, layers: Sequence[int]) -> None:
        old = self.config.out_layers
        super().drop_layers(layers)
        norms = [self.backbone._modules.pop(norm_name(layer)) for layer in old[:-1]]
        for layer, norm in zip(self.config.out_layers, norms, strict=False):
            setattr(self.backbone, norm_name(layer), norm)

    @classmethod
    def count_flops(
        cls, config: PlainMambaUperNetConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        return {**count_layers(config, counts, convention), "head": config.count_head()}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        products = self.backbone.patch_embed.products(self.config)
        for count, block in zip(counts, self.blocks, strict=True):
            products += block.mamba.products(count)
        return self.finish_products(products)

    def activation_bytes(self, size: int = 4) -> int:
        return max(count_bytes(self.config, size), self.count_head_bytes(size))

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return HEAD_OF_SEGMENTATION in state and "backbone.layers.0.mamba.direction_Bs" in state

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: Size | None,
        stride: int | None,
        trained_size: Size | None,
    ) -> tuple[PlainMambaUperNetConfig, dict[str, Tensor]]:
        fitted = strip_training(state)
        shape = Shapes(fitted, "UperNet on a PlainMamba", HINTS)
        sizes = {**read_backbone_sizes(shape, stride), **read_head(shape)}
        depth, patch = sizes["depth"], sizes["patch_size"]
        norms = sorted(int(found.group(1)) + 1 for key in fitted if (found := NORM_KEY.fullmatch(key)))
        out_layers = check_out_layers((*norms, depth), depth, "by the norms backbone.norm_layer*, and the last one")

        def grid_of(size: Size) -> Size:
            return PlainMambaUperNetConfig(**sizes, image_size=size, out_layers=(), trained_grid=(0, 0)).grid

        # The position embedding is resized in every forward, so that the image size need not be that of its grid.
        entries = shape("backbone.pos_embed", 3)[1]
        fits = trained_size is not None and math.prod(grid_of(trained_size)) == entries
        trained, own_size = infer_grid(entries, patch, patch, grid_of, None, trained_size if fits else None)
        size = tuple(image_size or trained_size or own_size)
        return PlainMambaUperNetConfig(**sizes, image_size=size, out_layers=out_layers, trained_grid=trained), fitted

    @classmethod
    def complete_config(
        cls, config: PlainMambaUperNetConfig, said: Statements, image_size: Size | None
    ) -> PlainMambaUperNetConfig:
        """Return the configuration with the training image size, if it is stated."""
        if "level" in said.options:
            raise InputError("`level` tells what the output levels of a Vim are: a PlainMamba has one kind of them")
        if image_size is None:
            image_size = find_crop(said) or config.image_size
        if not 1 <= min(image_size) <= max(image_size) <= LARGEST_SIDE:
            raise InputError(f"image size {image_size}: expected 1 to {LARGEST_SIDE} pixels")
        return replace(config, image_size=tuple(image_size))


def find_crop(said: Statements) -> Size | None:
    """Return the (height, width) of the training images, if it is stated."""
    for name in ("crop_size", "img_size"):
        value: Any = said.options[name].value if name in said.options else None
        value = (value, value) if type(value) is int else value
        if isinstance(value, tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
            return value
    return None


@lru_cache(maxsize=32)
def cached_snakes(grid: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `snakes` of a grid on a device; the images of a dataset have a few dozen different grids."""
    with torch.inference_mode(False):  # they are also used where gradients are computed
        return tuple(table.to(device) for table in snakes(*grid))
