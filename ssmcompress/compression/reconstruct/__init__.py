"""Reconstruction without training: later layers are refitted in closed form to the outputs of the dense model.

Pruning changes the inputs of all later layers. The dense and the pruned model run layer by layer over unlabelled
images, with the layers refitted so far in place. In each layer some linear maps (`Block.refitted`), and finally the
classifier, are replaced by a ridge regression (`ssmcompress.compression.reconstruct.least_squares`) at the kept tokens.
Its targets are

- for the projection into the residual stream: the dense model's features after the layer, minus the pruned ones before;
- for the maps before it: the output of the same map in the dense model;
- for the classifier: the dense logits.

A correction, which is a new part of the model, is fitted together with the projection: a low-rank linear map from the
mean of the tokens pruned so far to a vector that is added to all kept tokens, once per image and layer. The pruned
tokens predict the missing information; on two small Vims this alone reduced the divergence by another 13 to 36 %.

After the projection, the class token, if it is read out, gets its own correction: a low-rank linear map of its update
and of the sums of all tokens over segments of the image, where pruned tokens count with their last features
(`ssmcompress.models.class_corrections`). On two small Vims that kept about a third of their tokens after layer 2 or 3
it reduced the divergence on other images by another 13 and 35 % (0.070 to 0.061 and 0.077 to 0.050 nats; top-1 86.8 to
88.2 % and 80.3 to 82.3 %), for 0.2 % of the FLOPs. Using the input of the projection, which is wider than the update,
gave no gain (at full rank 0.057 and 0.052 nats with it, 0.059 and 0.050 with the update).

In models with mean pooling, the logits get such a map instead, of the sums after the last layer; it is fitted together
with the classifier. On a small PlainMamba with two plans the divergence on other images fell from 0.039 to 0.025 and
from 0.044 to 0.030 nats, for 0.05 % of the FLOPs.

Each row is weighted by the effect of an error there on the decision: the squared gradient of the dense model's margin
between its two best classes with respect to that token's features. This finds the tokens that matter in any
architecture.

With mean pooling, pruned tokens can stay in the mean with their last features. Without reconstruction this is worse (a
small PlainMamba at 42.9 % after layers 2, 3 and 5: 57.8 % top-1 instead of 71.5), with reconstruction mostly better
(86.4 instead of 86.1; 90.1 instead of 89.1 in another plan). So the classifier is refitted for both variants, and the
one closer to the dense model is used.

A fifth of the images is held out to choose each ridge. A weight is replaced only if this reduces the error on them, and
a model that does not get closer to the dense model on them is returned unchanged.

The residual streams of both models are stored in temporary files between layers, so memory does not grow with the
number of images; rerunning the models for each layer would take depth / 2 times as long (12 times for 24 layers).
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
from ...models.classifier import NoClassifier
from ...models.inputs import as_batches, check_classes, check_model
from ...models.learnt import add_learnt, find_batches
from ...models.modes import runs_in_eval_mode
from ...models.records import Reconstruction
from ...progress import track
from .layerwise import LayerwiseRefit, RefitOptions


@runs_in_eval_mode
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

    The result does not depend on the batching of the images, but on their order, which determines the held-out images.

    Args:
        pruned: a pruned model. dense: the model it was made from.
        images: as for `ssmcompress.calibrate`. They are iterated once, so an iterator is not read into memory. Labels
            are not used, and duplicate images are ignored.
        name: name of the images in reports; None: their own.
        distributed: every process of the default `torch.distributed` group makes this call, with the same models and
            its own images; their sums are added, and all processes get the same weights. If one fails, the others wait
            for it until the group's timeout.
        reference: the model whose inner maps, applied to the dense model's features, are the targets of the inner maps
            of `pruned`: the trimmed model before channels and tokens were dropped, which has the same states as
            `pruned`. None: the dense model; inner maps of another size are then not refitted.
        options: additional parts to fit.

    Returns:
        The model, with a record of kind "reconstruction" in its `steps`. If nothing was pruned or trimmed, the copy is
        unchanged and has no record.

    Raises:
        InputError: there are fewer than two different images, values are not finite, or the models do not match.
        SsmCompressError: there is not enough space for temporary files.
    """
    check_model(pruned, "pruned")
    check_model(dense, "dense")
    if pruned.plan is None or dense.plan is not None:
        raise InputError("reconstruct takes a pruned model and the dense one it was made from, in this order")
    if pruned.dense_config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    check_classes(pruned, dense)
    if isinstance(dense.classifier, NoClassifier):
        raise InputError("the models have no classes (`reset_classifier(0)`): reconstruct before that")
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
    """Return the layers (1-based), starting at the first one whose output can differ from the dense model's."""
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
