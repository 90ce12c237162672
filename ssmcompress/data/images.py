"""Images from wherever users keep them: folders, parquet / arrow files, `datasets` names, or sample photographs.

`open_images` finds out what a name means and gives back an `Images`: a list of pictures with or without labels.
`ssmcompress.data.batches` prepares them for a model.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import TokenModel

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
PHOTOGRAPH_CROPS = 64
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Bytes of a parquet file that is read whole; larger ones are mapped from an arrow file beside.
IN_MEMORY = 1 << 28


@dataclass(frozen=True)
class Images:
    """Pictures that are read when asked for.

    Attributes:
        name: what the user called them. size: how many there are.
        read: index -> PIL image; raises OSError for one that cannot be read.
        describe: index -> how to name that picture to a person.
        labels: a class index for each, or None.
        stand_in: whether they were taken for lack of the user's own.
        classes: the names of the classes, in their order, where they are known.
    """

    name: str
    size: int
    read: Callable[[int], Image.Image]
    describe: Callable[[int], str]
    labels: tuple[int, ...] | None = None
    stand_in: bool = False
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.size

    def readable(self, index: int) -> bool:
        """Whether that picture can be read."""
        try:
            self.read(index)
        except OSError:
            return False
        return True


def open_images(name: str | Path, num_classes: int) -> Images:
    """The images behind `name`, for a head of `num_classes` classes.

    However large it is, little of it is kept in memory: names of files, places in shards, tables mapped from the disk.

    Args:
        name: a folder of class folders, a folder of images, a parquet or arrow file or a folder of them, a tar shard in
            webdataset's manner or a folder of them, or a `datasets` hub name with its split (`owner/name:split`).

    Raises:
        InputError: nothing there, no images in it, or classes that are not the head's.
    """
    path = Path(name)
    if not path.exists():
        repo, colon, split = str(name).partition(":")
        if colon and repo and split:
            return _from_hub(repo, split, num_classes)
        raise InputError(
            f"no data at {name}: expected a folder, a parquet, arrow or tar file, or a hub name with :split"
        )
    try:
        if not path.is_dir() and path.name.endswith(SHARD_SUFFIXES):
            return _from_shards([path], str(name), num_classes)
        if not path.is_dir():
            return _from_table(_read_tables([path]), str(name), num_classes)
        if shards := sorted(p for p in path.iterdir() if p.name.endswith(SHARD_SUFFIXES) and p.is_file()):
            return _from_shards(shards, str(name), num_classes)
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
        files = [f"{name}/{file}" for name, files in by_class.items() for file in files]
        images = _from_files(path, files, tuple(index[name] for name, files in by_class.items() for _ in files))
        return replace(images, classes=tuple(sorted(index, key=index.get)) if len(index) == num_classes else None)
    if plain:
        return _from_files(path, plain, None)
    nested = [f.name for f in folders if any(p.is_dir() for p in f.iterdir())]
    hint = f"; did you mean {path / nested[0]}?" if nested else ""
    raise InputError(f"no images in {path}{hint}")


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _from_files(path: Path, files: Sequence[str], labels: tuple[int, ...] | None) -> Images:
    # Bytes in one piece: a million names take 40 MB, not 400, and worker processes share them.
    names = np.array([os.fsencode(file) for file in files])

    def file(i: int) -> Path:
        return path / os.fsdecode(bytes(names[i]))

    return Images(str(path), len(files), lambda i: _decode(file(i)), lambda i: str(file(i)), labels)


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
            f"{where} has {len(names)} classes ({', '.join(names[:3])}, ...), the model has {num_classes} "
            f"classes; its images cannot be scored"
        )
    return {name: i for i, name in enumerate(sorted(names))}


# --------------------------------------------------------------------------------------------------- tables


def _read_tables(files: list[Path]) -> Any:
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet

    parts = []
    for file in files:
        try:
            if file.suffix == ".arrow":
                parts.append(Dataset.from_file(str(file)))
            elif file.suffix == ".parquet" and file.stat().st_size > IN_MEMORY:
                parts.append(Dataset.from_parquet(str(file)))  # by way of an arrow file in the cache of `datasets`
            elif file.suffix == ".parquet":
                parts.append(Dataset(parquet.read_table(file)))
            else:
                raise InputError(f"{file}: expected a folder of images, or a .parquet, .arrow or .tar file")
        except InputError:
            raise
        except Exception as error:  # pyarrow and datasets raise whatever a damaged file makes them
            raise InputError(f"{file}: not a whole {file.suffix[1:]} file ({_first_line(error)})") from error
    try:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # likewise
        raise InputError(f"{files[0].parent}: the tables in it do not go together ({_first_line(error)})") from error


def _from_hub(repo: str, split: str, num_classes: int) -> Images:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports every retry; the error below says it
    try:
        table = load_dataset(repo, split=split)
    except Exception as error:  # whatever the hub, the network or a loading script answers
        raise InputError(f"no data at {repo}:{split}, neither here nor on the hub ({_first_line(error)})") from error
    return _from_table(table, f"{repo}:{split}", num_classes)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


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
    names = getattr(table.features[found[0]], "names", None) if labels is not None else None
    classes = tuple(names) if names is not None and len(names) == num_classes else None
    if names is not None and classes is None:
        index = _class_index(names, num_classes, name)
        labels = tuple(index[names[label]] for label in labels)
    root = Path(name) if Path(name).is_dir() else Path(name).parent
    read, describe = (lambda i: _decode(table[i][column], root)), (lambda i: f"{name}, row {i}")
    return Images(name, len(table), read, describe, labels, classes=classes)


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
            return Image.fromarray(_bytes(np.asarray(source)))
        with Image.open(source) as image:
            image.load()
            return _eight_bits(image)
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them
        raise OSError(f"unreadable image: {error}") from error


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels as 0..255; an OSError-to-be for anything whose scale would be a guess."""
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"pixels are {pixels.dtype}, expected whole numbers from 0 to 255")
    return pixels.astype(np.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey values scaled down; PIL's own conversion cuts everything above 255 to white."""
    if image.mode == "F":
        raise ValueError("an image of floating-point values has no known scale")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        return Image.fromarray(_bytes(pixels // 257 if image.mode != "I" or pixels.max() > 255 else pixels))
    return image


# --------------------------------------------------------------------------------------------------- shards


def _from_shards(files: list[Path], name: str, num_classes: int) -> Images:
    from .shards import read_index

    index = read_index(files)
    if not len(index):
        raise InputError(f"{name} holds no images: expected members like 000017.jpg, and 000017.cls with the class")
    labels = None
    if index.labels is not None:
        labels = _checked_labels(index.labels.tolist(), name, num_classes)
    return Images(name, len(index), lambda i: _decode(index.read(i)), index.describe, labels)


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

    return Images("sample photographs", count, read, lambda i: f"crop {i} of the sample photographs", stand_in=True)


def class_names(images: Images, num_classes: int) -> tuple[str, ...] | None:
    """Names of a head's classes: those of the data, ImageNet-1k's for 1,000 of them, else unknown."""
    if num_classes != 1000 or (images.classes and not all(name[1:].isdecimal() for name in images.classes)):
        return images.classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(num_classes))


def find_images(model: TokenModel, data: str | Path | None) -> Images:
    """The images to use with a model: `data`, else those that its folder names, else sample photographs."""
    if data is None and model.source is not None:
        data = model.source.data
        if data is not None and not (os.path.isabs(data) and os.path.exists(data)) and ":" not in data:
            data = None
    if data is None:
        return photographs(model.config.image_size)
    return open_images(data, model.config.num_classes)
