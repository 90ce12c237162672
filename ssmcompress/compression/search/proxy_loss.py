"""A cheap proxy for the loss of a reconstructed model: the pruned model's loss, as it is or with a refitted classifier.

Reconstruction (`ssmcompress.compression.reconstruct`) takes twenty times as long as running a plan, so plans are ranked
before it. The outputs as they are mislead, because part of their change is a shift that any refit removes. Refitting
the classifier alone, in closed form, is free compared with the run. Over 35 plans of the bundled Vim (50 to 75 % of the
FLOPs, one to three stages, eight metrics) its ranking and that of full reconstruction have a rank correlation of 0.96;
without the refit, 0.85.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.base import TokenModel
from ...tasks import CLASSIFICATION
from ...tasks.base import image_losses

# Ridge strength, relative to the mean squared input of the classifier.
RIDGE = 1e-2


class Collector:
    """Collects what runs of a model in the body of the with statement are judged by.

    That is (images, width), the input of the classifier if it is a linear layer, which can then be refitted; else the
    outputs of the classifier are judged at once, since there is one for each pixel.
    """

    def __init__(self, model: TokenModel):
        self.model, self.refits = model, isinstance(model.classifier, nn.Linear)
        self.parts: list[Tensor] = []

    def __enter__(self) -> Collector:
        def collect(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.parts.append((inputs[0] if self.refits else output).cpu())

        self.hook = self.model.classifier.register_forward_hook(collect)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def take(self, dense: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return what was collected since the last call: the inputs, or the loss of each image, (images,).

        Args:
            dense: outputs of the dense model on the same images. labels: of these images, or None.
        """
        values = torch.cat(self.parts)
        self.parts.clear()
        if self.refits or dense is None:
            return values
        return image_losses(self.model.task, values, dense, labels)


def sum_losses(
    classifier: nn.Module,
    collected: Tensor,
    dense: Tensor,
    labels: Tensor | None = None,
    *,
    refit: bool = False,
    add: Callable[..., None] | None = None,
) -> float:
    """Return the loss summed over the images: KL(dense || this) in nats, or cross entropy minus the dense model's.

    With `refit`, each half of the images (every second one) is measured with a classifier that was refitted to the
    dense logits on the other half.

    Args:
        collected: what `Collector.take` returned. dense: (images, classes) logits of the dense model.
        labels: (images,), for the cross entropy; None: KL.
        add: function that sums tensors over processes, in place, if each of them has its own images.
    """
    if not isinstance(classifier, nn.Linear):
        return float(collected.sum())
    features = collected
    weight, bias = classifier.weight.detach().cpu(), classifier.bias
    logits = F.linear(features, weight, None if bias is None else bias.detach().cpu()).double()
    if refit:
        rows = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
        halves = [slice(0, None, 2), slice(1, None, 2)]
        changes = [_fit_change(rows[half], dense.double()[half] - logits[half], add) for half in halves]
        for half, change in zip(halves, reversed(changes), strict=True):
            logits[half] += rows[half] @ change
    return float(image_losses(CLASSIFICATION, logits, dense, labels).sum())


def _fit_change(rows: Tensor, missing: Tensor, add: Callable[..., None] | None) -> Tensor:
    """Return the ridge regression (width + 1, classes) of what is missing in the logits, on the classifier's inputs."""
    gram, cross = rows.T @ rows, rows.T @ missing
    if add is not None:
        add(gram, cross)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)


def average_losses(totals: Sequence[float] | Tensor, images: int, add: Callable[..., None] | None) -> Tensor:
    """Convert losses summed over the images of each process to means over all images."""
    totals, count = torch.as_tensor(totals, dtype=torch.float64), torch.tensor(float(images), dtype=torch.float64)
    if add is not None:
        add(totals, count)
    return totals / count
