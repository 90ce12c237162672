"""The history of a model: its source, and a record of each step that changed its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, ClassVar, Protocol

from ..errors import InputError


@dataclass(frozen=True)
class Source:
    """The file that a model was loaded from; for a compressed model, the file of its dense model.

    Attributes:
        path: absolute path; for a model from the Hugging Face Hub, its name with the commit and the file.
        sha256: digest of the weights file. weights: the entry that was read.
        data: the images named in the folder (a path or a Hub name), or None.
    """

    path: str
    sha256: str
    weights: str = "model"
    data: str | None = None


@dataclass(frozen=True)
class MadeBy:
    """The command line and the versions with which a model was pruned, if known."""

    command: str | None = None
    versions: dict[str, str] | None = None


class Record(Protocol):
    """A record that a step appends to `TokenModel.steps`: a frozen dataclass of plain values, identified by `kind`."""

    kind: str


@dataclass(frozen=True)
class StepRecord:
    """The record of a step without a record class of its own.

    Attributes:
        kind: the name of the step. values: a JSON object that describes the step.
    """

    kind: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """The refit of one weight; see `ssmcompress.compression.reconstruct.least_squares.Refit`."""

    weight: str
    ridges: tuple[float | None, ...]
    before: float
    after: float
    half: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object, without `half` if it was not measured."""
        return {key: value for key, value in asdict(self).items() if key != "half" or value is not None}


