"""Pictures of images: the tokens that a pruned model keeps, and the classes that models give pixels."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.batches import Batches
from ..errors import escape_control
from ..models.base import TokenModel
from ..tasks import IGNORED
from .charts import shorten
from .frames import count_times, tile_frames, to_picture

Colour = tuple[int, int, int]

SIDE = 168  # pixels of an image in the picture
FRAMES_SIDE = 336  # width of the frames of a video
ROWS = 4  # images in a picture
GAP = 6
PAPER, INK = (255, 255, 255), (30, 30, 30)
# Dropped patches are pale grey, between these values for black and white, with diagonal lines: kept patches of grey and
# white images, which may have any of these values, have none. Between them is a border.
DROPPED_BLACK, DROPPED_WHITE, HATCH, BORDER = 176, 240, (150, 150, 150), (96, 96, 96)
HATCH_EVERY = 6  # pixels

SEGMENT_SIDE = 224  # width of an image in the picture of segments
DIMMED = 0.4  # of its colours, where there are those of classes
LINE, FONT_SIZE = 20, 13  # of texts: height and size in pixels
# Pixels that two models see differently: two colours that those who see red and green alike tell apart, by their
# lightness too, and one for pixels that neither model has right, or that have no label.
NOW_WRONG, NOW_RIGHT, DIFFERS = (213, 94, 0), (0, 114, 178), (40, 40, 40)
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
    """Draw a PNG with a row for each image: the image, then for each stage what is kept, and the rest in pale grey.

    The frames of a video lie next to each other, in rows. A patch whose token was merged into that of another, or
    fused, is drawn as dropped. Over the columns are their titles (`title_columns`).

    Args:
        model: pruned.
        images: each (channels, height, width), or (channels, frames, height, width), prepared as for the model; the
            first `rows`. Of images of another size than `config.image_size`, the centre of that size is taken.
    """
    batch = torch.stack([_cut_centre(image, model.config.image_size) for image in images[:rows]])
    _, decisions = model.trace(batch.to(next(model.parameters()).device))
    kept = [decision.kept.cpu() for decision in decisions]
    width, times = SIDE if model.frames is None else FRAMES_SIDE, count_times(model)
    grids = [tile_frames(model.patch_positions_at(stage.after), times) for stage in model.plan.stages]
    sheet: list[list[Image.Image]] = []
    for row, image in enumerate(batch.cpu()):
        photo = show_pixels(model, image)
        photo = _resize(photo, (width, max(1, round(width * photo.height / photo.width))))
        masks = [torch.isin(grid, positions[row]).numpy() for grid, positions in zip(grids, kept, strict=True)]
        sheet.append([photo, *(dim_dropped(photo, mask) for mask in masks)])
    return _encode_png(_stack([_draw_titles(title_columns(model), width), *map(_join, sheet)]))


def title_columns(model: TokenModel) -> list[str]:
    """Return what is in each column of `draw_kept_tokens`: the image, then how many tokens each stage keeps.

    The numbers are those of `token_counts`, with class tokens and those that others were fused into.
    """
    kept = zip(model.plan.stages, model.kept_counts(), strict=True)
    lengths = ((s.after, count, model.section_of(s.after).length) for s, count in kept)
    first = "image" if model.frames is None else f"{model.frames} frames"
    return [first, *(f"after layer {after}:\n{count} of {length} kept" for after, count, length in lengths)]


def dim_dropped(photo: Image.Image, kept: np.ndarray) -> Image.Image:
    """Return a picture in which all patches but the kept ones are pale grey with diagonal lines.

    Args:
        kept: (rows, columns) bool, whether each patch is kept.
    """
    wide = np.asarray(Image.fromarray(kept).resize(photo.size, Image.Resampling.NEAREST))
    pixels = np.asarray(photo.convert("RGB"))
    faded = _fade(photo)
    faded[np.add.outer(np.arange(photo.height), np.arange(photo.width)) % HATCH_EVERY == 0] = HATCH
    shown = np.where(wide[:, :, None], pixels, faded)
    inside = np.pad(wide, 1, mode="edge")
    near = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
    shown[near & ~wide] = BORDER  # on the dropped side: kept patches are whole
    return Image.fromarray(shown)


def _fade(photo: Image.Image) -> np.ndarray:
    """Return the pixels of a picture (height, width, 3) in pale grey, uint8."""
    grey = np.asarray(photo.convert("L"), np.float32) / 255
    pale = DROPPED_BLACK + (DROPPED_WHITE - DROPPED_BLACK) * grey
    return np.repeat(pale.round().astype(np.uint8)[:, :, None], 3, axis=2)


@dataclass(frozen=True)
class Difference:
    """Which pixels of an image two models give different classes, (height, width) bool each.

    Attributes:
        differs: all of them.
        wrong, right: those that only the first model has right, and only the second one; none without a label.
    """

    differs: np.ndarray
    wrong: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray, truth: np.ndarray | None) -> Difference:
        """Compare the classes (height, width) that two models give pixels, with the true ones where they are known."""
        differs = before != after
        if truth is None:
            return cls(differs, np.zeros_like(differs), np.zeros_like(differs))
        return cls(differs, differs & (before == truth), differs & (after == truth))

    def draw(self, photo: Image.Image) -> Image.Image:
        """Return the photo, pale, with these pixels in strong colours."""
        shown = _fade(photo)
        for pixels, colour in ((self.differs, DIFFERS), (self.wrong, NOW_WRONG), (self.right, NOW_RIGHT)):
            shown[_resize_pixels(pixels, photo.size)] = colour
        return Image.fromarray(shown)


def describe_differences(differences: Sequence[Difference], labelled: bool) -> str:
    """Return which share of all pixels differs, with labels also how many became wrong and how many right."""

    def share(name: str) -> str:
        counts = [getattr(difference, name) for difference in differences]
        return f"{100 * sum(map(np.sum, counts)) / max(1, sum(map(np.size, counts))):.1f} %"

    line = f"{share('differs')} of pixels differ"
    return f"{line}: {share('wrong')} became wrong, {share('right')} right" if labelled else line


@torch.no_grad()
def draw_segments(
    models: Mapping[str, TokenModel],
    images: Sequence[Tensor] | Tensor,
    targets: Sequence[Tensor] | Tensor | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[Colour] | None = None,
) -> bytes:
    """Draw a PNG with a row for each image: the image, its mask, then the classes that each model gives its pixels.

    Classes are drawn in colour over the dimmed image, pixels without a class in grey. A further column has the pixels
    to which the first and the last of several models give different classes, in strong colours, with their share below
    each row, and that of all rows at the end. Below is a legend of the classes that occur, and of these colours.

    Args:
        models: segmentation models by name, one at least, the dense one first.
        images: each (channels, height, width), of any size, prepared as for the models; the first `ROWS`.
        targets: class numbers of the pixels (height, width) of each image, `IGNORED` for none; None: unlabelled.
        classes: names of the classes; None: they are called by their numbers.
        palette: a colour (red, green, blue) for each class, 0 to 255; None, or fewer: `make_palette`.
    """
    first, images = next(iter(models.values())), images[:ROWS]
    count, labelled = first.config.num_classes, targets is not None
    palette = palette if palette and len(palette) >= count else make_palette(count)
    rows: list[Image.Image] = []
    found: set[int] = set()
    differences: list[Difference] = []
    for number, image in enumerate(images):
        photo = show_pixels(first, image.cpu())
        photo = photo.resize(
            (SEGMENT_SIDE, max(1, round(SEGMENT_SIDE * photo.height / photo.width))), Image.Resampling.BILINEAR
        )
        truth = [targets[number].cpu().numpy().astype(np.uint8)] if labelled else []
        seen = [_classify(model, image) for model in models.values()]
        shown = [_resize_pixels(pixels, photo.size) for pixels in (*truth, *seen)]
        found.update(*(np.unique(pixels).tolist() for pixels in shown))
        cells = [photo, *(_colour(photo, pixels, palette) for pixels in shown)]
        if len(seen) == 1:
            rows.append(_join(cells))
            continue
        # Shares are of the pixels that the models return, whatever size is shown.
        known = _resize_pixels(truth[0], seen[0].shape[::-1]) if labelled else None
        differences.append(Difference.of(seen[0], seen[-1], known))
        rows.append(_join([*cells, differences[-1].draw(photo)]))
        rows.append(_draw_line(describe_differences(differences[-1:], labelled), rows[-1].width))
    titles = ["image", *(["truth"] if labelled else []), *models]
    width = rows[0].width
    if differences:
        before, *between, after = models
        titles.append(f"difference of {before} and {after}" if between else "difference")
        rows.append(_draw_line(f"all images: {describe_differences(differences, labelled)}", width))
    names = [(_name_class(number, classes), palette[number]) for number in sorted(found - {IGNORED})]
    names += [("no class", UNLABELLED)] if IGNORED in found else []
    legends = [_draw_legend(names, width), *([_draw_legend(_name_differences(labelled), width)] if differences else [])]
    return _encode_png(_stack([_draw_titles(titles, SEGMENT_SIDE), *rows, *legends]))


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


def _classify(model: TokenModel, image: Tensor) -> np.ndarray:
    """Return the class of each pixel (height, width) of an image (channels, height, width), as uint8."""
    logits = model(image[None].to(next(model.parameters()).device))
    return logits[0].argmax(0).cpu().numpy().astype(np.uint8)


def _resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return class numbers, or which pixels are meant, (height, width) at another size (width, height)."""
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def _colour(photo: Image.Image, pixels: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Return the colours of classes (height, width) over a picture of the same size, without its own colours."""
    table = np.full((IGNORED + 1, 3), UNLABELLED, np.uint8)
    table[: len(palette)] = np.array(palette)[:IGNORED]
    return Image.blend(Image.fromarray(table[pixels]), photo.convert("L").convert("RGB"), DIMMED)


def _name_class(number: int, classes: Sequence[str] | None) -> str:
    known = classes is not None and number < len(classes)
    return shorten(classes[number]) if known else f"class {number}"


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


def _name_differences(labelled: bool) -> list[tuple[str, Colour]]:
    """Return the colours of the column of differences with what they stand for."""
    if not labelled:
        return [("difference: another class", DIFFERS)]
    names = {"became wrong": NOW_WRONG, "became right": NOW_RIGHT, "neither is right, or no label": DIFFERS}
    return [(f"difference: {name}", colour) for name, colour in names.items()]


def _resize(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a photo at another size: pixels of a small one as squares, a large one without jagged lines."""
    small = photo.width <= size[0]
    return photo.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _draw_titles(titles: Sequence[str], width: int) -> Image.Image:
    """Draw a title over each column of this width in pixels, in as many lines as the longest one needs."""
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [_wrap(title, width, font) for title in titles]
    sheet = Image.new("RGB", ((width + GAP) * len(titles) - GAP, LINE * max(map(len, wrapped))), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            pen.text((column * (width + GAP), number * LINE), line, INK, font)
    return sheet


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Return a text in lines of at most this width in pixels; a longer word is cut."""
    lines: list[str] = []
    for paragraph in escape_control(text).split("\n"):
        lines.append("")
        for word in paragraph.split():
            while font.getlength(word) > width:
                word = f"{word.removesuffix('...')[:-1]}..."
            longer = f"{lines[-1]} {word}".lstrip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def _draw_line(text: str, width: int) -> Image.Image:
    """Draw a line of text at the right end of a row of this width in pixels."""
    sheet, font = Image.new("RGB", (width, LINE), PAPER), ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(sheet).text((max(0, width - font.getlength(text)), 0), text, INK, font)
    return sheet


def _join(cells: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of one size next to each other."""
    width = cells[0].width + GAP
    row = Image.new("RGB", (width * len(cells) - GAP, cells[0].height), PAPER)
    for column, cell in enumerate(cells):
        row.paste(cell, (column * width, 0))
    return row


def _stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of one width below each other, the titles first, with a gap below all others."""
    sheet = Image.new("RGB", (parts[0].width, sum(part.height + GAP for part in parts) - 2 * GAP), PAPER)
    top = 0
    for number, part in enumerate(parts):
        sheet.paste(part, (0, top))
        top += part.height + (GAP if number else 0)
    return sheet


def _cut_centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the centre of an image (..., height, width), filled with the mean colour where it is too small."""
    missing = [max(0, wanted - side) for wanted, side in zip(size, image.shape[-2:], strict=True)]
    image = F.pad(image, (0, missing[1], 0, missing[0]))
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, image.shape[-2:], strict=True))
    return image[..., top : top + size[0], left : left + size[1]]


def _encode_png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def show_pixels(model: TokenModel, image: Tensor) -> Image.Image:
    """Undo the normalisation of an input; the frames of a video lie next to each other, in rows."""
    image = to_picture(model, image)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy()).convert("RGB")
