"""The charts of a report's web page: quality over FLOPs, FLOPs by part, refit errors, sensitivities.

Each is an SVG embedded in the page, with text as text, and comes with its numbers. A chart is left out if the report
does not have its data or has values of unexpected types, since a report may be of an older version or incomplete.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..compression.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from ..errors import InputError, escape_control
from ..files import ATTENTION
from ..tasks import Task, find_task
from .charts import COLOURS, add_label, encode_figure, finish_layout, new_figure, place_labels, plain_text, shorten
from .report_text import Report, list_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sensitivity files that may be next to a report, and the page that `ssmcompress visualize` writes there.
SENSITIVITY_FILES = (SENSITIVITY_FILE, "sensitivity-axes.json")
ATTENTION_PAGE = f"{ATTENTION}/index.html"
LARGEST = 1e30  # largest number in a chart
WIDTH = 7.2  # inches
BEFORE, AFTER = "#9A9A9A", COLOURS[0]
HEAT = 9  # colours of a heat map

Table = tuple[list[str], list[tuple[str, list[str]]]]


@dataclass(frozen=True)
class Chart:
    """A chart for a web page.

    Attributes:
        name: its place: "quality", "parts", "fits" or "sensitivity".
        svg: the image, safe to embed in a page. caption: text shown below it.
        table: its numbers, (header, rows); None: another table of the page has them.
    """

    name: str
    svg: str
    caption: str
    table: Table | None = None


def draw_charts(report: Report, folder: Path) -> tuple[dict[str, Chart], list[str]]:
    """Draw all charts for which a report, and the sensitivities next to it, have data.

    Args:
        folder: of the report; may also be a single file, which has nothing next to it.

    Returns:
        The charts by name, and notes on files that cannot be used.
    """
    with plain_text():
        charts = [draw(report) for draw in (draw_quality, draw_parts, draw_fits)]
        sensitivity, notes = read_sensitivity(folder)
        charts.append(None if sensitivity is None else draw_sensitivity(sensitivity))
    return {chart.name: chart for chart in charts if chart is not None}, notes


def read_sensitivity(folder: Path) -> tuple[Sensitivity | None, list[str]]:
    """Read the first file with token sensitivities in a folder; return it and notes about damaged files."""
    notes = []
    for name in SENSITIVITY_FILES:
        if not (folder / name).is_file():
            continue
        try:
            found = Sensitivity.read(folder / name)
        except InputError as error:
            notes.append(f"the chart of the sensitivities was not drawn: {error}")
            continue
        if found.loss.numel():
            return found, notes
    return None, notes


def link_attention(folder: Path, page: Path) -> str | None:
    """Return the path of a folder's attention maps relative to a page; None if there are none."""
    target = folder / ATTENTION_PAGE
    if not target.is_file():
        return None
    try:
        return quote(Path(os.path.relpath(target, page.absolute().parent)).as_posix())
    except ValueError:  # on another drive
        return None


# ------------------------------------------------------------------------------------------------------ quality, FLOPs


def list_points(report: Report) -> list[tuple[str, float, float]]:
    """Return (column, FLOPs in percent of the dense model's, quality in percent) of the columns that have both.

    Without labels, the quality is the similarity to the dense model, which is 100 % for the dense model itself.
    """
    key = _quality(report).report_key
    dense = _number((_mapping(report.get("dense")).get("flops") or {}).get("full"))
    if not dense:
        return []
    labelled = _has_labels(report)
    compared = {"dense": 100.0, "pruned": _number(_mapping(report.get("agreement")).get(key))}
    points = []
    for name in list_columns(report):
        value = _number(report[name].get(key)) if labelled else compared.get(name)
        cost = _number(report[name]["flops"].get("full"))
        if value is not None and cost is not None:
            points.append((name, 100 * cost / dense, value))
    return points


def plot_quality(report: Report) -> Figure | None:
    """Plot the quality of a report's columns over their FLOPs, labelled; None with fewer than two."""
    points, shown = list_points(report), _quality(report)
    if len(points) < 2:
        return None
    figure = new_figure(WIDTH, 3.9)
    axes = figure.subplots()
    for name, cost, value in points:
        dense, last = name == "dense", name == "pruned"
        colour = "black" if dense else AFTER if last else "#6A6A6A"
        face = colour if dense or last else "white"
        style = {"marker": "*" if dense else "o", "markersize": 13 if dense else 8, "markerfacecolor": face}
        axes.plot(cost, value, **style, markeredgecolor=colour, linestyle="", zorder=3)
        add_label(axes, f"{shorten(name)}, {shown.form.format(value)}", (cost, value), colour)
    for text in axes.texts:
        text.set_fontsize(9)
    axes.margins(0.18, 0.25)
    axes.set(xlabel="FLOPs left (full), %", ylabel=f"{shown.title}, {shown.unit}")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])
    axes.set_ylim(low, high)
    axes.grid(alpha=0.25)
    finish_layout(figure)
    place_labels(figure, axes)
    return figure


