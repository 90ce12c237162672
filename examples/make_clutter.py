"""Generate cluttered images from Fashion-MNIST and photographs, for segmentation or classification.

    apt-get install dataset-fashion-mnist        # Debian; or any copy of the four original files
    pip install scikit-image                     # for its photographs; those of scikit-learn are used, too
    python examples/make_clutter.py segmentation train seg-train.parquet --images 20000
    python examples/make_clutter.py segmentation test seg-test.parquet --images 2000
    python examples/make_clutter.py classification train clutter-train.parquet --images 20000
    python examples/make_clutter.py classification test clutter-test.parquet --images 5000
    python examples/make_clutter.py masks train clutter-masks.npz --images 20000

Each image is a 112 x 112 crop of a photograph. For segmentation, up to five garments of random size, colour and
position are pasted onto it, later ones in front; for each pixel, the column `annotation` has 0 for the photograph, or 1
to 10 for the class of the visible garment. For classification, there is one whole garment and fragments of others that
are too small to be recognised; the column `label` is the class of the whole one. The masks of these images, `masks`
(n, side, side / 8), hold one bit per pixel: whether it shows the whole garment. `labels` are the classes.

Training images use garments from Fashion-MNIST's training set, test images garments from its test set, and no
photograph is used for both. Image k depends only on the seed, the split and k. Fashion-MNIST is by Zalando SE, MIT
licence; for the photographs see the documentation of scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from fashion_mnist import CLASSES, FOLDER, read
from PIL import Image

from ssmcompress.cli.terminal import progress_bars
from ssmcompress.progress import track

SIDE = 112
LARGEST = 80  # side of a garment, in pixels
# Photographs by split. Both pictures of the motorcycle show the same scene.
SCIKIT_LEARN = {"train": ("china.jpg",), "test": ("flower.jpg",)}
SCIKIT_IMAGE = {
    "train": (
        "astronaut",
        "brick",
        "camera",
        "clock_motion",
        "coffee",
        "coins",
        "color",
        "grass",
        "horse",
        "hubble_deep_field",
        "ihc",
        "motorcycle_left",
        "motorcycle_right",
        "page",
        "text",
    ),
    "test": ("cell", "chelsea", "gravel", "moon", "retina", "rocket"),
}
FILES = {"train": "train", "test": "t10k"}
OPAQUE = 24  # darker pixels belong to the background of a Fashion-MNIST image
CLASS_NAMES = ("background", *CLASSES)


class Clutter:
    """The images of a split.

    Args:
        split: train or test. folder: with the original files of Fashion-MNIST. seed: seed of all random choices.
        side: side of the images, in pixels.
    """

    def __init__(self, split: str, folder: Path, seed: int, side: int = SIDE):
        self.side = side
        self.seed = [seed, ("train", "test").index(split)]
        self.garments, self.labels = read(folder, FILES[split])
        self.photographs = list(load_photographs(split))

    def draw_scene(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """Return image `number` for segmentation, and the class of each pixel (112, 112) uint8; 0 is the photograph."""
        generator = np.random.default_rng([*self.seed, 0, number])
        canvas, mask = self._crop(generator), np.zeros((self.side, self.side), np.uint8)
        for _ in range(generator.integers(1, 6)):
            garment = generator.integers(len(self.garments))
            side = int(generator.integers(28, 65))
            self._paste(canvas, mask, generator, self.garments[garment], 1 + int(self.labels[garment]), side)
        return to_picture(canvas), mask

    def draw_object(self, number: int) -> tuple[Image.Image, int, np.ndarray]:
        """Return image `number` for classification, its class, and what each pixel shows.

        The last is an array (side, side) uint8: 0 the photograph, 1 a fragment, 2 the whole garment.
        """
        generator = np.random.default_rng([*self.seed, 1, number])
        canvas, mask = self._crop(generator), np.zeros((self.side, self.side), np.uint8)
        for _ in range(generator.integers(4, 13)):
            pixels = self.garments[generator.integers(len(self.garments))]
            top, left = generator.integers(4, 16, 2)
            side = int(generator.integers(12, 29))
            self._paste(canvas, mask, generator, pixels[top : top + 9, left : left + 9], 1, side)
        garment = generator.integers(len(self.garments))
        side = int(generator.integers(40, LARGEST + 1))
        self._paste(canvas, mask, generator, self.garments[garment], 2, side)
        return to_picture(canvas), int(self.labels[garment]), mask

    def _crop(self, generator: np.random.Generator) -> np.ndarray:
        """Return a crop (112, 112, 3) of a photograph, float32 from 0 to 255, rotated and with changed colours.

        There are few photographs; without varied colours, a model would memorise them.
        """
        photograph = self.photographs[generator.integers(len(self.photographs))]
        shorter = min(photograph.size)
        side = int(generator.integers(min(self.side, shorter // 2), shorter + 1))
        left, top = (int(generator.integers(0, extent - side + 1)) for extent in photograph.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photograph.resize((self.side, self.side), Image.Resampling.BILINEAR, box=box), np.float32)
        pixels = np.rot90(pixels, generator.integers(4))
        pixels = pixels[:, ::-1] if generator.random() < 0.5 else pixels
        pixels = pixels[..., generator.permutation(3)]
        pixels = 255 - pixels if generator.random() < 0.25 else pixels
        gain, shift = generator.uniform(0.5, 1.3, 3), generator.uniform(-40, 40, 3)
        return np.ascontiguousarray((pixels * gain + shift).clip(0, 255), np.float32)

    def _paste(
        self,
        canvas: np.ndarray,
        mask: np.ndarray,
        generator: np.random.Generator,
        garment: np.ndarray,
        label: int,
        side: int,
    ) -> None:
        """Paste a garment of `side` pixels in a random colour at a random position and write its label to the mask."""
        picture = Image.fromarray(garment).resize((side, side), Image.Resampling.BILINEAR)
        shade = np.asarray(picture, np.float32)
        if generator.random() < 0.5:
            shade = shade[:, ::-1]
        top, left = generator.integers(0, self.side - side + 1, 2)
        colour = generator.uniform(60, 255, 3).astype(np.float32)
        # Keep the garment's texture: its brightness varies around that of its colour.
        pixels = (0.35 + 0.65 * shade[..., None] / 255) * colour
        inside = shade >= OPAQUE
        rows, columns = slice(top, top + side), slice(left, left + side)
        canvas[rows, columns][inside] = pixels[inside]
        mask[rows, columns][inside] = label


def load_photographs(split: str) -> Iterator[Image.Image]:
    """Yield the photographs of a split in RGB."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    folder = Path(data.__file__).parent
    for name in SCIKIT_LEARN[split]:
        yield Image.fromarray(load_sample_image(name))
    for name in SCIKIT_IMAGE[split]:
        file = next(folder.glob(f"{name}.*"))
        yield Image.open(file).convert("RGB")


