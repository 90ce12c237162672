"""Token importance: one score for each token; tokens with higher scores are kept.

`clip` is the score of ToP-ViM (arXiv 2409.18962, section 4): the mean over channels of the positive part of the
block's output before its projection. `l1`, `l2`, `mean` and `random` are the baselines of its ablation, `delta` is the
signal of MTR (arXiv 2507.14042), and `clip-paths` is the mean of `clip` over the separate scan paths. All but `random`
are computed by the scan: see `ssmcompress.ops.SCORES`. `saliency` is predicted from a token's features by a linear map
fitted to the dense model's gradients: see `ssmcompress.compression.saliency`. `similarity` is the merging criterion of
R-MeeTo (`ssmcompress.pruning.merging`).

Layers with attention have `attention`, the score of EViT (arXiv 2202.07800): the attention of the class token to a
token, averaged over the heads. Their `clip`, `l1`, `l2` and `mean` are computed from the output of attention before its
projection. `keys` is the merging criterion of ToMe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import SCORES, gather_tokens
from ..ops.dispatch import full_precision
from ..ops.reference import accumulation_dtype
from .tokens import EPSILON, Tokens

# Larger than the distance of any two linked tokens.
UNLINKED_DISTANCE = 3.0


DRAW_BITS = 24  # torch.rand gives multiples of 2 ** -24 in float32


def draw_random(length: int, seed: int) -> Tensor:
    """Return a random number (length,) int32 for each position, below 2 ** DRAW_BITS.

    It is the same for every image and batch: with a draw per image, predictions would depend on the batch. Integers
        stay
    exact in `half()` and `bfloat16()` copies of a model; bfloat16 values would have ties.
    """
    draw = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return (draw * 2**DRAW_BITS).int()


def random_scores(positions: Tensor, draw: Tensor) -> Tensor:
    """Return scores (batch, tokens) float32 between 0 and 1 for the tokens at `positions`, from `draw_random`."""
    return draw[positions].float() * 2.0**-DRAW_BITS


def normalize_rms(features: Tensor) -> Tensor:
    """Normalise features (..., d_model) to a mean square of 1, as the norm of the next layer does."""
    return features * torch.rsqrt(features.square().mean(-1, keepdim=True) + EPSILON)


def predict_saliency(features: Tensor, positions: Tensor, probe: Tensor) -> Tensor:
    """Predict the saliency (batch, tokens): a linear map of the features plus an intercept for each position.

    Args:
        features: (batch, tokens, d_model). positions: (batch, tokens).
        probe: (d_model + length,), see `ssmcompress.compression.saliency.fit_probes`.
    """
    width = features.shape[-1]
    dtype = accumulation_dtype(features.dtype)
    features, probe = features.to(dtype), probe.to(dtype)
    with full_precision(features.device):
        return normalize_rms(features) @ probe[:width] + probe[width:][positions]


def link_pairs(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Link tokens as in R-MeeTo; returns (distance, partner), both (batch, tokens).

    The tokens, except for the protected one, are split into even and odd ones. Each even token is linked to the odd
    token with the largest cosine similarity, and its distance is 1 minus the similarity. All other tokens are linked to
    themselves, with distance `UNLINKED_DISTANCE`.
    """
    batch, count, _ = tokens.features.shape
    indices = torch.arange(count, device=tokens.features.device).expand(batch, -1)
    distances = torch.full((batch, count), UNLINKED_DISTANCE, dtype=torch.float32, device=indices.device)
    order = indices  # the tokens that may be merged
    if tokens.protected is not None:
        several = tokens.protected_count
        free = indices[:, several:] - several
        order = free + several * (free >= tokens.protected_index()[:, None])
    even, odd = order[:, ::2], order[:, 1::2]
    if not odd.shape[1]:
        return distances, indices
    unit = F.normalize(tokens.features.float(), dim=-1)

    def at(index: Tensor) -> Tensor:
        return unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1]))

    with full_precision(unit.device):
        cosine, best = (at(even) @ at(odd).transpose(1, 2)).max(-1)
    return distances.scatter(1, even, 1 - cosine), indices.scatter(1, even, odd.gather(1, best))


