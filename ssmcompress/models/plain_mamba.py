"""PlainMamba (ChenhongyiYang): four continuous scans over a grid of patches, a 2-D convolution, mean pooling.

arXiv 2403.17695; module and parameter names are those of the published checkpoints (mmcv's, `backbone.` and `head.`).
The layers are in `plain_mamba_block`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..pruning.alignment import ScanOrder
from ..pruning.tokens import Tokens
from .base import TokenModel
from .classifier import has_no_classes, make_classifier
from .families import HEAD_OF_SEGMENTATION, StateDict
from .features import DroppedSums, NamePatterns
from .plain_mamba_block import (
    PatchEmbed,
    PlainMambaBlock,
    PlainMambaConfig,
    PlainMambaMixer,
    count_bytes,
    count_layers,
    read_backbone_sizes,
)
from .precision import LayerNorm, cast, widen
from .reading import Shapes, infer_grid, resize_grid
from .snakes import snakes

__all__ = ["PlainMamba", "PlainMambaBlock", "PlainMambaConfig", "PlainMambaMixer"]


class Backbone(nn.Module):
    def __init__(self, c: PlainMambaConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches, c.d_model))
        self.layers = nn.ModuleList(PlainMambaBlock(c, layer) for layer in range(c.depth))
        self.ln1 = LayerNorm(c.d_model, eps=1e-6)


class Head(nn.Module):
    def __init__(self, c: PlainMambaConfig):
        super().__init__()
        self.fc = make_classifier(c.d_model, c.num_classes)


class PlainMamba(TokenModel):
    """PlainMamba of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture = "plain_mamba"
    config_class = PlainMambaConfig
    telling_keys = ("backbone.patch_embed.projection.weight", "backbone.layers.0.mamba.direction_Bs", "head.fc.weight")
    no_weight_decay = NamePatterns(["*A_log", "*pos_embed", "*direction_Bs"])
    pools = True

    def __init__(self, config: PlainMambaConfig):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.head = Head(config)
        visits, labels = snakes(*config.grid)
        self.register_buffer("visits", visits, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.layers

    @property
    def classifier(self) -> nn.Module:
        return self.head.fc

    def embed(self, images: Tensor) -> Tokens:
        self.check(images)
        patches = widen(self.backbone.patch_embed(images).flatten(2).transpose(1, 2))
        orders = tuple(ScanOrder(v, labels=kinds) for v, kinds in zip(self.visits, self.labels, strict=True))
        return Tokens(patches + self.backbone.pos_embed, self.length, alignment=self.alignment, orders=orders)

    def readout(self, tokens: Tokens) -> Tensor:
        """Classify the mean over the kept tokens; with alignment `pool`, over the last features of all tokens.

        With a correction, the logits also depend on a summary of all tokens.
        """
        return self.classify(self.normalise(tokens.features), self.dropped_sums(tokens))

    def normalise(self, features: Tensor) -> Tensor:
        return self.backbone.ln1(features)

    def select_read(self, features: Tensor) -> Tensor:
        return features

    def classify(self, read: Tensor, sums: DroppedSums, pre_logits: bool = False) -> Tensor:
        if sums.total is not None:
            total = read.sum(1, dtype=sums.total.dtype) + sums.total
            pooled = cast(total / self.length, self.head.fc)
        else:
            pooled = read.mean(1)
        return pooled if pre_logits else self.add_correction(self.head.fc(pooled), sums.summary)

    def memory(self, features: Tensor) -> Tensor:
        return self.backbone.ln1(features)

    @classmethod
    def count_flops(
        cls, config: PlainMambaConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        return {**count_layers(config, counts, convention), "head": config.num_classes * config.d_model}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        products = self.backbone.patch_embed.products(self.config)
        for count, block in zip(counts, self.blocks, strict=True):
            products += block.mamba.products(count)
        corrections = nn.ModuleList([self.corrections, self.readout_correction or nn.Identity()])
        products += [(1, weight) for weight in corrections.parameters()]
        return [*products, (1, self.head.fc.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        return count_bytes(self.config, size)

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return "backbone.layers.0.mamba.direction_Bs" in state and HEAD_OF_SEGMENTATION not in state

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[PlainMambaConfig, dict[str, Tensor]]:
        # Exclude mmcv's moving averages, which are named like the weights, with underscores instead of dots.
        fitted = {key: value for key, value in state.items() if not key.startswith("ema_")}
        shape = Shapes(fitted, "PlainMamba")
        sizes = read_backbone_sizes(shape, stride)
        headless = has_no_classes(fitted.get("head.fc.weight"))
        sizes["num_classes"] = 0 if headless else shape.head("head.fc.weight", sizes["d_model"])
        patch = sizes["patch_size"]

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            return PlainMambaConfig(**sizes, image_size=size).grid

        entries = shape("backbone.pos_embed", 3)[1]
        trained, image_size = infer_grid(entries, patch, patch, grid_of, image_size, trained_size)
        config = PlainMambaConfig(**sizes, image_size=tuple(image_size))
        table = fitted["backbone.pos_embed"]
        if table.shape[2] == config.d_model:  # a mismatch is reported with the other shapes
            fitted["backbone.pos_embed"] = resize_grid(table, trained, config.grid)
        return config, fitted
