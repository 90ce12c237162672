"""Charts: shared helpers, the cost of each axis of a search, and the history of a fine-tuning."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import escape_control
from ..models.records import Finetuning
from ..tasks import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with red-green colour blindness can distinguish, without yellow, which is too
# light for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABEL_SIZE, LABEL_GAP = 7, 5  # points
LONGEST_NAME = 28  # characters of a name in a picture
# Positions of a label around its point, in order of preference: first above left, where a rising front has no points.
DIRECTIONS = ((-1, 1), (1, -1), (-1, 0), (1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
DISTANCES = (1, 3, 6, 10, 15)  # times LABEL_GAP


def shorten(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a text as one line, without control characters, and truncated to this length."""
    text = escape_control(" ".join(str(text)[: 8 * longest].split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


@contextmanager
def plain_text() -> Iterator[None]:
    """Treat texts of figures literally: dollar signs start no formula, and missing characters raise no warning.

    Both drawing and encoding of a figure belong inside.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches that is not attached to a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode_figure(figure: Figure, kind: str, dpi: float) -> bytes:
    """Encode a figure as an image. kind: png or svg. dpi: pixels per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def finish_layout(figure: Figure) -> None:
    """Compute the layout of a figure once and freeze it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def add_label(axes: Axes, text: str, point: tuple[float, float], colour: str) -> None:
    """Add a label to a point, to be moved by `place_labels`; the layout reserves no space for it."""
    place = {"textcoords": "offset points", "ha": "left", "va": "bottom"}
    label = axes.annotate(text, point, (0, 0), **place, fontsize=LABEL_SIZE, color=colour, zorder=5)
    label.set_in_layout(False)


def place_labels(figure: Figure, axes: Axes) -> None:
    """Move the labels of a panel so that they cover no other label and few points; remove labels that do not fit."""
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
        # The anchor is the corner of the text: the extent also includes descenders below the line.
        text.set_position((low - dot) * 72 / figure.dpi)
        near = np.clip(dot, *box)
        if np.abs(near - dot).max() > 2 * unit:
            ends = axes.transData.inverted().transform([dot, near])
            axes.plot(*ends.T, color=text.get_color(), linewidth=0.5, alpha=0.7, zorder=2)


def draw_axes(search: Mapping[str, Any]) -> bytes:
    """Draw a PNG with the loss over the FLOPs left, a line for each axis alone, and the combinations that were run.

    Each layer and direction is a point, with a line through those with the smallest loss. The chosen combination is
    marked by a star.

    Args:
        search: the section of a report, with `axes`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for option in search["axes"]:
        points.setdefault(option["axis"], []).append((100 * option["flops"], option["loss"]))
    tried = [(100 * run["flops"], run["loss"]) for run in search["tried"]]
    chosen = 100 * search["flops"], search["loss"]
    positive = [loss for line in (*points.values(), tried, [chosen]) for _, loss in line if loss > 0]
    floor = min(positive, default=1e-6)  # a logarithmic axis cannot show a loss of zero or less

    def place(line: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
        return [share for share, _ in line], [max(loss, floor) for _, loss in line]

    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    for number, (axis, line) in enumerate(points.items()):
        style = {"color": f"C{number}", "marker": "osD^"[number % 4], "markersize": 5}
        if axis == "layers":
            axes.plot(*place(line), **style, linestyle="", alpha=0.35)
            line = _least_loss(line)
        axes.plot(*place(sorted(line)), **style, linewidth=1.2, label=f"{axis} alone")
    axes.plot(*place(tried), "x", color="black", alpha=0.6, label="combinations run")
    axes.plot(*place([chosen]), "*", color="black", markersize=15, label=f"chosen: {chosen[0]:.1f} %")
    if (budget := search["asked"].get("flops")) is not None:
        axes.axvline(100 * budget, linestyle=":", color="grey", label="budget")
    axes.set(xlabel="FLOPs left (full), %", ylabel="loss, nats", xlim=(0, 100), yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return encode_figure(figure, "png", 110)


def _least_loss(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points (FLOPs, loss)."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw_history(finetuning: Finetuning, task: Task) -> bytes:
    """Draw a PNG with the loss of every epoch, and the metrics measured after it."""
    epochs = [entry["epoch"] for entry in finetuning.history]
    held = [entry["held_out"] or {} for entry in finetuning.history]
    figure = new_figure(8, 3.2)
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [entry["loss"] for entry in finetuning.history], "o-", label="training")
    left.set(xlabel="epoch", ylabel="loss of augmented images")
    hits = task.figure(task.hits)
    accuracies = [entry[hits.name] for entry in finetuning.history]
    right.plot(epochs, accuracies, "o-", label=f"{hits.title}, augmented images")
    for measured in (task.figure(task.quality), task.figure(task.likeness)):
        if any(entry.get(measured.name) is not None for entry in held):
            values = [entry.get(measured.name) for entry in held]
            right.plot(epochs, values, "o-", label=f"{measured.title}, held out")
    right.axvline(finetuning.epoch, linestyle=":", color="grey", label="chosen")
    right.set(xlabel="epoch", ylabel="%")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xticks(epochs if len(epochs) < 12 else epochs[:: len(epochs) // 10])
    return encode_figure(figure, "png", 110)