def match_keys(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Match tokens by their keys as in ToMe (arXiv 2210.09461); returns (distance, partner), both (batch, tokens).

    In the order of `tokens.ranks`, each token at an even place is matched with the token at an odd place whose key has
    the largest cosine similarity, and its distance is 1 minus the similarity. All others, including the protected
    tokens, are matched with themselves, with distance `UNLINKED_DISTANCE`.
    """
    batch, count, _ = tokens.features.shape
    indices = torch.arange(count, device=tokens.features.device).expand(batch, -1)
    order = indices if tokens.ranks is None else tokens.ranks.argsort(1)
    even, odd = order[:, ::2], order[:, 1::2]
    distances = torch.full((batch, count), UNLINKED_DISTANCE, dtype=torch.float32, device=indices.device)
    unit = F.normalize(tokens.keys.float(), dim=-1)
    with full_precision(unit.device):
        cosine = gather_tokens(unit, even) @ gather_tokens(unit, odd).transpose(1, 2)
    if tokens.protected is not None:
        held = tokens.is_protected(tokens.explicit_positions())
        cosine = cosine.masked_fill(held.gather(1, odd)[:, None], -torch.inf)
        cosine = cosine.masked_fill(held.gather(1, even)[..., None], -torch.inf)
    cosine, best = cosine.max(-1)
    distance = torch.where(cosine.isfinite(), 1 - cosine, UNLINKED_DISTANCE)
    return distances.scatter(1, even, distance), indices.scatter(1, even, odd.gather(1, best))


@dataclass(frozen=True)
class Importance:
    """An importance metric: its scoring function, its requirements and its cost.

    Attributes:
        score: (tokens, pruner) -> scores (batch, tokens), higher for more important tokens. `tokens` are the tokens
            after the layer of the stage; the pruner has the buffers `draw` and `probe`.
        block_metric: the score that the layer must compute, in `tokens.scores` (`keys`: in `tokens.keys`); or None.
            Scans support those of `ssmcompress.ops.SCORES`.
        draw: whether it needs a random value for each position. probe: whether it needs a predictor fitted on
            calibration images (`ssmcompress.compression.saliency`).
        flops: additional multiply-adds per token, as a multiple of d_model.
        ranks: whether it can be used to drop tokens; if not, it is only for merging.
    """

    score: Callable[[Tokens, Any], Tensor]
    block_metric: str | None = None
    draw: bool = False
    probe: bool = False
    flops: int = 0
    ranks: bool = True


IMPORTANCES: dict[str, Importance] = {
    **{name: Importance(lambda tokens, pruner: tokens.scores, block_metric=name) for name in SCORES},
    "random": Importance(lambda tokens, pruner: random_scores(pruner.table_positions(tokens), pruner.draw), draw=True),
    "saliency": Importance(
        lambda tokens, pruner: predict_saliency(tokens.features, pruner.table_positions(tokens), pruner.probe),
        probe=True,
        flops=1,
    ),
    "similarity": Importance(lambda tokens, pruner: link_pairs(tokens)[0], ranks=False),
    "attention": Importance(lambda tokens, pruner: tokens.scores, block_metric="attention", flops=1),
    "keys": Importance(lambda tokens, pruner: match_keys(tokens)[0], block_metric="keys", ranks=False),
}


def register_importance(name: str, importance: Importance) -> None:
    """Register a metric under a name for plans, `prune --importance` and `calibrate(..., importance=)`.

    A model pruned with it can be loaded again only while the metric is registered.

    Raises:
        ValueError: the name is taken.
    """
    if name in IMPORTANCES:
        raise ValueError(f"importance {name!r} is already registered")
    IMPORTANCES[name] = importance
