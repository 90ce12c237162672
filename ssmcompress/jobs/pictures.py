"""Pictures: the tokens that a pruned model keeps, segments, what each axis costs, a fine-tuning."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.batches import Batches
from ..errors import escape_control
from ..models.base import TokenModel
from ..models.records import Finetuning
from ..tasks import IGNORED, Task

Colour = tuple[int, int, int]

SIDE = 168  # pixels of an image in the picture
ROWS = 4  # images in a picture
GAP = 6
PAPER, INK = (255, 255, 255), (30, 30, 30)
PRUNED = (196, 30, 140)  # a colour that is rare in photographs and absent from grey images

SEGMENT_SIDE = 224  # width of an image in the picture of segments
DIMMED = 0.4  # of its colours, where there are those of classes
LINE, FONT_SIZE, LONGEST_NAME = 20, 13, 28  # of texts: height and size in pixels, and characters of a class
UNLABELLED = (128, 128, 128)
# Okabe and Ito's colours, which those who see red and green alike tell apart, without black, which dark pictures hide;
# then five that are darker or lighter than all of these.
FEW_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (97, 20, 92), (190, 240, 180), (110, 60, 15), (255, 195, 210), (30, 40, 110),
)  # fmt: skip
# Colours after those: hues as far from those before as they can be, and neighbours that differ in lightness, too.
GOLDEN, LIGHTNESS, SATURATION = 0.618034, (0.3, 0.7, 0.5), 0.7


def read_sample(images: Batches, rows: int = ROWS) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the first images that can be read, each (channels, height, width), and their masks (height, width).

    Args:
        images: those of segmentation, which may differ in size; without masks, None takes their place.
    """
    index = [i for i in images.index if i not in images.unreadable][:rows]
    few = replace(images, index=index, batch_size=rows, workers=0, unreadable=set())
    pairs = [(image, None if b.labels is None else b.labels[i]) for b in few for i, image in enumerate(b.images)]
    masks = [mask for _, mask in pairs if mask is not None]
    return [image for image, _ in pairs], masks or None


@torch.no_grad()
def draw_kept_tokens(model: TokenModel, images: Sequence[Tensor] | Tensor, rows: int = ROWS) -> bytes:
    """Draw a PNG with a row for each image: the image, then for each stage what was pruned by then, in colour.

    Args:
        model: pruned.
        images: each (channels, height, width), prepared as for the model; the first `rows`. Of images of another size
            than `config.image_size`, the centre of that size is taken.
    """
    batch = torch.stack([_cut_centre(image, model.config.image_size) for image in images[:rows]])
    _, decisions = model.trace(batch.to(next(model.parameters()).device))
    kept = [decision.kept.cpu() for decision in decisions]
    height, width = batch.shape[2:]
    size = (SIDE, round(SIDE * height / width))
    sheet = Image.new("RGB", ((size[0] + GAP) * (1 + len(kept)) - GAP, (size[1] + GAP) * len(batch) - GAP), PAPER)
    for row, image in enumerate(batch.cpu()):
        photo = _photo(model, image).resize(size, Image.Resampling.NEAREST)
        for column in range(1 + len(kept)):
            shown = photo
            if column:
                mask = torch.isin(model.patch_positions, kept[column - 1][row])
                dropped = Image.fromarray((~mask).numpy()).resize(size, Image.Resampling.NEAREST)
                shown = photo.copy()
                shown.paste(PRUNED, mask=dropped.convert("L").point(lambda v: 190 if v else 0))
            sheet.paste(shown, (column * (size[0] + GAP), row * (size[1] + GAP)))
    return _encode_png(sheet)


@torch.no_grad()
def draw_segments(
    models: Mapping[str, TokenModel],
    images: Sequence[Tensor] | Tensor,
    targets: Sequence[Tensor] | Tensor | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[Colour] | None = None,
) -> bytes:
    """Draw a PNG with a row for each image: the image, its mask, then the classes that each model gives its pixels.

    Classes are drawn in colour over the dimmed image, pixels without a class in grey. Below is a legend of the classes
    that occur.

    Args:
        models: segmentation models by name, one at least.
        images: each (channels, height, width), of any size, prepared as for the models; the first `ROWS`.
        targets: class numbers of the pixels (height, width) of each image, `IGNORED` for none; None: unlabelled.
        classes: names of the classes; None: they are called by their numbers.
        palette: a colour (red, green, blue) for each class, 0 to 255; None, or fewer: `make_palette`.
    """
    first, images = next(iter(models.values())), images[:ROWS]
    count = first.config.num_classes
    palette = palette if palette and len(palette) >= count else make_palette(count)
    columns = ["image", *(["truth"] if targets is not None else []), *models]
    rows: list[list[Image.Image]] = []
    found: set[int] = set()
    for number, image in enumerate(images):
        size = SEGMENT_SIDE, max(1, round(SEGMENT_SIDE * image.shape[1] / image.shape[2]))
        photo = _photo(first, image.cpu()).resize(size, Image.Resampling.BILINEAR)
        maps = [] if targets is None else [targets[number]]
        maps += [model(image[None].to(next(model.parameters()).device))[0].argmax(0) for model in models.values()]
        shown = [_resize_classes(pixels, size) for pixels in maps]
        found.update(*(np.unique(pixels).tolist() for pixels in shown))
        rows.append([photo, *(_colour(photo, pixels, palette) for pixels in shown)])
    width = (SEGMENT_SIDE + GAP) * len(columns) - GAP
    names = [(_name_class(number, classes), palette[number]) for number in sorted(found - {IGNORED})]
    legend = _draw_legend(names + ([("no class", UNLABELLED)] if IGNORED in found else []), width)
    heights = [LINE, *(row[0].height + GAP for row in rows), legend.height]
    sheet = Image.new("RGB", (width, sum(heights)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, name in enumerate(columns):
        pen.text((column * (SEGMENT_SIDE + GAP), 0), name, INK, font)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (SEGMENT_SIDE + GAP), sum(heights[: number + 1])))
    sheet.paste(legend, (0, sum(heights[:-1])))
    return _encode_png(sheet)


