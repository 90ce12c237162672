"""Tasks: what the outputs of a model mean, how they are compared with the truth and with those of another model."""

from __future__ import annotations

from .base import Evaluation, Figure, Meter, Task
from .classification import Classification
from .segmentation import IGNORED, Segmentation

__all__ = [
    "CLASSIFICATION",
    "IGNORED",
    "SEGMENTATION",
    "Classification",
    "Evaluation",
    "Figure",
    "Meter",
    "Segmentation",
    "Task",
    "find_task",
]

CLASSIFICATION, SEGMENTATION = Classification(), Segmentation()
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, SEGMENTATION)}


def find_task(name: str | None) -> Task:
    """Return the task of this name; None: classification, which files of earlier versions do not name.

    Raises:
        ValueError: no task has this name.
    """
    if name is None:
        return CLASSIFICATION
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]
