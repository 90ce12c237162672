"""Images from wherever users keep them: folders, parquet / arrow files, `datasets` names, or sample photographs.

`open_images` finds out what a name means and gives back an `Images`: a list of pictures with or without
labels. `Batches` turns (a part of) it into the batches a model takes.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .models import TokenModel

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
PHOTOGRAPHS = "sample-photographs"
PHOTOGRAPH_CROPS = 64


@dataclass(frozen=True)
class Images:
    """Pictures that are read when asked for.

    Attributes:
        name: what the user called them. size: how many there are.
        read: index -> PIL image; raises OSError for one that cannot be read.
        describe: index -> how to name that picture to a person.
        labels: a class index for each, or None.
    """

    name: str
    size: int
    read: Callable[[int], Image.Image]
    describe: Callable[[int], str]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.size


def open_images(name: str | Path, num_classes: int) -> Images:
    """The images behind `name`, for a head of `num_classes` classes.

    Args:
        name: a folder of class folders, a folder of images, a parquet or arrow file or a folder of them, or a
            `datasets` hub name with its split (`owner/name:split`).

    Raises:
        InputError: nothing there, no images in it, or classes that are not the head's.
    """
    path = Path(name)
    if not path.exists():
        repo, colon, split = str(name).partition(":")
        if colon and repo and split:
            return _from_hub(repo, split, num_classes)
        raise InputError(f"no data at {name}: expected a folder, a parquet or arrow file, or a hub name with :split")
    try:
        if not path.is_dir():
            return _from_table(_read_tables([path]), str(name), num_classes)
        tables = sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".arrow") and p.is_file())
        if tables:
            return _from_table(_read_tables(tables), str(name), num_classes)
        return _from_folder(path, num_classes)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


# -------------------------------------------------------------------------------------------------- folders


def _from_folder(path: Path, num_classes: int) -> Images:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    plain = _image_files(path)
    by_class = {folder.name: _image_files(folder) for folder in folders}
    if any(by_class.values()):
        if plain:
            raise InputError(f"{path} holds both images and class folders; name one of the two")
        index = _class_index(list(by_class), num_classes, str(path))
        files = [(file, index[name]) for name, files in by_class.items() for file in files]
        return _from_files(path, [file for file, _ in files], tuple(label for _, label in files))
    if plain:
        return _from_files(path, plain, None)
    nested = [f.name for f in folders if any(p.is_dir() for p in f.iterdir())]
    hint = f"; did you mean {path / nested[0]}?" if nested else ""
    raise InputError(f"no images in {path}{hint}")


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _from_files(path: Path, files: Sequence[Path], labels: tuple[int, ...] | None) -> Images:
    return Images(str(path), len(files), lambda i: _decode(files[i]), lambda i: str(files[i]), labels)


def _class_index(names: list[str], num_classes: int, where: str) -> dict[str, int]:
    """Class folder -> class: by synset id for an ImageNet head, else by sorted name."""
    if num_classes == 1000 and all(name[:1] == "n" and name[1:].isdecimal() for name in names):
        from timm.data import ImageNetInfo

        synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        unknown = [name for name in names if name not in synsets]
        if unknown:
            raise InputError(f"{where}: {', '.join(unknown[:3])} is not one of ImageNet-1k's synsets")
        return {name: synsets[name] for name in names}
    if len(names) != num_classes:
        raise InputError(
            f"{where} has {len(names)} class folders ({', '.join(names[:3])}, ...), the model has {num_classes} "
            f"classes; its images cannot be scored"
        )
    return {name: i for i, name in enumerate(sorted(names))}


# --------------------------------------------------------------------------------------------------- tables


def _read_tables(files: list[Path]) -> Any:
    from datasets import Dataset, concatenate_datasets
    from pyarrow import ArrowException, parquet

    parts = []
    for file in files:
        try:
            if file.suffix == ".arrow":
                parts.append(Dataset.from_file(str(file)))
            elif file.suffix == ".parquet":
                parts.append(Dataset(parquet.read_table(file)))
            else:
                raise InputError(f"{file}: expected a folder of images, or a .parquet or .arrow file")
        except (ArrowException, ValueError, OSError) as error:
            raise InputError(f"{file}: not a whole {file.suffix[1:]} file ({str(error).splitlines()[0]})") from error
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _from_hub(repo: str, split: str, num_classes: int) -> Images:
    from datasets import load_dataset

    try:
        table = load_dataset(repo, split=split)
    except Exception as error:  # whatever the hub, the network or a loading script answers
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise InputError(f"no data at {repo}:{split}, neither here nor on the hub ({reason})") from error
    return _from_table(table, f"{repo}:{split}", num_classes)


def _from_table(table: Any, name: str, num_classes: int) -> Images:
    from datasets import Image as ImageFeature

    images = [k for k, f in table.features.items() if isinstance(f, ImageFeature)]
    images = images or [k for k in IMAGE_COLUMNS if k in table.features]
    if not images:
        raise InputError(f"{name} has columns {', '.join(table.column_names)}: expected one with images")
    if not len(table):
        raise InputError(f"{name} holds no images")
    column = images[0]
    if isinstance(table.features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    found = [k for k in LABEL_COLUMNS if k in table.column_names]
    labels = _checked_labels(table[found[0]], name, num_classes) if found else None
    root = Path(name) if Path(name).is_dir() else Path(name).parent
    return Images(name, len(table), lambda i: _decode(table[i][column], root), lambda i: f"{name}, row {i}", labels)


def _checked_labels(values: Sequence[Any], name: str, num_classes: int) -> tuple[int, ...] | None:
    values = list(values)
    if all(v is None or v == -1 for v in values):  # how unlabelled test splits are published
        return None
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
            raise InputError(f"{name}, row {row}: label {value!r}; the model has classes 0 to {num_classes - 1}")
    return tuple(values)


def _decode(source: Any, root: Path | None = None) -> Image.Image:
    """A PIL image of a path, of encoded bytes, of a `datasets` image or of an array; OSError if it is none."""
    try:
        if isinstance(source, dict):
            source = source.get("bytes") or (root or Path()) / source["path"]
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif not isinstance(source, Path):
            return Image.fromarray(np.asarray(source, dtype=np.uint8))
        with Image.open(source) as image:
            image.load()
            return image
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them
        raise OSError(f"unreadable image: {error}") from error


# --------------------------------------------------------------------------------- what needs no file at all


def photographs(image_size: tuple[int, int], count: int = PHOTOGRAPH_CROPS, seed: int = 0) -> Images:
    """Crops of scikit-learn's two sample photographs: real images without labels, for lack of better ones."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(photo) for photo in load_sample_images().images]
    generator = np.random.default_rng(seed)
    boxes = []
    for i in range(count):
        width, height = originals[i % 2].size
        scale = generator.uniform(0.3, 1.0) * min(width / image_size[1], height / image_size[0])
        w, h = scale * image_size[1], scale * image_size[0]
        left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
        boxes.append((left, top, left + w, top + h))

    def read(i: int) -> Image.Image:
        size = (image_size[1], image_size[0])
        return originals[i % 2].resize(size, Image.Resampling.BICUBIC, box=boxes[i])

    return Images(PHOTOGRAPHS, count, read, lambda i: f"crop {i} of the sample photographs")


