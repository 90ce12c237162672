"""Token importance: one number a token from what a block computed for it, the higher the more it matters.

`clip` is the score of ToP-ViM (arXiv 2409.18962, section 4): the mean over channels of the positive part of
the block's output. `l1`, `l2`, `mean` and `random` are the baselines of its ablation, `delta` the signal of
MTR (arXiv 2507.14042).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IMPORTANCES: dict[str, Callable[[Tensor, Callable[[], Tensor]], Tensor]] = {
    "clip": lambda y, delta: y.relu().mean(-1),
    "l1": lambda y, delta: y.abs().mean(-1),
    "l2": lambda y, delta: y.square().mean(-1).sqrt(),
    "mean": lambda y, delta: y.mean(-1),
    "delta": lambda y, delta: delta().float().mean(-1),
    # Blind to the features: the pruner ranks positions by its own seeded draw.
    "random": lambda y, delta: torch.zeros_like(y[..., 0]),
}


def importance(metric: str, y: Tensor, delta: Callable[[], Tensor]) -> Tensor:
    """Score of each token, (batch, tokens).

    Args:
        metric: a name in `IMPORTANCES`.
        y: (batch, tokens, channels) block output before the output projection, in token order.
        delta: gives (batch, tokens, channels) step sizes after softplus, mean over scan paths; asked for only
            by the metric that needs them.
    """
    return IMPORTANCES[metric](y.float(), delta)


def random_scores(length: int, seed: int) -> Tensor:
    """(length,) a random rank for each position, the same for every image and batch.

    A draw per image would make a prediction depend on the batch the image came in.
    """
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))
