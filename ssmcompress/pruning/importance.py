"""Token importance: one number a token from what a block computed for it, the higher the more it matters.

`clip` is the score of ToP-ViM (arXiv 2409.18962, section 4): the mean over channels of the positive part of the
block's output before its projection. `l1`, `l2`, `mean` and `random` are the baselines of its ablation, `delta` the
signal of MTR (arXiv 2507.14042); `clip-paths` is `clip` of each scan path by itself, averaged. Those come from the
scan itself: see `ssmcompress.ops.SCORES`. `saliency` is read off a token's features by a linear map that was fitted to
the dense model's gradients, see `ssmcompress.compression.saliency`; `similarity` is the one of R-MeeTo, which merges by it
(`ssmcompress.pruning.merging`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import SCORES
from .tokens import Tokens

# What tokens may be dropped by, as an option; "similarity" has a meaning only where they are merged.
RANKINGS = (*SCORES, "random", "saliency")
IMPORTANCES = (*RANKINGS, "similarity")
# More than any distance of two tokens.
APART = 3.0


def random_scores(length: int, seed: int) -> Tensor:
    """(length,) a random rank for each position, the same for every image and batch.

    A draw per image would make a prediction depend on the batch the image came in.
    """
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


def unit_rms(features: Tensor) -> Tensor:
    """Features (..., d_model) at a mean square of 1, as the norm of the next layer sees them."""
    return features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-5)


def predicted_saliency(features: Tensor, positions: Tensor, probe: Tensor) -> Tensor:
    """(batch, tokens) what a probe says of tokens: a linear map of their features and a value for their position.

    Args:
        features: (batch, tokens, d_model). positions: (batch, tokens).
        probe: (d_model + length,), see `ssmcompress.compression.saliency.fit_probes`.
    """
    width = features.shape[-1]
    return unit_rms(features.float()) @ probe[:width] + probe[width:][positions]


def pair_distances(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """R-MeeTo's links: (distance, partner), both (batch, tokens).

    The protected token aside, the tokens are split into even and odd ones; each even token is linked to the odd one of
    the largest cosine, and its distance is 1 minus that. All others are `APART` from everything, linked to themselves.
    """
    batch, count, _ = tokens.features.shape
    own = torch.arange(count, device=tokens.features.device).expand(batch, -1)
    distances = torch.full((batch, count), APART, device=own.device)
    order = own  # the tokens that may be merged
    if tokens.protected is not None:
        free = own[:, 1:] - 1
        order = free + (free >= tokens.protected_index()[:, None])
    even, odd = order[:, ::2], order[:, 1::2]
    if not odd.shape[1]:
        return distances, own
    unit = F.normalize(tokens.features.float(), dim=-1)

    def at(index: Tensor) -> Tensor:
        return unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1]))

    cosine, best = (at(even) @ at(odd).transpose(1, 2)).max(-1)
    return distances.scatter(1, even, 1 - cosine), own.scatter(1, even, odd.gather(1, best))
