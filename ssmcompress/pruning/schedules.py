"""Published schedules of token reduction in vision transformers, as stages of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from .plan import Stage, share_removed


def evit_stages(layers: Sequence[int], ratios: Sequence[float], fuse: bool = False) -> tuple[Stage, ...]:
    """Return the stages of EViT (arXiv 2202.07800), which rank by the attention of the class token, inside the layers.

    Args:
        layers: 1-based layers; 4, 7 and 10 of 12 in the paper. ratios: the shares of tokens to remove there.
        fuse: whether the removed tokens are fused into one.
    """
    merge = "fused" if fuse else None
    return tuple(Stage(layer, ratio, "attention", merge) for layer, ratio in zip(layers, ratios, strict=True))


def tome_stages(depth: int, length: int, protected: int, removed: int, inflection: float = 0.0) -> tuple[Stage, ...]:
    """Return the stages of ToMe (arXiv 2210.09461), which merges some tokens in every layer.

    Args:
        depth: number of layers. length: number of tokens before the first layer. protected: how many of these are never
            merged.
        removed: average number of tokens that are merged in each layer.
        inflection: 0: the same number in each layer; -1: from twice the number in the first layer down to zero, the
            "decreasing" schedule of the paper; 1: the reverse.

    Raises:
        InputError: a number or the inflection is out of range.
    """
    if type(removed) is not int or removed < 1:
        raise InputError(f"{removed!r} tokens to merge in each layer: expected a whole number, from 1")
    if not -1 <= inflection <= 1:
        raise InputError(f"inflection {inflection!r}: expected from -1 to 1")
    least = int(removed * (1 - inflection))
    step = (2 * removed - 2 * least) / max(1, depth - 1)
    stages, count = [], length
    for layer in range(depth):
        # Half of the tokens can be merged into the others; ToMe counts the class token among the former.
        number = min(int(least + step * layer), (count - protected) // 2)
        if number > 0:
            stages.append(Stage(layer + 1, share_removed(count, count - number, protected), "keys", "bipartite"))
            count -= number
    return tuple(stages)
