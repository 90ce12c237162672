"""Vision transformers (ViT, DeiT, distilled DeiT, DeiT III, AugReg) in timm's form, the baseline of the papers.

The modules and parameter names are those of timm with one exception: the two classifiers of a distilled DeiT, whose
logits are averaged, are a single linear layer `head` on both tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note
from ..pruning.tokens import Tokens
from .base import TokenModel
from .classifier import has_no_classes, make_classifier
from .families import StateDict
from .features import DroppedSums, NamePatterns
from .precision import LayerNorm, cast, embed_patches, widen
from .reading import Shapes, infer_grid, resize_grid
from .statements import Statements
from .vit_block import ViTBlock, ViTConfig, count_layers
from .vit_options import check_options, read_options

# Head width of the models of DeiT and of most others; the number of heads is assumed from it.
HEAD_WIDTH = 64
KNOWN_WIDTHS = (192, 384, 768, 1024)  # of models of sizes tiny to large, whose heads all have that width
# Widths whose published models have 16 heads, of another width: so400m, huge, giant, gigantic.
OTHER_WIDTHS = (1152, 1280, 1408, 1664)
# DeiT's own code uses different names than timm for the parameters of the layer scale.
RENAMED = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


class VisionTransformer(TokenModel):
    """A ViT of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture = "vit"
    families = ("deit",)
    config_class = ViTConfig
    telling_keys = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
    hidden_options = ("num_heads", "activation", "epsilon", "pool")
    no_weight_decay = NamePatterns(["*pos_embed", "*cls_token", "*dist_token", "*reg_token"])
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "attn_pool.": "attention that pools the tokens",
        "rope.": "rotary position embedding",
        "rel_pos_bias": "relative positions",
        "decoder": "a masked autoencoder",
        "mask_token": "a model for pretraining",
        "patch_embed.norm": "a norm of the patches",
    }

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        from timm.layers import PatchEmbed

        c, width = config, config.d_model
        self.pools, self.reads_protected = c.pool == "avg", c.pool == "token"
        self.patch_embed = PatchEmbed(c.image_size, c.patch_size, c.in_chans, width, bias=not c.pre_norm)
        counts = {"cls_token": c.class_token, "dist_token": c.distillation_token, "reg_token": c.registers}
        for name, count in counts.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, count, width)) if count else None)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches + c.prefix * c.embeds_prefix, width))
        self.norm_pre = LayerNorm(width, c.epsilon) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(c) for _ in range(c.depth))
        self.norm = nn.Identity() if c.fc_norm else LayerNorm(width, c.epsilon)
        self.fc_norm = LayerNorm(width, c.epsilon) if c.fc_norm else nn.Identity()
        self.head = make_classifier(width * max(1, c.read), c.num_classes)

    def publish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.config.distillation_token and self.config.read == 2:
            _split_heads(state)
        return state

    @property
    def blocks(self) -> nn.ModuleList:
        return self._modules["blocks"]

    @property
    def classifier(self) -> nn.Module:
        return self.head

    @property
    def key_width(self) -> int:
        return self.d_model // self.config.num_heads

    @property
    def length(self) -> int:
        return self.config.patches + self.config.prefix

    @property
    def protected(self) -> int | None:
        return 0 if self.config.prefix else None

    @property
    def protected_count(self) -> int:
        return self.config.prefix

    @property
    def patch_positions(self) -> Tensor:
        return (torch.arange(self.config.patches, device="cpu") + self.config.prefix).view(self.config.grid)

    @property
    def default_importance(self) -> str:
        return "attention" if self.config.class_token else super().default_importance

    def default_stages(self) -> tuple[int, ...]:
        """Return EViT's layers, 4, 7 and 10 of 12, scaled to the depth."""
        depth = self.config.depth
        return tuple(sorted({min(depth, max(1, round(layer * depth / 12))) for layer in (4, 7, 10)}))

    def embed(self, images: Tensor) -> Tokens:
        c = self.config
        self.check(images)
        patches = widen(embed_patches(self.patch_embed.proj, images).flatten(2).transpose(1, 2))
        own = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        prefix = [widen(token).expand(images.shape[0], -1, -1) for token in own]
        if c.embeds_prefix:
            features = torch.cat([*prefix, patches], dim=1) + self.pos_embed
        else:
            features = torch.cat([*prefix, patches + self.pos_embed], dim=1)
        features = widen(self.norm_pre(features))
        return Tokens(features, self.length, self.protected, prefix=max(1, c.prefix), alignment=self.alignment)

    def readout(self, tokens: Tokens) -> Tensor:
        """Classify the class token, or the mean over the kept patches; see `Alignment.pool`."""
        return self.classify(self.normalise(self.select_read(tokens.features)), self.dropped_sums(tokens))

    def normalise(self, features: Tensor) -> Tensor:
        return self.norm(features)

    def select_read(self, features: Tensor) -> Tensor:
        c = self.config
        return features[:, : c.read] if c.read else features[:, c.prefix :]

    def classify(self, read: Tensor, sums: DroppedSums, pre_logits: bool = False) -> Tensor:
        if self.config.read:
            pooled = self.fc_norm(read).flatten(1)
        else:
            if sums.total is not None:
                mean = (read.sum(1, dtype=sums.total.dtype) + sums.total) / self.config.patches
            else:
                mean = read.mean(1)
            pooled = cast(self.fc_norm(mean), self.head)
        return pooled if pre_logits else self.add_correction(self.head(pooled), sums.summary)

    def memory(self, features: Tensor) -> Tensor:
        return self.norm(features) if self.pools else super().memory(features)

    @classmethod
    def count_flops(
        cls, config: ViTConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        # For the last layer as run, `full` counts only the tokens that are read out.
        parts = count_layers(config, counts, as_run and convention == "full" and config.read > 0)
        return {**parts, "head": config.num_classes * config.d_model * max(1, config.read)}

    def flops_by_part(self, counts: Sequence[int], convention: str, as_run: bool = True) -> dict[str, int]:
        return super().flops_by_part(counts, convention, as_run and self.shortens_last)

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        counts, products = self.token_counts(), [(self.config.patches, self.patch_embed.proj.weight.flatten(1))]
        for layer, block in enumerate(self.blocks, 1):
            short = self.shortens_last and layer == len(self.blocks)
            tokens, left = (counts[layer - 1], self.config.read) if short else counts[layer - 1 : layer + 1]
            q, kv = block.attn.qkv.weight.split([self.d_model, 2 * self.d_model])
            queries = left if short else tokens
            products += [(queries, q), (tokens, kv), (queries, block.attn.proj.weight)]
            products += [(left, block.mlp.fc1.weight), (left, block.mlp.fc2.weight)]
        corrections = (*self.corrections.parameters(), *self.class_corrections.parameters())
        products += [(1, weight) for weight in corrections]
        return [*products, (1, self.head.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        c = self.config
        inside = max(4 * c.d_model + 2 * self.length * c.num_heads, 2 * c.mlp_dim)
        return self.length * (3 * c.d_model * 4 + inside * size)

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[ViTConfig, dict[str, Tensor]]:
        state = {_rename(key): value for key, value in state.items()}
        shape = Shapes(state, "ViT", MISSING)
        width, in_chans, *patch_size = shape("patch_embed.proj.weight", 4)
        patch = patch_size[0]
        if patch != patch_size[1]:
            raise InputError(f"patches of {tuple(patch_size)} pixels: expected square ones")
        if stride not in (None, patch):
            raise InputError(f"stride {stride}: patches of a ViT do not overlap, expected {patch}")
        own = [shape(name, 3)[1] if name in state else 0 for name in ("cls_token", "dist_token", "reg_token")]
        if max(own[:2]) > 1:
            raise InputError(f"a ViT with {max(own[:2])} class tokens is not supported: expected one")

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            return size[0] // patch, size[1] // patch

        entries = shape("pos_embed", 3)[1]
        known = grid_of(trained_size) if trained_size is not None else None
        embeds = _embeds_prefix(entries, sum(own), known)
        trained, image_size = infer_grid(entries - sum(own) * embeds, patch, patch, grid_of, image_size, trained_size)
        if any(side % patch for side in image_size):
            raise InputError(f"image size {image_size}: expected multiples of {patch}, the patch size")
        config = ViTConfig(
            d_model=width,
            depth=shape.count("blocks."),
            num_heads=0,
            mlp_dim=shape("blocks.0.mlp.fc1.weight", 2)[0],
            in_chans=in_chans,
            num_classes=0 if has_no_classes(state.get("head.weight")) else shape.head("head.weight", width),
            patch_size=tuple(patch_size),
            stride=patch,
            image_size=tuple(image_size),
            class_token=own[0] > 0,
            distillation_token=own[1] > 0,
            registers=own[2],
            embeds_prefix=embeds,
            qkv_bias="blocks.0.attn.qkv.bias" in state,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
            layer_scale="blocks.0.ls1.gamma" in state,
            pre_norm="norm_pre.weight" in state,
            fc_norm="fc_norm.weight" in state and "norm.weight" not in state,
        )
        if state["pos_embed"].shape[2] == width:  # a mismatch is reported with the other shapes
            state["pos_embed"] = _resize_positions(state["pos_embed"], sum(own) * embeds, trained, config.grid)
        if config.distillation_token and "head_dist.weight" in state:
            _join_heads(state)
        return config, state

    @classmethod
    def complete_config(cls, config: ViTConfig, said: Statements, image_size: tuple[int, int] | None) -> ViTConfig:
        default = "avg" if config.fc_norm or not config.class_token else "token"
        found, where = read_options(config, said)
        if config.pre_norm and "activation" not in found:
            raise InputError(
                "a ViT with a norm before its layers, as in CLIP, whose activation is not in the weights: load it from "
                "a folder with timm's config.json, which names the model"
            )
        options = {"activation": "gelu", "epsilon": 1e-6, "pool": default, **found}
        check_options(config, options, where)
        if "num_heads" not in options:
            options["num_heads"] = _assume_heads(config.d_model)
        return replace(config, **options)


def _assume_heads(width: int) -> int:
    """Return the number of heads of a ViT of this width whose file does not say it; a note is shown for rare widths.

    Raises:
        InputError: the number cannot be assumed.
    """
    if width % HEAD_WIDTH:
        raise InputError(
            f"the number of heads is not in the weights, and the width {width} is not a multiple of {HEAD_WIDTH}, the "
            f"width of a head in most published models: give `num_heads`"
        )
    heads = width // HEAD_WIDTH
    if width in OTHER_WIDTHS:
        raise InputError(
            f"the number of heads is not in the weights: published models of width {width} have 16, but heads of the "
            f"usual width {HEAD_WIDTH} would be {heads}: give `num_heads`"
        )
    if width not in KNOWN_WIDTHS:
        note(f"the number of heads is not in the file; assumed: {heads}, of width {HEAD_WIDTH} (`num_heads`)")
    return heads


MISSING = {"pos_embed": "it has no learnt position embedding, and is not supported"}


def _rename(key: str) -> str:
    """Return timm's name of a parameter."""
    start, _, last = key.rpartition(".")
    return f"{start}.{RENAMED[last]}" if last in RENAMED and start.startswith("blocks.") else key


def _embeds_prefix(entries: int, prefix: int, grid: tuple[int, int] | None) -> bool:
    """Infer from the number of entries whether a position embedding covers the tokens before the patches.

    Args:
        grid: (rows, columns) of the patches, if known; else a square grid is assumed.
    """
    if not prefix:
        return False
    if grid is not None:
        return math.prod(grid) != entries
    return math.isqrt(entries) ** 2 != entries or math.isqrt(entries - prefix) ** 2 == entries - prefix > 0


def _resize_positions(table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1, prefix + patches, d_model) to another grid of patches."""
    return torch.cat([table[:, :prefix], resize_grid(table[:, prefix:], old, new)], dim=1)


def _join_heads(state: dict[str, Tensor]) -> None:
    """Merge the two classifiers of a distilled DeiT, in place, into one on both tokens that computes their mean."""
    weight, bias = (state.pop(f"head_dist.{name}") for name in ("weight", "bias"))
    if weight.shape == state["head.weight"].shape and bias.shape == state["head.bias"].shape:
        state["head.weight"] = torch.cat([state["head.weight"], weight], dim=1) / 2
        state["head.bias"] = (state["head.bias"] + bias) / 2


def _split_heads(state: dict[str, Tensor]) -> None:
    """Split the classifier of a distilled DeiT, in place, into the two whose mean it computes."""
    parts = (2 * state["head.weight"]).chunk(2, dim=1)
    state["head.weight"], state["head_dist.weight"] = (part.contiguous() for part in parts)
    state["head_dist.bias"] = state["head.bias"].clone()
