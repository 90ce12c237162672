"""Pictures of images: kept tokens, the classes of pixels in colour, and where two models differ."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import call
from conftest import GOLDEN, make_vim, make_vit
from PIL import Image

import ssmcompress
from ssmcompress.data.batches import Batches
from ssmcompress.data.images import Images
from ssmcompress.jobs import pictures
from ssmcompress.jobs.pictures import (
    Difference,
    describe_differences,
    dim_dropped,
    draw_kept_tokens,
    draw_segments,
    make_palette,
    read_sample,
    title_columns,
)
from ssmcompress.pruning.plan import Plan, Stage
from ssmcompress.tasks import IGNORED

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
SIDE = pictures.SEGMENT_SIDE
# Left edges of the columns.
COLUMNS = [number * (SIDE + pictures.GAP) for number in range(5)]


@pytest.fixture(scope="module")
def dense():
    return ssmcompress.load(GOLDEN / "upernet_vim.pth")


@pytest.fixture(scope="module")
def pruned(dense):
    return ssmcompress.prune(dense, ratio=0.5, stages=[2, 4])


def black(model, height=128, width=128) -> torch.Tensor:
    """A black image as the model takes it."""
    mean, std = (torch.tensor(v) for v in (model.preprocessing.mean, model.preprocessing.std))
    return (-mean / std)[:, None, None].expand(3, height, width).clone()


def noise(height=128, width=128, seed=0) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def decode(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def blended(colour) -> np.ndarray:
    """A colour blended over black."""
    return np.array([int((1 - pictures.DIMMED) * value) for value in colour])


def is_close(found, expected) -> bool:
    return bool(np.abs(found - expected).max() <= 1)


def has(sheet: np.ndarray, colour) -> bool:
    return bool((np.abs(sheet - np.array(colour)).max(-1) == 0).any())


def test_a_row_has_the_image_its_mask_and_what_the_models_see_in_it(dense, pruned):
    image, mask = black(dense), torch.full((200, 200), 2, dtype=torch.uint8)  # a mask of another size
    mask[:100], mask[:, 150:] = 4, IGNORED
    sheet = decode(draw_segments({"dense": dense, "pruned": pruned}, [image], [mask], palette=COLOURS))
    assert sheet.shape[1] == COLUMNS[4] + SIDE
    row = sheet[pictures.LINE : pictures.LINE + SIDE]
    assert not row[:, :SIDE].any()
    truth = row[:, COLUMNS[1] : COLUMNS[1] + SIDE]
    for place, colour in (((30, 30), COLOURS[4]), ((180, 30), COLOURS[2]), ((30, 200), pictures.UNLABELLED)):
        assert is_close(truth[place], blended(colour))
    for column, model in ((2, dense), (3, pruned)):
        with torch.no_grad():
            logits = F.interpolate(model(image[None]), size=(SIDE, SIDE), mode="nearest-exact")
        expected = np.array([blended(colour) for colour in COLOURS])[logits[0].argmax(0).numpy()]
        shown = row[:, COLUMNS[column] : COLUMNS[column] + SIDE]
        assert (np.abs(shown - expected).max(-1) <= 1).mean() > 0.98


def test_the_legend_has_the_classes_that_occur_and_no_others(dense):
    image, mask = black(dense), torch.full((128, 128), 5, dtype=torch.uint8)
    with torch.no_grad():
        predicted = set(dense(image[None]).argmax(1).unique().tolist())
    legend = decode(draw_segments({"dense": dense}, [image], [mask], palette=COLOURS))[pictures.LINE + SIDE :]
    assert {number for number, colour in enumerate(COLOURS) if has(legend, colour)} == predicted | {5}
    assert not has(legend, pictures.UNLABELLED)
    mask[:20] = IGNORED
    sheet = decode(draw_segments({"dense": dense}, [image], [mask], palette=COLOURS))
    assert has(sheet[pictures.LINE + SIDE :], pictures.UNLABELLED)


def test_names_of_classes_are_in_the_legend_whatever_they_are(dense):
    image, mask = black(dense), torch.full((128, 128), 5, dtype=torch.uint8)
    plain = decode(draw_segments({"dense": dense}, [image], [mask], [f"class {n}" for n in range(6)], COLOURS))
    assert np.array_equal(plain, decode(draw_segments({"dense": dense}, [image], [mask], None, COLOURS)))
    lines, words = (draw_segments({"dense": dense}, [image], [mask], [*"abcde", f"two{gap}words"]) for gap in "\n ")
    assert lines == words
    for name in ("another", "天空", "x" * 300, "\x1b[31m", ""):
        named = decode(draw_segments({"dense": dense}, [image], [mask], [*"abcde", name], COLOURS))
        assert named.shape == plain.shape, name
        assert not np.array_equal(named, plain), name


def test_images_differ_in_size_and_need_no_masks(dense, pruned):
    images = [noise(), noise(100, 160, seed=1), noise(150, 90, seed=2)]
    sheet = decode(draw_segments({"dense": dense, "pruned": pruned}, images))
    assert sheet.shape[1] == COLUMNS[3] + SIDE
    heights = [round(SIDE * height / width) for height, width in ((128, 128), (100, 160), (150, 90))]
    # Titles, a line below each row and one for all of them, the classes, and the colours of differences.
    assert sheet.shape[0] == sum(heights) + 7 * pictures.LINE + 8 * pictures.GAP
    many = decode(draw_segments({"dense": dense}, [images[0]] * 6))
    assert many.shape[0] < pictures.ROWS * (SIDE + pictures.GAP) + 3 * pictures.LINE + 1


def test_150_classes_have_150_colours():
    palette = make_palette(150)
    assert len(set(palette)) == 150
    assert make_palette(6) == palette[:6]
    assert pictures.UNLABELLED not in palette
    few = np.array(make_palette(12))
    distances = np.abs(few[:, None] - few[None]).sum(-1) + 1000 * np.eye(12)
    assert distances.min() > 80


def test_kept_tokens_are_those_of_the_centre(pruned):
    """Of a larger image its centre, of a smaller one all of it with the mean colour at the bottom and at the right."""
    large, small = noise(140, 200), noise(100, 128, seed=1)
    centre, filled = large[:, 6:134, 36:164], F.pad(small, (0, 0, 0, 28))
    expected = draw_kept_tokens(pruned, torch.stack([centre, filled]))
    assert draw_kept_tokens(pruned, [large, small]) == expected
    titles, cell = 2 * pictures.LINE, pictures.SIDE + pictures.GAP
    assert decode(expected).shape[:2] == (titles + 2 * cell - pictures.GAP, 3 * cell - pictures.GAP)


def saturation(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1) - pixels.min(-1)


def test_dropped_patches_are_pale_grey_and_kept_ones_as_they_were():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    kept = np.zeros((3, 4), bool)
    kept[1, 2] = kept[0] = True
    shown, pixels = np.array(dim_dropped(photo, kept)).astype(int), np.array(photo).astype(int)
    wide = kept.repeat(32, 0).repeat(32, 1)
    assert np.array_equal(shown[wide], pixels[wide])
    assert not saturation(shown[~wide]).any()
    inside = ~wide & np.roll(~wide, 1, 0) & np.roll(~wide, -1, 0) & np.roll(~wide, 1, 1) & np.roll(~wide, -1, 1)
    assert shown[inside].min() >= pictures.HATCH[0]
    # White and grey patches, too: a border, and lines that kept ones have not.
    for value in (0, 150, 200, 255):
        plain = np.array(dim_dropped(Image.new("RGB", (128, 96), (value,) * 3), kept)).astype(int)
        assert len(np.unique(plain[wide])) == 1
        assert len(np.unique(plain[65:, :64])) == 2  # lines, without the border


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_the_picture_of_kept_tokens_shows_what_each_stage_keeps(size):
    model = ssmcompress.prune(make_vim(image=size, patch=4), ratio=0.5, stages=[1, 3])
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    sheet = decode(draw_kept_tokens(model, image))[2 * pictures.LINE :]
    rows, columns = (side // 4 for side in size)
    assert sheet.shape[:2] == (round(pictures.SIDE * size[0] / size[1]), 3 * pictures.SIDE + 2 * pictures.GAP)
    photo = sheet[:, : pictures.SIDE]
    for number, decision in enumerate(model.trace(image)[1], 1):
        shown = sheet[:, number * (pictures.SIDE + pictures.GAP) :][:, : pictures.SIDE]
        assert (saturation(shown) <= saturation(photo)).all()
        for row in range(rows):
            for column in range(columns):
                kept = int(model.patch_positions[row, column]) in decision.kept[0].tolist()
                place = slice(round((row + 0.3) * photo.shape[0] / rows), round((row + 0.7) * photo.shape[0] / rows))
                across = slice(round((column + 0.3) * 168 / columns), round((column + 0.7) * 168 / columns))
                assert np.array_equal(shown[place, across], photo[place, across]) == kept


def test_titles_have_the_counts_of_the_plan():
    model = ssmcompress.prune(make_vim(depth=8, image=(56, 56)), ratio=0.3, stages=[5, 7])
    counts = model.token_counts()
    assert counts[5] == 139
    assert title_columns(model) == [
        "image",
        "after layer 5:\n139 of 197 kept",
        f"after layer 7:\n{counts[7]} of 197 kept",
    ]


def test_a_patch_that_was_fused_counts_as_dropped():
    vit = make_vit(image=(32, 32))
    stages = [Stage(2, 0.5, "attention", "fused")]
    model = ssmcompress.prune(vit, Plan(tuple(stages)))
    kept = model.token_counts()[2]
    assert f"{kept} of {model.length} kept" in title_columns(model)[1]
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    shown = decode(draw_kept_tokens(model, image))[2 * pictures.LINE :, pictures.SIDE + pictures.GAP :]
    side = pictures.SIDE / model.config.grid[0]
    centres = [round((n + 0.5) * side) for n in range(model.config.grid[0])]
    coloured = sum(bool(saturation(shown[y - 2 : y + 3, x - 2 : x + 3]).any()) for y in centres for x in centres)
    assert coloured == kept - 2  # the class token and the fused one have no patch


def test_the_difference_marks_exactly_the_pixels_of_another_class():
    generator = np.random.default_rng(0)
    before, after, truth = generator.integers(0, 3, (3, 20, 30)).astype(np.uint8)
    truth[:5] = IGNORED
    difference = Difference.of(before, after, truth)
    photo = Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    shown = np.array(difference.draw(photo)).astype(int)
    for colour, expected in (
        (pictures.NOW_WRONG, (before == truth) & (after != truth)),
        (pictures.NOW_RIGHT, (before != truth) & (after == truth)),
        (pictures.DIFFERS, (before != after) & (before != truth) & (after != truth)),
    ):
        assert expected.any()
        assert np.array_equal((shown == np.array(colour)).all(-1), expected), colour
    alike = before == after
    assert not saturation(shown[alike]).any()
    assert shown[alike].min() >= pictures.DROPPED_BLACK
    unlabelled = np.array(Difference.of(before, after, None).draw(photo))
    assert np.array_equal((unlabelled == np.array(pictures.DIFFERS)).all(-1), ~alike)


def test_shares_of_pixels_that_differ():
    before, after = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    after[0], after[1, :5] = 1, 1
    truth = np.where(np.arange(10)[:, None] == 0, 1, 0) * np.ones((10, 10), np.uint8)
    found = Difference.of(before, after, truth)
    alike = Difference.of(before, before, truth)
    assert describe_differences([found], True) == "15.0 % of pixels differ: 5.0 % became wrong, 10.0 % right"
    assert describe_differences([found, alike], False) == "7.5 % of pixels differ"


def test_the_column_of_differences_is_of_the_models_outputs(dense, pruned):
    image = noise()
    sheet = decode(draw_segments({"dense": dense, "pruned": pruned}, [image], palette=COLOURS))
    column = sheet[pictures.LINE : pictures.LINE + SIDE, COLUMNS[3] :]
    with torch.no_grad():
        differs = (dense(image[None]).argmax(1) != pruned(image[None]).argmax(1)).to(torch.uint8)[0].numpy()
    expected = np.array(Image.fromarray(differs).resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(bool)
    assert 0 < expected.sum() < expected.size
    assert np.array_equal((column == np.array(pictures.DIFFERS)).all(-1), expected)
    alone = decode(draw_segments({"dense": dense}, [image], palette=COLOURS))
    assert alone.shape[1] == COLUMNS[1] + SIDE
    several = decode(draw_segments({"dense": dense, "naive": dense, "pruned": pruned}, [image], palette=COLOURS))
    assert np.array_equal(several[-len(sheet) :][pictures.LINE : pictures.LINE + SIDE, COLUMNS[4] :], column)
    same = decode(draw_segments({"dense": dense, "pruned": dense}, [image], palette=COLOURS))
    assert not has(same[pictures.LINE : pictures.LINE + SIDE], pictures.DIFFERS)


def read_picture(i: int) -> Image.Image:
    if i == 1:
        raise OSError("damaged")
    pixels = np.random.default_rng(i).integers(0, 256, (128, 128 + 16 * i, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_sample_has_the_first_images_that_can_be_read(dense):
    source = Images("six", 6, read_picture, str, masks=lambda i: np.full((128, 128 + 16 * i), i % 6, np.uint8))
    batches = Batches(source, dense.transform(), range(6), batch_size=2)
    for _ in batches:
        pass
    images, masks = read_sample(batches, 3)
    assert [mask.unique().tolist() for mask in masks] == [[0], [2], [3]]
    assert [tuple(image.shape) for image in images] == [(3, 128, 128 + 16 * i) for i in (0, 2, 3)]
    assert batches.unreadable == {1}
    assert read_sample(replace(batches, source=replace(source, masks=None)), 2)[1] is None


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_folder_of_a_segmenter_has_a_picture_of_segments(tmp_path):
    for i in (0, 2, 3, 4):
        for folder, picture in (("images", read_picture(i)), ("annotations", Image.new("L", (128 + 16 * i, 128), i))):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{i}.png")
    prune = ("prune", GOLDEN / "upernet_vim.pth", "--ratio", "0.5", "--stages", "2,4", "--no-reconstruct")
    call(*prune, "--data", tmp_path, "--no-latency", "-o", "out")
    names = {file.name for file in Path("out").iterdir()}
    assert {"segments.png", "kept_tokens.png"} <= names
    assert decode(Path("out/segments.png").read_bytes()).shape[1] == COLUMNS[4] + SIDE
    assert "](segments.png)" in Path("out/README.md").read_text()
    call("report", "out", "--html", "page.html")
    assert 'alt="segments" src="data:image/png;base64,' in Path("page.html").read_text()
    call(*prune, "--data", tmp_path, "--no-latency", "-o", "out", "--force")  # the folder contains only its own files
