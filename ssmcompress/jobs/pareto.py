"""Charts of comparisons: quality over FLOPs of one model, and over FLOPs and latency of several models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tasks import Task
from .charts import COLOURS, add_label, encode_figure, finish_layout, new_figure, place_labels, plain_text
from .fronts import gigaflops, has_labels, list_front, milliseconds, read_quality
from .methods import DROPPED, MERGED, SEARCHED, SMALLER, TRIMMED, find_group, is_reconstructed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = "dense"
MARKERS = {DENSE: "*", DROPPED: "o", MERGED: "s", SEARCHED: "D", TRIMMED: "^", SMALLER: "v"}
GREY = "#8A8A8A"  # points that are not on the front, in a chart of one model
HEADROOM = 0.2  # above the highest point, for labels, as a share of the range
PALE, FAINT = 0.3, 0.75  # opacity of points that are not on the front: in colour, and in grey
DPI = 120


@dataclass(frozen=True)
class Panel:
    """A cost over which the quality is plotted.

    Attributes:
        cost: function from a row to the cost, None where it was not measured. title: of the axis.
    """

    cost: Callable[[Mapping[str, Any]], float | None]
    title: str


SHARE = Panel(lambda row: 100 * row["flops_share"], "FLOPs left (full), %")
FLOPS = Panel(gigaflops, "GFLOPs of one image (full)")
LATENCY = Panel(milliseconds, "latency at batch 1, ms")


def draw_pareto(rows: Sequence[Mapping[str, Any]], kind: str, task: Task) -> bytes:
    """Return `plot_pareto` as an image. kind: png or svg."""
    with plain_text():
        return encode_figure(plot_pareto(rows, task), kind, DPI)


def plot_pareto(rows: Sequence[Mapping[str, Any]], task: Task) -> Figure:
    """Plot the task's quality, or without labels its likeness to the dense model, over the FLOPs left by one model.

    Each group of methods has a marker, which is filled if later layers were refitted; the dense model is a star. The
    front is a step line with a label at each row; other points are grey.

    Args:
        rows: successful rows of a comparison, each with `method`, `flops_share` and the figures of the task.
    """
    rows = [{**row, "model": ""} for row in rows]
    figure = new_figure(9, 6.4)
    _fill_figure(figure, [SHARE], rows, task, _Paint({"": COLOURS[0]}, others=GREY))
    return figure


def draw_models(rows: Sequence[Mapping[str, Any]], task: Task, kinds: Sequence[str]) -> dict[str, bytes]:
    """Return `plot_models` as images, by kind: png or svg."""
    with plain_text():
        figure = plot_models(rows, task)
        return {kind: encode_figure(figure, kind, DPI) for kind in kinds}


def plot_models(rows: Sequence[Mapping[str, Any]], task: Task) -> Figure:
    """Plot the quality of rows of several models over GFLOPs and, where it was measured, over latency.

    Each model has a colour, each group of methods a marker, which is filled if later layers were refitted; dense models
    are stars. The front is a step line, since nothing was measured between two rows, with a label at each row; other
    points are pale. Without labels, quality is the similarity to the own dense model, and each model has a front of
    its own.

    Args:
        rows: successful rows of a comparison of several models, from `place_rows`.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    panels = [FLOPS, *([LATENCY] if any(milliseconds(row) is not None for row in rows) else [])]
    figure = new_figure(1.5 + 7 * len(panels), 6.6)
    _fill_figure(figure, panels, rows, task, _Paint(colours))
    return figure


@dataclass(frozen=True)
class _Paint:
    """The colours of a chart.

    Attributes:
        models: by name, "" for a single unnamed model. others: of points that are not on the front; None: the pale
            colour of their model.
    """

    models: Mapping[str, str]
    others: str | None = None


def _fill_figure(
    figure: Figure, panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]], task: Task, paint: _Paint
) -> None:
    """Draw the panels next to each other, with a legend below and labels that do not overlap."""
    shown = task.figure(task.quality if has_labels(rows, task) else task.likeness)
    for axes, panel in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        _fill_panel(axes, panel, rows, task, paint)
        axes.set(xlabel=panel.title, ylabel=f"{shown.title}, {shown.unit}")
        axes.grid(alpha=0.25)
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])  # figures are percentages
        axes.set_ylim(low, high + HEADROOM * (high - low))
    _add_legend(figure, rows, paint.models)
    finish_layout(figure)
    for axes in figure.axes:
        place_labels(figure, axes)


def _fill_panel(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]], task: Task, paint: _Paint) -> None:
    """Draw the points and the front of one panel; labels are added at their points and moved later."""
    labelled = has_labels(rows, task)
    groups = [rows] if labelled else [[row for row in rows if row["model"] == name] for name in paint.models]
    front = []
    for group in groups:
        best = list_front(group, panel.cost, task, labelled)
        front += best
        if best:
            points = [(panel.cost(row), read_quality(row, task, labelled)) for row in best]
            axes.step(*zip(*points, strict=True), where="post", color="lightgrey", linewidth=4, zorder=1)
    on_front = {id(row) for row in front}
    for row in rows:
        point = panel.cost(row), read_quality(row, task, labelled)
        if None in point:
            continue
        colour, dense, best = paint.models[row["model"]], row["method"] == DENSE, id(row) in on_front
        colour = colour if best or dense or paint.others is None else paint.others
        filled = dense or is_reconstructed(row["method"])
        axes.plot(
            *point,
            marker=MARKERS[_group(row)],
            markersize=13 if dense else 6,
            markerfacecolor=colour if filled else "white",
            markeredgecolor="black" if dense else colour,
            alpha=1 if best or dense else PALE if paint.others is None else FAINT,
            linestyle="",
            zorder=4 if dense else 3 if best else 2,
        )
        if best or dense:
            add_label(axes, _name_row(row), point, colour)


def _name_row(row: Mapping[str, Any]) -> str:
    """Return the label of a row: its method, or for a dense model its name if it has one."""
    if row["method"] == DENSE:
        return ", ".join(part for part in (row["model"], DENSE) if part)
    return row["method"].removesuffix(", reconstructed")


def _group(row: Mapping[str, Any]) -> str:
    return DENSE if row["method"] == DENSE else find_group(row["method"])


def _add_legend(figure: Figure, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Add a legend with the models by colour and the groups of methods by marker, as far as they occur."""
    from matplotlib.lines import Line2D

    grey = {"color": "none", "markeredgecolor": "dimgrey", "markersize": 7}
    entries = [
        Line2D(
            [],
            [],
            color="none",
            marker="*",
            markersize=12,
            markerfacecolor=colour,
            markeredgecolor="black",
            label=name or DENSE,
        )
        for name, colour in colours.items()
    ]
    used = {_group(row) for row in rows} - {DENSE}
    entries += [
        Line2D([], [], marker=marker, markerfacecolor="white", label=group, **grey)
        for group, marker in MARKERS.items()
        if group in used
    ]
    if any(is_reconstructed(row["method"]) for row in rows):
        entries.append(Line2D([], [], marker="o", markerfacecolor="dimgrey", label="filled: reconstructed", **grey))
    entries.append(Line2D([], [], color="lightgrey", linewidth=4, label="best at its cost"))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(5, len(entries)), fontsize="small")
