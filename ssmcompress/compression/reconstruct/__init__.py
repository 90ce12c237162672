"""Reconstruction without training: later layers are refitted in closed form to what the dense model computes.

Pruning changes what every later layer receives. The dense and the pruned model run layer by layer over unlabelled
images, with the layers refitted so far in place. In each layer some linear maps (`Block.refitted`), and finally the
classifier, are replaced by a ridge regression (`ssmcompress.compression.reconstruct.least_squares`) at the kept tokens.
Its targets are

- for the projection into the residual stream: the dense model's features after the layer, minus the pruned ones before;
- for the maps before it: the output of the same map in the dense model;
- for the classifier: the dense logits.

Together with the projection a correction is fitted, a new part of the model: a low-rank linear map from the mean
of the tokens pruned so far to a vector that is added to all kept ones, once per image and layer. The pruned tokens say
what is missing; on two small Vims this alone reduced the divergence by another 13 to 36 %.

After the projection, the class token, if the model reads that out, gets a correction of its own: a low-rank linear map
of its update and of the sums of all tokens over segments of the image, the pruned ones as they were last seen
(`ssmcompress.models.class_corrections`). On two small Vims that kept about a third of their tokens after layer 2 or 3
it reduced the divergence on other images by another 13 and 35 % (0.070 to 0.061 and 0.077 to 0.050 nats; top-1 86.8 to
88.2 % and 80.3 to 82.3 %), for 0.2 % of the FLOPs. What the projection receives, which is wider than the update, told
no more (at full rank 0.057 and 0.052 nats with it, 0.059 and 0.050 with the update).

Where a mean over tokens is read out, the logits get such a map instead, of the sums after the last layer; it is fitted
together with the classifier. On a small PlainMamba at two plans the divergence on other images fell from 0.039 to 0.025
and from 0.044 to 0.030 nats, for 0.05 % of the FLOPs.

The weight of a row is the effect of an error there on the decision: the squared gradient of the dense model's margin
between its two best classes with respect to that token's features. This finds the tokens that are read out in any
architecture.

If a mean over the tokens is read out, the pruned ones can stay in it with their last features. Without reconstruction
that is worse (a small PlainMamba at 42.9 % after layers 2, 3 and 5: 57.8 % top-1 instead of 71.5), with it mostly
better (86.4 instead of 86.1; 90.1 instead of 89.1 in another plan). So the classifier is refitted for both, and the one
that is closer to the dense model is used.

A fifth of the images is held out. They choose each ridge, a weight is replaced only if that helps on them, and a model
that does not come closer to the dense one on them stays as it was.

The residual streams of both models are kept in temporary files between layers, so memory does not grow with the number
of images; running the models again for each layer would take depth / 2 times as long (12 times for 24 layers).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...errors import NOT_FINITE, InputError
from ...models.base import TokenModel
from ...models.inputs import as_batches, check_model
from ...models.learnt import add_learnt, find_batches
from ...models.records import Reconstruction
from ...progress import track
from .layerwise import LayerwiseRefit, RefitOptions


@torch.no_grad()
def reconstruct(
    pruned: TokenModel,
    dense: TokenModel,
    images: Any,
    *,
    name: str | None = None,
    distributed: bool = False,
    reference: TokenModel | None = None,
    options: RefitOptions = RefitOptions(),
) -> TokenModel:
    """Return a copy of `pruned` whose later layers are refitted to follow `dense`; the arguments are not changed.

    The result does not depend on how the images are batched. It depends on their order, which decides the images that
    are held out.

    Args:
        pruned: a pruned model. dense: the model it was made from.
        images: as for `ssmcompress.calibrate`. They are iterated once, so an iterator is not read into memory. Labels
            are not used. Duplicates of an image are ignored.
        name: name of the images in reports; None: their own.
        distributed: every process of the default `torch.distributed` group makes this call, with the same models and
            its own images; their sums are added, and all end with the same weights. If one fails, the others wait for
            it until the group's timeout.
        reference: the model whose inner maps are the targets of those of `pruned`, on the dense model's features: the
            trimmed model before it lost channels and tokens, whose states are those of `pruned`. None: the dense model;
            inner maps of another size are then not refitted.
        options: what else is fitted.

    Returns:
        The model, with a record of kind "reconstruction" in its `steps`. If nothing was pruned or trimmed, the copy
        has no changes and no record.

    Raises:
        InputError: fewer than two different images, values that are not finite, or models that do not belong together.
        SsmCompressError: no room for temporary files.
    """
    check_model(pruned, "pruned")
    check_model(dense, "dense")
    if pruned.plan is None or dense.plan is not None:
        raise InputError("reconstruct takes a pruned model and the dense one it was made from, in this order")
    if pruned.dense_config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    if not dense.is_residual:
        raise InputError("a model with rotary positions cannot be reconstructed: use `reconstruct=False`")
    if reference is not None:
        check_model(reference, "reference")
        numbers = [m.origin.layers if m.origin is not None else tuple(range(1, len(m.blocks) + 1))
                   for m in (reference, pruned)]  # fmt: skip
        if reference.dense_config != dense.config or numbers[0] != numbers[1]:
            raise InputError("`reference` was not trimmed from `dense`, or has other layers than `pruned`")
    if next(pruned.parameters()).device != next(dense.parameters()).device:
        raise InputError("the pruned and the dense model are on different devices")
    model = copy.deepcopy(pruned)
    layers = _find_changed(model, dense)
    if not layers:
        return model
    batches = as_batches(dense, images, repeat=False)
    with TemporaryDirectory(prefix="ssmcompress-", ignore_cleanup_errors=True) as folder:
        run = LayerwiseRefit(dense, model, layers, Path(folder), distributed, reference or dense, options)
        before = run.start(batches)
        for _ in track(run.refit(), "reconstructing", run.chunks * run.passes()):
            pass
    after = run.kl
    if not math.isfinite(before) or not math.isfinite(after):
        raise InputError(NOT_FINITE)
    kept = after < before
    if not kept:
        model = copy.deepcopy(pruned)
    if distributed and (read := find_batches(batches)) is not None:
        read.sync()
    add_learnt(model, [batches])
    name = name or batches.name
    model.add_record(Reconstruction(name, run.images, run.held_out, before, after, kept, tuple(run.fits)))
    return model


def _find_changed(model: TokenModel, dense: TokenModel) -> range:
    """Return the layers (from 1) from the first one whose result can differ from the dense model's."""
    depth, counts, whole = len(model.blocks), model.token_counts(), model.counts_for(())
    numbers = [*(model.origin.layers if model.origin is not None else range(1, depth + 1)), len(dense.blocks) + 1]
    ours, theirs = model.config.layers, dense.config.layers
    for layer in range(1, depth + 1):
        number, following = numbers[layer - 1 : layer + 1]
        places = range(model.count_index(layer) + 1)
        if any(counts[i] < whole[i] for i in places) or number != layer or following != number + 1:
            return range(layer, depth + 1)
        if ours[layer - 1] != theirs[number - 1]:
            return range(layer, depth + 1)
    return range(0)
