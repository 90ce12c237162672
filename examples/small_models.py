"""Small models of the training scripts: a Vim, a PlainMamba, a VMamba or a DeiT with ten classes and square images.

Weights are initialised as in the published models (Vim, mamba-ssm, timm).
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from training_loop import initialise

from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.vim import VimConfig, VisionMamba
from ssmcompress.models.vmamba import VMamba, VMambaConfig

HEAD_WIDTH = 16  # channels per head of the DeiT
CLASSES = 10


class Sizes(NamedTuple):
    """Width, number of layers and scan states of a model, and its input size.

    Attributes:
        channels: of an image. side: of an image, in pixels. patch: side of a patch in pixels.
    """

    d_model: int
    depth: int
    d_state: int
    channels: int
    side: int
    patch: int

    @property
    def common(self) -> dict[str, Any]:
        """Configuration shared by all scanning models."""
        return {"in_chans": self.channels, "num_classes": CLASSES, "image_size": (self.side, self.side)}

    @property
    def layers(self) -> dict[str, Any]:
        """Configuration of models whose layers all have the same width."""
        width, rank = self.d_model, -(-self.d_model // 16)
        return {
            "d_model": width, "depth": self.depth, "d_inner": 2 * width, "d_state": self.d_state, "dt_rank": rank
        }  # fmt: skip


def make_vim(sizes: Sizes) -> VisionMamba:
    """Create a Vim with the class token in the middle."""
    patch = sizes.patch
    model = VisionMamba(VimConfig(**sizes.layers, **sizes.common, d_conv=4, patch_size=(patch, patch), stride=patch))
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    initialise(model, lambda m: (m.dt_proj, m.dt_proj_b), [block.mixer for block in model.blocks])
    return model


def make_plain_mamba(sizes: Sizes) -> PlainMamba:
    """Create a PlainMamba whose stem has 12 channels; the published 64 would account for most of the FLOPs."""
    config = PlainMambaConfig(
        **sizes.layers, **sizes.common, window=7, dw_layers=(), dw_window=0, stem_width=12, stem_depth=1,
        stem_window=7, patch_size=sizes.patch, stride=sizes.patch,
    )  # fmt: skip
    model = PlainMamba(config)
    nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    mixers = [block.mamba for block in model.blocks]
    initialise(model, lambda m: (m.dt_proj,), mixers)
    for mixer in mixers:
        nn.init.trunc_normal_(mixer.direction_Bs, std=0.02)
        mixer.dt_proj.bias.data /= 2  # this architecture adds the bias twice
    return model


def make_vmamba(sizes: Sizes) -> VMamba:
    """Create a VMamba with sections of 2, 2, `depth` and 2 layers, d_model to 8 d_model wide, and 4 x 4 patches."""
    widths = tuple(sizes.d_model * 2**section for section in range(4))
    config = VMambaConfig(
        **sizes.common, widths=widths, depths=(2, 2, sizes.depth, 2), d_inner=tuple(2 * width for width in widths),
        dt_rank=tuple(-(-width // 16) for width in widths), mlp_dim=tuple(4 * width for width in widths),
        d_state=sizes.d_state, stem_width=sizes.d_model // 2, window=3, stride=4,
    )  # fmt: skip
    model = VMamba(config)

    def dt_projs(mixer: nn.Module) -> list[SimpleNamespace]:
        paths = zip(mixer.dt_projs_weight.data, mixer.dt_projs_bias.data, strict=True)
        return [SimpleNamespace(weight=weight, bias=bias) for weight, bias in paths]

    initialise(model, dt_projs, [block.op for block in model.blocks])
    return model


def make_deit(sizes: Sizes) -> VisionTransformer:
    """Create timm's ViT, with weights scaled for few channels and sine-cosine position embeddings as initial values."""
    width = sizes.d_model
    if width % HEAD_WIDTH:
        raise SystemExit(f"--d-model {width}: expected a multiple of {HEAD_WIDTH}, the width of a head of the DeiT")
    model = VisionTransformer(
        img_size=sizes.side, patch_size=sizes.patch, in_chans=sizes.channels, num_classes=CLASSES, embed_dim=width,
        depth=sizes.depth, num_heads=width // HEAD_WIDTH, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="jax",
    )  # fmt: skip
    model.pos_embed.data[:, 1:] = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), width)
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the configuration for the checkpoint, such as the number of heads, which the weights do not show."""
    if not isinstance(model, VisionTransformer):
        return asdict(model.config)
    patches = model.patch_embed
    return {
        "d_model": model.embed_dim, "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads,
        "in_chans": model.in_chans, "num_classes": model.num_classes,
        "patch_size": tuple(patches.patch_size), "image_size": tuple(patches.img_size),
    }  # fmt: skip


class Architecture(NamedTuple):
    """The function that creates a model, the checkpoint entry of its weights, and its name in ssmcompress.

    `d_model`, `depth` and `d_state` are its usual sizes on Fashion-MNIST.
    """

    make: Callable[[Sizes], nn.Module]
    d_model: int
    depth: int
    weights: str
    name: str
    d_state: int = 8


ARCHITECTURES = {
    "vim": Architecture(make_vim, 64, 6, "model", "vim"),
    "plain_mamba": Architecture(make_plain_mamba, 64, 8, "state_dict", "plain_mamba"),
    "vmamba": Architecture(make_vmamba, 16, 5, "model", "vmamba", d_state=1),
    "deit": Architecture(make_deit, 32, 12, "model", "vit"),
}
