"""Alternative models from another package: timm's DeiTs of the sizes of Vim-tiny and Vim-small."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from ..models.base import TokenModel
from ..tasks import CLASSIFICATION

PEERS = ("deit_tiny_patch16_224", "deit_small_patch16_224")


def make_peers(model: TokenModel) -> dict[str, nn.Module]:
    """Return timm's DeiT-tiny and DeiT-small with random weights, by name, such as "timm deit_tiny_patch16_224".

    They are built for the model's image size, channels, classes and patch size, and have its dtype and device: with the
    16 x 16 patches in their names, an image of 28 x 28 pixels would be a single patch. Nothing is downloaded.

    Raises:
        InputError: the model is not a classifier of images, or timm is not installed.
    """
    if model.task.name != CLASSIFICATION.name or model.frames is not None:
        found = "takes videos" if model.frames is not None else f"is one for {model.task.name}"
        raise InputError(f"`peers` are models for classification of images, and the first model {found}")
    try:
        from timm import create_model
    except ImportError as error:
        raise InputError("`peers` needs the package timm: pip install timm") from error
    config, weight = model.config, next(model.parameters())
    options = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_chans}
    peers = {}
    for name in PEERS:
        peer = create_model(name, pretrained=False, num_classes=config.num_classes, **options)
        peers[f"timm {name}"] = peer.to(weight.device, weight.dtype).eval().requires_grad_(False)
    return peers


def describe_peers(model: TokenModel, peers: dict[str, nn.Module]) -> dict[str, Any]:
    """Return the configuration of a model's peers as a JSON value: `image_size`, `patch_size` and `tokens`."""
    embedding = next(iter(peers.values())).patch_embed
    tokens = embedding.num_patches + 1  # with the class token
    return {"image_size": list(model.config.image_size), "patch_size": list(embedding.patch_size), "tokens": tokens}
