"""Options of a ViT that cannot be inferred from its weights, read from a configuration or from a timm model name.

timm's models of one class differ in options without weights: the number of heads, the activation, the epsilon of the
norms, the pooling. A name such as "vit_base_patch16_clip_quickgelu_224" determines all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .activation_names import ACTIVATIONS, name_activation
from .statements import Statements
from .vit_block import ViTConfig

POOLS = ("token", "avg")
# timm's names of the options.
TIMM_NAMES = {"global_pool": "pool", "act_layer": "activation"}


def read_options(config: ViTConfig, said: Statements) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the stated options, and the places where they were found, by the names of their fields.

    Raises:
        InputError: two statements contradict each other, or timm's model of that name is of a different kind.
    """
    options, where = {}, {}
    for name in said.names:
        if (found := read_timm_model(name.value, config, said)) is not None:
            options, where = found, dict.fromkeys(found, name.where)
            break
    for key in ("num_heads", "activation", "epsilon", "pool", *TIMM_NAMES):
        if (statement := said.options.get(key)) is None or statement.value is None:
            continue
        name, value = TIMM_NAMES.get(key, key), statement.value
        if name in where and options[name] != value and key not in TIMM_NAMES:
            raise InputError(f"{statement.where} says {name}={value!r}, {where[name]} says {options[name]!r}")
        options[name], where[name] = value, statement.where
    return options, where


def check_options(config: ViTConfig, options: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Raise an InputError unless the model with these options is supported; `where` has the places of stated ones."""
    heads = options.get("num_heads")
    if heads is not None and (type(heads) is not int or heads < 1 or config.d_model % heads):
        place = f" in {where['num_heads']}" if where.get("num_heads", "`num_heads`") != "`num_heads`" else ""
        raise InputError(f"`num_heads` {heads!r}{place}: expected a divisor of the width {config.d_model}")
    for name, supported in (("activation", ACTIVATIONS), ("pool", POOLS)):
        if options[name] not in supported:
            raise InputError(f"a ViT with {name} {options[name]!r} is not supported: expected {', '.join(supported)}")
    epsilon = options["epsilon"]
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"`epsilon` {epsilon!r}: expected a small number, such as 1e-6")
    if options["pool"] == "token" and not config.class_token:
        raise InputError("a ViT without a class token cannot read it out (pool 'token')")
    if options["pool"] == "avg" and config.distillation_token:
        raise InputError("a distilled ViT reads out its tokens, not a mean (pool 'avg')")


def read_timm_model(name: str, config: ViTConfig, said: Statements) -> dict[str, Any] | None:
    """Return the options of timm's model with this name, including prefix and tag; None if timm has no such model.

    Raises:
        InputError: the model is of a different class, or has different parts.
    """
    import timm
    from timm.layers import Attention, Mlp
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer

    base = name.strip().rpartition("/")[2].partition(".")[0]
    if not timm.is_model(base):
        return None
    arguments = {key: o.value for key in ("num_heads", "global_pool") if (o := said.options.get(key)) is not None}
    with torch.device("meta"):
        try:
            model = timm.create_model(base, pretrained=False, num_classes=config.num_classes, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"timm cannot make a {base}: {str(error)[:200]}") from error
    kinds = [(model, (VisionTransformer, VisionTransformerDistilled))]
    for block in model.blocks if isinstance(getattr(model, "blocks", None), nn.Module) else ():
        kinds += [(block, (Block,)), (block.attn, (Attention,)), (block.mlp, (Mlp,))] if type(block) is Block else []
        kinds += [] if type(block) is Block else [(block, (Block,))]
    if wrong := [part for part, expected in kinds if type(part) not in expected]:
        raise InputError(f"{base} is made of timm's {type(wrong[0]).__name__}: not supported")
    block = model.blocks[0]
    activation = name_activation(block.mlp.act)
    if activation is None:
        found = type(block.mlp.act).__name__
        raise InputError(f"{base} has the activation {found}: expected {', '.join(ACTIVATIONS)}")
    return {
        "num_heads": block.attn.num_heads,
        "activation": activation,
        "epsilon": block.norm1.eps,
        "pool": model.global_pool,
    }
