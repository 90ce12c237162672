"""Root-mean-square normalisation (arXiv 1910.07467), the first op of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import select


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, backend: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, with the mean over the last axis.

    Args:
        x: (..., channels). weight: (channels,).
        backend: "cpu", "reference", or None for the best one available.
        dtype: of the result; None: that of `x`.

    Returns:
        (..., channels).

    Raises:
        ValueError: the shapes do not match, or the backend is unknown.
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: expected weight {tuple(x.shape[-1:])}, found {tuple(weight.shape)}")
    module = select(backend, x)
    if dtype is None or dtype == x.dtype:
        return module.rms_norm(x, weight, eps)
    if hasattr(module, "rms_norm_to"):
        return module.rms_norm_to(x, weight, eps, dtype)
    return module.rms_norm(x, weight, eps).to(dtype)
