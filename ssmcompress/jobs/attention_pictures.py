"""Pictures of a survey: attention maps and kept patches of an image, and summaries over all images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .charts import COLOURS, encode_figure, new_figure, plain_text, shorten
from .pictures import dim_dropped
from .survey import Prediction, Survey
from .variants import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

SIDE = 224  # minimum size of a picture in a figure, in pixels
CELL, DPI = 2.05, 110  # inches of a picture, with its margins, and pixels per inch
TEXT = 0.62  # inches for the lines below a map
MOST_STAGES = 4
KEPT_NOTE = "What each stage\nkeeps: patches as in\nthe picture. Those\nthat are gone are\npale grey."
OPACITY = 0.8  # of a map over the grey picture
# The colour scale ends at this quantile of an image's values, so that outliers do not determine it.
SCALE_SHARE = 0.99


@dataclass(frozen=True)
class StageView:
    """A stage in one image.

    Attributes:
        kept: (rows, columns) bool, the patches kept after this stage. scores: (rows, columns), NaN for patches that
            were not candidates; None: not scored.
    """

    kept: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class ModelView:
    """Results of one model for one image.

    Attributes:
        prediction: the model's prediction. said: the same as text. map: (rows, columns). kept: (rows, columns) bool,
            the patches that are present in all layers of the map.
        stages: in order; empty for a dense model.
    """

    prediction: Prediction
    said: str
    map: np.ndarray
    kept: np.ndarray
    stages: Sequence[StageView] = ()


@dataclass(frozen=True)
class ImageView:
    """An image to be shown.

    Attributes:
        name, group: its name, and the group that it was drawn from. label: its class; None: unlabelled.
        photo: the model input as a picture. models: results of each model, by name.
    """

    name: str
    group: str
    label: str | None
    photo: Image.Image
    models: Mapping[str, ModelView] = field(default_factory=dict)

    def scale(self) -> tuple[float, float]:
        """Return the lowest and highest value of the colour scale shared by all maps of this image."""
        values = np.concatenate([view.map[view.kept] for view in self.models.values()])
        if not len(values):
            return 0.0, 1.0
        low, high = np.quantile(values, [1 - SCALE_SHARE, SCALE_SHARE])
        return float(low), float(high)


def draw_image(image: ImageView, titles: Sequence[str], title: str) -> bytes:
    """Draw a PNG of an image: the picture, the maps of all models on one scale, then the patches kept by each stage.

    Args:
        titles: of the stages. title: of the maps.
    """
    shown = _pick_stages(len(titles)) if any(view.stages for view in image.models.values()) else []
    columns, rows = 1 + len(image.models), 1 + len(shown)
    with plain_text():
        figure = new_figure(CELL * columns + 0.9, (CELL + 0.3) * rows + TEXT + 0.5)
        heading = shorten(image.name, 60) + (f" · {shorten(image.label)}" if image.label is not None else "")
        figure.suptitle(heading + (f"\n{image.group}" if image.group else ""), fontsize=10)
        cells = figure.subplots(rows, columns, squeeze=False)
        for axes in np.ravel(cells):
            _clear(axes)
        _draw_maps(figure, cells[0], image, title)
        for row, number in zip(cells[1:], shown, strict=True):
            for axes, view in zip(row[1:], image.models.values(), strict=True):
                if view.stages:
                    kept = dim_dropped(_enlarge(image.photo), view.stages[number].kept)
                    _show(axes, kept, titles[number])
        if shown:
            cells[1][0].text(0, 1, KEPT_NOTE, va="top", fontsize=8, wrap=True, transform=cells[1][0].transAxes)
        return encode_figure(figure, "png", DPI)


def _draw_maps(figure: Figure, cells: Sequence[Axes], image: ImageView, title: str) -> None:
    """Draw the picture and each model's map, with the prediction below it."""
    from matplotlib.cm import ScalarMappable

    norm, colours = choose_colours(*image.scale())
    _show(cells[0], image.photo, "picture")
    for axes, (name, view) in zip(cells[1:], image.models.items(), strict=True):
        _show(axes, paint_map(image.photo, view, norm, colours), shorten(name))
        axes.set_xlabel(
            "\n".join([shorten(view.said), *_describe(view.prediction, image.label is not None)]), fontsize=8
        )
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(cells), shrink=0.9, pad=0.01, aspect=15, extend="both")
    bar.set_label(title, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def draw_summary(survey: Survey, title: str) -> bytes | None:
    """Draw a PNG that summarises all images: similarity to the dense maps, and how often each patch is kept.

    Returns:
        The PNG; None if there is neither, as for a dense model alone.
    """
    values = {
        name: [row.correlation for row in rows if row.correlation is not None]
        for name, rows in survey.predictions.items()
    }
    values = {name: found for name, found in values.items() if found}
    pruned = {name: kept for name, kept in survey.kept.items() if name != DENSE}
    if not pruned:
        return None
    panels = bool(values) + len(pruned)
    with plain_text():
        figure = new_figure(1.2 + 3.0 * bool(values) + 2.5 * len(pruned), 3.7)
        ratios = [1.4] * bool(values) + [1.0] * len(pruned)
        cells = np.ravel(figure.subplots(1, panels, squeeze=False, width_ratios=ratios))
        if values:
            _draw_spread(cells[0], values, len(survey.index))
        picture = None
        for axes, (name, kept) in zip(cells[bool(values) :], pruned.items(), strict=True):
            picture = axes.imshow(kept, cmap="cividis", vmin=0, vmax=1)
            axes.set_title(f"{shorten(name)}: share of images\nin which a patch is kept", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        bar = figure.colorbar(picture, ax=list(cells[bool(values) :]), shrink=0.75)
        bar.ax.yaxis.set_major_formatter("{x:.0%}")
        bar.ax.tick_params(labelsize=8)
        figure.suptitle(title, fontsize=9)
        return encode_figure(figure, "png", DPI)


def _draw_spread(axes: Axes, values: Mapping[str, Sequence[float]], images: int) -> None:
    """Draw each model's correlations with their quartiles and mean."""
    for place, found in enumerate(values.values(), 1):
        colour = COLOURS[(place - 1) % len(COLOURS)]
        if len(set(found)) > 1:
            body = axes.violinplot([found], positions=[place], widths=0.8, showextrema=False)["bodies"][0]
            body.set_facecolor(colour)
            body.set_alpha(0.35)
        low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
        axes.plot([place, place], [low, high], color=colour, linewidth=5, solid_capstyle="butt")
        axes.plot(place, middle, "_", color="white", markersize=9)
        axes.plot(place, np.mean(found), "D", color=colour, markeredgecolor="black", markersize=5)
        axes.annotate(f"mean {np.mean(found):.2f}", (place, np.mean(found)), (9, 0), textcoords="offset points",
                      fontsize=7.5, va="center")  # fmt: skip
    axes.set_xticks(range(1, len(values) + 1), [shorten(name) for name in values], fontsize=8)
    axes.set_xlim(0.4, len(values) + 0.95)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel("correlation with the map of the dense model", fontsize=8)
    axes.set_title(f"{images} images: spread, quartiles, mean", fontsize=9)
    axes.grid(axis="y", alpha=0.3)


def choose_colours(low: float, high: float) -> tuple[Normalize, Colormap]:
    """Return the colour scale of the maps: centred at zero if values have both signs, otherwise from the lowest one."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    size = max(abs(low), abs(high)) or 1.0
    if low < -0.2 * size:
        return Normalize(-size, size), colormaps["RdBu_r"]
    return Normalize(low, high if high > low else low + 1), colormaps["viridis"]


def paint_map(photo: Image.Image, view: ModelView, norm: Normalize, colours: Colormap) -> Image.Image:
    """Draw a map over the grey picture; dropped patches are dimmed and have no colour of the scale."""
    photo = _enlarge(photo)
    dimmed = np.asarray(dim_dropped(photo, view.kept))
    wide = Image.fromarray(view.map.astype(np.float32)).resize(photo.size, Image.Resampling.NEAREST)
    there = np.asarray(Image.fromarray(view.kept).resize(photo.size, Image.Resampling.NEAREST))
    heat = colours(norm(np.asarray(wide)))[..., :3] * 255
    grey = np.asarray(photo.convert("L"), np.float32)[..., None]
    lit = OPACITY * heat + (1 - OPACITY) * grey
    return Image.fromarray(np.where(there[..., None], lit.round(), dimmed).astype(np.uint8))


def _enlarge(photo: Image.Image) -> Image.Image:
    """Enlarge a picture to SIDE pixels or more, by an integer factor so that all pixels keep the same size."""
    factor = -(-SIDE // min(photo.size))
    return photo.resize((photo.width * factor, photo.height * factor), Image.Resampling.NEAREST)


def _clear(axes: Axes) -> None:
    """Hide the axes of a panel, keeping only what is drawn in it."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _show(axes: Axes, picture: Image.Image, title: str) -> None:
    axes.imshow(np.asarray(picture), interpolation="nearest")
    axes.set_title(title, fontsize=8)


def _describe(prediction: Prediction, labelled: bool) -> list[str]:
    """Describe a prediction in short lines."""
    words = ("✗ wrong", "✓ right") if labelled else ("not as dense", "as dense")
    lines = [] if prediction.right is None else [words[prediction.right]]
    if prediction.correlation is not None:
        lines.append(f"correlation {prediction.correlation:.2f}")
    return lines


def _pick_stages(count: int) -> list[int]:
    """Return the indices of the stages to draw: all, or MOST_STAGES spread evenly, including the last one."""
    places = np.linspace(0, count - 1, min(count, MOST_STAGES)).round().astype(int)
    return list(dict.fromkeys(places.tolist()))


def encode_url(photo: Image.Image) -> str:
    """Encode a picture as a data: URL."""
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_grid(values: np.ndarray, shown: np.ndarray | None = None, digits: int = 6) -> list[list[Any]]:
    """Convert an array (rows, columns) to lists of JSON values; None where it is not shown or not a number."""
    hidden = ~np.isfinite(values) if shown is None else ~shown
    return [
        [None if gone else round(float(value), digits) for value, gone in zip(row, out, strict=True)]
        for row, out in zip(values, hidden, strict=True)
    ]