def find_images(model: TokenModel, data: str | Path | None) -> Images:
    """The images to use with a model: `data`, else those that its folder names, else sample photographs."""
    if data is None and model.source is not None:
        data = model.source.data
        if data is not None and not Path(data).exists() and ":" not in data:
            data = None
    if data is None or str(data) == PHOTOGRAPHS:
        return photographs(model.config.image_size)
    return open_images(data, model.config.num_classes)


# -------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Images (batch, channels, height, width); labels (batch,) or None; where each stood in its source."""

    images: Tensor
    labels: Tensor | None
    index: list[int]


@dataclass(eq=False)
class Batches:
    """The images at `index` of `source`, prepared for `model`; can be iterated again and again.

    Unreadable ones are left out. An iteration fills `unreadable` with their indices and `digests` with the
    hashes of the others, by which the same image is known in another place.
    """

    source: Images
    model: TokenModel
    index: Sequence[int]
    batch_size: int = 64
    workers: int = 0
    unreadable: set[int] = field(default_factory=set)
    digests: set[bytes] = field(default_factory=set)

    def __post_init__(self):
        self.transform = self.model.preprocessing.transform(self.model.config.image_size)

    def unreadable_names(self) -> list[str]:
        """What could not be read, as a person would name it."""
        return [self.source.describe(i) for i in sorted(self.unreadable)]

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        i = self.index[row]
        try:
            return i, self.transform(self.source.read(i))
        except OSError:
            return i, None

    def __iter__(self) -> Iterator[Batch]:
        rows = [range(k, min(k + self.batch_size, len(self.index))) for k in range(0, len(self.index), self.batch_size)]
        # Readers are closures, which only forked workers can take over.
        fork = "fork" if self.workers and "fork" in multiprocessing.get_all_start_methods() else None
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=rows,
            num_workers=self.workers if fork else 0,
            collate_fn=list,
            multiprocessing_context=fork,
        )
        empty = True
        for items in loader:
            self.unreadable.update(i for i, image in items if image is None)
            items = [(i, image) for i, image in items if image is not None]
            if not items:
                continue
            empty = False
            index = [i for i, _ in items]
            labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i in index])
            self.digests.update(hashlib.sha1(image.numpy().tobytes()).digest() for _, image in items)
            yield Batch(torch.stack([image for _, image in items]), labels, index)
        if empty and self.index:
            raise InputError(f"none of the {len(self.index)} images of {self.source.name} can be read")


def draw(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """(`count` of `size` indices drawn by seed, the others), both in order."""
    order = np.random.default_rng(seed).permutation(size).tolist()
    return sorted(order[:count]), sorted(order[count:])
