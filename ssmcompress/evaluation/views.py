"""Predictions averaged over views of the same video: clips and crops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.clips import Views


def predict(model: nn.Module, images: Tensor, views: Views | None) -> Tensor:
    """Return the outputs of a model, float32 on its device; for several views, the log of their mean probabilities.

    The mean is over probabilities, after the softmax, as in VideoMamba's code and earlier code for several views
    (`merge` in `engines/engine_for_finetuning.py`). Its logarithm is used as logits, so that the softmax of the result
    is the mean.

    Args:
        images: (batch, ...) as the model takes them; with `views`, (batch, views, ...).
    """
    device = next(model.parameters()).device
    if views is None:
        return model(images.to(device)).float()
    scores = [model(images[:, view].to(device)).float().log_softmax(1) for view in range(images.shape[1])]
    return torch.stack(scores).logsumexp(0) - torch.tensor(float(len(scores))).log()