@dataclass(frozen=True)
class Reconstruction:
    """The record of a reconstruction.

    Attributes:
        name, images: the name of the data and the number of different images used.
        held_out: how many of them were used for selection only.
        kl_before, kl_after: mean KL(dense || pruned) on the held-out images in nats per image, with old and new
            weights.
        kept: whether the new weights were kept; the old ones are kept if they were closer to the dense model.
        fits: the refits in the order in which they were made.
    """

    kind: ClassVar[str] = "reconstruction"

    name: str
    images: int
    held_out: int
    kl_before: float
    kl_after: float
    kept: bool
    fits: tuple[Fit, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object, as `from_dict` reads it."""
        return {**asdict(self), "fits": [fit.to_dict() for fit in self.fits]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Reconstruction:
        """Read a record from a JSON object.

        Raises:
            InputError: the value is not such an object.
        """
        try:
            fits = tuple(
                Fit(
                    str(f["weight"]),
                    tuple(None if ridge is None else float(ridge) for ridge in f["ridges"]),
                    float(f["before"]),
                    float(f["after"]),
                    None if f.get("half") is None else float(f["half"]),
                )
                for f in value["fits"]
            )
            counts = (int(value[k]) for k in ("images", "held_out"))
            losses = (float(value[k]) for k in ("kl_before", "kl_after"))
            return cls(str(value["name"]), *counts, *losses, bool(value["kept"]), fits)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"not a record of a reconstruction: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Finetuning:
    """The record of a fine-tuning.

    Attributes:
        name, images: the name of the data and the number of its images per epoch.
        held_out: number of images on which the best epoch was selected.
        labels, teacher: whether they were used. recipe: the recipe as a JSON object, with the actual batch size.
        seed: seed of the order and the augmentation of the images. steps: total optimiser steps.
        epoch: the epoch of the model's weights; 0: the initial weights, as no epoch was better on the held-out images.
        averaged: whether the weights are the moving average.
        seconds: wall-clock time. processes: number of processes at the end.
        history: a JSON object for each epoch.
        run: the inputs of the run, which `resume` must match, as a JSON object; None if they were not recorded.
    """

    kind: ClassVar[str] = "finetuning"

    name: str
    images: int
    held_out: int
    labels: bool
    teacher: bool
    recipe: dict[str, Any]
    seed: int
    steps: int
    epoch: int
    averaged: bool
    seconds: float
    processes: int
    history: tuple[dict[str, Any], ...] = field(repr=False)
    run: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Finetuning:
        """Read a record from the JSON object that `dataclasses.asdict` wrote.

        Raises:
            InputError: the value is not such an object.
        """
        try:
            recipe = dict(value["recipe"])
            if not all(isinstance(v, (str, bool, int, float)) for v in recipe.values()):
                raise ValueError("a recipe of other things than numbers and texts")
            return cls(
                name=str(value["name"]),
                recipe=recipe,
                history=tuple(dict(entry) for entry in value["history"]),
                run=None if value.get("run") is None else dict(value["run"]),
                **{k: int(value[k]) for k in ("images", "held_out", "seed", "steps", "epoch", "processes")},
                **{k: bool(value[k]) for k in ("labels", "teacher", "averaged")},
                seconds=float(value["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"not a record of a fine-tuning: {type(error).__name__} {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) and isfinite(v) for v in value)


def _are_layers(value: Any) -> bool:
    return _are_counts(value) and value == sorted(set(value))


def _are_paths(value: Any) -> bool:
    """Return whether a value maps layer numbers (strings in JSON) to lists of scan path indices."""
    return isinstance(value, dict) and all(
        isinstance(layer, str) and layer.isascii() and layer.isdigit() and layer == str(int(layer[:9]))
        and isinstance(paths, list) and paths and all(type(path) is int and path >= 0 for path in paths)
        and paths == sorted(set(paths))
        for layer, paths in value.items()
    )  # fmt: skip


# Maximum length of the chain of input models, each made from the one before, in a file.
MOST_INPUTS = 64
_IMAGES = {"name": (_is_text, "a text"), "images": (_is_count, "a number of at least 1")}
_COUNTS, _LOSSES = (_are_counts, "a list of numbers of at least 1"), (_are_numbers, "a list of finite numbers")
# The fields of trimming records: for each kind, key -> (test of its value, description of valid values).
TRIMMING: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "states": {**_IMAGES, "n": _COUNTS, "losses": _LOSSES},
    "channels": {**_IMAGES, "e": _COUNTS, "costs": _LOSSES},
    "layers": {"layers": (_are_layers, "a list of ascending layer numbers")},
    "directions": {"directions": (_are_paths, "an object of layer numbers and ascending lists of scan paths")},
}


def _read_step(kind: Any, values: Any) -> StepRecord:
    """Return the record of a step without a record class; InputError for values that are invalid for its kind."""
    record = StepRecord(str(kind), dict(values))
    if record.kind == INPUT:
        _check_input(record.values)
    for key, (is_valid, expected) in TRIMMING.get(record.kind, {}).items():
        found = f"is {str(record.values[key])[:40]!r}" if key in record.values else "is missing"
        if key not in record.values or not is_valid(record.values[key]):
            raise InputError(f"bad record of trimmed {record.kind}: `{key}` {found}; expected {expected}")
    return record


# The kind of record for the compressed model that a compression started from. Records before it belong to that model.
INPUT = "input"


def list_own_steps(steps: Sequence[Record]) -> tuple[Record, ...]:
    """Return the records since a compression continued from a compressed model; all records if none did."""
    start = next((number for number, step in enumerate(steps, 1) if step.kind == INPUT), 0)
    return tuple(steps[start:])


def _check_input(value: Any, depth: int = 0) -> None:
    """Raise an InputError unless a value is a record of the model that a compression started from."""
    valid = isinstance(value, dict) and depth < MOST_INPUTS
    valid = valid and all(value.get(key) is None or isinstance(value[key], str) for key in ("path", "sha256"))
    valid = valid and isinstance(value.get("steps"), list) and all(map(_is_text, value["steps"]))
    valid = valid and isinstance(value.get("stages"), list)
    if not valid or not all(
        isinstance(stage, dict) and _is_count(stage.get("after")) and _is_count(stage.get("kept"))
        for stage in value["stages"]
    ):
        raise InputError(f"bad record of the model that was compressed further: {str(value)[:80]}")
    if value.get("input") is not None:
        _check_input(value["input"], depth + 1)


# Kinds with their own key in config.json; all others are listed under `steps`.
KEYED = {record.kind: record for record in (Reconstruction, Finetuning)}


def steps_to_dict(steps: Sequence[Record]) -> dict[str, Any]:
    """Return the records as a JSON object for the `pruning` section of config.json.

    The key `steps` exists only if a record has no key of its own; it lists all records in order.
    """
    value: dict[str, Any] = dict.fromkeys(KEYED)
    value |= {step.kind: _values(step) for step in steps if step.kind in KEYED}
    if any(step.kind not in KEYED for step in steps):
        value["steps"] = [{"kind": s.kind} | ({} if s.kind in KEYED else {"values": _values(s)}) for s in steps]
    return value


def _values(step: Record) -> dict[str, Any]:
    if isinstance(step, StepRecord):
        return step.values
    return step.to_dict() if isinstance(step, Reconstruction) else asdict(step)


def steps_from_dict(value: Mapping[str, Any]) -> tuple[Record, ...]:
    """Read the records written by `steps_to_dict`; kinds not in `KEYED` become `StepRecord`s.

    Raises:
        InputError: the value is malformed, or a record of `TRIMMING` has a missing or malformed value.
    """
    records = {k: cls.from_dict(value[k]) for k, cls in KEYED.items() if value.get(k) is not None}
    entries = value.get("steps")
    if entries is None:
        return tuple(records.values())
    try:
        steps = tuple(
            records[entry["kind"]] if entry["kind"] in KEYED else _read_step(entry["kind"], entry["values"])
            for entry in entries
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a list of steps: {type(error).__name__} {error}") from error
    kinds = [step.kind for step in steps]
    if twice := [kind for kind in TRIMMING if kinds.count(kind) > 1]:
        raise InputError(f"{kinds.count(twice[0])} records of trimmed {twice[0]}: expected one at most")
    return steps
