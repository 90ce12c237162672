"""The steps of a compression: drop layers and directions, trim states and channels, prune, align, refit, fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..compression.calibrate import calibrate
from ..compression.finetune.loop import finetune
from ..compression.finetune.recipe import Recipe
from ..compression.finetune.state import StateFile
from ..compression.reconstruct import reconstruct
from ..compression.reconstruct.layerwise import RefitOptions
from ..compression.reconstruct.levels import has_levels, map_levels
from ..compression.trim.channels import ChannelChains, trim_channels
from ..compression.trim.layers import drop_directions, drop_layers
from ..compression.trim.states import StateChains, trim_states
from ..compression.trim.trims import Trims, fit_counts
from ..data.batches import Batches
from ..data.content import different
from ..errors import InputError
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..models.learnt import learnt_from
from ..models.records import MadeBy
from ..models.rewrite import align, prune
from ..models.saved import serialise, versions
from ..pruning.alignment import UNALIGNED, Alignment
from ..pruning.merging import MERGED_BY
from ..pruning.plan import Plan
from .charts import draw_history
from .pipeline import Context, Step

# Number of images for trimming states and channels.
STATE_IMAGES, CHANNEL_IMAGES = 128, 256
LAST_FILE = "last.safetensors"
HISTORY_FILE = "finetuning.png"


@dataclass(frozen=True)
class DropLayers:
    """Drop whole layers.

    Attributes:
        layers: their numbers, from 1.
    """

    layers: tuple[int, ...]
    name: ClassVar[str] = "layers"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the model without these layers."""
        return drop_layers(model, self.layers) if self.layers else model


@dataclass(frozen=True)
class DropDirections:
    """Drop scan paths of some layers.

    Attributes:
        directions: (layer, paths) pairs, layers from 1.
    """

    directions: tuple[tuple[int, tuple[int, ...]], ...]
    name: ClassVar[str] = "directions"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the model without these paths."""
        return drop_directions(model, dict(self.directions)) if self.directions else model


@dataclass(frozen=True)
class TrimStates:
    """Trim the states of the scans on `context.calibration`, in closed form.

    Attributes:
        n: how many each layer keeps, one number or one per layer. chains: of the model, if already computed.
    """

    n: int | tuple[int, ...]
    chains: StateChains | None = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "states"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the trimmed model, or the same one if nothing was trimmed."""
        _check_alone(context)
        images = None if self.chains is not None else _first(context.calibration, STATE_IMAGES)
        n = fit_counts(self.n, [block.d_state for block in model.blocks])
        after = trim_states(model, n, images, chains=self.chains, name=context.calibration.source.name)
        return after if after.config != model.config else model


@dataclass(frozen=True)
class TrimChannels:
    """Trim the channels of the layers on `context.calibration`, in closed form.

    Attributes:
        e: how many each layer keeps, one number or one per layer. chains: of the model, if already computed.
    """

    e: int | tuple[int, ...]
    chains: ChannelChains | None = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "channels"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the trimmed model, or the same one if nothing was trimmed."""
        _check_alone(context)
        images = None if self.chains is not None else _first(context.calibration, CHANNEL_IMAGES)
        e = fit_counts(self.e, [block.d_inner for block in model.blocks])
        after = trim_channels(model, e, images, chains=self.chains, name=context.calibration.source.name)
        context.uncut = context.uncut or model
        return after if after.config != model.config else model


def _check_alone(context: Context) -> None:
    """Raise an InputError if there are several processes, since their sums over images are not reduced."""
    if context.distributed:
        raise InputError("states and channels are trimmed in one process: start ssmcompress without a launcher")


def _first(images: Batches, count: int) -> Batches:
    """Return the first images as a `Batches` of their own."""
    return replace(images, index=list(images.index)[:count], unreadable=set())


@dataclass(frozen=True)
class Prune:
    """Drop tokens by a plan, without alignment; the plan's alignment is applied by the step `Align`.

    A plan without a calibration is calibrated first on `context.calibration`, with its own alignment.
    """

    plan: Plan
    name: ClassVar[str] = "naive"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the pruned model, whose plan has the calibration."""
        # A plan that comes with its calibration does not record the calibration images.
        plan, images = self.plan, None
        context.uncut = context.uncut or model
        if plan.calibration is None:
            images = context.calibration
            name, together = images.source.name, context.distributed
            plan = calibrate(model, images, plan, gap=plan.gap, name=name, distributed=together)
            images.sync()
        pruned = prune(model, replace(plan, alignment=UNALIGNED))
        pruned.learnt = learnt_from(model).add(images)
        return pruned


