"""The depthwise causal convolution in front of the scan, aligned to the positions that pruning removed."""

from __future__ import annotations

from torch import Tensor

from .dispatch import full_precision, select


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Apply a depthwise causal convolution along a sequence from which tokens may be missing.

    A kept token sees its neighbours at their distance on the original path, and zeros at pruned positions:
    y_j = act(bias + sum_d weight[:, width-1-d] * x[token at position q_j - d, if kept]), d = 0..width-1. This equals
    the dense convolution with zeros at the pruned positions, evaluated at the kept tokens.

    Args:
        x: (batch, length, channels). weight: (channels, width) or (channels, 1, width), where the last tap
            is that of the current token. bias: (channels,).
        positions: (batch, length) or (length,) integers, strictly increasing along the sequence: the position
            of each token on the original path. None: no token is missing.
        activation: "silu" or None.
        reverse: look ahead instead of back; x, positions and the result stay in token order.
        backend: "cpu", "reference", or None for the best one available.

    Returns:
        (batch, length, channels) in the dtype of `x`; sums are float32 or wider.

    Raises:
        ValueError: the shapes do not match, or the activation or the backend is unknown.
    """
    if weight.ndim == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        raise ValueError(
            f"causal_conv1d: expected x (batch, length, channels) and weight (channels, width), "
            f"found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"causal_conv1d: expected bias ({x.shape[2]},), found {tuple(bias.shape)}")
    if positions is not None:
        if positions.ndim == 1:
            positions = positions.expand(x.shape[0], -1)
        if positions.shape != x.shape[:2]:
            raise ValueError(f"causal_conv1d: expected positions {tuple(x.shape[:2])}, found {tuple(positions.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is 'silu' or None, found {activation!r}")
    with full_precision(x.device):
        return select(backend, x).causal_conv1d(x, weight, bias, positions, activation, reverse)
