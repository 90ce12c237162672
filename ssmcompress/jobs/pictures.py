"""Pictures of the tokens that a pruned model keeps, and of the classes that models predict for pixels."""

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
# Dropped patches are pale grey, between these values for black and white, with diagonal lines. Kept patches of
# greyscale images may have the same grey values, but no lines. Between dropped and kept patches is a border.
DROPPED_BLACK, DROPPED_WHITE, HATCH, BORDER = 176, 240, (150, 150, 150), (96, 96, 96)
HATCH_EVERY = 6  # pixels

SEGMENT_SIDE = 224  # width of an image in the picture of segments
DIMMED = 0.4  # opacity of the image under the class colours
LINE, FONT_SIZE = 20, 13  # height of a text line and font size, in pixels
# Pixels on which two models differ: two colours that people with red-green colour blindness can distinguish, also by
# lightness, and one for pixels on which both models are wrong, or that have no label.
NOW_WRONG, NOW_RIGHT, DIFFERS = (213, 94, 0), (0, 114, 178), (40, 40, 40)
UNLABELLED = (128, 128, 128)
# Okabe and Ito's colours, suitable for red-green colour blindness, without black, which dark pictures hide; then five
# that are darker or lighter than all of these.
FEW_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (97, 20, 92), (190, 240, 180), (110, 60, 15), (255, 195, 210), (30, 40, 110),
)  # fmt: skip
# Further colours: hues as far from the previous ones as possible, and neighbours that also differ in lightness.
GOLDEN, LIGHTNESS, SATURATION = 0.618034, (0.3, 0.7, 0.5), 0.7


def read_sample(images: Batches, rows: int = ROWS) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the first readable images, each (channels, height, width), and their masks (height, width).

    Args:
        images: segmentation images may differ in size; without masks, None is returned instead.
    """
    index = [i for i in images.index if i not in images.unreadable][:rows]
    few = replace(images, index=index, batch_size=rows, workers=0, unreadable=set())
    pairs = [(image, None if b.labels is None else b.labels[i]) for b in few for i, image in enumerate(b.images)]
    masks = [mask for _, mask in pairs if mask is not None]
    return [image for image, _ in pairs], masks or None


@torch.no_grad()
def draw_kept_tokens(model: TokenModel, images: Sequence[Tensor] | Tensor, rows: int = ROWS) -> bytes:
    """Draw a PNG with a row for each image: the image, then for each stage the kept patches, the rest in pale grey.

    The frames of a video are arranged in rows. A patch whose token was merged into another or fused is drawn as
    dropped. Above the columns are their titles (`title_columns`).

    Args:
        model: pruned.
        images: each (channels, height, width), or (channels, frames, height, width), prepared as for the model; the
            first `rows` are drawn. Images of another size than `config.image_size` are centre-cropped to it.
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
    """Return the titles of the columns of `draw_kept_tokens`: the image, then how many tokens each stage keeps.

    The numbers are those of `token_counts`, including class tokens and fused tokens.
    """
    kept = zip(model.plan.stages, model.kept_counts(), strict=True)
    lengths = ((s.after, count, model.section_of(s.after).length) for s, count in kept)
    first = "image" if model.frames is None else f"{model.frames} frames"
    return [first, *(f"after layer {after}:\n{count} of {length} kept" for after, count, length in lengths)]


