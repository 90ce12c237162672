"""What is remembered of a fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from .recipe import Recipe


@dataclass(frozen=True)
class Finetuning:
    """How a model was fine-tuned.

    Attributes:
        name, images: the data, and how many of its images a pass takes. held_out: how many chose among the epochs.
        labels, teacher: whether they were used. recipe: a `Recipe` as a JSON value, with the batch size as it was.
        seed: of the order of the images and of their augmentation. steps: optimiser steps in all.
        epoch: whose weights the model has, 0: those that it began with, for none did better on the images held out.
        averaged: whether these are the average of the weights.
        seconds: of all processes side by side. processes: how many there were at the end.
        history: a JSON value for each epoch.
    """

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
        """What `dataclasses.asdict` made of one; an InputError for anything else."""
        try:
            return cls(
                name=str(value["name"]),
                recipe=asdict(Recipe.from_dict(value["recipe"])),
                history=tuple(dict(entry) for entry in value["history"]),
                **{k: int(value[k]) for k in ("images", "held_out", "seed", "steps", "epoch", "processes")},
                **{k: bool(value[k]) for k in ("labels", "teacher", "averaged")},
                seconds=float(value["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"not a record of a fine-tuning: {type(error).__name__} {error}") from error