def to_picture(canvas: np.ndarray) -> Image.Image:
    """Convert pixels (height, width, 3) from 0 to 255 to a picture."""
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, **options: Any) -> dict[str, Any]:
    """Return a picture as `datasets` stores it; the options are passed to PIL's `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def write_masks(clutter: Clutter, count: int, output: Path) -> None:
    """Write a mask of the whole garment for each classification image, and the classes."""
    drawn = (clutter.draw_object(number) for number in track(range(count), "drawing masks", count))
    masks, labels = zip(*((np.packbits(shown == 2, axis=1), label) for _, label, shown in drawn), strict=True)
    np.savez_compressed(output, masks=np.stack(masks), labels=np.asarray(labels))


def write_table(clutter: Clutter, task: str, seed: int, count: int, output: Path) -> None:
    """Write the images as a Parquet table."""
    features: dict[str, Any] = {"image": ImageFeature()}
    if task == "segmentation":
        features["annotation"] = ImageFeature()
    else:
        features["label"] = ClassLabel(names=CLASSES)
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number in track(range(count), "drawing images", count):
        picture, target, *_ = clutter.draw_scene(number) if task == "segmentation" else clutter.draw_object(number)
        columns["image"].append(encode(picture, format="JPEG", quality=92))
        if task == "segmentation":
            columns["annotation"].append(encode(Image.fromarray(target), format="PNG"))
        else:
            columns["label"].append(target)
    table = Dataset.from_dict(columns, features=Features(features))
    table.add_column("seed", [seed] * count, feature=Value("int32")).to_parquet(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("segmentation", "classification", "masks"))
    parser.add_argument("split", choices=tuple(FILES))
    parser.add_argument("output", type=Path, help="a .parquet file, or an .npz file of masks")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--idx", type=Path, default=FOLDER, help="folder of the original files of Fashion-MNIST")
    parser.add_argument("--side", type=int, default=SIDE, help="side of the images in pixels; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.side < LARGEST:
        parser.error(f"--side {args.side}: expected at least {LARGEST}, the largest that a garment can be")
    if args.side % 8 and args.task == "masks":
        parser.error(f"--side {args.side}: expected a multiple of 8 for masks, because 8 pixels are packed into a byte")

    clutter = Clutter(args.split, args.idx, args.seed, args.side)
    with progress_bars(quiet=False):
        if args.task == "masks":
            write_masks(clutter, args.images, args.output)
        else:
            write_table(clutter, args.task, args.seed, args.images, args.output)
    what = "masks" if args.task == "masks" else "images"
    print(f"wrote {args.images} {what} to {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
