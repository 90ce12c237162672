"""Chart of the methods in tables 1 to 3, without training and fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssmcompress.jobs.charts import COLOURS, encode_figure, new_figure, plain_text, shorten

from .found import TITLES, Found, list_methods
from .methods import CLASSIFIERS, SEGMENTERS, WITH_AND_WITHOUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS = tuple(name for pair in WITH_AND_WITHOUT.values() for name in pair)
DPI = 110
WITHOUT, TUNED, WHOLE = COLOURS[0], COLOURS[1], COLOURS[2]


def draw_chart(found: Sequence[Found], share: float) -> bytes | None:
    """Return a PNG image with one panel per model; None if no method was measured."""
    panels = [(f, rows) for f in found if (rows := list_rows(f, share))]
    if not panels:
        return None
    heights = [len(rows) + 2 for _, rows in panels]
    with plain_text():
        figure = new_figure(7.5, 0.19 * sum(heights) + 0.4 * len(panels))
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (model, rows) in zip(axes, panels, strict=True):
            draw_panel(panel, model, rows)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        return encode_figure(figure, "png", DPI)


def list_rows(found: Found, share: float) -> list[tuple[str, str]]:
    """Return (method, row name) of the measured methods, best first."""
    names = SEGMENTERS if found.figure == "miou" else dict.fromkeys((*CLASSIFIERS, *PAIRS))
    rows = [row for row in list_methods(found, names, share) if found.values(row[1])]
    return sorted(rows, key=lambda row: -found.mean(row[1]))


def draw_panel(axes: Axes, found: Found, rows: Sequence[tuple[str, str]]) -> None:
    """Draw the methods of a model as rows, with the range over the seeds, and the dense model as a line."""
    places = np.arange(len(rows))
    values = [found.values(key) for _, key in rows]
    means = [found.mean(key) for _, key in rows]
    tuned = [found.tuned_value(key) for _, key in rows]
    axes.axvline(found.dense[found.figure], color=WHOLE, linewidth=1, label="dense")
    axes.hlines(places, [min(v) for v in values], [max(v) for v in values], color=WITHOUT, linewidth=3, alpha=0.4)
    axes.plot(means, places, "o", color=WITHOUT, markersize=5, label="without training")
    axes.plot([np.nan if value is None else value for value in tuned], places, "d", color=TUNED, markersize=5,
              fillstyle="none", label="fine-tuned")  # fmt: skip
    axes.set_yticks(places, [method for method, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_title(f"{shorten(found.name, 60)}: {TITLES[found.figure]} (%)", fontsize=9, loc="left")
