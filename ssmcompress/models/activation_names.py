"""Names of activations, found from the values of a module."""

from __future__ import annotations

import torch
from torch import nn

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def name_activation(activation: nn.Module) -> str | None:
    """Return timm's name of an activation, one of `ACTIVATIONS`; None for any other."""
    from timm.layers import get_act_layer

    x = torch.linspace(-4, 4, 33, device="cpu")
    for name in ACTIVATIONS:
        if torch.allclose(activation(x), get_act_layer(name)()(x), rtol=0, atol=1e-6):
            return name
    return None
