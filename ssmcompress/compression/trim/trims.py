"""A description of how a model is trimmed, without tokens, shared by reports, plans and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...models.base import TokenModel
from ...models.records import Record, StepRecord, steps_from_dict
from ...models.saved import read_plan_file
from ...models.sizes import LayeredConfig, LayerSize, Origin, spread


@dataclass(frozen=True)
class Trims:
    """Describes how a dense model is trimmed.

    Attributes:
        states, channels: the maximum that each layer keeps, one number or one per remaining layer; None: all.
        layers: the dropped layers (1-based).
        directions: (layer, paths) pairs: the scan paths that a layer loses. Layer numbers are those of the dense model.
    """

    states: int | tuple[int, ...] | None = None
    channels: int | tuple[int, ...] | None = None
    layers: tuple[int, ...] = ()
    directions: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __bool__(self) -> bool:
        return self != Trims()

    @property
    def axes(self) -> tuple[str, ...]:
        """The trimmed axes; directions belong to layers."""
        used = {"states": self.states, "channels": self.channels, "layers": self.layers or self.directions}
        return tuple(axis for axis, value in used.items() if value)

    def apply_to(self, config: LayeredConfig) -> LayeredConfig:
        """Return the configuration of the trimmed model.

        Raises:
            InputError: the model does not have such parts, or has no scans.
        """
        if not self:
            return config
        if not isinstance(config, LayeredConfig):
            raise InputError(f"{', '.join(self.axes)} cannot be trimmed: the model has no scans")
        self._check(config)
        dropped, kept = dict(self.directions), []
        for number, size in enumerate(config.layers, 1):
            if number not in self.layers:
                directions = tuple(path for path in size.directions if path not in dropped.get(number, ()))
                kept.append((number, LayerSize(size.d_inner, size.d_state, directions)))
        states, channels = (spread(most or 1 << 30, len(kept)) for most in (self.states, self.channels))
        sizes: dict[int, LayerSize] = {}
        for (number, size), N, E in zip(kept, states, channels, strict=True):
            sizes[number] = size._replace(d_inner=min(E, size.d_inner), d_state=min(N, size.d_state))
        return config.with_layers(sizes)

    def _check(self, config: LayeredConfig) -> None:
        """Raise an InputError if the trims are invalid for a model of these sizes."""
        numbers = range(1, config.depth + 1)
        for layer in (*self.layers, *(layer for layer, _ in self.directions)):
            if layer not in numbers:
                raise InputError(f"trims: layer {layer} of a model of {config.depth} layers")
        if len(set(self.layers)) >= config.depth:
            raise InputError(f"trims: all {config.depth} layers are dropped; expected one to remain")
        for layer, paths in self.directions:
            present = config.layers[layer - 1].directions
            if not set(paths) < set(present):
                raise InputError(f"trims: scan paths {list(paths)} of layer {layer}, which has {list(present)}")
        left = config.depth - len(set(self.layers))
        for name, counts in (("states", self.states), ("channels", self.channels)):
            values = counts if isinstance(counts, tuple) else (1 if counts is None else counts,)
            if isinstance(counts, tuple) and len(counts) != left:
                raise InputError(f"trims: {len(counts)} numbers of {name}, expected one for each of {left} layers")
            if min(values) < 1:
                raise InputError(f"trims: {min(values)} {name}, expected at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object without the fields that are not trimmed."""
        value = {
            "states": _to_json(self.states),
            "channels": _to_json(self.channels),
            "layers": list(self.layers),
            "directions": {str(layer): list(paths) for layer, paths in self.directions},
        }
        return {key: part for key, part in value.items() if part}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Trims:
        """Read trims written by `to_dict`; InputError for any other value."""
        try:
            directions = {int(k): tuple(map(_parse, v)) for k, v in value.get("directions", {}).items()}
            return cls(
                states=_parse_counts(value.get("states")),
                channels=_parse_counts(value.get("channels")),
                layers=tuple(map(_parse, value.get("layers", ()))),
                directions=tuple(sorted(directions.items())),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not what is trimmed off a model: {type(error).__name__} {error}") from error


def find_trims(steps: Sequence[Record]) -> Trims:
    """Return the trims in the records of a model's steps."""
    values = {step.kind: step.values for step in steps if isinstance(step, StepRecord)}
    return Trims.from_dict(
        {
            "states": _compact(values.get("states", {}).get("n")),
            "channels": _compact(values.get("channels", {}).get("e")),
            "layers": values.get("layers", {}).get("layers", ()),
            "directions": values.get("directions", {}).get("directions", {}),
        }
    )


def read_trims(file: str | Path) -> Trims:
    """Read the trims from a file that `read_plan` can read; empty trims if it has none."""
    value = read_plan_file(file)
    if not isinstance(value, Mapping):
        return Trims()
    try:
        if isinstance(value.get("trims"), Mapping):
            return Trims.from_dict(value["trims"])
        pruning = value.get("pruning")
        return find_trims(steps_from_dict(pruning)) if isinstance(pruning, Mapping) else Trims()
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def build_trimmed(model: TokenModel, trims: Trims) -> TokenModel:
    """Return a model without weights that has the sizes of a dense model after trimming."""
    with torch.device("meta"):
        trimmed = type(model)(trims.apply_to(model.config))
    trimmed.preprocessing = model.preprocessing
    layers = tuple(number for number in range(1, len(model.blocks) + 1) if number not in trims.layers)
    trimmed.origin = Origin(model.config, layers)
    trimmed.mark_compressed()
    return trimmed


def _compact(counts: Any) -> Any:
    """Return a single number for a list of counts if all layers have the same."""
    same = isinstance(counts, list) and len({*map(str, counts)}) == 1
    return counts[0] if same else counts


def fit_counts(most: int | tuple[int, ...], sizes: Sequence[int]) -> int | tuple[int, ...]:
    """Limit the numbers that layers keep, one number or one per layer, to the size of each layer."""
    return min(most, max(sizes)) if isinstance(most, int) else most


def _to_json(counts: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(counts) if isinstance(counts, tuple) else counts


def _parse(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 20:
        raise ValueError(f"expected a whole number, found {str(value)[:20]!r}")
    return value


def _parse_counts(value: Any) -> int | tuple[int, ...] | None:
    if value is None or isinstance(value, int):
        return None if value is None else _parse(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"expected numbers, found {str(value)[:20]!r}")
    return tuple(map(_parse, value))
