"""Validation of requested numbers of states or channels, and the copy of the model to cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ...errors import InputError
from ...models.base import TokenModel
from ...models.learnt import learnt_from

Count = int | Sequence[int]


def count_per_layer(value: Any, sizes: Sequence[int], name: str, what: str) -> list[int]:
    """Return the number to keep in each layer.

    Args:
        value: a number (layers that have fewer keep all), or one number per layer.
        sizes: the current size of each layer. name: the argument. what: what is counted, for messages.

    Raises:
        InputError: the value has another type, or a number is out of range.
    """
    if is_whole(value):
        if not 1 <= value <= max(sizes):
            raise InputError(f"`{name}` {value}: expected 1 to {max(sizes)}, the {what} that a layer has")
        return [min(int(value), size) for size in sizes]
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or not all(map(is_whole, value)):
        raise InputError(f"`{name}` {value!r}: expected a whole number, or one per layer"[:200])
    if len(value) != len(sizes):
        raise InputError(f"`{name}` has {len(value)} numbers: expected one for each of the {len(sizes)} layers")
    for layer, (number, size) in enumerate(zip(value, sizes, strict=True), 1):
        if not 1 <= number <= size:
            raise InputError(f"`{name}` {number} of layer {layer}: expected 1 to {size}, the {what} that it has")
    return [int(number) for number in value]


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def copy_to_cut(model: TokenModel, changes: bool = True) -> TokenModel:
    """Return a copy of a model, marked as compressed if it will be changed."""
    copied = copy.deepcopy(model)
    if changes:
        copied.learnt = learnt_from(model)  # for a dense model without a record, an empty set
        copied.mark_compressed()
    return copied
