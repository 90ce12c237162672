"""Token merging instead of dropping: the strongest training-free alternatives to pruning, for comparison.

- "ordered" is the method of R-MeeTo (arXiv 2412.12496): each removed token is merged into the partner it is linked to,
  by a mean that is weighted by the number of tokens that each one stands for.
- "grouped" is the method of MTR (arXiv 2507.14042): the tokens with the highest scores stay unchanged, the lowest are
  sources, those between are targets, and each source is averaged into the target most similar to it. There are as many
  targets as sources, if enough tokens are kept.

In both, the kept tokens retain their order and positions, and the protected token is not merged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dispatch import full_precision
from .importance import link_pairs
from .tokens import Tokens

MERGES = ("ordered", "grouped")


def merge_into_kept(tokens: Tokens, index: Tensor, scores: Tensor, merge: str) -> Tokens:
    """Return the tokens at `index`, with all others merged into some of them.

    Args:
        tokens: the tokens before the stage. index: (batch, kept) ascending, the tokens to keep.
        scores: (batch, tokens) the scores they were ranked by, infinite for the protected token.
        merge: one of `MERGES`.
    """
    batch, count, _ = tokens.features.shape
    is_kept = torch.zeros(batch, count, dtype=torch.bool, device=index.device)
    is_kept = is_kept.scatter(1, index, torch.ones_like(index, dtype=torch.bool))  # torch.jit cannot scatter a bool
    if merge == "ordered":
        partner = link_pairs(tokens)[1]
        sizes = tokens.sizes if tokens.sizes is not None else torch.ones_like(scores)
    else:
        partner = _find_targets(tokens, int(index.shape[1]), is_kept, scores)
        sizes = torch.ones_like(scores)
    indices = torch.arange(count, device=index.device).expand(batch, -1)
    target = torch.where(is_kept, indices, partner)
    weight = torch.zeros_like(sizes).scatter_add(1, target, sizes)
    parts = tokens.features * sizes[..., None]
    total = torch.zeros_like(parts).scatter_add(1, target[..., None].expand_as(parts), parts)
    merged = torch.where(is_kept[..., None], total / weight.clamp(min=1)[..., None], tokens.features)
    kept = tokens.updated(merged, update=tokens.update).keep(index)
    return replace(kept, sizes=weight.gather(1, index)) if merge == "ordered" else kept


def _find_targets(tokens: Tokens, kept: int, is_kept: Tensor, scores: Tensor) -> Tensor:
    """Return for each token (batch, tokens) the most similar of the `kept` tokens with the lowest scores."""
    features, length = tokens.features, int(tokens.features.shape[1])
    count = min(length - kept, kept - (tokens.protected is not None))
    if not count:
        return torch.arange(length, device=features.device).expand(features.shape[0], -1)
    lowest = scores.masked_fill(~is_kept, torch.inf).topk(count, largest=False).indices
    unit = F.normalize(features.float(), dim=-1)
    targets = unit.gather(1, lowest[..., None].expand(-1, -1, unit.shape[-1]))
    with full_precision(unit.device):
        return lowest.gather(1, (unit @ targets.transpose(1, 2)).argmax(-1))