@dataclass(frozen=True)
class Align:
    """Align the later layers of a pruned model to the dropped, fused or merged tokens."""

    alignment: Alignment
    name: ClassVar[str] = "aligned"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the aligned model, or the same one if nothing can be aligned: attention with dropped tokens."""
        scans = any(isinstance(block, ScanBlock) for block in model.blocks)
        pools = self.alignment.pool and model.pools
        merges = any(stage.merge in MERGED_BY.values() for stage in model.plan.stages)
        return align(model, self.alignment) if scans or pools or merges else model


@dataclass(frozen=True)
class MapLevels:
    """Map the tokens of a segmentation model to the dense output levels on `context.calibration`, in closed form."""

    name: ClassVar[str] = "mapped"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the model with the maps, or the same one if nothing is pruned or there are fewer than two images."""
        images = context.calibration
        if not has_levels(model) or _count_different(images) < 2:
            return model
        name, together = images.source.name, context.distributed
        return map_levels(model, context.dense, images, name=name, distributed=together)


@dataclass(frozen=True)
class Reconstruct:
    """Refit the later layers to the dense model on `context.calibration`, in closed form.

    Attributes:
        required: whether fewer than two different images are an error; otherwise the model is then left unchanged.
        options: what else is fitted.
    """

    required: bool = True
    options: RefitOptions = RefitOptions()
    name: ClassVar[str] = "reconstructed"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the reconstructed model, or the same one if nothing was pruned or there are no images to refit on."""
        images = context.calibration
        if model.plan is None:
            return model
        if not self.required and _count_different(images) < 2:
            return model
        name, together = images.source.name, context.distributed
        reference = context.uncut or model if model.origin is not None else None
        after = reconstruct(
            model, context.dense, images, name=name, distributed=together, reference=reference, options=self.options
        )
        return after if after.find_record("reconstruction") is not None else model


def _count_different(images: Batches) -> int:
    """Return the number of different images over all processes, reading them if that has not been done yet."""
    if not images.digests.any():  # the plan already had its calibration
        for _ in images:
            pass
        images.sync()
    return len(different(images.digests))


@dataclass(frozen=True)
class Finetune:
    """Train the model on `context.training`, with the dense model as teacher, labels, or both.

    Attributes:
        recipe: training settings. teacher: whether the dense model is the teacher.
    """

    recipe: Recipe = Recipe()
    teacher: bool = True
    name: ClassVar[str] = "finetuned"

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the best weights on `context.held_out`; add the last ones and a chart to `context.files`."""
        best, last = finetune(
            model,
            context.training,
            dense=context.dense if self.teacher else None,
            recipe=self.recipe,
            held_out=context.held_out,
            seed=context.seed,
            state=StateFile(context.state, context.resume) if context.state is not None else None,
            log=context.log,
        )
        last.made_by = MadeBy(context.command, versions())
        context.files[LAST_FILE] = serialise(last)
        context.files[HISTORY_FILE] = draw_history(best.find_record("finetuning"), best.task)
        return best


def trimming_steps(trims: Trims, chains: Mapping[str, Any]) -> Sequence[Step]:
    """Return the steps that trim a model, in an order in which each can use the result of the previous one.

    Args:
        chains: those already computed, by step name.
    """
    steps: list[Step] = []
    if trims.directions:
        steps.append(DropDirections(trims.directions))
    if trims.layers:
        steps.append(DropLayers(trims.layers))
    if trims.states is not None:
        steps.append(TrimStates(trims.states, chains.get("states")))
    if trims.channels is not None:
        steps.append(TrimChannels(trims.channels, chains.get("channels")))
    return steps


def pruning_steps(plan: Plan, reconstruct: Reconstruct | None, levels: bool = False) -> Sequence[Step]:
    """Return the steps that apply a plan: pruning, alignment if the plan has any, then reconstruction if given.

    Args:
        levels: whether output levels are mapped to those of the dense model.
    """
    steps: list[Step] = [Prune(plan)] if plan.stages else []
    if plan.stages and plan.alignment != UNALIGNED:
        steps.append(Align(plan.alignment))
    if levels:
        steps.append(MapLevels())
    return steps if reconstruct is None else [*steps, reconstruct]
