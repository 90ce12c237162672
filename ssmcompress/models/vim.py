"""Vision Mamba (Vim, hustvl): bidirectional scans over a raster of patches, with a class token in the middle.

arXiv 2401.09417; module and parameter names are those of the published checkpoints (`bimambav2`,
`final_pool_mean`, `abs_pos_embed`, `with_midclstok`, `div2`). The layers are in `vim_block`, the code shared with
VideoMamba in `vim_classifier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..errors import InputError
from ..progress import note
from .base import Expected
from .families import StateDict
from .statements import FILE_NAME, Statements
from .vim_block import VimBlock, VimConfig, VimMixer
from .vim_classifier import (
    SAME_NAMES,
    VIDEO_MAMBA_B,
    VIDEO_MAMBA_M,
    VIM_OPTIONS,
    VimClassifier,
    has_vim_layers,
    is_of_video,
)

__all__ = ["VimBlock", "VimConfig", "VimMixer", "VisionMamba"]

ADVICE = (
    "give `architecture`: 'vim' or 'video_mamba'. If you do not know, `evaluate` it as each on a few labelled images: "
    "read as the other one, it is wrong about most"
)


class VisionMamba(VimClassifier):
    """Vision Mamba of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture, title = "vim", "Vim"
    config_class = VimConfig
    # From hustvl's vim/models_mamba.py; all published models have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        **VIM_OPTIONS,
        "use_middle_cls_token": Expected((True,), "the class token in the middle of the sequence"),
        "if_divide_out": Expected((True,), "the sum of both scans divided by two"),
        "if_bimamba": Expected((False,), "bidirectional blocks of type v2"),
        "final_pool_type": Expected(("mean", "none", None), "the class token as its output"),
        "flip_img_sequences_ratio": Expected((-1, 0), "no random flips of the sequence"),
    }
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "rope.": "rotary position embedding",
        "cls_token_": "several class tokens",
        "pos_embed_cls": "a Mamba-Reg",
        "fpn": "the neck of a segmentation model",
    }

    @staticmethod
    def place_class_token(patches: int) -> int:
        return patches // 2

    @classmethod
    def check_identity(cls, config: VimConfig, said: Statements) -> None:
        """Distinguish a Vim from a VideoMamba, which has its class token in front and does not divide by two."""
        is_size_of_m = (config.d_model, config.depth) == VIDEO_MAMBA_M
        # A file name does not outweigh a size that is published only for the other architecture.
        if said.family is not None and not (is_size_of_m and said.family.where == FILE_NAME):
            return
        if config.d_model == VIDEO_MAMBA_M[0] or config.depth == VIDEO_MAMBA_M[1]:
            raise InputError(
                f"{config.depth} layers of width {config.d_model}: {SAME_NAMES}. No published Vim has this width or "
                f"depth; VideoMamba-M has {VIDEO_MAMBA_M[1]} layers of width {VIDEO_MAMBA_M[0]}; {ADVICE}"
            )
        if not said.wrapped or (config.d_model, config.depth) == VIDEO_MAMBA_B:
            raise InputError(f"{SAME_NAMES}, and nothing says which: {ADVICE}")
        note(f"taken for a Vim: {SAME_NAMES}, and nothing says which (see `architecture`)")

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return has_vim_layers(state) and not is_of_video(state)
