"""Base class of classifiers with Vim layers: a class token among the patches is read out.

Subclasses define the position of the token and how their weights are recognised.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import gather_tokens
from ..pruning.tokens import Tokens
from .base import Expected, TokenModel
from .classifier import has_no_classes, make_classifier
from .families import StateDict
from .features import DroppedSums, NamePatterns
from .precision import RMSNorm, embed_patches, widen
from .reading import Shapes, infer_grid, resize_grid
from .vim_block import (
    EPSILON,
    FORTH_AND_BACK,
    PatchEmbed,
    VimBlock,
    VimConfig,
    count_layer_bytes,
    count_layers,
    count_spans,
    read_layer_sizes,
)

PROJECTION = "patch_embed.proj.weight"
# (d_model, depth) of VideoMamba-M, which no published Vim has, and of VideoMamba-B, whose weights are published as a
# checkpoint entry, like those of a Vim.
VIDEO_MAMBA_M, VIDEO_MAMBA_B = (576, 32), (768, 24)
SAME_NAMES = "the weights of a Vim or of a VideoMamba, which have the same names and shapes"

# From hustvl's vim/models_mamba.py: options that all of these models have in common.
VIM_OPTIONS: Mapping[str, Expected] = {
    "if_cls_token": Expected((True,), "one class token"),
    "use_double_cls_token": Expected((False,), "one class token"),
    "bimamba_type": Expected(("v2",), "bidirectional blocks of type v2"),
    "if_bidirectional": Expected((False,), "both scans in every layer"),
    "if_abs_pos_embed": Expected((True,), "a learnt position embedding"),
    "if_rope": Expected((False,), "no rotary position embedding"),
    "if_rope_residual": Expected((False,), "no rotary position embedding"),
    "rms_norm": Expected((True,), "RMSNorm"),
    "norm_epsilon": Expected((EPSILON,), f"norms with an epsilon of {EPSILON:g}"),
}


class VimClassifier(TokenModel):
    """A classifier on `VimBlock` layers. `forward`: images (batch, channels, height, width) -> logits (batch, classes).

    Attributes:
        title: its name in messages.
    """

    title: ClassVar[str]
    telling_keys = ("cls_token", "pos_embed", PROJECTION, "layers.0.mixer.A_b_log", "head.weight")
    no_weight_decay = NamePatterns(["*A_log", "*A_b_log", "*pos_embed", "*cls_token"])
    reads_protected = True

    def __init__(self, config: VimConfig):
        super().__init__(config)
        c = config
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.frame_patches + 1, c.d_model))
        self.layers = nn.ModuleList(VimBlock(c, size) for size in c.layers)
        self.norm_f = RMSNorm(c.d_model, eps=EPSILON)
        self.head = make_classifier(c.d_model, c.num_classes)

    @staticmethod
    @abc.abstractmethod
    def place_class_token(patches: int) -> int:
        """Return the position of the class token in a sequence with this number of patches."""

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def classifier(self) -> nn.Module:
        return self.head

    @property
    def length(self) -> int:
        return self.config.patches + 1

    @property
    def protected(self) -> int:
        return self.place_class_token(self.config.patches)

    @property
    def patch_positions(self) -> Tensor:
        raster = torch.arange(self.config.patches, device="cpu")
        return (raster + (raster >= self.protected)).view(self.config.grid)

    def embed(self, images: Tensor) -> Tokens:
        self.check(images)
        patches = widen(embed_patches(self.patch_embed.proj, images).flatten(2).transpose(1, 2))
        parts = (patches[:, : self.protected], self.cls_token.expand(images.shape[0], -1, -1))
        parts = (*parts, patches[:, self.protected :])
        # Avoid an empty part, which would remain as an operator in ONNX files.
        features = torch.cat(parts if self.protected else parts[1:], dim=1) + self.place_embedding()
        return Tokens(features, self.length, self.protected, alignment=self.alignment, orders=FORTH_AND_BACK)

    def place_embedding(self) -> Tensor:
        """Return the position embedding (1, length, d_model) that is added to the tokens."""
        return self.pos_embed

    def readout(self, tokens: Tokens) -> Tensor:
        protected = gather_tokens(tokens.features, tokens.protected_index()[:, None])[:, 0]
        return self.classify(self.normalise(protected), self.dropped_sums(tokens))

    def normalise(self, features: Tensor) -> Tensor:
        return self.norm_f(features)

    def select_read(self, features: Tensor) -> Tensor:
        return features[:, 0]

    def classify(self, read: Tensor, sums: DroppedSums, pre_logits: bool = False) -> Tensor:
        return read if pre_logits else self.head(read)

    @classmethod
    def count_flops(
        cls, config: VimConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        # For the last layer as run, `full` counts only the class token.
        read = cls.place_class_token(config.patches) if as_run and convention == "full" else None
        return {**count_layers(config, counts, convention, read), "head": config.num_classes * config.d_model}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        products = [(self.config.patches, self.patch_embed.proj.weight.flatten(1))]
        for count, block in zip(counts[:-1], self.blocks[:-1], strict=True):
            products += block.mixer.products(count)
        spans = count_spans(counts[-1], self.config.patches, self.protected)
        products += self.blocks[-1].mixer.last_products(counts[-1], spans)
        corrections = (*self.corrections.parameters(), *self.class_corrections.parameters())
        products += [(1, weight) for weight in corrections]
        return [*products, (1, self.head.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        return self.length * count_layer_bytes(self.config, size)

    @classmethod
    def infer_stride(cls, state: StateDict, side: int) -> int | None:
        patch, entries = state[PROJECTION].shape[-1], state["pos_embed"].shape[1] - 1
        # Patches must cover the image exactly, as in all published models; otherwise several strides would fit.
        fitting = (s for s in range(1, patch + 1) if side >= patch and (side - patch) % s == 0)
        strides = [s for s in fitting if ((side - patch) // s + 1) ** 2 == entries]
        return strides[0] if len(strides) == 1 else None

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[VimConfig, dict[str, Tensor]]:
        if {"cls_token_head", "cls_token_tail"} <= state.keys():
            raise InputError(
                f"a {cls.title} with two class tokens (cls_token_head, cls_token_tail) is not supported: expected one"
            )
        shape = Shapes(state, cls.title, MISSING)
        if (count := shape("cls_token", 3)[1]) != 1:
            raise InputError(
                f"a {cls.title} with {count} class tokens, as in Mamba-Reg, is not supported: expected one"
            )
        sizes = {**read_layer_sizes(shape), **cls.read_patches(shape)}
        patch = sizes["patch_size"][0]
        if patch != sizes["patch_size"][1]:
            raise InputError(f"patches of {sizes['patch_size']} pixels: expected square ones")
        stride = stride or patch
        if stride > patch:
            raise InputError(f"`stride` {stride}: expected at most {patch}, the patch size; more leaves pixels unread")

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1

        entries = shape("pos_embed", 3)[1] - 1
        advice = f" (and the patch stride, if it is not {patch})"
        trained, image_size = infer_grid(entries, patch, stride, grid_of, image_size, trained_size, advice)
        d_model = sizes["d_model"]
        config = cls.config_class(
            **sizes,
            num_classes=0 if has_no_classes(state.get("head.weight")) else shape.head("head.weight", d_model),
            stride=stride,
            image_size=tuple(image_size),
        )
        fitted = dict(state)
        if state["pos_embed"].shape[2] == d_model:  # a mismatch is reported with the other shapes
            table = resize_pos_embed(state["pos_embed"], trained, config.frame_grid, cls.place_class_token)
            fitted["pos_embed"] = table
        return config, fitted

    @classmethod
    def read_patches(cls, shape: Shapes) -> dict[str, Any]:
        """Infer the fields of the configuration that are determined by the patch embedding."""
        d_model, in_chans, *patch_size = shape(PROJECTION, 4)
        return {"d_model": d_model, "in_chans": in_chans, "patch_size": tuple(patch_size)}


MISSING = {
    "cls_token": "it has no class token, from which this Vim reads its output, and is not supported",
    "pos_embed": "it has no learnt position embedding, and is not supported",
    "layers.0.mixer.A_b_log": "it scans in one direction only, and is not supported",
}


def has_vim_layers(state: StateDict) -> bool:
    """Return whether parameter names belong to the patch embedding and layers of a Vim."""
    return PROJECTION in state and any(key.startswith("layers.0.mixer.") for key in state)


def is_of_video(state: StateDict) -> bool:
    """Return whether weights with Vim layers belong to a video model, which rules out a Vim."""
    return "temporal_pos_embedding" in state or state[PROJECTION].ndim == 5


def resize_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int], place: Callable[[int], int]) -> Tensor:
    """Interpolate a position embedding (1, 1 + patches, d_model) to another patch grid.

    The entry of the class token does not change.

    Args:
        place: function from the number of patches to the position of the class token.
    """
    token = place(table.shape[1] - 1)
    patches = resize_grid(torch.cat([table[:, :token], table[:, token + 1 :]], dim=1), old, new)
    new_token = place(patches.shape[1])
    return torch.cat([patches[:, :new_token], table[:, token : token + 1], patches[:, new_token:]], dim=1)
