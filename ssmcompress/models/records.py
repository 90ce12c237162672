"""What a model remembers of how it came about: its source, and one record for each step that changed its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from ..errors import InputError


@dataclass(frozen=True)
class Source:
    """The file a model was read from, or, for a compressed model, the dense file it was made from.

    Attributes:
        path: absolute path. sha256: of the weights file's content. weights: the entry that was read.
        data: what the folder names as its images (a path or a hub name), or None.
    """

    path: str
    sha256: str
    weights: str = "model"
    data: str | None = None


@dataclass(frozen=True)
class MadeBy:
    """How a pruned model came about: the command line and the versions, where they are known."""

    command: str | None = None
    versions: dict[str, str] | None = None


class Record(Protocol):
    """What a step leaves in `TokenModel.steps`: a frozen dataclass of plain values, named by its `kind`."""

    kind: str


@dataclass(frozen=True)
class StepRecord:
    """The record of a step without a class of its own.

    Attributes:
        kind: the name of the step. values: a JSON object that describes what it did.
    """

    kind: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """The refit of one weight: see `ssmcompress.compression.reconstruct.least_squares.Refit`."""

    weight: str
    ridges: tuple[float | None, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Reconstruction:
    """How a model was reconstructed.

    Attributes:
        name, images: the data, and how many different images of it were used. held_out: how many of them only chose.
        kl_before, kl_after: mean KL(dense || pruned) on those held out in nats an image, with old and new weights.
        kept: whether the model has the new weights: it keeps the old ones if they were closer.
        fits: in the order in which they were made.
    """

    kind: ClassVar[str] = "reconstruction"

    name: str
    images: int
    held_out: int
    kl_before: float
    kl_after: float
    kept: bool
    fits: tuple[Fit, ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Reconstruction:
        """Read what `dataclasses.asdict` made of one.

        Raises:
            InputError: anything else.
        """
        try:
            fits = tuple(
                Fit(
                    str(f["weight"]),
                    tuple(None if ridge is None else float(ridge) for ridge in f["ridges"]),
                    float(f["before"]),
                    float(f["after"]),
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
    """How a model was fine-tuned.

    Attributes:
        name, images: the data, and how many of its images a pass takes. held_out: how many chose among the epochs.
        labels, teacher: whether they were used. recipe: the recipe as a JSON object, with the batch size as it was.
        seed: of the order of the images and of their augmentation. steps: optimiser steps in all.
        epoch: whose weights the model has; 0: the starting weights, because no epoch did better on the images held out.
        averaged: whether these are the average of the weights.
        seconds: wall-clock time. processes: how many there were at the end.
        history: a JSON object for each epoch.
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
    history: tuple[dict[str, Any], ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Finetuning:
        """Read what `dataclasses.asdict` made of one.

        Raises:
            InputError: anything else.
        """
        try:
            recipe = dict(value["recipe"])
            if not all(isinstance(v, (str, bool, int, float)) for v in recipe.values()):
                raise ValueError("a recipe of other things than numbers and texts")
            return cls(
                name=str(value["name"]),
                recipe=recipe,
                history=tuple(dict(entry) for entry in value["history"]),
                **{k: int(value[k]) for k in ("images", "held_out", "seed", "steps", "epoch", "processes")},
                **{k: bool(value[k]) for k in ("labels", "teacher", "averaged")},
                seconds=float(value["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"not a record of a fine-tuning: {type(error).__name__} {error}") from error


# Kinds that config.json has under a key of their own; all others are under `steps`.
KEYED = {record.kind: record for record in (Reconstruction, Finetuning)}


def steps_to_dict(steps: Sequence[Record]) -> dict[str, Any]:
    """The records as a JSON object: the part of config.json's `pruning` block that is about steps.

    `steps` is there only if a record has no key of its own; it names all of them in order.
    """
    value: dict[str, Any] = dict.fromkeys(KEYED)
    value |= {step.kind: asdict(step) for step in steps if step.kind in KEYED}
    if any(step.kind not in KEYED for step in steps):
        value["steps"] = [{"kind": s.kind} if s.kind in KEYED else asdict(s) for s in steps]
    return value


def steps_from_dict(value: Mapping[str, Any]) -> tuple[Record, ...]:
    """Read the records that `steps_to_dict` wrote.

    Raises:
        InputError: anything else.
    """
    keyed = {k: cls.from_dict(value[k]) for k, cls in KEYED.items() if value.get(k) is not None}
    listed = value.get("steps")
    if listed is None:
        return tuple(keyed.values())
    try:
        return tuple(
            keyed[entry["kind"]] if entry["kind"] in KEYED else StepRecord(str(entry["kind"]), dict(entry["values"]))
            for entry in listed
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a list of steps: {type(error).__name__} {error}") from error
