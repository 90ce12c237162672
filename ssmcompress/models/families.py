"""Unsupported model families, recognised by parameter names so that error messages can name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

StateDict = Mapping[str, Tensor]

HEAD_OF_SEGMENTATION = "decode_head.conv_seg.weight"
# The scans of the first version of VMamba and of models derived from it: VM-UNet, MedMamba.
FIRST_VERSION = "layers.0.blocks.0.self_attention"
SUPPORTED_BACKBONES = ("backbone.layers.0.mixer.", "backbone.layers.0.mamba.direction_Bs")


class Family(NamedTuple):
    """A family of models: its name, its kind of output, and a test of whether parameter names belong to it."""

    name: str
    task: str
    recognises: Callable[[StateDict], bool]


CLASSIFICATION, SEGMENTATION, DETECTION = "image classification", "semantic segmentation", "object detection"


def _with(*keys: str) -> Callable[[StateDict], bool]:
    return lambda state: all(key in state for key in keys)


def _with_part(key: str, part: str) -> Callable[[StateDict], bool]:
    """Return a test for a parameter `key` together with a module called `part` at any level."""
    return lambda state: key in state and any(f".{part}." in name for name in state)


def _has_other_head_or_backbone(state: StateDict) -> bool:
    """Return whether there is an mmseg head that is not UperNet, or not on a Vim or PlainMamba backbone."""
    if HEAD_OF_SEGMENTATION in state:
        return not any(key.startswith(SUPPORTED_BACKBONES) for key in state)
    backbones = any(key.startswith(("backbone.layers.", "backbone.levels.")) for key in state)
    return backbones and any(key.startswith("decode_head.") for key in state)


def _scans_parts_of_grids(state: StateDict) -> bool:
    """Return whether layers have the windowed scans of LocalVim and LocalVMamba."""
    return any(".multi_scan." in key for key in state if key.startswith("layers.0."))


def _beginning(*prefixes: str) -> Callable[[StateDict], bool]:
    return lambda state: all(any(key.startswith(prefix) for key in state) for prefix in prefixes)


# The order matters: a family that is derived from another one comes before it.
FAMILIES: tuple[Family, ...] = (
    Family(
        "UperNet on a VMamba backbone",
        SEGMENTATION,
        _with(HEAD_OF_SEGMENTATION, "backbone.layers.0.blocks.0.op.A_logs"),
    ),
    Family("a model with a head of mmseg", SEGMENTATION, _has_other_head_or_backbone),
    Family("a detector of mmdet", DETECTION, lambda state: any("rpn_head." in k or "bbox_head." in k for k in state)),
    Family("VideoMamba", "masked pretraining", _beginning("clip_decoder.", "layers.0.mixer.")),
    Family("Mamba-Reg", CLASSIFICATION, _with("pos_embed_cls", "layers.0.mixer.A_log")),
    Family("LocalMamba", CLASSIFICATION, _scans_parts_of_grids),
    Family("VM-UNet", SEGMENTATION, _beginning("layers_up.", f"{FIRST_VERSION}.")),
    Family("MedMamba", CLASSIFICATION, _with_part(f"{FIRST_VERSION}.A_logs", "conv33conv33conv11")),
    Family("EfficientVMamba", CLASSIFICATION, _with_part("layers.0.blocks.0.op.A_logs", "conv_branch")),
    Family("VSSD", CLASSIFICATION, _with("layers.0.blocks.0.attn.A_log", "layers.0.blocks.0.cpe1.weight")),
    Family("VMamba, first version", CLASSIFICATION, _with(f"{FIRST_VERSION}.A_logs")),
    Family("MambaVision", CLASSIFICATION, _with("patch_embed.conv_down.0.weight")),
    Family("a Mamba language model", "text", _with("backbone.embeddings.weight", "backbone.layers.0.mixer.A_log")),
    Family("a Mamba language model", "text", _with("backbone.embedding.weight", "backbone.layers.0.mixer.A_log")),
    Family("Swin Transformer", CLASSIFICATION, _with("layers.0.blocks.0.attn.relative_position_bias_table")),
    Family("ResNet", CLASSIFICATION, _with("conv1.weight", "layer1.0.conv1.weight")),
)

# Names of architectures as they are spelled in files, in the order in which they are searched.
FAMILY_NAMES: tuple[tuple[str, str, str], ...] = (
    ("video_mamba", "VideoMamba", r"video[-_ ]?mamba"),
    ("plain_mamba", "PlainMamba", r"plain[-_ ]?mamba"),
    ("mamba_vision", "MambaVision", r"mamba[-_ ]?vision"),
    ("vm_unet", "VM-UNet", r"vm[-_ ]?unet"),
    ("med_mamba", "MedMamba", r"med[-_ ]?mamba"),
    ("vssd", "VSSD", r"(?<![a-z])vssd"),
    ("local_vim", "LocalMamba", r"local[-_ ]?(vim|vmamba|mamba)"),
    ("efficient_vmamba", "EfficientVMamba", r"efficient[-_ ]?vmamba"),
    ("mamba_reg", "Mamba-Reg", r"mamba[-_ ]?(reg|r)(?![a-z])"),
    ("vmamba", "VMamba", r"vmamba|(?<![a-z])vssm"),
    ("deit", "DeiT", r"(?<![a-z])deit"),
    ("vit", "ViT", r"(?<![a-z])vit(?![a-z])"),
    ("vim", "Vim", r"(?<![a-z])vim(?![a-z])|(?<![a-z])vision[-_ ]?mamba"),
)


def find_family(state: StateDict) -> Family | None:
    """Return the unsupported family of models with these parameter names, or None."""
    return next((family for family in FAMILIES if family.recognises(state)), None)
