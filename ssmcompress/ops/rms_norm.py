"""Root-mean-square normalisation (arXiv 1910.07467), the first op of every block."""

from __future__ import annotations

from torch import Tensor

from .dispatch import select


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, with the mean over the last axis.

    Args:
        x: (..., channels). weight: (channels,).
        backend: "cpu", "reference", or None for the best one available.

    Returns:
        (..., channels) in the dtype of `x`.

    Raises:
        ValueError: the shapes do not match, or the backend is unknown.
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: expected weight {tuple(x.shape[-1:])}, found {tuple(weight.shape)}")
    return select(backend, x).rms_norm(x, weight, eps)
