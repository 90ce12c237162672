"""Charts of comparisons: quality over FLOPs of one model, and over FLOPs and latency of several models."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tasks import Task
from .fronts import gigaflops, has_labels, list_front, milliseconds, read_quality
from .methods import DROPPED, MERGED, SEARCHED, SMALLER, TRIMMED, find_group, is_reconstructed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = "dense"
MARKERS = {DENSE: "*", DROPPED: "o", MERGED: "s", SEARCHED: "D", TRIMMED: "^", SMALLER: "v"}
# Okabe and Ito's colours, which those who see red and green alike tell apart, without the yellow, which is too light
# for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEADROOM = 0.2  # above the highest point, for labels, as a share of the range
PALE = 0.3  # opacity of the points that are not on the front
LABEL_SIZE, LABEL_GAP = 7, 5  # points
# Places of a label around its point, the first ones preferred: above left, where a front that rises has no points.
DIRECTIONS = ((-1, 1), (1, -1), (-1, 0), (1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
DISTANCES = (1, 3, 6, 10, 15)  # times LABEL_GAP


def draw_pareto(rows: Sequence[Mapping[str, Any]], kind: str, task: Task) -> bytes:
    """Draw the task's quality, or without labels its likeness to the dense model, over the FLOPs left: a line a method.

    Args:
        rows: those of a comparison, each with `method`, `flops_share` and the figures of the task. kind: png or svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labelled = any(row[task.quality] is not None for row in rows)
    shown = task.figure(task.quality if labelled else task.likeness)
    key = shown.name
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[key] is not None:
            points.setdefault(row["method"], []).append((100 * row["flops_share"], row[key]))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    best: list[tuple[float, float]] = []
    for point in sorted((p for line in points.values() for p in line), key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    if best:
        axes.plot(*zip(*best, strict=True), color="lightgrey", linewidth=6, zorder=0, label="best at its FLOPs")
    for number, (method, line) in enumerate(points.items()):
        style = {
            "marker": "osD^vP*X"[number % 8],
            "color": f"C{number % 10}",
            "linestyle": "-" if number < 10 else "--",
        }
        axes.plot(*zip(*sorted(line), strict=True), **style, label=method, markersize=5, linewidth=1)
    axes.set(xlabel="FLOPs left (full), %", ylabel=f"{shown.title}, {shown.unit}")
    axes.grid(alpha=0.3)
    if points:
        figure.legend(loc="outside right upper", fontsize="x-small")
    return _encode(figure, kind)


@dataclass(frozen=True)
class Panel:
    """One of the costs that quality is drawn over.

    Attributes:
        cost: function from a row to the cost, None where it was not measured. title: of the axis.
    """

    cost: Callable[[Mapping[str, Any]], float | None]
    title: str


FLOPS = Panel(gigaflops, "GFLOPs of one image (full)")
LATENCY = Panel(milliseconds, "latency at batch 1, ms")


def draw_models(rows: Sequence[Mapping[str, Any]], task: Task, kinds: Sequence[str]) -> dict[str, bytes]:
    """Return `plot_models` as images, by kind: png or svg."""
    figure = plot_models(rows, task)
    return {kind: _encode(figure, kind) for kind in kinds}


def plot_models(rows: Sequence[Mapping[str, Any]], task: Task) -> Figure:
    """Plot the quality of rows of several models over GFLOPs and, where it was measured, over latency.

    Each model has a colour, each group of methods a marker, which is filled if later layers were refitted; dense models
    have a star. The front is a line of steps, since nothing was measured between two rows, with a label at each row;
    other points are pale. Without labels, quality is the likeness to the own dense model, and each model has a front
    of its own.

    Args:
        rows: those of a comparison of several models that did not fail, as `place_rows` returns them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labelled = has_labels(rows, task)
    shown = task.figure(task.quality if labelled else task.likeness)
    names = list(dict.fromkeys(row["model"] for row in rows))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    panels = [FLOPS, *([LATENCY] if any(milliseconds(row) is not None for row in rows) else [])]
    figure = Figure(figsize=(1.5 + 7 * len(panels), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        _fill_panel(axes, panel, rows, task, colours)
        axes.set(xlabel=panel.title, ylabel=f"{shown.title}, {shown.unit}")
        axes.grid(alpha=0.25)
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])  # figures are percentages
        axes.set_ylim(low, high + HEADROOM * (high - low))
    _add_legend(figure, rows, colours)
    figure.draw_without_rendering()  # sizes are final from here on
    figure.set_layout_engine("none")
    for axes in figure.axes:
        _place_labels(figure, axes)
    return figure


def _fill_panel(
    axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]], task: Task, colours: Mapping[str, str]
) -> None:
    """Draw the points and the front of one panel; labels are added at their points, and placed later."""
    labelled = has_labels(rows, task)
    groups = [rows] if labelled else [[row for row in rows if row["model"] == name] for name in colours]
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
        colour, dense, best = colours[row["model"]], row["method"] == DENSE, id(row) in on_front
        filled = dense or is_reconstructed(row["method"])
        axes.plot(
            *point,
            marker=MARKERS[_group(row)],
            markersize=13 if dense else 6,
            markerfacecolor=colour if filled else "white",
            markeredgecolor="black" if dense else colour,
            alpha=1 if best or dense else PALE,
            linestyle="",
            zorder=4 if dense else 3 if best else 2,
        )
        if best or dense:
            name = f"{row['model']}, dense" if dense else row["method"].removesuffix(", reconstructed")
            place = {"textcoords": "offset points", "ha": "left", "va": "bottom"}
            text = axes.annotate(name, point, (0, 0), **place, fontsize=LABEL_SIZE, color=colour, zorder=5)
            text.set_in_layout(False)


def _place_labels(figure: Figure, axes: Axes) -> None:
    """Move the labels of a panel to where they cover no other label and few points; one without a place is removed."""
    unit, renderer = LABEL_GAP * figure.dpi / 72, figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    points = np.array([line.get_xydata()[0] for line in axes.lines if len(line.get_xydata()) == 1]).reshape(-1, 2)
    dots, placed = axes.transData.transform(points), np.zeros((0, 2, 2))
    for text in sorted(axes.texts, key=lambda text: text.xy):
        extent, dot = text.get_window_extent(renderer), axes.transData.transform(text.xy)
        size = np.array([extent.width, extent.height])
        found: list[tuple[float, np.ndarray]] = []
        for distance, direction in itertools.product(DISTANCES, DIRECTIONS):
            low = dot + unit * distance * np.array(direction) + size * (np.array(direction) - 1) / 2
            high = low + size
            if (low < inside.min).any() or (high > inside.max).any():
                continue
            if ((low - unit / 3 < placed[:, 1]) & (high + unit / 3 > placed[:, 0])).all(1).any():
                continue
            covered = ((dots > low - unit / 2) & (dots < high + unit / 2)).all(1).sum()
            found.append((covered + 0.4 * DISTANCES.index(distance), low))
        if not found:
            text.remove()
            continue
        _, low = min(found, key=lambda place: place[0])
        box = np.stack([low, low + size])
        placed = np.concatenate([placed, box[None]])
        # The corner of the text is its anchor: the extent holds parts of letters below the line.
        text.set_position((low - dot) * 72 / figure.dpi)
        near = np.clip(dot, *box)
        if np.abs(near - dot).max() > 2 * unit:
            ends = axes.transData.inverted().transform([dot, near])
            axes.plot(*ends.T, color=text.get_color(), linewidth=0.5, alpha=0.7, zorder=2)


def _group(row: Mapping[str, Any]) -> str:
    return DENSE if row["method"] == DENSE else find_group(row["method"])


def _add_legend(figure: Figure, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Add the models by colour and the groups of methods by marker, those that there are."""
    from matplotlib.lines import Line2D

    grey = {"color": "none", "markeredgecolor": "dimgrey", "markersize": 7}
    entries = [
        Line2D(
            [], [], color="none", marker="*", markersize=12, markerfacecolor=colour, markeredgecolor="black", label=name
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


def _encode(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
