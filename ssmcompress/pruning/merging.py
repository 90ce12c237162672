"""Token merging instead of dropping: the strongest training-free alternatives to pruning, as baselines.

- "ordered" is the method of R-MeeTo (arXiv 2412.12496): each removed token is merged into the partner it is linked to,
  by a mean weighted by the number of tokens that each one represents.
- "grouped" is the method of MTR (arXiv 2507.14042): the tokens with the highest scores stay unchanged, those with the
  lowest scores are sources, the others are targets, and each source is averaged into the target most similar to it.
  There are as many targets as sources, if enough tokens are kept.

Two methods are for layers with attention:

- "bipartite" is the method of ToMe (arXiv 2210.09461): each removed token is merged into the token with the most
  similar key, by a mean weighted by the number of tokens that each one represents. If the plan is aligned, later
  attention weights tokens by this number (proportional attention).
- "fused" is the method of EViT (arXiv 2202.07800): all removed tokens are fused into one token, their sum weighted by
  the attention of the class token. It has no position and comes last; later stages can remove it.

The kept tokens retain their order and positions, and protected tokens are not merged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dispatch import full_precision
from .importance import link_pairs, match_keys
from .tokens import Tokens

MERGES = ("ordered", "grouped", "bipartite", "fused")
# Importance metrics that are only for merging, and the merge method of each.
MERGED_BY = {"similarity": "ordered", "keys": "bipartite"}


def merge_into_kept(tokens: Tokens, index: Tensor, scores: Tensor, merge: str, partner: Tensor | None = None) -> Tokens:
    """Return the tokens at `index`, with all others merged into some of them.

    Args:
        tokens: the tokens before the stage. index: (batch, kept) ascending, the tokens to keep.
        scores: (batch, tokens), the scores by which they were ranked, infinite for the protected token.
        merge: one of `MERGES`.
        partner: (batch, tokens), the result of `link_tokens` if the scores are from it; None: it is computed here.
    """
    if merge == "fused":
        return _fuse(tokens, index, scores)
    batch, count, _ = tokens.features.shape
    is_kept = torch.zeros(batch, count, dtype=torch.bool, device=index.device)
    is_kept = is_kept.scatter(1, index, torch.ones_like(index, dtype=torch.bool))  # torch.jit cannot scatter a bool
    if merge in MERGED_BY.values():
        partner = link_tokens(tokens, merge)[1] if partner is None else partner
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
    if merge == "bipartite":
        kept = replace(kept, ranks=_rank(tokens).gather(1, index))
    return replace(kept, sizes=weight.gather(1, index)) if merge in MERGED_BY.values() else kept


def link_tokens(tokens: Tokens, merge: str) -> tuple[Tensor, Tensor]:
    """Return the scores and the partner of each token, (batch, tokens) each, for a method in `MERGED_BY`."""
    return link_pairs(tokens) if merge == "ordered" else match_keys(tokens)


def count_merge(merge: str, tokens: int, kept: int, width: int, key_width: int) -> int:
    """Return the additional multiply-adds of merging the tokens of one image.

    Args:
        tokens, kept: number of tokens before and after. width: width of the residual stream. key_width: width of the
            compared keys.
    """
    if merge == "fused":
        return (tokens - kept) * width
    if merge == "grouped":
        return tokens * min(tokens - kept, kept) * width
    return (tokens // 2) ** 2 * (key_width if merge == "bipartite" else width)


def _rank(tokens: Tokens) -> Tensor:
    """Return ranks (batch, tokens) after a merge as in ToMe: first the tokens at even places, then those at odd places.

    They are distinct, in the order of the remaining tokens.
    """
    count = int(tokens.features.shape[1])
    places = torch.arange(count, device=tokens.features.device).expand(tokens.features.shape[0], -1)
    if tokens.ranks is not None:
        places = tokens.ranks.argsort(1).argsort(1)
    return places + places % 2 * count


def _fuse(tokens: Tokens, index: Tensor, scores: Tensor) -> Tokens:
    """Return the tokens at `index`, followed by the sum of all others weighted by their scores."""
    removed = torch.ones_like(scores).scatter(1, index, torch.zeros_like(index).to(scores.dtype))
    weight = torch.where(removed > 0, scores, 0).to(tokens.features.dtype)
    with full_precision(weight.device):
        fused = weight[:, None] @ tokens.features
    return tokens.keep(index).with_fused(fused)


def _find_targets(tokens: Tokens, kept: int, is_kept: Tensor, scores: Tensor) -> Tensor:
    """Return (batch, tokens): for each token, the most similar of the `kept` tokens with the lowest scores."""
    features, length = tokens.features, int(tokens.features.shape[1])
    count = min(length - kept, kept - tokens.protected_count)
    if not count:
        return torch.arange(length, device=features.device).expand(features.shape[0], -1)
    lowest = scores.masked_fill(~is_kept, torch.inf).topk(count, largest=False).indices
    unit = F.normalize(features.float(), dim=-1)
    targets = unit.gather(1, lowest[..., None].expand(-1, -1, unit.shape[-1]))
    with full_precision(unit.device):
        return lowest.gather(1, (unit @ targets.transpose(1, 2)).argmax(-1))