def draw_quality(report: Report) -> Chart | None:
    """Draw `plot_quality` for a page; its numbers are in the table of the report."""
    figure = plot_quality(report)
    if figure is None:
        return None
    shown = _quality(report)
    points = [
        f"{name} {shown.form.format(value)} at {cost:.1f} % of the FLOPs" for name, cost, value in list_points(report)
    ]
    caption = f"The quality of the models ({shown.title}, {shown.unit}) over the FLOPs that they leave."
    svg = _encode(figure, "quality", f"{caption} {'; '.join(points)}.")
    return Chart("quality", svg, f"{caption} The numbers are in the table above.")


def _has_labels(report: Report) -> bool:
    quality = _task(report).figure(_task(report).quality).report_key
    return any(_number(report[name].get(quality)) is not None for name in list_columns(report))


def _quality(report: Report) -> Any:
    """Return the figure by which the columns of a report are compared."""
    task = _task(report)
    return task.figure(task.quality if _has_labels(report) else task.likeness)


def _task(report: Report) -> Task:
    return find_task(report.get("task"))


# --------------------------------------------------------------------------------------------------------------- parts


def list_parts(report: Report) -> list[tuple[str, float, float]]:
    """Return (part, GFLOPs in the dense model, GFLOPs in the pruned one), largest first; empty if not in the report."""
    dense, pruned = (_numbers(_mapping(report.get(name)).get("flops_by_part")) for name in ("dense", "pruned"))
    if not dense or not pruned:
        return []
    names = dict.fromkeys([*dense, *pruned])
    rows = [(name, dense.get(name, 0.0), pruned.get(name, 0.0)) for name in names]
    return sorted((row for row in rows if max(row[1:]) > 0), key=lambda row: -max(row[1:]))


