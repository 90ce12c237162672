"""Tasks: the meaning of a model's outputs, and how they are compared with targets and with another model's outputs."""

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
    """Return the task with this name; None: classification, which files of earlier versions do not specify.

    Raises:
        ValueError: there is no task with this name.
    """
    if name is None:
        return CLASSIFICATION
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]
