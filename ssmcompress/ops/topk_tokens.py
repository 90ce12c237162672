"""Selection of the tokens to keep."""

from __future__ import annotations

from torch import Tensor

from .dispatch import select


def topk_tokens(scores: Tensor, count: int, backend: str | None = None) -> Tensor:
    """Return the indices (batch, count) int64, ascending, of the highest `scores` (batch, tokens).

    Ties are resolved in favour of the lower index on every backend, so that the same image keeps the same tokens.
    """
    return select(backend, scores).topk_tokens(scores, count)