def dim_dropped(photo: Image.Image, kept: np.ndarray) -> Image.Image:
    """Return a picture in which all dropped patches are pale grey with diagonal lines.

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
    shown[near & ~wide] = BORDER  # on the dropped side, so that kept patches are complete
    return Image.fromarray(shown)


def _fade(photo: Image.Image) -> np.ndarray:
    """Convert a picture to pale grey pixels (height, width, 3), uint8."""
    grey = np.asarray(photo.convert("L"), np.float32) / 255
    pale = DROPPED_BLACK + (DROPPED_WHITE - DROPPED_BLACK) * grey
    return np.repeat(pale.round().astype(np.uint8)[:, :, None], 3, axis=2)


@dataclass(frozen=True)
class Difference:
    """Pixels of an image for which two models predict different classes, (height, width) bool each.

    Attributes:
        differs: all of them.
        wrong, right: pixels where only the first model is correct, and only the second one; empty without labels.
    """

    differs: np.ndarray
    wrong: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray, truth: np.ndarray | None) -> Difference:
        """Compare the classes (height, width) predicted by two models, with the true ones if they are known."""
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
    """Describe the share of pixels that differ, and with labels how many became wrong and how many right."""

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
    """Draw a PNG with a row for each image: the image, its mask, then the classes predicted by each model.

    Classes are drawn in colour over the dimmed image, pixels without a class in grey. With several models, a further
    column shows the pixels for which the first and the last one predict different classes, in strong colours, with
    their share below each row and the total at the end. Below is a legend of the classes and of these colours.

    Args:
        models: segmentation models by name, one at least, the dense one first.
        images: each (channels, height, width), of any size, prepared as for the models; the first `ROWS`.
        targets: class numbers of the pixels (height, width) of each image, `IGNORED` for none; None: unlabelled.
        classes: names of the classes; None: their numbers are shown.
        palette: a colour (red, green, blue) for each class, 0 to 255; missing ones are taken from `make_palette`.
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
        # Shares refer to the model's output pixels, not to the size of the picture.
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
    """Return a colour for each class: twelve suitable for colour blindness, then others by hue and lightness.

    No set of 150 colours is distinguishable for everyone.
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
    """Resize class numbers or a pixel mask (height, width) to another size (width, height)."""
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def _colour(photo: Image.Image, pixels: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Draw class colours (height, width) over a greyscale version of the picture."""
    table = np.full((IGNORED + 1, 3), UNLABELLED, np.uint8)
    table[: len(palette)] = np.array(palette)[:IGNORED]
    return Image.blend(Image.fromarray(table[pixels]), photo.convert("L").convert("RGB"), DIMMED)


def _name_class(number: int, classes: Sequence[str] | None) -> str:
    known = classes is not None and number < len(classes)
    return shorten(classes[number]) if known else f"class {number}"


def _draw_legend(names: Iterable[tuple[str, Colour]], width: int) -> Image.Image:
    """Draw a legend with a colour patch before each name, wrapped to lines of `width` pixels."""
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
    """Return the colours of the difference column and their meanings."""
    if not labelled:
        return [("difference: another class", DIFFERS)]
    names = {"became wrong": NOW_WRONG, "became right": NOW_RIGHT, "neither is right, or no label": DIFFERS}
    return [(f"difference: {name}", colour) for name, colour in names.items()]


def _resize(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a photo: small ones with square pixels, large ones with antialiasing."""
    small = photo.width <= size[0]
    return photo.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _draw_titles(titles: Sequence[str], width: int) -> Image.Image:
    """Draw a title above each column of this width in pixels, wrapped to as many lines as the longest one needs."""
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [_wrap(title, width, font) for title in titles]
    sheet = Image.new("RGB", ((width + GAP) * len(titles) - GAP, LINE * max(map(len, wrapped))), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            pen.text((column * (width + GAP), number * LINE), line, INK, font)
    return sheet


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Wrap a text to lines of at most this width in pixels; longer words are cut."""
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
    """Draw a right-aligned line of text, for a row of this width in pixels."""
    sheet, font = Image.new("RGB", (width, LINE), PAPER), ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(sheet).text((max(0, width - font.getlength(text)), 0), text, INK, font)
    return sheet


def _join(cells: Sequence[Image.Image]) -> Image.Image:
    """Join pictures of one size horizontally."""
    width = cells[0].width + GAP
    row = Image.new("RGB", (width * len(cells) - GAP, cells[0].height), PAPER)
    for column, cell in enumerate(cells):
        row.paste(cell, (column * width, 0))
    return row


def _stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Stack pictures of one width vertically, the titles first, with a gap below all others."""
    sheet = Image.new("RGB", (parts[0].width, sum(part.height + GAP for part in parts) - 2 * GAP), PAPER)
    top = 0
    for number, part in enumerate(parts):
        sheet.paste(part, (0, top))
        top += part.height + (GAP if number else 0)
    return sheet


def _cut_centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre-crop an image (..., height, width), padded with the mean colour if it is too small."""
    missing = [max(0, wanted - side) for wanted, side in zip(size, image.shape[-2:], strict=True)]
    image = F.pad(image, (0, missing[1], 0, missing[0]))
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, image.shape[-2:], strict=True))
    return image[..., top : top + size[0], left : left + size[1]]


def _encode_png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def show_pixels(model: TokenModel, image: Tensor) -> Image.Image:
    """Undo the normalisation of an input; the frames of a video are arranged in rows."""
    image = to_picture(model, image)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy()).convert("RGB")
