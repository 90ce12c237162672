"""Corrections of the class token: what a layer misses there because other tokens were dropped, as a linear map.

The class token is one of many for the weights of a layer, but all that is read out passes through it. So after a layer
it gets a map of its own, from the update that the layer made to it and from a summary of all tokens, the dropped ones
as they were last seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..pruning.tokens import Tokens
from .precision import cast

# The most segments of a summary, and the fewest positions in a segment: 14 segments of the 197 tokens of a 14 x 14 grid
# are its rows. On a Vim of that size 14 segments left 1 % less divergence than 7, on one of 50 tokens 7 % less.
MAX_SEGMENTS, MIN_POSITIONS = 14, 3
# The most inputs of a map, because fitting one takes the square of that in memory (72 MiB) and its cube in time.
MAX_INPUTS = 3072
# The largest rank of a correction of logits: 3 % of the parameters of a PlainMamba-L1 with 1,000 classes.
MAX_READOUT_RANK = 64


def choose_segments(length: int, width: int) -> int:
    """Return the number of segments in which a model of `length` tokens of `width` features sums them."""
    affordable = (MAX_INPUTS - width) // (width + 1)
    return max(1, min(MAX_SEGMENTS, length // MIN_POSITIONS, affordable))


def count_inputs(width: int, segments: int) -> int:
    """Return the number of inputs of a map: the update, and for each segment the sums and the number of tokens."""
    return width + segments * (width + 1)


def max_rank(outputs: int, inputs: int) -> int:
    """Return the largest rank with which the two factors of a matrix have no more values than it; at least 1."""
    return max(1, outputs * inputs // (outputs + inputs))


def max_readout_rank(classes: int, inputs: int) -> int:
    """Return the largest rank of a correction of logits."""
    return min(MAX_READOUT_RANK, max_rank(classes, inputs))


class ClassBefore(NamedTuple):
    """What a correction needs of the tokens before its layer.

    Attributes:
        features: (batch, 1, width) of the class token. summary: `Tokens.summarise`.
        place: (batch, 1, width) index of the class token, for `gather`.
    """

    features: Tensor
    summary: Tensor
    place: Tensor


class ClassCorrection(nn.Sequential):
    """A linear map of low rank to the correction of the class token after a layer, as two float32 layers.

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
        """Return what the correction needs of the tokens before the layer, while they are still in the cache."""
        place = tokens.find_layout(self.segments).place
        return ClassBefore(tokens.features.gather(1, place), tokens.summarise(self.segments), place)

    def correct(self, features: Tensor, before: ClassBefore) -> Tensor:
        """Return the features (batch, kept, width) after the layer with those of the class token corrected.

        If they are of one token, it is the class token.
        """
        alone = features.shape[1] == 1
        update = (features if alone else features.gather(1, before.place)) - before.features
        correction = self(update[:, 0], before.summary)[:, None].to(features.dtype)
        return features + correction if alone else features.scatter_add(1, before.place, correction)
