"""The importance metric `saliency`: the predicted effect of an error in a token on the dense model's decision.

The gradient of the margin between the two best classes with respect to a token's features measures the importance of
the token, but needs a backward pass. A linear map of the token's features and position, the probe, predicts the norm of
that gradient; it is fitted in closed form on a few hundred unlabelled images and costs d_model multiply-adds per token.

On the bundled Vim (60 % of the FLOPs, one stage, 1,024 images that nothing was fitted on, KL from the dense model after
alignment alone and after reconstruction): after layer 2 `clip` 0.261 and 0.105, `l2` 0.204 and 0.097, saliency 0.195
and 0.069; after layer 3 `clip` 0.496, `delta` 0.280 and 0.083, saliency 0.261 and 0.071; but after layer 1 `clip`
0.633 and 0.131, saliency 0.803 and 0.140. So it is offered as one more metric. Rejected alternatives: the logarithm of
the squared gradient (0.212 and 0.075 after layer 2), the same times the squared features (0.208 and 0.071), the mean of
either per position only (0.283, 0.290), the change of a token across the block (0.259), the norm of its features (0.223
and 0.094).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..data.any_batches import in_chunks
from ..errors import NOT_FINITE, InputError
from ..models.base import TokenModel
from ..models.fingerprint import fingerprint
from ..models.inputs import as_batches
from ..models.modes import runs_in_eval_mode
from ..progress import track
from ..pruning.importance import normalize_rms
from .margin import features_and_gradients
from .remember import hash_of, keeps_results, remembered

# Ridge strength, added to the covariance of the features, whose mean square is 1.
RIDGE = 1e-3


@runs_in_eval_mode
@torch.no_grad()
def fit_probes(
    model: TokenModel, images: Any, layers: Sequence[int], *, distributed: bool = False
) -> tuple[Tensor, ...]:
    """Fit the probes that predict the saliency of tokens after `layers`.

    A probe is a ridge regression of the norm of the margin's gradient on the features, normalised to a mean square of
    1, with an intercept for each position.

    Args:
        model: the dense model. images: as for `ssmcompress.calibrate`. layers: the layers (1-based) to fit probes for.

    Returns:
        For each layer of the model a probe (d_model + length,), with the sizes of its section; empty for layers not in
        `layers`.

    Raises:
        InputError: there are no images, or values are not finite.
    """
    batches, device = as_batches(model, images), next(model.parameters()).device
    sums = {layer: _RegressionSums(*model.section_of(layer)[2:]) for layer in layers}
    count = torch.zeros((), dtype=torch.float64, device="cpu")
    known = hash_of(fingerprint(model), list(layers)) if keeps_results() else ""
    for chunk in in_chunks(track(batches, "fitting saliency", batches.total), model.chunk_size()):
        count += len(chunk)
        compute = partial(_sum_chunk, model, chunk.to(device), layers)
        for layer, values in zip(layers, remembered(partial(hash_of, "saliency", known, chunk), compute), strict=True):
            sums[layer].add(*values)
    if distributed:
        processes.all_reduce_sum(count, *(value for rows in sums.values() for value in rows.values()), device=device)
    if not count:
        raise InputError("no images to calibrate on")
    none = torch.zeros(0, dtype=torch.float32, device="cpu")
    probes = [sums[i].solve(float(count)) if i in sums else none for i in range(1, len(model.blocks) + 1)]
    if not all(probe.isfinite().all() for probe in probes):
        raise InputError(NOT_FINITE)
    return tuple(probes)


def _sum_chunk(model: TokenModel, images: Tensor, layers: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Return the sums over the tokens of a chunk for each of the layers, in the order of `_RegressionSums.values`."""
    features, gradients = features_and_gradients(model, images)
    found = []
    for point in map(model.stage_point, layers):
        x, y = normalize_rms(features[point].float()), gradients[point].float().norm(dim=-1)
        rows, norms = x.flatten(0, 1), y.flatten()
        sums = rows.T @ rows, rows.T @ norms, x.sum(0), y.sum(0)
        found.append(tuple(value.double().cpu() for value in sums))
    return found


class _RegressionSums:
    """The float64 sums over all rows for the regression of one layer."""

    def __init__(self, length: int, width: int):
        shapes = (width, width), (width,), (length, width), (length,)
        zeros = (torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes)
        self.gram, self.cross, self.x, self.y = zeros

    def values(self) -> tuple[Tensor, ...]:
        """Return all sums, to be added over processes."""
        return self.gram, self.cross, self.x, self.y

    def add(self, *chunk: Tensor) -> None:
        """Add the sums over a chunk, in the order of `values`."""
        for total, value in zip(self.values(), chunk, strict=True):
            total += value

    def solve(self, images: float) -> Tensor:
        """Return the probe (d_model + length,), given the number of images in the sums."""
        x, y = self.x / images, self.y / images
        gram = self.gram - images * x.T @ x
        gram.diagonal().add_(RIDGE * images * len(x))
        weight = torch.linalg.solve(gram, self.cross - images * x.T @ y)
        return torch.cat([weight, y - x @ weight]).float()
