"""Maps of tokens to the output levels that a dense model has; `compression.reconstruct.levels` fits them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..errors import InputError
from ..pruning.tokens import Level
from .base import TokenModel
from .precision import cast


class LevelMap(nn.Module):
    """An affine map of a token's value x and of the mean c over the kept tokens: own x + mean c + bias.

    Args:
        width: d_model.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.own = skip_init(nn.Linear, width, width, device=device, dtype=torch.float32)
        # One vector for an image, so it is not computed for each token.
        self.mean = skip_init(nn.Linear, width, width, bias=False, device=device, dtype=torch.float32)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> LevelMap:
        """Return a map by a linear layer of [x; c], which has 2 * width inputs."""
        width = linear.out_features
        part = cls(width, linear.weight.device)
        part.own.weight.copy_(linear.weight[:, :width])
        part.own.bias.copy_(linear.bias)
        part.mean.weight.copy_(linear.weight[:, width:])
        return part

    def forward(self, values: Tensor, context: Tensor) -> Tensor:
        """Map values (batch, tokens, width) with the mean over the kept tokens (batch, width)."""
        return self.own(cast(values, self.own)) + self.mean(cast(context, self.mean))[:, None]

    @staticmethod
    def count_flops(tokens: int, width: int) -> int:
        """Return the FLOPs of mapping `tokens` tokens of one image."""
        return (tokens + 1) * width**2


def fill_level(level: Level, maps: Sequence[nn.Module] | None, zero: bool = False) -> Tensor:
    """Return a level at all positions, (batch, length, d_model).

    Args:
        maps: for each group of tokens a `LevelMap`, or an Identity; None: values as they are.
        zero: whether dropped tokens are zeros.
    """
    values = level.groups()
    if zero:
        values = [*(torch.zeros_like(group) for group in values[:-1]), values[-1]]
    if maps is None:
        return level.fill(values)
    context = level.values.mean(1)
    return level.fill(
        [part(x, context) if isinstance(part, LevelMap) else x for part, x in zip(maps, values, strict=True)]
    )


def group_sizes(model: TokenModel, level: int) -> list[int]:
    """Return the tokens of each group at an output level, from 1: those that each stage before it dropped, and kept."""
    plan, counts, layer = model.plan, model.token_counts(), model.config.out_layers[level - 1]
    if plan is None or (plan.reenter and layer > len(model.blocks) - plan.reenter):
        return [model.length]
    dropped = [counts[stage.after - 1] - counts[stage.after] for stage in plan.stages if stage.after < layer]
    return [*dropped, model.length - sum(dropped)]


def fill_level_maps(model: TokenModel, state: Mapping[str, Tensor]) -> None:
    """Put maps from a file into a pruned model that has output levels.

    Args:
        state: "level_maps.{level}.{group}.own.weight" and so on, level from 1, -> tensors. A group without any keeps
            its values.

    Raises:
        InputError: maps that do not fit the model.
    """
    if not state:
        return
    width, names = model.d_model, ("own.weight", "own.bias", "mean.weight")
    shapes = dict(zip(names, ((width, width), (width,), (width, width)), strict=True))
    parsed = [re.fullmatch(r"level_maps\.(\d{1,3})\.(\d{1,3})\.(.+)", key) for key in state]
    places = {(int(match[1]), int(match[2])) for match in parsed if match is not None}
    expected = {f"level_maps.{level}.{group}.{name}" for level, group in places for name in names}
    fitting = all(1 <= level <= model.levels and group < len(group_sizes(model, level)) for level, group in places)
    if None in parsed or not fitting or expected != set(state):
        raise InputError(f"maps of output levels ({next(iter(state))}, ...) that do not belong to the model")
    for level in sorted({level for level, _ in places}):
        parts = nn.ModuleList(nn.Identity() for _ in range(len(group_sizes(model, level))))
        for _, group in sorted(place for place in places if place[0] == level):
            values = {name: state[f"level_maps.{level}.{group}.{name}"] for name in names}
            if any(values[name].shape != shapes[name] or not values[name].isfinite().all() for name in names):
                raise InputError(f"maps of output level {level}: other shapes than the model's, or not finite")
            parts[group] = LevelMap(width)
            parts[group].load_state_dict(values)
        model.level_maps[str(level)] = parts
