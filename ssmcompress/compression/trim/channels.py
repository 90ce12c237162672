"""Trimming of channels: a smaller `d_inner` with closed-form selection and refit.

The channels of a layer are dropped by optimal brain surgeon (`chain`) on the activations of the model: the projection
into the residual stream and the inner maps whose inputs are the channels are refitted to their outputs. On the bundled
model with 2 states (90.50 % top-1 on 2,000 images; 256 images for fitting), 96 of 128 channels give 90.65 %, 80 90.50,
64 90.10, and 64 random ones, also refitted, 80.25. Below half of the channels, reconstruction should follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.any_batches import AnyBatches
from ...models.base import TokenModel
from ...models.blocks import TrimmableBlock
from ...models.learnt import add_learnt
from ...models.modes import runs_in_eval_mode
from ...models.records import StepRecord
from ...progress import track
from .activations import LayerInputs, check_trimmable
from .chain import ChannelChain, MapSums, drop_channels
from .requests import Count, copy_to_cut, count_per_layer


@dataclass(frozen=True)
class ChannelChains:
    """The chains of a model's layers, with which `cut_channels` can create a model with any number of channels.

    Attributes:
        layers: a chain for each layer.
        batches: the images that were read, or their digests; `images`: their number.
    """

    layers: tuple[ChannelChain, ...]
    batches: AnyBatches | np.ndarray
    images: int

    def cost(self, layer: int, e: int) -> float:
        """Return the cost of keeping e channels of a layer (1-based); see `drop_channels`."""
        costs = self.layers[layer - 1].costs
        return float(costs[len(costs) - e])


@runs_in_eval_mode
@torch.no_grad()
def trim_channels(
    model: TokenModel, e: Count, images: Any = None, *, chains: ChannelChains | None = None, name: str | None = None
) -> TokenModel:
    """Return a copy of a model with fewer channels in its layers; the argument is not changed.

    Trim states first, if at all: with fewer states, fewer outputs of the maps must be preserved.

    Args:
        model: a model that drops no tokens.
        e: the channels to keep in every layer, or a number for each layer.
        images: as for `ssmcompress.calibrate`, without labels. All are used; 256 are enough. They are iterated once.
        chains: the result of `channel_chains` for this model, instead of images.
        name: name of the images in reports; None: their own.

    Returns:
        The model, with a record of kind "channels" in its `steps`. If nothing is dropped, the copy is unchanged and has
        no record.

    Raises:
        InputError: `e` is out of range, there are fewer than two images, values are not finite, or the model drops
            tokens.
    """
    check_trimmable(model)
    counts = _counts(model, e)
    if counts == _sizes(model):
        return cut_channels(model, None, counts)
    chains = chains or channel_chains(model, images)
    trimmed = cut_channels(model, chains, counts)
    costs = [chains.cost(layer, count) for layer, count in enumerate(counts, 1)]
    values = {"name": name or chains.batches.name, "images": chains.images, "e": counts, "costs": costs}
    trimmed.add_record(StepRecord("channels", values))
    add_learnt(trimmed, [chains.batches])
    return trimmed


@torch.no_grad()
def channel_chains(model: TokenModel, images: Any) -> ChannelChains:
    """Compute the chain of each layer, for `cut_channels` with any number of channels.

    Args:
        model, images: as for `trim_channels`.

    Raises:
        InputError: as `trim_channels`.
    """
    inputs = LayerInputs(model, images)
    chains = tuple(track(_chains(inputs), "trimming channels", len(model.blocks)))
    return ChannelChains(chains, inputs.batches, inputs.images)


@torch.no_grad()
def cut_channels(model: TokenModel, chains: ChannelChains | None, e: Count) -> TokenModel:
    """Return a copy of a model with e channels in its layers, as `trim_channels` does but without a record.

    Args:
        model: the model of the chains. chains: the result of `channel_chains`; None if nothing is dropped.
        e: as for `trim_channels`.
    """
    check_trimmable(model)
    counts, sizes = _counts(model, e), _sizes(model)
    trimmed = copy_to_cut(model, counts != sizes)
    for layer, (block, count, size) in enumerate(zip(trimmed.blocks, counts, sizes, strict=True)):
        if count < size:
            _cut(block, chains.layers[layer], count)
    if counts != sizes:
        trimmed.read_sizes()
    return trimmed


def _sizes(model: TokenModel) -> list[int]:
    return [block.d_inner for block in model.blocks]


def _counts(model: TokenModel, e: Count) -> list[int]:
    return count_per_layer(e, _sizes(model), "e", "channels")


def _cut(block: TrimmableBlock, chain: ChannelChain, count: int) -> None:
    """Cut a layer to `count` channels in place, and refit its maps."""
    index = chain.keep(count)
    inner, projection = block.channel_maps
    refits = [chain.refit(sums, index) for sums in (*chain.inner, chain.projection)]
    block.cut_channels(index.to(next(block.parameters()).device))
    for name, (weight, shift) in zip((*inner, projection), refits, strict=True):
        linear = block.get_submodule(name)
        linear.weight.copy_(weight)
        if shift is not None:
            linear.bias.add_(shift.to(linear.bias))


def _chains(inputs: LayerInputs) -> Iterator[ChannelChain]:
    """Yield the chain of each layer, in order."""
    for layer in range(1, len(inputs.model.blocks) + 1):
        inner, projection = inputs.block.channel_maps
        # An error in the output of an inner map has the weight of an error before the layer, as in reconstruction.
        weighed_after = {**dict.fromkeys(inner, layer - 1), projection: layer}
        sums = {name: _MapRows(inputs.block.get_submodule(name)) for name in weighed_after}
        hooks = [
            rows.linear.register_forward_pre_hook(
                lambda _, args, rows=rows, after=weighed_after[name]: rows.add(
                    args[0], inputs.weights(inputs.chunk, after)
                )
            )
            for name, rows in sums.items()
        ]
        try:
            inputs.advance()
        finally:
            for hook in hooks:
                hook.remove()
        yield drop_channels(sums[projection].finish(), [sums[name].finish() for name in inner])


class _MapRows:
    """The sums over the input rows of a linear map: products in float32, sums in float64."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.device = "cpu" if linear.weight.device.type == "mps" else linear.weight.device
        self.gram, self.sum, self.weight = 0.0, 0.0, 0.0

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Add the rows x (images, tokens, channels) of a chunk, with weights (images, tokens)."""
        x, w = x.detach().flatten(0, 1).float(), weights.flatten().float()
        weighted = x * w[:, None]
        self.gram = self.gram + (weighted.T @ x).to(self.device).double()
        self.sum = self.sum + weighted.sum(0).to(self.device).double()
        self.weight = self.weight + float(w.sum())

    def finish(self) -> MapSums:
        """Return the sums, centred if the map has a bias, which compensates for a shift of the mean."""
        weight, gram = self.linear.weight.detach().to(self.device).double(), (self.gram + self.gram.T) / 2
        if self.linear.bias is None:
            return MapSums(weight, gram)
        mean = self.sum / self.weight
        return MapSums(weight, gram - self.weight * torch.outer(mean, mean), mean)
