"""The interface of a task, and the figures computed by its meter."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """A figure of a model, as reports, comparisons and charts show it.

    Attributes:
        name: key of the figure in an `Evaluation` and in the rows of a comparison: "top1".
        title: display name: "top-1". form: format of its value, with the unit: "{:.2f} %".
        unit: "%" or "nats".
        compared: whether it compares the model with the dense one; otherwise it is computed from labels.
        key: key in a report, in the section "agreement" if it is compared, else in the section of the model; None:
            `name`.
        column: column header in the table of a comparison; None: there is no such column.
    """

    name: str
    title: str
    form: str = "{:.2f} %"
    unit: str = "%"
    compared: bool = False
    key: str | None = None
    column: str | None = None

    @property
    def report_key(self) -> str:
        """The key in a report."""
        return self.key or self.name

    @property
    def cell_form(self) -> str:
        """The format in a table that shows the unit below it, except for percentages."""
        return self.form if self.unit == "%" else self.form.removesuffix(f" {self.unit}")

    def explain_column(self) -> str:
        """Explain the header of a column: "agrees: same class as dense", "KL from dense in nats"."""
        text = self.title if self.unit == "%" else f"{self.title} in {self.unit}"
        return text if text.startswith(self.column) else f"{self.column}: {text}"


class Evaluation:
    """The figures of one model on a set of images.

    Each figure is an attribute: `result.top1`. It is None if it could not be computed for lack of labels or of a dense
    model.

    Attributes:
        images: number of images. labelled: whether they have labels. figures: the figures by name.
    """

    def __init__(self, images: int, labelled: bool, **figures: float | None):
        self.images, self.labelled, self.figures = images, labelled, figures

    def __getattr__(self, name: str) -> float | None:
        figures = self.__dict__.get("figures", {})
        if name not in figures:
            raise AttributeError(f"{name!r}: the figures are {', '.join(figures)}")
        return figures[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Evaluation) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({values})"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, `images` and `labelled` as a JSON object."""
        return {"images": self.images, "labelled": self.labelled, **self.figures}


class Meter(abc.ABC):
    """Sums over batches in float64, so that figures are independent of the batch size and the number of processes.

    Attributes:
        sums: a float64 tensor on the CPU; the sums of several processes can be added.
    """

    sums: Tensor

    @property
    @abc.abstractmethod
    def images(self) -> int:
        """The number of images so far."""

    @abc.abstractmethod
    def add(self, output: Tensor, target: Tensor | None, dense: Tensor | None) -> None:
        """Add a batch: outputs of the model, targets or None, outputs of the dense model or None."""

    @abc.abstractmethod
    def result(self) -> Evaluation:
        """Return the figures of all images so far, at least one."""


class Task(abc.ABC):
    """The purpose of a model: how its outputs (images, ...) are evaluated, compared and trained.

    Attributes:
        name: name in files and options: "classification". title: name in messages.
        figures: the figures shown for a model, in this order.
        quality: name of the figure that ranks models with labels and is shown in charts; `likeness`: the figure for
            models without labels. `hits`: the figure that is the mean of `accuracy`.
        lost_likeness: unit of 100 minus `likeness`: "% of ...". labels: the form of labels in the data, for advice.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    quality: ClassVar[str]
    likeness: ClassVar[str]
    hits: ClassVar[str]
    lost_likeness: ClassVar[str]
    labels: ClassVar[str]

    @abc.abstractmethod
    def meter(self, classes: int | None = None) -> Meter:
        """Return a meter for models of `classes` classes; None: unknown."""

    @abc.abstractmethod
    def distance(self, dense: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the distance of outputs from those of the dense model, (images,) nats, zero if they agree.

        It is computed in the dtype of the arguments and is differentiable.

        Args:
            temperature: divisor of the logits of both.
        """

    def total_distance(self, dense: Tensor, output: Tensor) -> Tensor:
        """Return the distance of outputs from the dense model's, summed over the images, () float64 on the CPU."""
        return self.distance(dense.cpu().double(), output.cpu().double()).sum()

    @abc.abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the training loss of outputs, (images,) nats.

        It is computed in the dtype of `output` and is differentiable.
        """

    @abc.abstractmethod
    def margin(self, output: Tensor) -> Tensor:
        """Return the margin of the decision, (images,): the largest logit minus the second largest."""

    @abc.abstractmethod
    def agreement(self, dense: Tensor, output: Tensor) -> Tensor:
        """Return the share of decisions on which both outputs agree, (images,) from 0 to 1."""

    @abc.abstractmethod
    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the share of correct decisions, (images,) from 0 to 1; targets as for `loss`."""

    @abc.abstractmethod
    def check_target(self, target: Tensor, classes: int) -> None:
        """Raise an InputError if the targets of a batch are invalid for a model of `classes` outputs."""

    @abc.abstractmethod
    def is_at_chance(self, result: Evaluation, classes: int) -> bool:
        """Return whether figures with labels are hardly better than guessing, on enough images to tell."""

    @abc.abstractmethod
    def describe_chance(self, result: Evaluation, classes: int) -> str:
        """Describe the predictions of a model that `is_at_chance`, as the end of a sentence about it."""

    @abc.abstractmethod
    def causes_of_chance(self, by_name: bool) -> list[str]:
        """Return possible label errors for such a model; `by_name`: classes are numbered by their names."""

    @abc.abstractmethod
    def describe_likeness(self, likeness: float, images: int) -> str:
        """Return a sentence saying that a model has little in common with the dense one, `likeness` in percent."""

    def figure(self, name: str) -> Figure:
        """Return the figure of this name."""
        return next(figure for figure in self.figures if figure.name == name)

    def figures_of(self, compared: bool) -> tuple[Figure, ...]:
        """Return the figures that compare a model with the dense one, or those that do not."""
        return tuple(figure for figure in self.figures if figure.compared == compared)

    def describe(self, result: Evaluation | None, compared: bool) -> dict[str, float | None]:
        """Return these figures of a result by their keys in a report; None: not measured."""
        values = {} if result is None else result.figures
        return {figure.report_key: values.get(figure.name) for figure in self.figures_of(compared)}


def mean_loss(task: Task, output: Tensor, dense: Tensor, target: Tensor | None = None) -> float:
    """Return the mean distance from the dense outputs in nats; with targets, the mean increase in loss.

    Args:
        output, dense: (images, ...). target: as for `Task.loss`.
    """
    return float(image_losses(task, output, dense, target).mean())


def image_losses(task: Task, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the loss per image averaged by `mean_loss`, (images,) float64."""
    output, dense = output.double(), dense.double()
    return task.distance(dense, output) if target is None else task.loss(output, target) - task.loss(dense, target)
