"""A cheap proxy for the loss of a reconstructed model: the pruned model's loss, optionally with refitted classifier.

Reconstruction (`ssmcompress.compression.reconstruct`) takes twenty times as long as running a plan, so plans are ranked
before it. The raw outputs are misleading, because part of their change is a shift that any refit removes. A closed-form
refit of the classifier alone costs almost nothing compared with the run. Over 35 plans of the bundled Vim (50 to 75 %
of the FLOPs, one to three stages, eight metrics) its ranking has a rank correlation of 0.96 with full reconstruction;
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
    """Collects the values needed to compute the loss of a model's runs in the body of the with statement.

    For a linear classifier, which can be refitted, these are its inputs (images, width). Otherwise the loss is computed
    from the outputs immediately, since there is one output per pixel.
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
        """Return the values collected since the last call: the inputs, or the loss of each image, (images,).

        Args:
            dense: outputs of the dense model on the same images. labels: the labels of these images, or None.
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
    """Return the loss summed over the images: KL(dense || model) in nats, or cross entropy minus the dense model's.

    With `refit`, each half of the images (every second one) is evaluated with a classifier refitted to the dense logits
    on the other half.

    Args:
        collected: the result of `Collector.take`. dense: (images, classes), logits of the dense model.
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
    """Return the ridge regression (width + 1, classes) of the error of the logits on the classifier's inputs."""
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
