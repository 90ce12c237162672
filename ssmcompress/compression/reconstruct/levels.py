"""Fitting of maps from dropped and kept tokens to the output levels of the dense model.

A segmentation model reads all tokens at several layers, the output levels; a model with several resolutions needs all
tokens where the resolution changes. The last value of a dropped token is stale there, and the values of kept tokens
change too, because others are missing. In each level, the tokens dropped by each stage, and the kept tokens, get their
own linear map (`ssmcompress.models.level_maps`), fitted in closed form to the dense model's values at the same
positions on unlabelled images. If a plan reads dropped tokens as zeros, the inputs of their maps are also zeros, and
the maps use only the mean over the kept tokens. A fifth of the images is held out to choose the ridge; a group keeps
its values if no map helps on them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ... import processes
from ...data.any_batches import in_chunks
from ...errors import InputError
from ...models.base import TokenModel
from ...models.inputs import as_batches, check_model
from ...models.learnt import add_learnt, find_batches
from ...models.level_maps import LevelMap
from ...models.modes import runs_in_eval_mode
from ...models.records import Fit, StepRecord
from ...ops import gather_tokens
from ...progress import track
from ...pruning.tokens import Level
from .linear import LinearSums

# One in HELD_OUT images is held out, as in reconstruction.
HELD_OUT = 5


def has_levels(model: TokenModel) -> bool:
    """Return whether a model has output levels and drops tokens."""
    return model.levels > 0 and model.plan is not None and bool(model.plan.stages)


@runs_in_eval_mode
@torch.no_grad()
def map_levels(
    pruned: TokenModel, dense: TokenModel, images: Any, *, name: str | None = None, distributed: bool = False
) -> TokenModel:
    """Return a copy of `pruned` with maps from its output levels to those of `dense`; the arguments are not changed.

    Args:
        pruned: a pruned model with output levels. dense: the model it was made from.
        images: as for `ssmcompress.calibrate`, without labels. They are iterated once if the model reads out its
            levels, else once for each level with dropped tokens.
        name: name of the images in reports; None: their own.
        distributed: every process of the default `torch.distributed` group makes this call, each with its own images.

    Returns:
        The model, with a record of kind "level_maps" in its `steps`.

    Raises:
        InputError: the model has no output levels or no stages, or there are fewer than two images.
    """
    check_model(pruned, "pruned")
    check_model(dense, "dense")
    if not has_levels(pruned):
        raise InputError(
            "levels are mapped in a segmentation model that drops tokens, or one of several resolutions: prune it"
        )
    if pruned.dense_config != dense.dense_config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    model = copy.deepcopy(pruned)
    passes = model.level_passes()
    batches = as_batches(dense, images, repeat=len(passes) > 1)
    device, fits = next(model.parameters()).device, []
    for levels in passes:
        run = None
        for chunk in in_chunks(track(batches, "mapping output levels", batches.total), dense.chunk_size()):
            ours, theirs = (m.read_levels(chunk.to(device), levels) for m in (model, dense))
            run = run or LevelSums(model, levels, ours)
            run.add(theirs, ours)
        if run is None or run.images < 2:
            raise InputError("output levels are mapped on at least 2 images, one to fit and one to check on")
        fits += run.install(model, distributed)
    if distributed and (read := find_batches(batches)) is not None:
        read.sync()
    add_learnt(model, [batches])
    values = {"name": name or batches.name, "images": run.images, "fits": [fit.to_dict() for fit in fits]}
    model.add_record(StepRecord("level_maps", values))
    return model


def _identity(width: int, device: torch.device) -> nn.Linear:
    """Return the linear layer of [x; c], each of `width` features, whose output is x."""
    linear = skip_init(nn.Linear, 2 * width, width, device=device, dtype=torch.float32)
    linear.weight.copy_(torch.eye(width, 2 * width))
    linear.bias.zero_()
    return linear


class LevelSums:
    """Sums over the tokens of each group of each level, from which the maps of a pruned model are fitted.

    Args:
        model: the pruned model. numbers: the numbers of the levels (1-based).
        levels: the levels for some images, from which the groups are inferred.
    """

    def __init__(self, model: TokenModel, numbers: Sequence[int], levels: Sequence[Level]):
        device, self.numbers, self.read_groups = next(model.parameters()).device, numbers, model.read_groups
        widths = [level.values.shape[-1] for level in levels]
        self.sums = [
            [LinearSums(_identity(width, device), device) for _ in level.groups()]
            for level, width in zip(levels, widths, strict=True)
        ]
        self.images = 0

    def add(self, dense: Sequence[Level], levels: Sequence[Level], held: Tensor | None = None) -> None:
        """Add the levels of a batch of images from the dense model, and from the pruned model without its maps.

        Args:
            held: (images,), whether an image is held out; None: one in `HELD_OUT`.
        """
        count = len(levels[0].values)
        if held is None:
            held = (self.images + torch.arange(count, device=levels[0].values.device)) % HELD_OUT == 1
        self.images += count
        for target, level, sums in zip(dense, levels, self.sums, strict=True):
            positions = [*(group.positions for group in level.dropped), level.positions]
            context = level.values.mean(1)
            for values, places, rows in zip(self.read_groups(level), positions, sums, strict=True):
                targets = target.values if places is None else gather_tokens(target.values, places)
                inputs = torch.cat([values, context[:, None].expand_as(values)], dim=-1)
                rows.add(inputs, targets, torch.ones_like(values[..., 0]), held)

    def install(self, model: TokenModel, distributed: bool = False) -> list[Fit]:
        """Fit the maps and install them in the model, replacing earlier ones; return the records of the fits."""
        fits = []
        for number, sums in zip(self.numbers, self.sums, strict=True):
            parts = nn.ModuleList()
            for group, rows in enumerate(sums):
                if distributed:
                    processes.all_reduce_sum(*rows.rows.sums(), device=rows.linear.weight.device)
                result = rows.refit()
                name = f"level {number}, {'kept' if group + 1 == len(sums) else f'dropped by stage {group + 1}'}"
                fits.append(result.to_record(name))
                parts.append(LevelMap.from_linear(rows.linear) if result.ridges else nn.Identity())
            model.level_maps[str(number)] = parts
        return fits