def plot_parts(report: Report) -> Figure | None:
    """Plot the FLOPs of the parts of the dense and of the pruned model as bars next to each other."""
    rows = list_parts(report)
    if not rows:
        return None
    scale, unit = _choose_unit(rows)
    figure = new_figure(WIDTH, 1.1 + 0.42 * len(rows))
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, column, colour, name in ((-0.2, 1, BEFORE, "dense"), (0.2, 2, AFTER, "pruned")):
        values = [scale * row[column] for row in rows]
        bars = axes.barh(places + offset, values, 0.38, color=colour, label=name)
        axes.bar_label(bars, map(_count, values), padding=3, fontsize=8)
    axes.set_yticks(places, [shorten(row[0]) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.13, y=0.02)
    axes.set_xlabel(f"{unit} of one image (full)")
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    return figure


def draw_parts(report: Report) -> Chart | None:
    """Draw `plot_parts` for a page, with its numbers."""
    figure = plot_parts(report)
    if figure is None:
        return None
    rows = list_parts(report)
    scale, unit = _choose_unit(rows)
    table = [
        (name, [_count(scale * dense), _count(scale * pruned), _change(dense, pruned)]) for name, dense, pruned in rows
    ]
    caption = "Where the FLOPs of one image are (full), in the dense and in the pruned model."
    header = ["part", f"dense, {unit}", f"pruned, {unit}", "change"]
    return Chart("parts", _encode(figure, "parts", caption), caption, (header, table))


# ---------------------------------------------------------------------------------------------------------------- fits


def list_fits(report: Report) -> dict[str, list[tuple[str, float, float]]]:
    """Return the refitted maps by name, each with (layer, error before, error after) in layer order.

    The error is the relative error of a map on held-out images. Layers are numbered as in the names of the weights.
    """
    found: dict[str, list[tuple[str, float, float]]] = {}
    fits = _mapping(report.get("reconstruction")).get("fits")
    for fit in fits if isinstance(fits, Sequence) else ():
        before, after = _number(_mapping(fit).get("before")), _number(_mapping(fit).get("after"))
        if before is None or after is None or not isinstance(fit.get("weight"), str):
            continue
        layer, _, name = fit["weight"].rpartition(", " if ", " in fit["weight"] else ".")
        number = ".".join(re.findall(r"\d+", layer)) or layer or name
        found.setdefault(name, []).append((number, before, after))
    return found


def plot_fits(report: Report) -> Figure | None:
    """Plot the errors of the refitted maps by layer, before and after, with a panel for each kind of map."""
    found = list_fits(report)
    values = [value for fits in found.values() for _, *pair in fits for value in pair if value > 0]
    if not values:
        return None
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(WIDTH, 0.5 + 2.1 * rows)
    panels = np.ravel(figure.subplots(rows, columns, sharey=True, squeeze=False))
    floor = min(values)  # a logarithmic axis cannot show an error of zero
    for axes, (name, fits) in zip(panels, found.items(), strict=False):
        _fill_fits(axes, fits, floor)
        axes.set_title(shorten(name), fontsize=10)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    figure.supylabel("share missed, %", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _fill_fits(axes: Axes, fits: Sequence[tuple[str, float, float]], floor: float) -> None:
    """Draw the errors of one kind of map: a hollow point before, a filled one after, and a line between them."""
    from matplotlib.ticker import LogLocator, NullLocator

    places = range(len(fits))
    before, after = ([100 * max(fit[which], floor) for fit in fits] for which in (1, 2))
    axes.vlines(places, after, before, color="lightgrey", linewidth=3, zorder=1)
    axes.plot(places, before, "o", color="#5A5A5A", markerfacecolor="white", markersize=6, label="before", zorder=2)
    axes.plot(places, after, "o", color=AFTER, markersize=6, label="after", zorder=3)
    every = -(-len(fits) // 12)
    axes.set_xticks(places[::every], [shorten(fit[0], 12) for fit in fits][::every], fontsize=8)
    axes.set(yscale="log", xlabel="layer" if len(fits) > 1 else "", xlim=(-0.6, len(fits) - 0.4))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)


def draw_fits(report: Report) -> Chart | None:
    """Draw `plot_fits` for a page; its numbers are in the table of the report."""
    figure = plot_fits(report)
    if figure is None:
        return None
    caption = (
        "The error of each refitted map, before and after, by layer, numbered as in the names of the weights. The "
        "numbers are in the table below."
    )
    return Chart("fits", _encode(figure, "fits", caption), caption)


# --------------------------------------------------------------------------------------------------------- sensitivity


def find_best(sensitivity: Sensitivity) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each layer and token count, the smallest loss over the metrics, and the index of that metric.

    Returns:
        Two arrays (layers, kept).
    """
    loss = sensitivity.loss.numpy()
    return loss.min(1), loss.argmin(1)


def plot_sensitivity(sensitivity: Sensitivity) -> Figure:
    """Plot the loss of a single stage by layer and share of kept tokens, using the best metric in each cell."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    loss, _ = find_best(sensitivity)
    positive = loss[loss > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1e-5)
    high = max(high, low * 1.01)
    figure = new_figure(WIDTH, 1.3 + 0.26 * len(sensitivity.kept))
    axes = figure.subplots()
    edges = [np.arange(size + 1) - 0.5 for size in loss.shape]
    colours = colormaps["cividis_r"].resampled(HEAT)
    mesh = axes.pcolormesh(
        *edges, np.clip(loss, low, high).T, norm=LogNorm(low, high), cmap=colours, edgecolors="white", linewidth=0.5
    )
    length = sensitivity.model["length"]
    axes.set_xticks(range(len(sensitivity.layers)), map(str, sensitivity.layers))
    axes.set_yticks(range(len(sensitivity.kept)), [f"{100 * kept / length:.0f}" for kept in sensitivity.kept])
    axes.invert_yaxis()
    axes.set(xlabel="pruned after layer", ylabel="tokens kept, %")
    bar = figure.colorbar(mesh, ax=axes, label="loss, nats (logarithmic)")
    marks = np.geomspace(low, high, 5)
    bar.set_ticks(marks, labels=[f"{mark:.1g}" if mark < 0.1 else f"{mark:.2g}" for mark in marks])
    bar.minorticks_off()
    return figure


def draw_sensitivity(sensitivity: Sensitivity) -> Chart:
    """Draw `plot_sensitivity` for a page, with its numbers and metrics."""
    loss, best = find_best(sensitivity)
    length = sensitivity.model["length"]
    header = ["after layer", *(f"{100 * kept / length:.0f} % kept" for kept in sensitivity.kept)]
    rows = [
        (str(layer), [f"{loss[i, j]:.2g} {sensitivity.metrics[best[i, j]]}" for j in range(loss.shape[1])])
        for i, layer in enumerate(sensitivity.layers)
    ]
    against = "the dense model's outputs" if sensitivity.objective == "kl" else "the labels"
    data = sensitivity.data
    caption = (
        "The loss of pruning after a single layer, by the share of the tokens that are kept. Each cell has the "
        f"metric that loses least, of {', '.join(sensitivity.metrics)}. Measured against {against} on "
        f"{data['images']} images of {data['name']}."
    )
    return Chart("sensitivity", _encode(plot_sensitivity(sensitivity), "sensitivity", caption), caption, (header, rows))


# ------------------------------------------------------------------------------------------------------------- drawing


def _encode(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an SVG element to embed in a page: without URLs, and with unique ids."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = encode_figure(figure, "svg", 72).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", opening)
    # All images in a page share one id namespace.
    rest = re.sub(r' id="', f' id="{name}-', rest)
    rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
    alt = html.escape(escape_control(" ".join(alt.split())))
    return f'{opening} role="img" aria-label="{alt}">{rest.strip()}'


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """Return a number that can be plotted; None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) < LARGEST else None


def _numbers(value: Any) -> dict[str, float]:
    return {str(name): number for name, v in _mapping(value).items() if (number := _number(v)) is not None}


def _choose_unit(rows: Sequence[tuple[str, float, float]]) -> tuple[float, str]:
    """Return the most readable unit for the parts of a model: (units per GFLOP, its name)."""
    return (1e3, "MFLOPs") if max(max(row[1:]) for row in rows) < 0.1 else (1.0, "GFLOPs")


def _count(value: float) -> str:
    return f"{value:.3g}" if value >= 0.01 or not value else f"{value:.1g}"


def _change(dense: float, pruned: float) -> str:
    return f"{pruned / dense - 1:+.1%}" if dense > 0 else ""
