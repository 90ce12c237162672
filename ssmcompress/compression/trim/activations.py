"""The inputs of a dense model's layers on a set of images, computed layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...data.any_batches import in_chunks
from ...errors import NOT_FINITE, InputError
from ...models.base import TokenModel
from ...models.blocks import TrimmableBlock
from ...models.inputs import as_batches, check_model
from ...progress import track
from ...pruning.tokens import Tokens
from ..margin import margin_gradients

# Minimum weight of a token, relative to the mean weight of the layer's tokens. With few images, only a few tokens have
# a large weight. KL from the dense model (bundled, 128 images) with 1e-3, 0.1 and equal weights: 2 states 0.0022,
# 0.0019 and 0.0022; 1 state 0.022, 0.019 and 0.061. On another Vim, and for channels, 1e-3 and 0.1 were equal.
LEAST_WEIGHT = 0.1
LEAST_IMAGES = 2


class LayerInputs:
    """Runs a model without dropped tokens layer by layer, with the features before the current layer in memory.

    128 images of 197 tokens and width 384 are 39 MB.

    Attributes:
        layer: the current layer (1-based). chunk: the chunk of images (0-based) that `advance` is processing.
        batches: the images, from `as_batches`, read once. images: their number.
    """

    def __init__(self, model: TokenModel, images: Any):
        check_trimmable(model)
        self.model, self.layer, self.chunk, self.images = model, 1, 0, 0
        self.batches = as_batches(model, images, repeat=False)
        self.features: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        device = next(model.parameters()).device
        for chunk in in_chunks(track(self.batches, "collecting activations", self.batches.total), model.chunk_size()):
            chunk = chunk.to(device)
            self.gradients.append(margin_gradients(model, chunk))
            tokens = model.embed(chunk)
            self.template = tokens.updated(tokens.features[:1])
            self.features.append(tokens.features)
            self.images += len(chunk)
        if self.images < LEAST_IMAGES:
            raise InputError(f"`images` has {self.images}: expected at least {LEAST_IMAGES}; 128 are enough")
        points = zip(*self.gradients, strict=True)
        self.means = [
            sum(part.sum(dtype=torch.float32) for part in point) / (self.images * model.length) for point in points
        ]

    @property
    def block(self) -> TrimmableBlock:
        """The current layer."""
        return self.model.blocks[self.layer - 1]

    def chunks(self) -> Iterator[Tokens]:
        """Yield the tokens before the current layer."""
        return (self.template.updated(features) for features in self.features)

    def weights(self, chunk: int, layer: int) -> Tensor:
        """Return the weights (images, tokens) of errors in the features after `layer` (0: before the first one).

        They are the squared gradients of the margin, relative to the mean of the layer.
        """
        gradient, mean = self.gradients[chunk][layer], self.means[layer]
        return gradient / mean + LEAST_WEIGHT if mean > 0 else torch.ones_like(gradient)

    def advance(self) -> None:
        """Run the current layer."""
        for chunk, tokens in enumerate(self.chunks()):
            self.chunk = chunk
            features = self.block(tokens).features
            if not features.isfinite().all():
                raise InputError(NOT_FINITE)
            self.features[chunk] = features
        self.layer += 1


def check_trimmable(model: Any) -> None:
    """Raise an InputError if an argument is not a model, has unsupported layers, or already drops tokens."""
    check_model(model)
    if not all(isinstance(block, TrimmableBlock) for block in model.blocks):
        raise InputError(
            f"a {model.architecture} cannot be trimmed, because its layers have no states, channels or paths to "
            "remove: drop tokens instead"
        )
    if model.plan is not None and model.plan.stages:
        raise InputError("`model` drops tokens already: trim the dense model, then prune the result")