def make_palette(classes: int) -> list[Colour]:
    """Return a colour for each class: twelve that the colour-blind tell apart, then others by hue and lightness.

    No set of 150 colours can be told apart by everyone.
    """
    more = []
    for number in range(max(0, classes - len(FEW_COLOURS))):
        lightness = LIGHTNESS[number % len(LIGHTNESS)]
        colour = colorsys.hls_to_rgb(number * GOLDEN % 1, lightness, SATURATION)
        more.append(tuple(round(255 * value) for value in colour))
    return [*FEW_COLOURS[:classes], *more]


def _resize_classes(pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return class numbers (height, width) at another size (width, height), the nearest ones, as uint8."""
    return np.array(Image.fromarray(pixels.cpu().to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST))


def _colour(photo: Image.Image, pixels: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Return the colours of classes (height, width) over a picture of the same size, without its own colours."""
    table = np.full((IGNORED + 1, 3), UNLABELLED, np.uint8)
    table[: len(palette)] = np.array(palette)[:IGNORED]
    return Image.blend(Image.fromarray(table[pixels]), photo.convert("L").convert("RGB"), DIMMED)


def _name_class(number: int, classes: Sequence[str] | None) -> str:
    known = classes is not None and number < len(classes)
    name = escape_control(" ".join(classes[number].split())) if known else f"class {number}"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _draw_legend(names: Iterable[tuple[str, Colour]], width: int) -> Image.Image:
    """Draw a patch of colour in front of each name, in lines of at most `width` pixels where a name fits in one."""
    font, places, x, y = ImageFont.load_default(FONT_SIZE), [], 0, 0
    for name, colour in names:
        length = LINE + int(font.getlength(name)) + 3 * GAP
        if x and x + length > width:
            x, y = 0, y + LINE
        places.append((x, y, name, colour))
        x += length
    legend = Image.new("RGB", (width, y + LINE), PAPER)
    pen = ImageDraw.Draw(legend)
    for left, top, name, colour in places:
        pen.rectangle((left, top + 3, left + LINE - GAP, top + LINE - 4), colour)
        pen.text((left + LINE, top + 1), name, INK, font)
    return legend


def draw_axes(search: Mapping[str, Any]) -> bytes:
    """Draw a PNG with the loss over the FLOPs left, a line for each axis alone, and the combinations that were run.

    Layers and directions have a point each, with a line through those that lose least. The chosen combination has a
    star.

    Args:
        search: the section of a report, with `axes`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = {}
    for option in search["axes"]:
        points.setdefault(option["axis"], []).append((100 * option["flops"], option["loss"]))
    tried = [(100 * run["flops"], run["loss"]) for run in search["tried"]]
    chosen = 100 * search["flops"], search["loss"]
    positive = [loss for line in (*points.values(), tried, [chosen]) for _, loss in line if loss > 0]
    floor = min(positive, default=1e-6)  # a loss of zero or less has no place on a logarithmic axis

    def place(line: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
        return [share for share, _ in line], [max(loss, floor) for _, loss in line]

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _least_loss(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (FLOPs, loss) that no other one beats in both."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw_history(finetuning: Finetuning, task: Task) -> bytes:
    """Draw a PNG with the loss of every epoch, and what was measured after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [entry["epoch"] for entry in finetuning.history]
    held = [entry["held_out"] or {} for entry in finetuning.history]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _cut_centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the centre of an image (channels, height, width), filled with the mean colour where it is too small."""
    missing = [max(0, wanted - side) for wanted, side in zip(size, image.shape[1:], strict=True)]
    image = F.pad(image, (0, missing[1], 0, missing[0]))
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, image.shape[1:], strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def _encode_png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _photo(model: TokenModel, image: Tensor) -> Image.Image:
    """Undo the normalisation of an image."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy()).convert("RGB")
