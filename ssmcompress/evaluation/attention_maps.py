"""Attention maps: how much each patch of an image contributes to the decision of a model, dense or pruned.

Maps are computed from the hidden attention of layers (`ssmcompress.evaluation.hidden_attention`): from the row of the
token that is read out, or, if all tokens are read, from the mean over all rows. The formulas of `raw`, `rollout` and
`attribution` are those of Ali et al. (arXiv 2403.01590, code of HiddenMambaAttn), with three additions for pruned
models: a dropped token has the value 0; the smallest and the largest value are taken over the tokens that are present;
and in a rollout, a dropped token attends only to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..models.inputs import as_batches, check_model
from ..models.modes import runs_in_eval_mode
from ..models.running import Decision
from ..ops.observing import AttentionCall
from ..progress import track
from ..pruning.tokens import Tokens
from ..tasks import CLASSIFICATION
from .hidden_attention import RowSum, sum_attention_rows, view_layers

METHODS = {
    "row": "mean over channels of the exact row",
    "xai": "mean over channels of the row as Vim's published code has it",
    "raw": "raw attention: rows scaled to 0..1, as a mean over channels and layers",
    "rollout": "attention rollout",
    "attribution": "rollout, with rows weighted by the gradient of the predicted class",
}
# Published maps use the layers of Vim-small from the 16th of 24 on.
PUBLISHED_START, PUBLISHED_DEPTH = 15, 24


@dataclass(frozen=True)
class Attention:
    """The results of `attend` for a batch of images.

    Attributes:
        maps: (batch, rows, columns) float32; 0 where a patch was dropped.
        kept: (batch, rows, columns) bool, whether a patch is present in all layers of the map.
        outputs: of the model, (batch, classes) of a classifier.
        decisions: of the stages, as returned by `TokenModel.trace`.
        places: for each decision (rows, columns) int64, the position of each patch of the image, or of the coarser
            patch that contains it.
    """

    maps: Tensor
    kept: Tensor
    outputs: Tensor
    decisions: list[Decision]
    places: list[Tensor]


@runs_in_eval_mode
def attention_maps(
    model: TokenModel, images: Any, *, layer: int | Sequence[int] | None = None, method: str = "row"
) -> Tensor:
    """Compute a map for each image of how much each patch contributes to the model's output.

    The token that reads is the class token of a Vim or a ViT; in other models the maps are means over all tokens that
    read. They are exact for pruned and aligned models. All except a rollout of attention take O(tokens * channels *
    states) operations and no matrix of tokens by tokens.

    Args:
        model: a classifier or a segmentation model of `ssmcompress.load`, dense or pruned.
        images: prepared images (batch, channels, height, width), or any data that `ssmcompress.evaluate` takes.
        layer: a layer, from 1, or several, over which the map is averaged; for a rollout the layers that are rolled
            out. None: from 5/8 of the depth on, as published for Vim.
        method: "row", the mean over channels (for attention: over heads) of the row of the token that reads, signed,
            forward and backward path added; "xai", the same for the vector used by Vim's published code, which omits
            the step of the class token and its own entry; "raw", "rollout" or "attribution", the published maps of
            these vectors (without a class token, of exact means of rows), with negative values set to 0.

    Returns:
        (images, rows, columns) float32 on the CPU; 0 for patches that were dropped or merged into others. The frames of
        a video are stacked vertically.

    Raises:
        InputError: a layer or a method that the model does not have, or images that cannot be used.
    """
    check_model(model)
    layers = choose_layers(len(model.blocks), layer)
    check_method(model, method)
    device = next(model.parameters()).device
    batches = as_batches(model, images, repeat=False)
    maps = [attend(model, x.to(device), layers, method).maps.cpu() for x, _ in track(batches, "maps", batches.total)]
    if not maps:
        raise InputError("there are no images in the data")
    if len(shapes := {tuple(part.shape[1:]) for part in maps}) > 1:
        listed = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(shapes))
        raise InputError(f"images of several sizes, with {listed} patches: pass those of one size at a time")
    return torch.cat(maps)


def choose_layers(depth: int, layer: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the layers of a map in ascending order; InputError for one that a model of `depth` layers lacks."""
    if layer is None:
        return tuple(range(min(depth, depth * PUBLISHED_START // PUBLISHED_DEPTH + 1), depth + 1))
    listed = list(layer) if isinstance(layer, Iterable) else [layer]
    if not listed or not all(isinstance(number, Integral) and 1 <= number <= depth for number in listed):
        raise InputError(f"`layer` {layer!r}: expected one or several numbers from 1 to {depth}")
    return tuple(sorted({int(number) for number in listed}))


def check_method(model: TokenModel, method: str) -> None:
    """Raise an InputError unless this method can compute maps of the model."""
    if method not in METHODS:
        raise InputError(f"`method` {method!r}: expected one of {', '.join(METHODS)}")
    if method == "xai" and not _reads_as_published(model):
        raise InputError(
            f"`method` 'xai' needs scans that a class token reads, as in a Vim, not a {model.architecture}"
        )
    if method == "attribution" and (model.task is not CLASSIFICATION or not _has_scans(model)):
        raise InputError(
            f"`method` 'attribution' is for classifiers with scans; for a {model.architecture} expected one of "
            f"{', '.join(name for name in METHODS if name not in ('xai', 'attribution'))}"
        )


def describe_reader(model: TokenModel) -> str:
    """Describe which token reads the others in maps of a model."""
    return "the class token" if model.reads_protected else "the mean over all tokens"


def attend(model: TokenModel, images: Tensor, layers: Sequence[int], method: str) -> Attention:
    """Run a model and compute a map for each image, as `attention_maps` does.

    Args:
        images: (batch, channels, height, width) on the model's device. layers: ascending. method: valid for the model.
    """
    learns, published = method == "attribution", _reads_as_published(model)
    chosen: list[Layer] = []
    grids: list[Tensor] = []  # for each of these layers, the positions of the patches
    decisions: list[Decision] = []
    places: list[Tensor] = []
    streams: list[Tensor] = []
    with torch.no_grad():
        tokens = model.embed(images)
        patches = find_patches(tokens, model.config.grid).to(images.device)
    # Gradients are needed even if the caller has disabled them.
    with torch.inference_mode(False), torch.set_grad_enabled(learns):
        if learns:
            tokens = replace(tokens, features=tokens.features.clone().requires_grad_())
        readings: dict[int, Reading] = {}

        def start(layer: int, before: Tokens) -> RowSum | None:
            if layer not in layers:
                return None
            readings[layer] = Reading.of(before, model.reads_protected, published and method != "row")
            return readings[layer].rows

        for view in view_layers(model, tokens, start):
            grid = find_places(view.before, patches)
            if view.decision is not None:
                decisions.append(view.decision)
                places.append(grid)
            tokens = view.after
            if view.layer in readings:
                grids.append(grid)
                chosen.append(readings.pop(view.layer).finish(method))
                streams.append(view.before.features)
        outputs = model.readout(tokens)
        if learns:
            chosen = weigh_layers(chosen, streams, outputs)
    with torch.no_grad():
        if any(grid is not patches for grid in grids):
            chosen = [layer.spread(grid, patches) for layer, grid in zip(chosen, grids, strict=True)]
        positions = patches.flatten()
        kept = torch.stack([layer.present[:, positions] for layer in chosen]).all(0)
        maps = torch.where(kept, combine_layers(chosen, method)[:, positions], 0.0)
    shape = patches.shape
    return Attention(maps.unflatten(1, shape), kept.unflatten(1, shape), outputs.detach(), decisions, places)


def find_patches(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Return the position (rows, columns) of each patch: all unprotected tokens, in raster order.

    Args:
        grid: of the model, for tokens without their own grid.
    """
    positions = torch.arange(tokens.length, device="cpu")
    if tokens.protected is not None:
        positions = positions[~tokens.is_protected(positions)]
    return positions.view(grid if tokens.grid is None else tokens.grid)


def find_places(tokens: Tokens, patches: Tensor) -> Tensor:
    """Return the position (rows, columns) among these tokens of each patch, or of the coarser patch that contains it.

    Args:
        patches: the positions in the first layer; they are returned if the grid is the same.
    """
    (rows, columns), grid = patches.shape, tokens.grid
    if grid is None or tuple(grid) == (rows, columns):
        return patches
    down, across = (
        torch.arange(many, device=patches.device) * few // many for many, few in ((rows, grid[0]), (columns, grid[1]))
    )
    return down[:, None] * grid[1] + across


@dataclass(frozen=True)
class Reading:
    """The rows to read in a layer, before it is run; see `Layer` for `present` and `reader`.

    Attributes:
        positions: (batch, tokens) of its tokens. rows: observer of the calls of the layer.
    """

    positions: Tensor
    present: Tensor
    reader: Tensor
    rows: RowSum

    @classmethod
    @torch.no_grad()
    def of(cls, tokens: Tokens, reads_protected: bool, published: bool) -> Reading:
        """Return a reading for a layer that is run on these tokens, at the protected token or at all tokens."""
        positions = tokens.explicit_positions()
        present = torch.zeros(len(positions), tokens.length + tokens.fused, dtype=torch.bool, device=positions.device)
        present = present.scatter(1, positions, True)
        if reads_protected:
            reader = torch.zeros_like(present, dtype=torch.float32)
            reader[:, tokens.protected] = 1.0
        else:
            reader = present / present.sum(1, keepdim=True)
        return cls(positions, present, reader, RowSum(reader.gather(1, positions), published))

    @torch.no_grad()
    def finish(self, method: str) -> Layer:
        """Return the layer after it has been run."""
        attention, empty = self.rows.attention, torch.zeros_like(self.reader)
        if method == "rollout" and attention is not None:
            return Layer(self.positions, self.present, self.reader, empty, attention)
        rows = self.rows.total
        rows = rows.clamp_(min=0) if method == "attribution" else rows
        rows = _scale(rows) if method in ("raw", "attribution") else rows
        return Layer(self.positions, self.present, self.reader, empty.scatter(1, self.positions, rows.mean(-1)), None)


@dataclass(frozen=True)
class Layer:
    """A layer of a map, with values at all positions (batch, length); those from `Tokens.length` on are fused tokens.

    Attributes:
        positions: (batch, tokens) of its tokens. present: (batch, length) bool, whether there is a token.
        reader: (batch, length), the weights of the rows that read, which sum to 1.
        vector: (batch, length), the layer's row for the map, 0 where there is no token.
        attention: the attention call, if its whole matrix is needed; else None.
    """

    positions: Tensor
    present: Tensor
    reader: Tensor
    vector: Tensor
    attention: AttentionCall | None

    def read(self, row: Tensor) -> Tensor:
        """Return the row (batch, length) of a rollout after multiplication with the matrix of this earlier layer."""
        if self.attention is None:
            # 1 v^T + I on the tokens that are present, with rows that sum to 1.
            inside = torch.where(self.present, row, 0.0).sum(1, keepdim=True)
            mixed = (inside * self.vector + row) / (1 + self.vector.sum(1, keepdim=True))
        else:
            # (A + I) / 2, with the mean over heads (Abnar and Zuidema, arXiv 2005.00928).
            read = sum_attention_rows(self.attention, row.gather(1, self.positions)).mean(-1)
            mixed = (row + torch.zeros_like(row).scatter(1, self.positions, read)) / 2
        return torch.where(self.present, mixed, row)

    def spread(self, places: Tensor, patches: Tensor) -> Layer:
        """Return the layer on the image's grid; the value of a coarser position is divided among its patches.

        Args:
            places, patches: as for `find_places`.
        """
        index, order = places.flatten(), patches.flatten().argsort()
        shares = 1 / index.bincount(minlength=self.present.shape[1]).clamp(min=1)
        values = {"present": self.present, "reader": self.reader * shares, "vector": self.vector * shares}
        positions = patches.flatten()[order].expand(len(self.positions), -1)
        return replace(self, positions=positions, **{name: x[:, index][:, order] for name, x in values.items()})

    def padded(self, length: int) -> Layer:
        """Return the layer padded with positions that have no tokens."""
        parts = ("present", "reader", "vector")
        return replace(self, **{name: F.pad(x := getattr(self, name), (0, length - x.shape[1])) for name in parts})


def combine_layers(layers: Sequence[Layer], method: str) -> Tensor:
    """Combine layers into a map (batch, length)."""
    length = max(layer.present.shape[1] for layer in layers)
    layers = [layer.padded(length) for layer in layers]
    if method in ("rollout", "attribution"):
        # Row of the token that reads in the product of the layers' matrices, the last one first.
        return reduce(lambda row, layer: layer.read(row), reversed(layers), layers[-1].reader).clamp(min=0)
    mean = torch.stack([layer.vector for layer in layers]).mean(0)
    return mean.clamp(min=0) if method == "raw" else mean


def weigh_layers(layers: Sequence[Layer], streams: Sequence[Tensor], outputs: Tensor) -> list[Layer]:
    """Return layers whose vectors are weighted by the gradient of the predicted class's logit.

    Args:
        streams: the residual stream (batch, tokens, d_model) before each layer. outputs: the logits (batch, classes).
    """
    predicted = outputs.gather(1, outputs.argmax(1, keepdim=True)).sum()
    weighted = []
    for layer, gradient in zip(layers, torch.autograd.grad(predicted, streams), strict=True):
        weights = torch.zeros_like(layer.vector)
        weights[layer.present] = _scale(gradient.clamp(min=0).amax(-1, keepdim=True)).flatten().to(weights.dtype)
        weighted.append(replace(layer, vector=layer.vector * weights))
    return weighted


def _scale(values: Tensor) -> Tensor:
    """Scale values (batch, tokens, channels) to 0..1 in each image; zeros if all are equal."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return (values - low) / torch.where(high > low, high - low, 1.0)


def _reads_as_published(model: TokenModel) -> bool:
    """Return whether published maps use the vectors `xai`, which require a class token and scans."""
    return model.reads_protected and _has_scans(model)


def _has_scans(model: TokenModel) -> bool:
    return all(isinstance(block, ScanBlock) for block in model.blocks)
