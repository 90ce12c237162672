"""UperNet on a Vim (hustvl, seg/): a Vim without class token, whose output levels pass through a neck of convolutions.

Module and parameter names are those of the published code (mmseg's, `backbone.` and `decode_head.`). The kind of the
output levels cannot be inferred from the weights: see `ssmcompress.models.vim_levels.LEVELS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note
from ..pruning.tokens import Dropped, Tokens
from .base import Expected
from .families import HEAD_OF_SEGMENTATION, StateDict
from .features import NamePatterns
from .precision import RMSNorm, embed_patches, widen
from .reading import Shapes, infer_grid, resize_grid
from .rotations import cached_rotations, rotations
from .statements import Statements
from .upernet import (
    HEAD_OPTIONS,
    HINTS,
    UperNet,
    UperNetConfig,
    check_out_layers,
    find_out_layers,
    read_head,
    strip_training,
)
from .upernet import LEVELS as LEVEL_COUNT
from .vim_block import (
    EPSILON,
    FORTH_AND_BACK,
    PatchEmbed,
    VimBlock,
    VimConfig,
    count_layer_bytes,
    count_layers,
    read_layer_sizes,
)
from .vim_levels import DEFAULT_LEVEL, LEVELS, find_level

Size = tuple[int, int]


ROPE_KEYS = ("backbone.rope.freqs_cos", "backbone.rope.freqs_sin")
PATCH_SIZES = (16, 8)


@dataclass(frozen=True, kw_only=True)
class VimUperNetConfig(UperNetConfig, VimConfig):
    """Sizes of a Vim with a UperNet head; `level` and `out_layers` cannot be inferred from the weights.

    Attributes:
        image_size: the size of the model's input, and of the windows of larger images.
        level: the kind of the output levels, a key of `LEVELS`.
    """

    level: str

    @property
    def map_sizes(self) -> list[Size]:
        # Four sizes, each half of the previous one: strides 4 to 32, for patches of 16 and of 8 pixels.
        (rows, columns), ups = self.grid, self.doublings
        return [((rows << ups) >> halved, (columns << ups) >> halved) for halved in range(LEVEL_COUNT)]

    @property
    def doublings(self) -> int:
        """The number of times that the neck doubles the sides of the grid for the finest map."""
        return int(math.log2(self.stride // 4))

    def count_neck(self) -> int:
        """Return the FLOPs of the neck: d_model^2 for each position of each map that it upsamples."""
        doubled = sum(math.prod(size) for size in self.map_sizes[: self.doublings])
        if self.doublings == 2:  # the finest map is doubled twice
            doubled += math.prod(self.map_sizes[1])
        return doubled * self.d_model**2


class Backbone(nn.Module):
    def __init__(self, c: VimUperNetConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches, c.d_model))
        self.layers = nn.ModuleList(VimBlock(c, size) for size in c.layers)
        self.norm_f = RMSNorm(c.d_model, eps=EPSILON)
        double = [nn.ConvTranspose2d(c.d_model, c.d_model, 2, stride=2) for _ in range(3 if c.doublings == 2 else 1)]
        if c.doublings == 2:
            self.fpn1 = nn.Sequential(double[0], nn.BatchNorm2d(c.d_model), nn.GELU(), double[1])
            self.fpn2 = nn.Sequential(double[2])
        else:
            self.fpn1 = nn.Sequential(double[0])


class VimUperNet(UperNet):
    """UperNet on a Vim of any size. `forward`: images (B, C, H, W) -> logits (B, classes, H, W).

    Images of a size other than `config.image_size` are segmented in windows of that size, which overlap by a third.
    """

    architecture, families = "vim_upernet", ("vim",)
    config_class = VimUperNetConfig
    telling_keys = ("backbone.patch_embed.proj.weight", "backbone.layers.0.mixer.A_b_log", HEAD_OF_SEGMENTATION)
    no_weight_decay = NamePatterns(["*A_log", "*A_b_log", "*pos_embed"])
    # From hustvl's seg/backbone/vim.py; all published models have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        **HEAD_OPTIONS,
        "if_cls_token": Expected((False,), "no class token"),
        "if_divide_out": Expected((True,), "the sum of both scans divided by two"),
        "bimamba_type": Expected(("v2",), "bidirectional blocks of type v2"),
        "if_bimamba": Expected((False,), "bidirectional blocks of type v2"),
        "if_bidirectional": Expected((False,), "both scans in every layer"),
        "if_abs_pos_embed": Expected((True,), "a learnt position embedding"),
        "flip_img_sequences_ratio": Expected((-1, 0), "no random flips of the sequence"),
        "norm_epsilon": Expected((EPSILON,), f"norms with an epsilon of {EPSILON:g}"),
    }
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "backbone.cls_token": "a backbone with a class token",
        "backbone.fpn": "a neck for patches of another size",
    }

    def __init__(self, config: VimUperNetConfig):
        super().__init__(config)
        self.backbone = Backbone(config)
        level = LEVELS[config.level]
        for block in self.blocks:  # also for tokens that are dropped between two levels
            block.keeps_update = not level.stream

    def embed(self, images: Tensor) -> Tokens:
        self.check(images)
        c = self.config
        if tuple(images.shape[-2:]) != c.image_size:
            raise InputError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels: expected windows of "
                f"{c.image_size[0]}x{c.image_size[1]}; call the model itself, which cuts them"
            )
        patches = widen(embed_patches(self.backbone.patch_embed.proj, images).flatten(2).transpose(1, 2))
        features = self._rotate(patches + self.backbone.pos_embed, None)
        return Tokens(features, self.length, alignment=self.alignment, orders=FORTH_AND_BACK, grid=c.grid, dropped=())

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (batch, classes, height, width) of images (batch, channels, height, width)."""
        if not isinstance(images, Tensor) or tuple(images.shape[-2:]) == self.config.image_size:
            return super().forward(images)
        self.check(images)
        window = self.config.image_size
        height, width = images.shape[-2:]
        # A side shorter than the window is padded with zeros, the mean colour.
        padded = F.pad(images, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
        rows, columns = (window_starts(side, part) for side, part in zip(padded.shape[-2:], window, strict=True))
        total = counts = None
        for top in rows:
            for left in columns:
                place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                logits = widen(super().forward(padded[place]))
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *padded.shape[-2:])
                    counts = logits.new_zeros(padded.shape[-2:])
                total[place] += logits
                counts[place] += 1
        return (total / counts)[..., :height, :width].to(images.dtype)

    def observe(self, layer: int, tokens: Tokens) -> Tokens:
        """Append the output level of the layer, if it has one, and apply the rotary embedding for the next layer."""
        if layer < len(self.blocks) and LEVELS[self.config.level].rope:
            dropped = tuple(self._rotate_group(group) for group in tokens.dropped)
            tokens = replace(tokens, features=self._rotate(tokens.features, tokens.positions), dropped=dropped)
        return super().observe(layer, tokens)

    def read_values(self, layer: int, values: Tensor) -> Tensor:
        level = LEVELS[self.config.level]
        return self.backbone.norm_f(values) if level.norm and layer == len(self.blocks) else values

    def normalise(self, features: Tensor) -> Tensor:
        return self.backbone.norm_f(features)

    @property
    def is_residual(self) -> bool:
        return not LEVELS[self.config.level].rope

    def form_maps(self, levels: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = levels
        neck = self.backbone
        if self.config.doublings == 2:
            return [neck.fpn1(first), neck.fpn2(second), third, F.max_pool2d(fourth, 2)]
        return [neck.fpn1(first), second, F.max_pool2d(third, 2), F.max_pool2d(fourth, 4)]

    def _rotate_group(self, group: Dropped) -> Dropped:
        """Return dropped tokens, rotated in the same way as the kept ones."""
        features = self._rotate(group.features, group.positions)
        return group._replace(features=features, values=features)

    def _rotate(self, features: Tensor, positions: Tensor | None) -> Tensor:
        """Apply the rotary position embedding to features (batch, kept, d_model), if the model has one."""
        if not LEVELS[self.config.level].rope:
            return features
        # Not buffers, which a low-precision model would round: in bfloat16, 24 rotations change lengths by percents.
        tables = rotations if torch.compiler.is_compiling() else cached_rotations  # traced tensors must not be cached
        cos, sin = tables(self.config.grid, self.config.d_model, features.device, features.dtype)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        turned = torch.stack([-features[..., 1::2], features[..., ::2]], dim=-1).flatten(-2)
        return features * cos + turned * sin

    @classmethod
    def count_flops(
        cls, config: VimUperNetConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        return {
            **count_layers(config, counts, convention, read=None),
            "neck": config.count_neck(),
            "head": config.count_head(),
        }

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        neck, sizes = self.backbone, self.config.map_sizes
        products = [(self.config.patches, neck.patch_embed.proj.weight.flatten(1))]
        for count, block in zip(counts, self.blocks, strict=True):
            products += block.mixer.products(count)
        doubling = [(neck.fpn1[0], self.config.grid)]
        if self.config.doublings == 2:
            doubling += [(neck.fpn1[3], sizes[1]), (neck.fpn2[0], self.config.grid)]
        # One row for each input position, with all outputs of its window.
        products += [(math.prod(size), conv.weight.flatten(1).t()) for conv, size in doubling]
        return self.finish_products(products)

    def activation_bytes(self, size: int = 4) -> int:
        return max(self.length * count_layer_bytes(self.config, size), self.count_head_bytes(size))

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return HEAD_OF_SEGMENTATION in state and any(key.startswith("backbone.layers.0.mixer.") for key in state)

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: Size | None,
        stride: int | None,
        trained_size: Size | None,
    ) -> tuple[VimUperNetConfig, dict[str, Tensor]]:
        fitted = strip_training(state)
        if "backbone.cls_token" in fitted:
            raise InputError("a Vim backbone with a class token (backbone.cls_token) is not supported for segmentation")
        shape = Shapes(fitted, "UperNet on a Vim", HINTS)
        sizes = {**read_layer_sizes(shape, "backbone."), **read_head(shape)}
        d_model, in_chans, *patch_size = shape("backbone.patch_embed.proj.weight", 4)
        patch = patch_size[0]
        if patch != patch_size[1] or patch not in PATCH_SIZES:
            raise InputError(f"patches of {tuple(patch_size)} pixels: the neck has one for 16 or 8 pixels only")
        if stride not in (None, patch):
            raise InputError(f"stride {stride}: a segmentation model's patches, {patch} pixels here, do not overlap")

        def grid_of(size: Size) -> Size:
            return size[0] // patch, size[1] // patch

        entries = shape("backbone.pos_embed", 3)[1]
        trained, image_size = infer_grid(entries, patch, patch, grid_of, image_size, trained_size)
        if any(side % patch for side in image_size) or min(grid_of(image_size)) < PATCH_SIZES[0] // patch * 2:
            raise InputError(
                f"image size {image_size}: expected multiples of {patch} pixels, the patch size, from 32 on"
            )
        ropes = [fitted.pop(key) for key in ROPE_KEYS if key in fitted]
        for table, expected in zip(ropes, rotations(trained, d_model) if ropes else (), strict=False):
            if table.shape != expected.shape or not torch.allclose(table.float(), expected, atol=1e-3):
                raise InputError(f"{ROPE_KEYS[0]} does not hold the rotations of a grid of {trained} patches")
        config = VimUperNetConfig(
            **sizes,
            d_model=d_model,
            in_chans=in_chans,
            patch_size=tuple(patch_size),
            stride=patch,
            image_size=tuple(image_size),
            out_layers=(),
            level="rope" if ropes else "",
        )
        table = fitted["backbone.pos_embed"]
        if table.shape[2] == d_model:  # a mismatch is reported with the other shapes
            fitted["backbone.pos_embed"] = resize_grid(table, trained, config.grid)
        return config, fitted

    @classmethod
    def complete_config(cls, config: VimUperNetConfig, said: Statements, image_size: Size | None) -> VimUperNetConfig:
        """Return the configuration with its output levels: as stated, else the defaults of the published code."""
        found, assumed = find_out_layers(said), []
        quarters = tuple(config.depth * part // LEVEL_COUNT for part in range(1, LEVEL_COUNT + 1))
        value, where = (quarters, "every quarter of the layers") if found is None else found
        out_layers = check_out_layers(value, config.depth, where)
        if found is None:
            assumed.append(f"the outputs of layers {', '.join(map(str, out_layers))}")
        level = find_level(said)
        if config.level and level not in (None, config.level):
            raise InputError(
                f"the file has rotary positions ({ROPE_KEYS[0]}), which are supported with `level` {config.level!r} "
                f"only, not with {level!r}"
            )
        level = level or config.level
        if not level:
            assumed.append(f"{DEFAULT_LEVEL!r} (see `level`)")
        if assumed:
            note(f"nothing says what the head reads: taken for {', and '.join(assumed)}")
        return replace(config, out_layers=out_layers, level=level or DEFAULT_LEVEL)


def window_starts(side: int, window: int) -> list[int]:
    """Return the start offsets of windows that cover a side of at least their size; they overlap by a third or more."""
    stride = window * 2 // 3
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(0, min(number * stride, side - window)) for number in range(count)]
