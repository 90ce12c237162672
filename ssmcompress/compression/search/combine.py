"""Combinations of axes for a budget, ranked by the expected loss computed from the loss of each axis alone.

The losses of the axes are added, like those of stages (`propose`): small, independent changes of the logits are
additive in the KL divergence. The caller checks the best few by running them. Layers and directions are dropped in the
order of their loss per FLOP. Plans for tokens are those that `propose` finds for the dense model at several budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from ...evaluation.flops import flops_of
from ...models.base import TokenModel
from ...pruning.plan import Stage
from ..trim.trims import Trims
from .axes import Option, iterate_axes
from .propose import Candidate

# At most one layer in LAYERS_SHARE is dropped, and one direction in the same share of the other layers.
LAYERS_SHARE = 4


@dataclass(frozen=True)
class Combination:
    """Trims, stages of the trimmed model, and their expected FLOPs and loss."""

    trims: Trims
    stages: tuple[Stage, ...]
    flops: float
    expected: float

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are trimmed or pruned."""
        return (*self.trims.axes, *(("tokens",) if self.stages else ()))


def combine(model: TokenModel, options: Sequence[Option], tokens: Sequence[Candidate]) -> list[Combination]:
    """Return all combinations of the options and the token plans, sorted by increasing expected loss.

    Args:
        model: the dense model. options: the options of its axes. tokens: token plans for the dense model.
    """
    plans = [Candidate((), 0.0), *tokens]
    combinations = []
    parts = (_one_axis(options, "states"), _one_axis(options, "channels"), _layer_sets(model, options))
    for (states, loss_n), (channels, loss_e), (layers, loss_l) in product(*parts):
        trims = replace(layers, states=states.states, channels=channels.channels)
        config = trims.apply_to(model.config)
        for plan in plans:
            stages = move_stages(plan.stages, trims.layers, config.depth)
            if stages is None:
                continue
            counts = model.counts_for(stages, config=config)
            expected = loss_n + loss_e + loss_l + plan.expected
            combinations.append(Combination(trims, stages, flops_of(model, config, counts), expected))
    return sorted(combinations, key=lambda c: (c.expected, c.flops))


def move_stages(stages: Sequence[Stage], dropped: Sequence[int], depth: int) -> tuple[Stage, ...] | None:
    """Renumber stages after dropping layers; None if two of them coincide, or one has no layer on either side."""
    moved = [replace(stage, after=stage.after - sum(layer <= stage.after for layer in dropped)) for stage in stages]
    places = [stage.after for stage in moved]
    return tuple(moved) if len(set(places)) == len(places) and all(1 <= a < depth for a in places) else None


def _one_axis(options: Sequence[Option], axis: str) -> list[tuple[Trims, float]]:
    """Return the trims of an axis, starting with none, and their losses, made monotone in the savings."""
    result, loss = [(Trims(), 0.0)], 0.0
    for option in sorted(iterate_axes(options, axis), key=lambda o: -o.flops):
        loss = max(loss, option.loss)
        result.append((option.trims, loss))
    return result


def _layer_sets(model: TokenModel, options: Sequence[Option]) -> list[tuple[Trims, float]]:
    """Return sets of layers and directions to drop, in increasing size, and the sums of their losses."""
    base = flops_of(model, model.config)
    ranked = sorted(iterate_axes(options, "layers"), key=lambda o: max(0.0, o.loss) / max(base - o.flops, 1e-9))
    most = max(1, model.config.depth // LAYERS_SHARE)
    layers = [option for option in ranked if option.trims.layers]
    directions = [option for option in ranked if option.trims.directions]
    result = []
    for dropped in range(min(most, len(layers), model.config.depth - 1) + 1):
        gone = {option.trims.layers[0] for option in layers[:dropped]}
        loss = sum(max(0.0, option.loss) for option in layers[:dropped])
        result.append((Trims(layers=tuple(sorted(gone))), loss))
        chosen: dict[int, Option] = {}  # one direction of a layer
        for option in directions:
            layer = option.trims.directions[0][0]
            if layer in gone or layer in chosen:
                continue
            chosen[layer] = option
            if len(chosen) > most:
                break
            loss += max(0.0, option.loss)
            pairs = tuple(sorted(pair for option in chosen.values() for pair in option.trims.directions))
            result.append((Trims(layers=tuple(sorted(gone)), directions=pairs), loss))
    return result
