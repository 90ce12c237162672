"""Token importance: one number a token from what a block computed for it, the higher the more it matters.

`clip` is the score of ToP-ViM (arXiv 2409.18962, section 4): the mean over channels of the positive part of the
block's output before its projection. `l1`, `l2`, `mean` and `random` are the baselines of its ablation, `delta` the
signal of MTR (arXiv 2507.14042); `clip-paths` is `clip` of each scan path by itself, averaged. All but `random` come
from the scan itself: see `ssmcompress.ops.SCORES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import SCORES

IMPORTANCES = (*SCORES, "random")


def random_scores(length: int, seed: int) -> Tensor:
    """(length,) a random rank for each position, the same for every image and batch.

    A draw per image would make a prediction depend on the batch the image came in.
    """
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))
