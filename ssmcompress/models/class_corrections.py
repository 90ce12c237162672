"""Corrections of the class token: linear maps that predict the error of a layer there caused by dropped tokens.

A refit of the layer's weights treats the class token as one token of many, but the readout depends on it alone. So it
gets its own map after a layer, from the layer's update of the class token and a summary of all tokens, where dropped
tokens count with their last features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..pruning.tokens import Tokens
from .precision import cast

# Maximum number of segments of a summary, and minimum number of positions in a segment. The 197 tokens of a 14 x 14
# grid in 14 segments are its rows: on a Vim of that size they left 1 % less divergence than 7, on one of 50 tokens 7 %
# less.
MAX_SEGMENTS, MIN_POSITIONS = 14, 3
# Maximum number of inputs of a map: fitting needs memory proportional to its square (72 MiB) and time to its cube.
MAX_INPUTS = 3072
# The largest rank of a correction of logits: 3 % of the parameters of a PlainMamba-L1 with 1,000 classes.
MAX_READOUT_RANK = 64


def choose_segments(length: int, width: int) -> int:
    """Return the number of segments over which a model sums `length` tokens of `width` features."""
    affordable = (MAX_INPUTS - width) // (width + 1)
    return max(1, min(MAX_SEGMENTS, length // MIN_POSITIONS, affordable))


def count_inputs(width: int, segments: int) -> int:
    """Return the number of inputs of a map: the update, and the sum and number of tokens of each segment."""
    return width + segments * (width + 1)


def max_rank(outputs: int, inputs: int) -> int:
    """Return the largest rank whose two factors have no more values than the full matrix; at least 1."""
    return max(1, outputs * inputs // (outputs + inputs))


def max_readout_rank(classes: int, inputs: int) -> int:
    """Return the largest rank of a correction of the logits."""
    return min(MAX_READOUT_RANK, max_rank(classes, inputs))


class ClassBefore(NamedTuple):
    """The inputs of a correction that are taken from the tokens before its layer.

    Attributes:
        features: (batch, 1, width), those of the class token. summary: the result of `Tokens.summarise`.
        place: (batch, 1, width) index of the class token, for `gather`.
    """

    features: Tensor
    summary: Tensor
    place: Tensor


class ClassCorrection(nn.Sequential):
    """A low-rank linear map that computes the correction of the class token after a layer, as two float32 layers.

    Args:
        width: width of the residual stream. segments: segments of the summary. rank: rank of the map.
    """

    def __init__(self, width: int, segments: int, rank: int, device: torch.device | str | None = None):
        options = {"bias": False, "device": device or "cpu", "dtype": torch.float32}
        sizes = ((count_inputs(width, segments), rank), (rank, width))
        super().__init__(*(skip_init(nn.Linear, *size, **options) for size in sizes))
        self.segments = segments

    def forward(self, update: Tensor, summary: Tensor) -> Tensor:
        """Return the correction (batch, width).

        Args:
            update: (batch, width), what the layer added to the class token.
            summary: (batch, segments * (width + 1)), `Tokens.summarise` of the tokens before the layer.
        """
        inwards, outwards = self
        return outwards(inwards(cast(torch.cat([update, summary], dim=1), inwards)))

    def read(self, tokens: Tokens) -> ClassBefore:
        """Return the inputs of the correction from the tokens before the layer, while they are still in the cache."""
        place = tokens.find_layout(self.segments).place
        return ClassBefore(tokens.features.gather(1, place), tokens.summarise(self.segments), place)

    def correct(self, features: Tensor, before: ClassBefore) -> Tensor:
        """Return the features (batch, kept, width) after the layer, with the class token corrected.

        If there is only one token, it is the class token.
        """
        alone = features.shape[1] == 1
        update = (features if alone else features.gather(1, before.place)) - before.features
        correction = self(update[:, 0], before.summary)[:, None].to(features.dtype)
        return features + correction if alone else features.scatter_add(1, before.place, correction)
