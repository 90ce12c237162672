"""Reconstruction without training: later layers refitted in closed form to what the dense model computes.

Pruning changes what every later layer receives. Dense and pruned model are run side by side over unlabelled images,
layer by layer, whatever was refitted before in place; in each layer some linear maps (`Block.refitted`) and at last
the classifier are replaced by the ridge regression (`ssmcompress.compression.reconstruct.least_squares`) of

- for the projection into the residual stream: the dense model's features after the layer, minus the pruned ones before;
- for the maps before it: what the same map gives in the dense model;
- for the classifier: the dense logits,

at the kept tokens. With the projection goes a correction, the one thing that is new in the model: a linear map of low
rank from the mean of the tokens pruned so far to an addition to all kept ones, once an image and layer. What was
pruned tells what is missing; on two small Vims this alone took another 13 to 36 % off the divergence.

A row weighs what an error there would do to the decision: the squared gradient of the dense model's margin between
its two best classes by that token's features. That finds by itself which tokens are read out, in any architecture.

Where a mean over the tokens is read out, the pruned ones may stay in it as they were last seen. Without reconstruction
that is worse (a small PlainMamba at 42.9 % after layers 2, 3 and 5: 57.8 % top-1 for 71.5), with it mostly better (86.4
for 86.1; 90.1 for 89.1 in another plan): so the classifier is refitted for both, and the closer one is taken.

A fifth of the images is held out: it chooses each ridge, a weight is replaced only where that helps on it, and a
model that does not come closer to the dense one on it is left as it was.

The residual streams of both models wait in temporary files between layers, so memory does not grow with the images;
running the models anew for each layer instead would take depth / 2 times as long (12 times for 24 layers).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...data.batches import AnyBatches
from ...errors import NOT_FINITE, InputError
from ...models.base import TokenModel
from ...models.records import Reconstruction
from ...progress import track
from .layerwise import SideBySide


@torch.no_grad()
def reconstruct(
    pruned: TokenModel, dense: TokenModel, images: Any, *, name: str = "images", distributed: bool = False
) -> TokenModel:
    """A copy of `pruned` whose later layers are refitted to follow `dense`; the arguments are left as they are.

    The result does not depend on how the images are batched.

    Args:
        pruned: a pruned model. dense: the model it was made from.
        images: a tensor (count, C, H, W) of prepared images, or batches of them (tensors, (images, labels) pairs, or
            `ssmcompress.data.batches.Batches`), passed over once; a generator is read into memory first. Labels are not
            used. The same image counts once.
        name: what the images are called in reports.
        distributed: every process of the default `torch.distributed` group makes this call, with the same models and
            images of its own; their sums are added, and all end with the same weights. If one fails, the others wait
            for it as long as the group lets them.

    Returns:
        The model, with a record of kind "reconstruction" in its `steps`. Where nothing was pruned, nothing is done.

    Raises:
        InputError: fewer than two different images, values that are not finite, or models that do not belong together.
        SsmCompressError: no room for temporary files.
    """
    if pruned.plan is None or dense.plan is not None:
        raise InputError("reconstruct takes a pruned model and the dense one it was made from, in this order")
    if pruned.config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    if next(pruned.parameters()).device != next(dense.parameters()).device:
        raise InputError("the pruned and the dense model are on different devices")
    model = copy.deepcopy(pruned)
    counts = model.token_counts()
    incomplete = [layer for layer in range(1, len(model.blocks) + 1) if counts[layer - 1] < model.length]
    if not incomplete:
        return model
    with TemporaryDirectory(prefix="ssmcompress-", ignore_cleanup_errors=True) as folder:
        run = SideBySide(dense, model, incomplete, Path(folder), distributed)
        before = run.start(AnyBatches(images))
        for _ in track(run.refit(), "reconstructing", run.blocks * run.passes()):
            pass
    after = run.kl
    if not math.isfinite(before) or not math.isfinite(after):
        raise InputError(NOT_FINITE)
    kept = after < before
    if not kept:
        model = copy.deepcopy(pruned)
    model.add_record(Reconstruction(name, run.images, run.held_out, before, after, kept, tuple(run.fits)))
    return model
