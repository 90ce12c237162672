"""Selection of tokens by index, separately for each image."""

from __future__ import annotations

from torch import Tensor

from .dispatch import select


def gather_tokens(tokens: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
    """Select the tokens at `index` (batch, kept), integers, from (batch, tokens, channels): (batch, kept, channels)."""
    return select(backend, tokens).gather_tokens(tokens, index)
