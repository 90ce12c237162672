"""Dropping whole layers and scan directions, without images.

The remaining weights are not adapted, so reconstruction or fine-tuning should follow. On the bundled model (2,000 test
images, dense 90.80 % top-1, only the classifier refitted), dropping layer 6, 17 % of its FLOPs, gives 90.15 %, dropping
layer 4 89.6, and dropping one direction of either layer 0.55 to 1.05 points less than dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InputError
from ...models.base import TokenModel
from ...models.records import StepRecord
from .activations import check_trimmable
from .requests import copy_to_cut, is_whole


def drop_layers(model: TokenModel, layers: Sequence[int]) -> TokenModel:
    """Return a copy of a model without some of its layers; the argument is not changed.

    Args:
        model: a model that drops no tokens. layers: 1-based numbers of layers of the current model.

    Returns:
        The model, with a record of kind "layers" that lists all missing layers by their numbers in the dense model. If
        `layers` is empty, the copy is unchanged and has no record.

    Raises:
        InputError: the numbers are not layers of the model, or include all of them.
    """
    check_trimmable(model)
    depth, chosen = len(model.blocks), sorted(set(_check_numbers(layers, "layers")))
    for layer in chosen:
        _check_layer(layer, depth, "layers")
    if len(chosen) == depth:
        raise InputError(f"`layers` are all {depth} layers: expected at least one to remain")
    smaller = copy_to_cut(model, bool(chosen))
    if chosen:
        earlier = model.find_record("layers")
        numbers = [smaller.origin.layers[layer - 1] for layer in chosen]
        numbers += earlier.values["layers"] if earlier is not None else []
        smaller.drop_layers(chosen)
        for kind, key in (("states", "n"), ("channels", "e")):  # sizes of the remaining layers from earlier steps
            if (record := smaller.find_record(kind)) is not None and isinstance(record.values.get(key), list):
                left = [count for layer, count in enumerate(record.values[key], 1) if layer not in chosen]
                smaller.add_record(StepRecord(kind, {**record.values, key: left}))
        smaller.add_record(StepRecord("layers", {"layers": sorted(numbers)}))
    return smaller


def drop_directions(model: TokenModel, directions: Mapping[int, Sequence[int]]) -> TokenModel:
    """Return a copy of a model without some scan paths of some layers; the argument is not changed.

    Args:
        model: a model that drops no tokens.
        directions: layer (1-based) -> paths to drop: for a Vim 0, forward, or 1, backward; for a PlainMamba 0 to 3, in
            the order of `ssmcompress.models.snakes`.

    Returns:
        The model, with a record of kind "directions" that lists all missing paths by the numbers of their layers in the
        dense model. If nothing is dropped, the copy is unchanged and has no record.

    Raises:
        InputError: a layer does not have such paths, or would lose all of its paths.
    """
    check_trimmable(model)
    if not isinstance(directions, Mapping):
        raise InputError(f"`directions` {directions!r}: expected a dict from layers to paths"[:200])
    chosen = {}
    for layer in _check_numbers(list(directions), "directions"):
        _check_layer(layer, len(model.blocks), "directions")
        present, dropped = model.blocks[layer - 1].directions, _check_numbers(directions[layer], "directions")
        if wrong := [path for path in dropped if path not in present]:
            raise InputError(
                f"`directions` {wrong[0]} of layer {layer}: expected some of {', '.join(map(str, present))}"
            )
        if set(dropped) == set(present):
            raise InputError(f"`directions` of layer {layer} are all that it has: expected at least one to remain")
        if dropped:
            chosen[layer] = sorted(set(dropped))
    smaller = copy_to_cut(model, bool(chosen))
    if chosen:
        earlier = model.find_record("directions")
        # Keys of a JSON object are strings.
        record = {k: list(v) for k, v in earlier.values["directions"].items()} if earlier is not None else {}
        for layer, paths in chosen.items():
            block = smaller.blocks[layer - 1]
            block.drop_directions(tuple(path for path in block.directions if path not in paths))
            number = str(smaller.origin.layers[layer - 1])
            record[number] = sorted([*record.get(number, ()), *paths])
        smaller.read_sizes()
        smaller.add_record(StepRecord("directions", {"directions": record}))
    return smaller


def _check_numbers(values: Any, name: str) -> list[int]:
    """Return integers as a list; InputError naming the argument for anything else."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise InputError(f"`{name}` {values!r}: expected whole numbers in a list"[:200])
    values = list(values)
    if not all(map(is_whole, values)):
        raise InputError(f"`{name}` {values!r}: expected whole numbers"[:200])
    return [int(value) for value in values]


def _check_layer(layer: int, depth: int, name: str) -> None:
    if not 1 <= layer <= depth:
        raise InputError(f"`{name}`: layer {layer}: expected 1 to {depth}")
