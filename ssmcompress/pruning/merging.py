"""Merging instead of dropping: the strongest training-free rivals of pruning, to be compared with.

- "ordered" is R-MeeTo's (arXiv 2412.12496): each dropped token joins the partner it was linked to, by a mean that is
  weighted by how many tokens each one stands for.
- "grouped" is MTR's (arXiv 2507.14042): the tokens ranked highest stay as they are, the lowest are sources, those
  between are targets, and each source is averaged into the target most similar to it. There are as many targets as
  sources, as far as there are.

Either way the tokens that stay keep their order and their places, and the protected one takes no part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .importance import pair_distances
from .tokens import Tokens

MERGES = ("ordered", "grouped")


def merge_into_kept(tokens: Tokens, index: Tensor, scores: Tensor, merge: str) -> Tokens:
    """The tokens at `index`, with all others merged into some of them.

    Args:
        tokens: those before the stage. index: (batch, kept) ascending, which of them stay.
        scores: (batch, tokens) what they were ranked by, the protected token at infinity.
        merge: one of `MERGES`.
    """
    batch, count, _ = tokens.features.shape
    stays = torch.zeros(batch, count, dtype=torch.bool, device=index.device).scatter(1, index, True)
    if merge == "ordered":
        partner = pair_distances(tokens)[1]
        sizes = tokens.sizes if tokens.sizes is not None else torch.ones_like(scores)
    else:
        partner = _targets(tokens.features, stays, scores)
        sizes = torch.ones_like(scores)
    own = torch.arange(count, device=index.device).expand(batch, -1)
    into = torch.where(stays, own, partner)
    weight = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    parts = tokens.features * sizes[..., None]
    total = torch.zeros_like(parts).scatter_add(1, into[..., None].expand_as(parts), parts)
    merged = torch.where(stays[..., None], total / weight.clamp(min=1)[..., None], tokens.features)
    kept = tokens.updated(merged).keep(index)
    return replace(kept, sizes=weight.gather(1, index)) if merge == "ordered" else kept


def _targets(features: Tensor, stays: Tensor, scores: Tensor) -> Tensor:
    """(batch, tokens) for each token the most similar of the lowest-ranked ones that stay."""
    gone = int((~stays[0]).sum())
    free = stays & scores.isfinite()
    targets = min(gone, int(free[0].sum()))
    if not targets:
        return torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
    lowest = scores.masked_fill(~free, torch.inf).topk(targets, largest=False).indices
    unit = F.normalize(features.float(), dim=-1)
    chosen = unit.gather(1, lowest[..., None].expand(-1, -1, unit.shape[-1]))
    return lowest.gather(1, (unit @ chosen.transpose(1, 2)).argmax(-1))
