"""Semantic segmentation with UperNet on any backbone: the head, and the base class of the models.

arXiv 1807.10221, and mmseg's `UPerHead`; module and parameter names are those of mmseg's checkpoints (`decode_head.`).
Its auxiliary head is for training only and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.dense import DensePreprocessing
from ..errors import InputError
from ..pruning.plan import Stage
from ..pruning.tokens import Level, Tokens
from ..tasks import SEGMENTATION
from .base import Expected
from .families import StateDict
from .level_maps import LevelledModel
from .precision import cast
from .reading import Shapes
from .running import Decision
from .sizes import LayeredConfig, LayerSize
from .statements import Statement, Statements

Size = tuple[int, int]

POOL_SCALES = (1, 2, 3, 6)
LEVELS = 4
HINTS = {
    f"decode_head.{part}": "its head is another one than UperNet's, and is not supported"
    for part in ("psp_modules.0.1.conv.weight", "lateral_convs.0.conv.weight", "fpn_convs.0.conv.weight")
}
# From mmseg's configurations; all published models have these values.
HEAD_OPTIONS: Mapping[str, Expected] = {
    "pool_scales": Expected((POOL_SCALES,), f"means over {', '.join(map(str, POOL_SCALES))} parts of each side"),
    "align_corners": Expected((False,), "maps that are resized without aligned corners"),
}


@dataclass(frozen=True, kw_only=True)
class UperNetConfig(LayeredConfig):
    """The sizes that a segmentation model has in addition to those of its backbone.

    Attributes:
        head_channels: width of the head.
        out_layers: the layers (1-based) after which an output level is taken; the last one is the last layer.
    """

    head_channels: int
    out_layers: tuple[int, ...]

    @property
    def map_sizes(self) -> list[Size]:
        """The (rows, columns) of the input maps of the head, from fine to coarse, for images of `image_size`."""
        return [self.grid] * LEVELS

    def count_head(self) -> int:
        """Return the FLOPs of the head for one image of `image_size`."""
        *finer, last = (rows * columns for rows, columns in self.map_sizes)
        width, channels = self.d_model, self.head_channels
        pyramid = sum(scale**2 for scale in POOL_SCALES) * width * channels
        bottleneck = last * 9 * (width + len(POOL_SCALES) * channels) * channels
        lateral, fpn = sum(finer) * width * channels, sum(finer) * 9 * channels**2
        final = finer[0] * channels * (9 * LEVELS * channels + self.num_classes)
        return pyramid + bottleneck + lateral + fpn + final

    def with_layers(self, sizes: Mapping[int, LayerSize]) -> UperNetConfig:
        out_layers = tuple(layer for layer, number in enumerate(sizes, 1) if number in self.out_layers)
        return replace(super().with_layers(sizes), out_layers=out_layers)


class ConvModule(nn.Module):
    """A convolution without bias, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """Four maps (batch, width, rows, columns) from fine to coarse -> logits (batch, classes) at the size of the first.

    Pyramid pooling of the coarsest map (PSP), then a feature pyramid from coarse to fine (FPN).
    """

    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(width, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvModule(width + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(LEVELS - 1))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(LEVELS - 1))
        self.fpn_bottleneck = ConvModule(LEVELS * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, last = maps
        sizes = [tuple(x.shape[-2:]) for x in maps]
        means = [resize(pool(last), sizes[-1]) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([last, *means], dim=1))
        sums = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)] + [top]
        for level in range(LEVELS - 1, 0, -1):
            sums[level - 1] = sums[level - 1] + resize(sums[level], sizes[level - 1])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, sums[:-1], strict=True)] + [top]
        outputs = [resize(x, sizes[0]) for x in outputs]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(outputs, dim=1)))

    def products(self, sizes: Sequence[Size]) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) for one image whose maps have these (rows, columns)."""
        areas = [rows * columns for rows, columns in sizes]
        convs = [(scale**2, pool[1].conv) for scale, pool in zip(POOL_SCALES, self.psp_modules, strict=True)]
        convs += [(areas[-1], self.bottleneck.conv)]
        for parts in (self.lateral_convs, self.fpn_convs):
            convs += [(area, part.conv) for area, part in zip(areas, parts, strict=False)]
        convs += [(areas[0], self.fpn_bottleneck.conv), (areas[0], self.conv_seg)]
        return [(rows, conv.weight.flatten(1)) for rows, conv in convs]


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize maps (batch, channels, rows, columns) bilinearly, as everywhere in mmseg."""
    size = tuple(size)
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class UperNet(LevelledModel):
    """A segmentation model. `forward`: images (B, C, H, W) -> logits (B, classes, H, W).

    Its `backbone` has `layers`. `readout` returns the logits of the head, which are smaller than the images; `trace`
    and `forward` return them upsampled.
    """

    task = SEGMENTATION
    levels = LEVELS
    reads_levels = True
    hidden_options = ("level", "out_layers")
    # Both sides of an image are resized up to a multiple of this number before the model; None: they are not.
    multiple: ClassVar[int | None] = None

    expected_options: ClassVar[Mapping[str, Expected]] = HEAD_OPTIONS

    def __init__(self, config: Any):
        super().__init__(config)
        self.decode_head = UPerHead(config.d_model, config.head_channels, config.num_classes)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.layers

    @property
    def classifier(self) -> nn.Conv2d:
        return self.decode_head.conv_seg

    @property
    def droppable_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in super().droppable_layers if layer not in self.config.out_layers)

    @property
    def image_shape(self) -> tuple[int, None, None]:
        return self.config.in_chans, None, None

    def default_preprocessing(self) -> DensePreprocessing:
        return DensePreprocessing.default(self.config.in_chans, self.config.image_size, self.multiple)

    def read_preprocessing(self, value: Mapping[str, Any]) -> DensePreprocessing:
        return DensePreprocessing.from_dict(value, self.config.in_chans)

    def transform(self) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image to the model's input; its method `pair` takes an image and its mask."""
        return self.preprocessing.transform()

    def fixed_transform(self) -> Callable[[Any], Tensor]:
        """Return a transform like `transform` that center-crops images of another aspect ratio."""
        return self.preprocessing.transform(self.config.image_size)

    def raw_outputs(self, images: Tensor) -> Tensor:
        return self.readout(self.encode(images)[0])

    def level_layer(self, level: int) -> int:
        return self.config.out_layers[level - 1]

    def level_stages(self, level: int) -> list[Stage]:
        stages = self.plan.stages if self.plan is not None else ()
        return [stage for stage in stages if stage.after < self.level_layer(level)]

    def level_passes(self) -> list[tuple[int, ...]]:
        return [tuple(range(1, LEVELS + 1))]

    def read_levels(self, images: Tensor, levels: Sequence[int]) -> list[Level]:
        found = self.encode(images)[0].levels
        return [found[level - 1] for level in levels]

    def trace(self, images: Tensor) -> tuple[Tensor, list[Decision]]:
        """Compute the logits (batch, classes, height, width); return them and the decision of each stage."""
        tokens, decisions = self.encode(images)
        return resize(self.readout(tokens), images.shape[-2:]), decisions

    def observe(self, layer: int, tokens: Tokens) -> Tokens:
        """Append the output level of the layer, if it has one."""
        if layer not in self.config.out_layers:
            return tokens
        level = tokens.level()
        dropped = tuple(group._replace(values=self.read_values(layer, group.values)) for group in level.dropped)
        level = level._replace(values=self.read_values(layer, level.values), dropped=dropped)
        return replace(tokens, levels=(*tokens.levels, level))

    def read_values(self, layer: int, values: Tensor) -> Tensor:
        """Return the level's values for tokens (batch, tokens, d_model), from the stream or the updates after it."""
        return values

    def form_maps(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the input maps of the head, given the levels as maps (batch, d_model, rows, columns)."""
        return list(levels)

    def readout(self, tokens: Tokens) -> Tensor:
        """Compute the head's logits (batch, classes, rows, columns) at the size of its finest map."""
        maps = []
        for number, level in enumerate(tokens.levels, 1):
            filled = cast(self.fill(number, level), self.classifier)
            maps.append(filled.transpose(1, 2).unflatten(2, tokens.grid))
        return self.decode_head(self.form_maps(maps))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Raise an InputError: the head reads the outputs of several layers, not the last features alone."""
        raise InputError(
            f"the head of a segmentation model reads {LEVELS} layers: call the model, or take forward_intermediates"
        )

    def drop_layers(self, layers: Sequence[int]) -> None:
        """Remove layers as `TokenModel.drop_layers` does; InputError for an output layer."""
        if needed := [layer for layer in self.config.out_layers if layer in layers]:
            outputs = ", ".join(map(str, self.config.out_layers))
            raise InputError(f"layer {needed[0]} cannot be dropped: the head reads the output of layers {outputs}")
        super().drop_layers(layers)

    def count_head_bytes(self, size: int) -> int:
        """Return the bytes of one image's activations at the peak of the head."""
        c, (area, *_) = self.config, (math.prod(size) for size in self.config.map_sizes)
        # Input and output of the last 3x3 convolution; the logits, and the logits at the size of the image.
        return max((LEVELS + 1) * c.head_channels * area, c.num_classes * (area + math.prod(c.image_size))) * size

    def finish_products(self, products: Iterable[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Append the matrix products of corrections and head to those of the backbone and its neck."""
        corrections = [(1, weight) for weight in self.corrections.parameters()]
        return [*products, *corrections, *self.decode_head.products(self.config.map_sizes)]


def strip_training(state: StateDict) -> dict[str, Tensor]:
    """Return the weights without training-only parts: the auxiliary head, and mmcv's moving averages.

    The latter are named like the weights, with underscores instead of dots.
    """
    return {key: value for key, value in state.items() if not key.startswith(("auxiliary_head.", "ema_"))}


def read_head(shape: Shapes) -> dict[str, int]:
    """Return the sizes of a UperNet head: num_classes and head_channels.

    Raises:
        InputError: it is a different head, or has a different number of input maps.
    """
    classes, channels, _, _ = shape("decode_head.conv_seg.weight", 4)
    for key in HINTS:
        shape(key, 4)
    maps, scales = shape.count("decode_head.lateral_convs.") + 1, shape.count("decode_head.psp_modules.")
    if maps != LEVELS:
        raise InputError(f"a UperNet head that reads {maps} maps is not supported: expected {LEVELS}")
    if scales != len(POOL_SCALES):
        raise InputError(f"a UperNet head with {scales} means of its last map is not supported: expected {POOL_SCALES}")
    return {"num_classes": classes, "head_channels": channels}


def check_out_layers(out_layers: Any, depth: int, where: str) -> tuple[int, ...]:
    """Check and return the output layers (1-based); InputError unless there are four and the last is the last layer."""
    valid = isinstance(out_layers, (list, tuple)) and all(type(layer) is int for layer in out_layers)
    ascending = valid and list(out_layers) == sorted(set(out_layers))
    if not (ascending and len(out_layers) == LEVELS and out_layers[0] >= 1 and out_layers[-1] == depth):
        raise InputError(
            f"output levels after layers {str(out_layers)[:80]} ({where}), counted from 1: expected {LEVELS} of the "
            f"{depth} layers in ascending order, the last layer among them"
        )
    return tuple(out_layers)


def find_out_layers(said: Statements) -> Statement | None:
    """Return the statement about the output layers (1-based), or None."""
    if "out_layers" in said.options:
        return said.options["out_layers"]
    if (found := said.options.get("out_indices")) is None:
        return None
    valid = isinstance(found.value, tuple) and all(type(index) is int for index in found.value)
    return Statement(tuple(index + 1 for index in found.value), found.where) if valid else found
