"""Vision Mamba (Vim, hustvl): bidirectional scans over a raster of patches, with a class token in the middle.

arXiv 2401.09417; module and parameter names are those of the published checkpoints (`bimambav2`,
`final_pool_mean`, `abs_pos_embed`, `with_midclstok`, `div2`). The layers are in `vim_block`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import gather_tokens
from ..progress import note
from ..pruning.tokens import Tokens
from .base import Expected, StateDict, TokenModel
from .classifier import has_no_classes, make_classifier
from .features import DroppedSums, NamePatterns
from .precision import RMSNorm, embed_patches, widen
from .reading import Shapes, infer_grid, resize_grid
from .statements import Statements
from .vim_block import (
    EPSILON,
    FORTH_AND_BACK,
    PatchEmbed,
    VimBlock,
    VimConfig,
    VimMixer,
    count_layer_bytes,
    count_layers,
    read_layer_sizes,
)

__all__ = ["VimBlock", "VimConfig", "VimMixer", "VisionMamba", "resize_pos_embed"]

# (d_model, depth) of VideoMamba-M, which no published Vim has, and of VideoMamba-B, whose weights are published as an
# entry of a checkpoint, as a Vim's are.
VIDEO_MAMBA_M, VIDEO_MAMBA_B = (576, 32), (768, 24)
SAME_NAMES = "the weights of a Vim or of a VideoMamba, which have the same names and shapes"


class VisionMamba(TokenModel):
    """Vision Mamba of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture = "vim"
    config_class = VimConfig
    telling_keys = (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "layers.0.mixer.A_b_log",
        "head.weight",
    )

    no_weight_decay = NamePatterns(["*A_log", "*A_b_log", "*pos_embed", "*cls_token"])
    reads_protected = True
    # Of hustvl's vim/models_mamba.py; all published models have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        "if_cls_token": Expected((True,), "one class token"),
        "use_double_cls_token": Expected((False,), "one class token"),
        "use_middle_cls_token": Expected((True,), "the class token in the middle of the sequence"),
        "if_divide_out": Expected((True,), "the sum of both scans divided by two"),
        "bimamba_type": Expected(("v2",), "bidirectional blocks of type v2"),
        "if_bimamba": Expected((False,), "bidirectional blocks of type v2"),
        "if_bidirectional": Expected((False,), "both scans in every layer"),
        "if_abs_pos_embed": Expected((True,), "a learnt position embedding"),
        "if_rope": Expected((False,), "no rotary position embedding"),
        "if_rope_residual": Expected((False,), "no rotary position embedding"),
        "final_pool_type": Expected(("mean", "none", None), "the class token as its output"),
        "flip_img_sequences_ratio": Expected((-1, 0), "no random flips of the sequence"),
        "rms_norm": Expected((True,), "RMSNorm"),
        "norm_epsilon": Expected((EPSILON,), f"norms with an epsilon of {EPSILON:g}"),
    }
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "rope.": "rotary position embedding",
        "cls_token_": "several class tokens",
        "temporal_pos_embedding": "a VideoMamba for video",
        "pos_embed_cls": "a Mamba-Reg",
        "fpn": "the neck of a segmentation model",
    }

    def __init__(self, config: VimConfig):
        super().__init__(config)
        c = config
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches + 1, c.d_model))
        self.layers = nn.ModuleList(VimBlock(c, size) for size in c.layers)
        self.norm_f = RMSNorm(c.d_model, eps=EPSILON)
        self.head = make_classifier(c.d_model, c.num_classes)

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
        return self.config.patches // 2

    @property
    def patch_positions(self) -> Tensor:
        raster = torch.arange(self.config.patches, device="cpu")
        return (raster + (raster >= self.protected)).view(self.config.grid)

    def embed(self, images: Tensor) -> Tokens:
        c = self.config
        self.check(images)
        patches = widen(embed_patches(self.patch_embed.proj, images).flatten(2).transpose(1, 2))
        before, after = patches.split([self.protected, c.patches - self.protected], dim=1)
        tokens = torch.cat([before, self.cls_token.expand(images.shape[0], -1, -1), after], dim=1)
        features = tokens + self.pos_embed
        return Tokens(features, self.length, self.protected, alignment=self.alignment, orders=FORTH_AND_BACK)

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
        # `full` of the last layer, as run, counts the class token alone.
        parts = count_layers(config, counts, convention, as_run and convention == "full")
        return {**parts, "head": config.num_classes * config.d_model}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        products = [(self.config.patches, self.patch_embed.proj.weight.flatten(1))]
        for count, block in zip(counts, self.blocks, strict=True):
            last = block is self.blocks[-1]
            products += block.mixer.last_products(count) if last else block.mixer.products(count)
        corrections = (*self.corrections.parameters(), *self.class_corrections.parameters())
        products += [(1, weight) for weight in corrections]
        return [*products, (1, self.head.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        return self.length * count_layer_bytes(self.config, size)

    @classmethod
    def check_identity(cls, config: VimConfig, said: Statements) -> None:
        """Tell a Vim from a VideoMamba, which has its class token in front and does not divide by two."""
        if said.family is not None:
            return
        advice = "give `architecture`: 'vim' if it is a Vim; VideoMamba is not supported yet"
        if config.d_model == VIDEO_MAMBA_M[0] or config.depth == VIDEO_MAMBA_M[1]:
            raise InputError(
                f"{config.depth} layers of width {config.d_model}: the size of VideoMamba-M ({VIDEO_MAMBA_M[1]} layers "
                f"of width {VIDEO_MAMBA_M[0]}), and of no published Vim; {advice}"
            )
        if not said.wrapped or (config.d_model, config.depth) == VIDEO_MAMBA_B:
            raise InputError(f"{SAME_NAMES}, and nothing says which: {advice}")
        note(f"taken for a Vim: {SAME_NAMES}, and nothing says which (see `architecture`)")

    @classmethod
    def infer_stride(cls, state: StateDict, side: int) -> int | None:
        patch, entries = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[1] - 1
        # Images are filled by patches, as in all published models: else any size near theirs would do.
        fitting = (s for s in range(1, patch + 1) if side >= patch and (side - patch) % s == 0)
        strides = [s for s in fitting if ((side - patch) // s + 1) ** 2 == entries]
        return strides[0] if len(strides) == 1 else None

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return "patch_embed.proj.weight" in state and any(k.startswith("layers.0.mixer.") for k in state)

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
                "a Vim with two class tokens (cls_token_head, cls_token_tail) is not supported: expected one"
            )
        shape = Shapes(state, "Vim", MISSING)
        if (count := shape("cls_token", 3)[1]) != 1:
            raise InputError(f"a Vim with {count} class tokens, as in Mamba-Reg, is not supported: expected one")
        d_model, in_chans, *patch_size = shape("patch_embed.proj.weight", 4)
        sizes = read_layer_sizes(shape)
        patch = patch_size[0]
        if patch != patch_size[1]:
            raise InputError(f"patches of {tuple(patch_size)} pixels: expected square ones")
        stride = stride or patch
        if stride > patch:
            raise InputError(f"`stride` {stride}: expected at most {patch}, the patch size; more leaves pixels unread")

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1

        entries = shape("pos_embed", 3)[1] - 1
        advice = f" (and the patch stride, if it is not {patch})"
        trained, image_size = infer_grid(entries, patch, stride, grid_of, image_size, trained_size, advice)
        config = VimConfig(
            d_model=d_model,
            **sizes,
            in_chans=in_chans,
            num_classes=0 if has_no_classes(state.get("head.weight")) else shape.head("head.weight", d_model),
            patch_size=tuple(patch_size),
            stride=stride,
            image_size=tuple(image_size),
        )
        fitted = dict(state)
        if state["pos_embed"].shape[2] == d_model:  # a contradiction is reported with the other shapes
            fitted["pos_embed"] = resize_pos_embed(state["pos_embed"], trained, config.grid)
        return config, fitted


MISSING = {
    "cls_token": "it has no class token, from which this Vim reads its output, and is not supported",
    "pos_embed": "it has no learnt position embedding, and is not supported",
    "layers.0.mixer.A_b_log": "it scans in one direction only, and is not supported",
}


def resize_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1, 1 + patches, d_model) to another patch grid.

    The entry of the class token, in the middle at patches // 2, does not change.
    """
    middle = (table.shape[1] - 1) // 2
    patches = resize_grid(torch.cat([table[:, :middle], table[:, middle + 1 :]], dim=1), old, new)
    middle_new = patches.shape[1] // 2
    return torch.cat([patches[:, :middle_new], table[:, middle : middle + 1], patches[:, middle_new:]], dim=1)
