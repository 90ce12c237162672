"""The tokens at an index, each image its own."""

from __future__ import annotations

from torch import Tensor

from .dispatch import select


def gather_tokens(tokens: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
    """(batch, taken, channels): of `tokens` (batch, tokens, channels) those at `index` (batch, taken), integers."""
    return select(backend, tokens).gather_tokens(tokens, index)
