"""Models with output levels, which need all positions, and the maps from tokens to the values of the dense model there.

A segmentation model reads out its levels; in a model with several resolutions, later layers process them. At a dropped
token, a level has the token's last value. `compression.reconstruct.levels` fits the maps.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..errors import InputError
from ..pruning.plan import Stage
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
        # The mean is one vector per image, so this product is not repeated for each token.
        self.mean = skip_init(nn.Linear, width, width, bias=False, device=device, dtype=torch.float32)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> LevelMap:
        """Create a map from a linear layer of [x; c], which has 2 * width inputs."""
        width = linear.out_features
        part = cls(width, linear.weight.device)
        part.own.weight.copy_(linear.weight[:, :width])
        part.own.bias.copy_(linear.bias)
        part.mean.weight.copy_(linear.weight[:, width:])
        return part

    def forward(self, values: Tensor, context: Tensor) -> Tensor:
        """Map values (batch, tokens, width) with the mean over the kept tokens (batch, width)."""
        return self.own(cast(values, self.own)) + self.mean(cast(context, self.mean))[:, None]


def fill_level(level: Level, maps: Sequence[nn.Module] | None, values: Sequence[Tensor] | None = None) -> Tensor:
    """Return a level at all positions, (batch, length, d_model).

    Args:
        maps: a `LevelMap` or an Identity for each group of tokens; None: keep the values unchanged.
        values: the values of each group, from `LevelledModel.read_groups`; None: those of the level.
    """
    values = level.groups() if values is None else values
    if maps is None:
        return level.fill(values)
    context = level.values.mean(1)
    return level.fill(
        [part(x, context) if isinstance(part, LevelMap) else x for part, x in zip(maps, values, strict=True)]
    )


class LevelledModel(TokenModel):
    """A model with output levels, which are numbered from 1.

    Attributes:
        level_maps: for each level, by its number, a `LevelMap` or an Identity for each group of its tokens. They are
            outside the layers so that published parameter names do not change.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.level_maps = nn.ModuleDict()

    @abc.abstractmethod
    def level_layer(self, level: int) -> int:
        """Return the layer (1-based) after which a level is taken."""

    @abc.abstractmethod
    def level_stages(self, level: int) -> list[Stage]:
        """Return the stages whose dropped tokens are missing at a level."""

    @abc.abstractmethod
    def level_passes(self) -> list[tuple[int, ...]]:
        """Return the levels whose maps are fitted, in ordered groups; maps within a group do not feed each other."""

    @abc.abstractmethod
    def read_levels(self, images: Tensor, levels: Sequence[int]) -> list[Level]:
        """Compute the levels of one group of `level_passes` for images, without applying their maps."""

    def fill(self, number: int, level: Level) -> Tensor:
        """Return a level at all positions, (batch, length, width), after its maps."""
        maps = self.level_maps[str(number)] if str(number) in self.level_maps else None
        return fill_level(level, maps, self.read_groups(level))

    def read_groups(self, level: Level) -> list[Tensor]:
        """Return the values of each group of tokens of a level (batch, tokens, width), before its map.

        The values of dropped tokens depend on the plan's `fill`.
        """
        *dropped, kept = level.groups()
        zero = self.plan is not None and self.plan.fill == "zero"
        return [*(map(torch.zeros_like, dropped) if zero else dropped), kept]

    def group_sizes(self, level: int) -> list[int]:
        """Return the number of tokens in each group at a level: those dropped by each stage, and the kept ones."""
        layer, counts = self.level_layer(level), self.token_counts()
        length = self.section_of(layer).length
        if self.plan is None or (self.plan.reenter and layer > len(self.blocks) - self.plan.reenter):
            return [length]
        places = [self.count_index(stage.after) for stage in self.level_stages(level)]
        dropped = [counts[place] - counts[place + 1] for place in places]
        return [*dropped, length - sum(dropped)]

    def level_products(self) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) of the level maps for one image."""
        maps = (
            (size, part)
            for level, parts in self.level_maps.items()
            for part, size in zip(parts, self.group_sizes(int(level)), strict=True)
            if isinstance(part, LevelMap)
        )
        return [pair for size, part in maps for pair in ((size, part.own.weight), (1, part.mean.weight))]

    def count_level_maps(self) -> int:
        return sum(rows * weight.numel() for rows, weight in self.level_products())

    def bound_level_maps(self, stages: Sequence[int]) -> int:
        count = 0
        for level in range(1, self.levels + 1):
            first, last, length, width = self.section_of(self.level_layer(level))
            if groups := len({after for after in stages if first <= after <= last}):
                count += (length + groups + 1) * width**2  # every token, and a mean for each group
        return count


def fill_level_maps(model: TokenModel, state: Mapping[str, Tensor]) -> None:
    """Load level maps from a file into a pruned model with output levels.

    Args:
        state: "level_maps.{level}.{group}.own.weight" and so on (1-based levels) -> tensors. A group without a map
            keeps its values.

    Raises:
        InputError: the maps do not fit the model.
    """
    if not state:
        return
    names = ("own.weight", "own.bias", "mean.weight")
    parsed = [re.fullmatch(r"level_maps\.(\d{1,3})\.(\d{1,3})\.(.+)", key) for key in state]
    places = {(int(match[1]), int(match[2])) for match in parsed if match is not None}
    expected = {f"level_maps.{level}.{group}.{name}" for level, group in places for name in names}
    fitting = all(1 <= level <= model.levels and group < len(model.group_sizes(level)) for level, group in places)
    if None in parsed or not fitting or expected != set(state):
        raise InputError(f"maps of output levels ({next(iter(state))}, ...) that do not belong to the model")
    for level in sorted({level for level, _ in places}):
        width = model.section_of(model.level_layer(level)).width
        shapes = dict(zip(names, ((width, width), (width,), (width, width)), strict=True))
        parts = nn.ModuleList(nn.Identity() for _ in range(len(model.group_sizes(level))))
        for _, group in sorted(place for place in places if place[0] == level):
            values = {name: state[f"level_maps.{level}.{group}.{name}"] for name in names}
            if any(values[name].shape != shapes[name] or not values[name].isfinite().all() for name in names):
                raise InputError(f"maps of output level {level}: other shapes than the model's, or not finite")
            parts[group] = LevelMap(width)
            parts[group].load_state_dict(values)
        model.level_maps[str(level)] = parts
