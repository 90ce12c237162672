"""The cost and savings of trimming each axis of a model alone: states, channels, layers and scan directions.

The loss is `proxy_loss` with a refitted classifier, measured once on images that were not used for fitting. `combine`
combines the axes with token pruning, whose sensitivities are measured separately (`sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data.batches import LabelledBatch
from ...errors import NOT_FINITE, InputError
from ...evaluation.flops import flops_of
from ...models.base import TokenModel
from ...models.blocks import TrimmableBlock
from ...progress import track
from ..remember import hash_of, keeps_results, remembered
from ..trim.channels import cut_channels
from ..trim.layers import drop_directions, drop_layers
from ..trim.states import cut_states
from ..trim.trims import Trims
from .proxy_loss import Collector, sum_losses

# Shares of the states and of the channels to keep; channel counts are multiples of CHANNELS_STEP.
STATE_SHARES = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
CHANNEL_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
CHANNELS_STEP = 8


@dataclass(frozen=True)
class Option:
    """One way to trim one axis, with its share of the dense FLOPs (`full`, without token pruning) and its loss.

    Attributes:
        axis: "states", "channels" or "layers"; single scan directions belong to "layers".
        flops: share of the dense model's FLOPs. loss: in nats per image, see `proxy_loss`.
    """

    axis: str
    trims: Trims
    flops: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        values = {"flops": round(self.flops, 6), "loss": round(self.loss, 7)}
        return {"axis": self.axis, "trims": self.trims.to_dict(), **values}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Option:
        """Read an option written by `to_dict`."""
        share, loss = float(value["flops"]), float(value["loss"])
        if not 0 < share <= 1 or not -1e9 < loss < 1e9:
            raise ValueError(f"flops {share}, loss {loss} of an axis")
        return cls(str(value["axis"]), Trims.from_dict(value["trims"]), share, loss)


def list_axes(model: TokenModel) -> tuple[str, ...]:
    """Return the axes, other than tokens, along which a model can be trimmed."""
    if not all(isinstance(block, TrimmableBlock) for block in model.blocks):
        return ()
    sizes = model.config.layers
    several = {
        "states": max(size.d_state for size in sizes) > 1,
        "channels": max(size.d_inner for size in sizes) > CHANNELS_STEP,
        "layers": len(sizes) > 1,
    }
    return tuple(axis for axis, possible in several.items() if possible)


def list_options(model: TokenModel, axes: Sequence[str]) -> list[tuple[str, Trims]]:
    """Return (axis, trims) of all options that are measured for a model."""
    sizes = model.config.layers
    options: list[tuple[str, Trims]] = []
    if "states" in axes:
        most = max(size.d_state for size in sizes)
        counts = sorted({max(1, round(most * share)) for share in STATE_SHARES} - {most}, reverse=True)
        options += [("states", Trims(states=count)) for count in counts]
    if "channels" in axes:
        most = max(size.d_inner for size in sizes)
        counts = {max(1, round(most * share / CHANNELS_STEP)) * CHANNELS_STEP for share in CHANNEL_SHARES}
        options += [("channels", Trims(channels=count)) for count in sorted(counts, reverse=True) if count < most]
    if "layers" in axes and len(sizes) > 1:
        options += [("layers", Trims(layers=(number,))) for number in model.droppable_layers]
        options += [
            ("layers", Trims(directions=((number, (path,)),)))
            for number, size in enumerate(sizes, 1)
            if len(size.directions) > 1
            for path in size.directions
        ]
    return options


@torch.no_grad()
def measure_axes(
    model: TokenModel,
    data: LabelledBatch,
    axes: Sequence[str],
    chains: Callable[[str], Any],
    *,
    refit: bool = True,
    key: str = "",
) -> tuple[Option, ...]:
    """Measure the loss of trimming a dense model along each axis alone, preferably on images not used for fitting.

    Args:
        data: images (count, C, H, W) and labels (count,) to compare with; no labels: the dense model's outputs.
        chains: function from "states" or "channels" to the chains of the model (`ssmcompress.compression.trim`).
        refit: whether the classifier is refitted first, as for a model that will be reconstructed.
        key: hash of the model and of the inputs of the chains, for `ssmcompress.compression.remember`.

    Raises:
        InputError: values are not finite.
    """
    found, options = [], list_options(model, axes)
    dense = run(model, data.images)
    known = hash_of(key, data.images, data.labels, refit) if keeps_results() else ""

    def measure(trims: Trims) -> float | None:
        if trims.states is not None and trims.states > chains("states").most:
            return None  # more states than can be refitted in the free memory
        return average_loss(_trim(model, trims, chains), data, dense, refit=refit)

    for axis, trims in track(options, "measuring axes", len(options)):
        loss = remembered(partial(hash_of, "axis", known, trims), partial(measure, trims))
        if loss is None:
            continue
        if loss != loss:
            raise InputError(NOT_FINITE)
        found.append(Option(axis, trims, flops_of(model, trims.apply_to(model.config)), loss))
    return tuple(found)


def _trim(model: TokenModel, trims: Trims, chains: Callable[[str], Any]) -> TokenModel:
    """Return the model trimmed along one axis."""
    if trims.states is not None:
        return cut_states(model, chains("states"), trims.states)
    if trims.channels is not None:
        return cut_channels(model, chains("channels"), trims.channels)
    return drop_layers(drop_directions(model, dict(trims.directions)), trims.layers)


@torch.no_grad()
def run(model: TokenModel, images: Tensor) -> Tensor:
    """Return the outputs (images, ...) that are used to compare models, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.raw_outputs(part.to(device)).cpu() for part in images.split(model.chunk_size())])


@torch.no_grad()
def average_loss(model: TokenModel, data: LabelledBatch, dense: Tensor, *, refit: bool) -> float:
    """Return the mean loss of a model on images, see `sum_losses`."""
    with Collector(model) as collector:
        run(model, data.images)
    total = sum_losses(model.classifier, collector.take(dense, data.labels), dense, data.labels, refit=refit)
    return total / len(data.images)


def iterate_axes(options: Sequence[Option], axis: str) -> Iterator[Option]:
    """Yield the options of one axis."""
    return (option for option in options if option.axis == axis)
