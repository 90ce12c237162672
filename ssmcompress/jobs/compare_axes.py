"""The models of a comparison that reduce something other than tokens: one axis, all axes, or the image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compression.search.axes import CHANNELS_STEP, average_loss, list_axes, run
from ..compression.smaller_image import choose_image_size, shrink_image
from ..compression.trim.channels import channel_chains
from ..compression.trim.layers import drop_layers
from ..compression.trim.states import state_chains
from ..compression.trim.trims import Trims
from ..data.batches import Batches, LabelledBatch
from ..errors import InputError
from ..evaluation.flops import flops_of
from ..files import write_file
from ..models.base import TokenModel
from ..progress import track
from ..pruning.plan import Plan
from .axes_search import LEAST_IMAGES, choose_axes, search_axes
from .images import CalibrationImages
from .pipeline import Context, Step, run_steps
from .prune import mark_unchanged
from .requests import SEARCH_IMAGES, DataOptions
from .steps import CHANNEL_IMAGES, STATE_IMAGES, Reconstruct, pruning_steps, trimming_steps
from .trial import SearchRequest, read_all

ALL, IMAGE = "all", "image"


class AxisModels:
    """Builds the models of these methods for any number of levels, sharing measurements between them.

    Args:
        model: the dense model. images: for calibration. data: how they are read. gap: gap source.
        sensitivity: the file in which the search over all axes saves its measurements.
    """

    def __init__(self, model: TokenModel, images: CalibrationImages, data: DataOptions, gap: str, sensitivity: Path):
        self.model, self.images, self.data, self.gap, self.sensitivity = model, images, data, gap, sensitivity
        self.chains: dict[str, Any] = {}
        self.ranking: tuple[int, ...] | None = None

    def build(self, axis: str, share: float, reconstruct: bool = True) -> TokenModel:
        """Return the model with at most this share of the dense FLOPs.

        Args:
            axis: "states", "channels" or "layers", alone; ALL, a search over all axes; or IMAGE, a smaller image.
            reconstruct: whether the classifier is refitted to a smaller image; the other axes always reconstruct.

        Raises:
            InputError: the axis cannot reach the share, or there are no images to fit on.
            BudgetError: the search cannot reach it.
        """
        if self.images.source.stand_in and (reconstruct or axis != IMAGE):
            raise InputError("reconstruction needs images of your own")
        if flops_of(self.model, self.model.config) <= share:
            return mark_unchanged(self.model)
        if axis == IMAGE:
            images = self.images.calibration if reconstruct else None
            return shrink_image(self.model, choose_image_size(self.model, share), images)
        if axis == ALL:
            return self._run(self._search(share))
        trims = choose_trims(self.model, axis, share, self._rank_layers)
        return self._run([*trimming_steps(trims, self._chains_for(axis)), Reconstruct()])

    def _run(self, steps: Sequence[Step]) -> TokenModel:
        context = Context(self.model, self.images.calibration, seed=self.data.seed)
        *_, model = run_steps(steps, context, keep=()).values()
        return model

    def _search(self, share: float) -> Sequence[Step]:
        """Return the steps found by a search over all axes."""
        axes = choose_axes(self.model, None, self.images)
        if axes == ("tokens",) and list_axes(self.model):
            raise InputError(
                f"{self.images.count} images to search on: expected at least {LEAST_IMAGES} for axes other than tokens"
            )
        earlier = str(self.sensitivity) if self.sensitivity.is_file() else None
        request = SearchRequest(flops=share, axes=axes, sensitivity=earlier)
        result = search_axes(self.model, request, self.images, self.data, gap=self.gap, repair=True)
        write_file(self.sensitivity, result.sensitivity.to_json().encode(), force=True)
        plan = Plan(result.plan.stages, result.plan.alignment, self.gap, self.data.seed)
        return [
            *trimming_steps(result.trims, result.chains),
            *pruning_steps(plan, Reconstruct(), bool(self.model.levels)),
        ]

    def _chains_for(self, axis: str) -> Mapping[str, Any]:
        """Return the dense model's chains for an axis, by step name; computed once."""
        makers = {"states": (state_chains, STATE_IMAGES), "channels": (channel_chains, CHANNEL_IMAGES)}
        if axis in makers and axis not in self.chains:
            make, count = makers[axis]
            self.chains[axis] = make(self.model, _first(self.images.calibration, count))
        return self.chains

    def _rank_layers(self) -> Sequence[int]:
        """Return the layers, from 1, sorted by the loss of the model without each, smallest first; measured once."""
        if self.ranking is None:
            pictures, _ = read_all(_first(self.images.calibration, SEARCH_IMAGES))
            dense, numbers = run(self.model, pictures), self.model.droppable_layers
            losses = {
                number: average_loss(
                    drop_layers(self.model, (number,)), LabelledBatch(pictures, None), dense, refit=True
                )
                for number in track(numbers, "measuring layers", len(numbers))
            }
            self.ranking = tuple(sorted(losses, key=losses.get))
        return self.ranking


def choose_trims(model: TokenModel, axis: str, share: float, rank_layers: Callable[[], Sequence[int]]) -> Trims:
    """Return the mildest trims along one axis, equal in all layers, that leave at most this share of the dense FLOPs.

    States are trimmed one by one and channels in steps of eight. As few layers as possible are dropped, in the order of
    `rank_layers`; their losses are measured one at a time, and not again once the first is dropped.

    Raises:
        InputError: the axis cannot save that much.
    """
    least = 1.0
    for trims in _list_trims(model, axis, rank_layers):
        least = min(least, flops_of(model, trims.apply_to(model.config)))
        if least <= share:
            return trims
    raise InputError(f"cannot reach {share:.1%}: {axis} leave {least:.1%} at least")


def _list_trims(model: TokenModel, axis: str, rank_layers: Callable[[], Sequence[int]]) -> Iterator[Trims]:
    """Yield the trims along one axis, mildest first."""
    sizes = model.config.layers
    if axis == "states":
        yield from (Trims(states=n) for n in range(max(size.d_state for size in sizes), 0, -1))
    elif axis == "channels":
        most = max(size.d_inner for size in sizes)
        yield from (Trims(channels=e) for e in range(-(-most // CHANNELS_STEP) * CHANNELS_STEP, 0, -CHANNELS_STEP))
    else:
        ranking = rank_layers()
        yield from (Trims(layers=tuple(sorted(ranking[:count]))) for count in range(len(ranking)))


def _first(images: Batches, count: int) -> Batches:
    """Return the first images as batches of their own."""
    return replace(images, index=list(images.index)[:count], unreadable=set())
