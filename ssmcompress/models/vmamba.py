"""VMamba (MzeroMiko): four sections of layers on successively halved grids, four scans in each layer, mean pooling.

arXiv 2401.10166, the second version, `v05_noz`, whose weights are released; module names are those of the published
checkpoints. The authors call the sections "stages". The layers are in `vmamba_block`.

Tokens are dropped inside a section. At its end every position is needed: a dropped token is restored with its last
features, or with the output of the maps of the section's level (`level_maps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note
from ..pruning.alignment import ScanOrder
from ..pruning.plan import Stage, default_stages
from ..pruning.tokens import Level, Tokens
from .base import Expected
from .blocks import Block
from .classifier import has_no_classes, make_classifier
from .families import StateDict
from .features import DroppedSums, NamePatterns
from .level_maps import LevelledModel
from .precision import LayerNorm, cast, widen
from .reading import LARGEST_SIDE, Shapes
from .statements import IMAGE_SIZE, Statements
from .vmamba_block import (
    EPSILON,
    PATHS,
    Downsample,
    Stem,
    VMambaBlock,
    VMambaConfig,
    VMambaMixer,
    count_bytes,
    count_layers,
    make_paths,
)

__all__ = ["VMamba", "VMambaBlock", "VMambaConfig", "VMambaMixer"]

STRIDE = 4
PUBLISHED_SIZE = (224, 224)
# Linear layers that may be stored as 1x1 convolutions.
PROJECTIONS = ("op.in_proj.weight", "op.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


class SectionLayers(nn.Module):
    """The layers of a section, and the downsampling to the next one."""

    def __init__(self, c: VMambaConfig, section: int):
        super().__init__()
        self.blocks = nn.ModuleList(VMambaBlock(c, section) for _ in range(c.depths[section]))
        self.downsample = Downsample(*c.widths[section : section + 2]) if section + 1 < len(c.depths) else nn.Identity()


class VMamba(LevelledModel):
    """VMamba of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture = "vmamba"
    config_class = VMambaConfig
    telling_keys = ("patch_embed.0.weight", "layers.0.blocks.0.op.A_logs", "classifier.head.weight")
    no_weight_decay = NamePatterns(["*A_logs", "*Ds", "*dt_projs_bias"])
    # From MzeroMiko/VMamba's configurations; all released models of the second version have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        "SSM_FORWARDTYPE": Expected(("v05_noz",), "layers of type v05_noz"),
        "SSM_ACT_LAYER": Expected(("silu",), "SiLU after the convolution"),
        "MLP_ACT_LAYER": Expected(("gelu",), "GELU in the MLP"),
        "POSEMBED": Expected((False,), "no position embedding"),
        "GMLP": Expected((False,), "an MLP without a gate"),
    }

    foreign_keys: ClassVar[Mapping[str, str]] = {
        "running_mean": "norms over the batch",
        "op.conv2d.bias": "a bias of the convolution",
        "downsample.reduction": "patches that are merged",
    }

    def __init__(self, config: VMambaConfig):
        super().__init__(config)
        c = config
        self.patch_embed = Stem(c)
        self.layers = nn.ModuleList(SectionLayers(c, section) for section in range(len(c.depths)))
        self.norm = LayerNorm(c.d_model, eps=EPSILON)
        self.head = make_classifier(c.d_model, c.num_classes)
        for section, grid in enumerate(c.grids):
            self.register_buffer(f"visits{section}", make_paths(*grid), persistent=False)
        # Number of the first layer of each further section -> 0-based index of the section.
        self._first = {section.first: number for number, section in enumerate(self.sections) if number}

    @property
    def blocks(self) -> list[Block]:
        return [block for part in self.layers for block in part.blocks]

    @property
    def classifier(self) -> nn.Module:
        return self.head

    @property
    def levels(self) -> int:
        """The number of levels: one at the end of each section."""
        return len(self.config.depths)

    @property
    def droppable_layers(self) -> tuple[int, ...]:
        return ()

    def default_stages(self) -> tuple[int, ...]:
        """Return the first layer of each section with several layers, and ToP-ViM's stages in the longest section."""
        deepest = max(self.sections, key=lambda section: section.last - section.first)
        depth = deepest.last - deepest.first + 1
        layers = {section.first for section in self.sections if section.last > section.first} or {1}
        layers |= {deepest.first - 1 + layer for layer in default_stages(depth)} if depth > 1 else set()
        return tuple(sorted(layers))

    def starts_section(self, layer: int) -> bool:
        return layer in self._first

    # ------------------------------------------------------------------------------------------------- levels

    def level_layer(self, level: int) -> int:
        return self.sections[level - 1].last

    def level_stages(self, level: int) -> list[Stage]:
        section = self.sections[level - 1]
        return [s for s in self.plan.stages if section.first <= s.after <= section.last] if self.plan else []

    def level_passes(self) -> list[tuple[int, ...]]:
        return [(level,) for level in range(1, self.levels + 1) if self.level_stages(level)]

    def read_levels(self, images: Tensor, levels: Sequence[int]) -> list[Level]:
        (level,) = levels
        *_, last = self.run_layers(self.embed(images), range(1, self.level_layer(level) + 1))
        return [last.after.level()]

    # ------------------------------------------------------------------------------------------------ forward

    def embed(self, images: Tensor) -> Tokens:
        self.check(images)
        return self._to_tokens(self.patch_embed(images), 0)

    def _to_tokens(self, maps: Tensor, section: int) -> Tokens:
        """Convert maps (batch, width, rows, columns) to the tokens of a section, which store dropped tokens."""
        grid = tuple(maps.shape[-2:])
        orders = tuple(map(ScanOrder, getattr(self, f"visits{section}")))
        features = widen(maps.flatten(2).transpose(1, 2))
        length = grid[0] * grid[1]
        return Tokens(features, length, alignment=self.alignment, orders=orders, grid=grid, dropped=())

    def enter(self, layer: int, tokens: Tokens) -> Tokens:
        if layer not in self._first:
            return tokens
        section = self._first[layer]
        filled = self.fill(section, tokens.level())  # levels count from 1, so this is the section before
        maps = filled.transpose(1, 2).unflatten(2, tokens.grid)
        return self._to_tokens(self.layers[section - 1].downsample(maps), section)

    def readout(self, tokens: Tokens) -> Tensor:
        """Classify the mean over all positions."""
        return self.classify(self._features(tokens), DroppedSums())

    def _features(self, tokens: Tokens) -> Tensor:
        """Return normalised tokens at all positions, (batch, length, d_model)."""
        return self.normalise(self.fill(self.levels, tokens.level()))

    def normalise(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.d_model:
            raise InputError(
                f"the norm after the last layer is for {self.d_model} features, and these are {features.shape[-1]}: "
                f"leave out `norm`, set `intermediates_only` with `stop_early`, or take layers of the last section"
            )
        return self.norm(features)

    def select_read(self, features: Tensor) -> Tensor:
        return features

    def classify(self, read: Tensor, sums: DroppedSums, pre_logits: bool = False) -> Tensor:
        pooled = cast(widen(read).mean(1), self.head)
        return pooled if pre_logits else self.head(pooled)

    # ------------------------------------------------------------------------------------ what the model is

    @property
    def global_pool(self) -> str:
        return "avg"

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": width, "reduction": STRIDE * 2**section, "module": f"layers.{section}.blocks.{layer}"}
            for section, (width, depth) in enumerate(zip(self.config.widths, self.config.depths, strict=True))
            for layer in range(depth)
        ]

    def patch_positions_at(self, layer: int) -> Tensor:
        grid = self.config.grids[self.sections.index(self.section_of(layer))]
        return torch.arange(grid[0] * grid[1], device="cpu").view(grid)

    @classmethod
    def count_flops(
        cls, config: VMambaConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        return {**count_layers(config, counts, convention), "head": config.num_classes * config.d_model}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        c, counts, maps = self.config, self.token_counts(), self.level_products()
        stem = self.patch_embed
        products = [(math.prod(c.stem_grid), stem["0"].weight.flatten(1)), (c.patches, stem["5"].weight.flatten(1))]
        for layer, block in enumerate(self.blocks, 1):
            if (section := self._first.get(layer)) is not None:
                conv = self.layers[section - 1].downsample["1"]
                products.append((math.prod(c.grids[section]), conv.weight.flatten(1)))
            tokens, left = counts[self.count_index(layer) :][:2]
            products += block.op.products(tokens)
            products += [(left, block.mlp.fc1.weight), (left, block.mlp.fc2.weight)]
        corrections = [(1, weight) for weight in self.corrections.parameters()]
        return [*products, *maps, *corrections, (1, self.head.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        return count_bytes(self.config, size)

    # --------------------------------------------------------------------------------------------------- files

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return "layers.0.blocks.0.op.A_logs" in state

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[VMambaConfig, dict[str, Tensor]]:
        fitted = to_own_form(state)
        shape = Shapes(fitted, "VMamba", HINTS)
        check_version(fitted, shape)
        if stride not in (None, STRIDE):
            raise InputError(f"`stride` {stride}: the tokens of a VMamba are {STRIDE} pixels apart")
        first = [f"layers.{section}.blocks.0." for section in range(shape.count("layers."))]
        sizes = [shape(f"{name}op.in_proj.weight", 2) for name in first]
        stem_width, in_chans, _, _ = shape("patch_embed.0.weight", 4)
        config = VMambaConfig(
            widths=tuple(width for _, width in sizes),
            depths=tuple(shape.count(f"layers.{section}.blocks.") for section in range(len(first))),
            d_inner=tuple(channels for channels, _ in sizes),
            dt_rank=tuple(shape(f"{name}op.dt_projs_weight", 3)[2] for name in first),
            mlp_dim=tuple(shape(f"{name}mlp.fc1.weight", 2)[0] for name in first),
            d_state=shape(f"{first[0]}op.A_logs", 2)[1],
            stem_width=stem_width,
            window=shape.window(f"{first[0]}op.conv2d.weight"),
            in_chans=in_chans,
            num_classes=0 if has_no_classes(fitted.get("head.weight")) else shape.head("head.weight", sizes[-1][1]),
            stride=STRIDE,
            image_size=tuple(image_size or trained_size or PUBLISHED_SIZE),
        )
        return config, fitted

    @classmethod
    def complete_config(
        cls, config: VMambaConfig, said: Statements, image_size: tuple[int, int] | None
    ) -> VMambaConfig:
        """Return the configuration with the stated image size, unless the caller requests one."""
        found = said.size(IMAGE_SIZE, "img_size", "input_size", "image_size")
        if image_size is None and found is not None:
            config = replace(config, image_size=found.value)
        elif image_size is None:
            note(f"images of {config.image_size[0]} pixels are assumed: the weights do not show it (`image_size`)")
        if not 1 <= min(config.image_size) <= max(config.image_size) <= LARGEST_SIDE:
            raise InputError(f"image size {config.image_size}: expected 1 to {LARGEST_SIDE} pixels")
        return config

    def publish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, value in state.items():
            if key.endswith("op.x_proj.weight"):
                key, value = f"{key.removesuffix('.weight')}_weight", value.unflatten(0, (PATHS, -1))
            start = key.partition(".")[0]
            found[f"classifier.{key}" if start in ("norm", "head") else key] = value
        return found


HINTS = {
    "layers.0.blocks.0.mlp.fc1.weight": "its layers have no MLP, as in the first version, which is not supported",
    "patch_embed.0.weight": "its patches are made differently, as in the first version, which is not supported",
}


def to_own_form(state: StateDict) -> dict[str, Tensor]:
    """Convert weights in any of the published forms to the names and shapes of this model.

    Matrices may be stored as 1x1 convolutions, and those of the four paths as one tensor of two or three dimensions.

    Raises:
        InputError: a parameter is present in two forms.
    """
    found: dict[str, Tensor] = {}
    for stored, value in state.items():
        key = stored.removeprefix("classifier.")
        if key.endswith(PROJECTIONS) and value.ndim == 4 and tuple(value.shape[2:]) == (1, 1):
            value = value.flatten(1)
        elif key.endswith("op.x_proj_weight") and value.ndim == 3:
            key, value = f"{key.removesuffix('_weight')}.weight", value.flatten(0, 1)
        elif key.endswith("op.dt_projs.weight") and value.ndim == 2 and len(value) % PATHS == 0:
            key, value = f"{key.removesuffix('.weight')}_weight", value.unflatten(0, (PATHS, -1))
        if key in found:
            raise InputError(f"{key} of a VMamba is present twice, once as {stored}: remove one of them")
        found[key] = value
    return found


def check_version(state: StateDict, shape: Shapes) -> None:
    """Raise an InputError that names the version if it is a VMamba of another version with different layers."""
    name = "layers.0.blocks.0.op."
    channels, (rows, _) = shape(f"{name}conv2d.weight", 4)[0], shape(f"{name}in_proj.weight", 2)
    others = {
        f"{name}conv2d.bias": "a bias of the convolution",
        "layers.0.downsample.reduction.weight": "patches that are merged",
        "patch_embed.proj.weight": "a stem of one convolution",
        "pos_embed": "a position embedding",
    }
    found = [what for key, what in others.items() if key in state]
    found += ["a gate"] if rows == 2 * channels else []
    if found:
        raise InputError(
            f"a VMamba with {' and '.join(found)} is not supported: this version knows the released second version, "
            f"v05_noz, which has none"
        )
