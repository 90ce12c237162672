"""How good a pruned model would be, judged cheaply: by its outputs as they are, or with its classifier refitted.

Reconstruction (`ssmcompress.compression.reconstruct`) takes twenty times as long as running a plan, so plans are judged
before it. The outputs as they are mislead: part of what pruning does to them is a shift that any refit takes away. To
refit the classifier alone, in closed form, costs nothing beside the run, and ranks 35 plans of the bundled Vim (50 to
75 % of the FLOPs, one to three stages, eight metrics) as full reconstruction does with a rank correlation of 0.96;
without it, 0.85.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.base import TokenModel

# Of the mean square of what the classifier receives.
RIDGE = 1e-2


class Collector:
    """What the classifier of a model receives, (images, width), of all runs while in the `with` block."""

    def __init__(self, model: TokenModel):
        self.model = model
        self.seen: list[Tensor] = []

    def __enter__(self) -> Collector:
        self.hook = self.model.classifier.register_forward_hook(lambda _, given, __: self.seen.append(given[0].cpu()))
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def take(self) -> Tensor:
        """What came since the last time."""
        found = torch.cat(self.seen)
        self.seen.clear()
        return found


def total_loss(
    classifier: nn.Linear,
    features: Tensor,
    dense: Tensor,
    labels: Tensor | None = None,
    *,
    refit: bool = False,
    add: Callable[..., None] | None = None,
) -> float:
    """Sum over the images of KL(dense || this) in nats, or of the labels' cross entropy above the dense model's.

    With `refit`, each half of the images (every second one) is judged with a classifier that was refitted to the dense
    logits on the other half.

    Args:
        features: (images, width) what the classifier receives. dense: (images, classes) the dense model's logits.
        labels: (images,), to judge by them.
        add: adds tensors up over processes, each of which has images of its own.
    """
    weight, bias = classifier.weight.detach().cpu(), classifier.bias
    logits = F.linear(features, weight, None if bias is None else bias.detach().cpu()).double()
    if refit:
        rows = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
        halves = [slice(0, None, 2), slice(1, None, 2)]
        changes = [_change(rows[half], dense.double()[half] - logits[half], add) for half in halves]
        for half, change in zip(halves, reversed(changes), strict=True):
            logits[half] += rows[half] @ change
    ours, theirs = logits.log_softmax(1), dense.double().log_softmax(1)
    if labels is None:
        return float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    return float(F.nll_loss(ours, labels, reduction="sum") - F.nll_loss(theirs, labels, reduction="sum"))


def _change(rows: Tensor, missing: Tensor, add: Callable[..., None] | None) -> Tensor:
    """(width + 1, classes) ridge regression of what is missing in the logits."""
    gram, cross = rows.T @ rows, rows.T @ missing
    if add is not None:
        add(gram, cross)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)


def mean_losses(totals: Sequence[float] | Tensor, images: int, add: Callable[..., None] | None) -> Tensor:
    """Losses summed over the images of each process -> means over all images."""
    totals, count = torch.as_tensor(totals, dtype=torch.float64), torch.tensor(float(images), dtype=torch.float64)
    if add is not None:
        add(totals, count)
    return totals / count
