"""Images in tables: parquet and arrow files, and data sets of the hub, read with `datasets`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import InputError
from .images import Images, decode
from .labels import check_labels, class_index

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
# Largest parquet file, in bytes, that is read into memory; larger ones are converted to a memory-mapped arrow file.
IN_MEMORY = 1 << 28


def read_tables(files: list[Path], name: str, num_classes: int) -> Images:
    """Return the rows of parquet or arrow files, concatenated.

    Raises:
        InputError: a file is damaged, tables have different columns, or there are no images or other labels than the
            head's.
    """
    return _from_table(_read_tables(files), name, num_classes)


def _read_tables(files: list[Path]) -> Any:
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet

    parts = []
    for file in files:
        try:
            if file.suffix == ".arrow":
                parts.append(Dataset.from_file(str(file)))
            elif file.suffix == ".parquet" and file.stat().st_size > IN_MEMORY:
                parts.append(Dataset.from_parquet(str(file)))  # converted to an arrow file in the cache of `datasets`
            elif file.suffix == ".parquet":
                parts.append(Dataset(parquet.read_table(file)))
            else:
                raise InputError(f"{file}: expected a folder of images, or a .parquet, .arrow or .tar file")
        except InputError:
            raise
        except Exception as error:  # pyarrow and datasets raise many kinds of errors for a damaged file
            raise InputError(f"{file}: not a whole {file.suffix[1:]} file ({_first_line(error)})") from error
    try:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # likewise
        raise InputError(f"{files[0].parent}: the tables in it do not go together ({_first_line(error)})") from error


def read_hub(repo: str, split: str, num_classes: int) -> Images:
    """Return the images of a split of a data set on the hub; InputError if they cannot be used."""
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry; the error below is enough
    try:
        table = load_dataset(repo, split=split)
    except Exception as error:  # the hub, the network and loading scripts raise many kinds of errors
        raise InputError(f"no data at {repo}:{split}, neither here nor on the hub ({_first_line(error)})") from error
    return _from_table(table, f"{repo}:{split}", num_classes)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _from_table(table: Any, name: str, num_classes: int) -> Images:
    from datasets import Image as ImageFeature

    image_columns = [k for k, f in table.features.items() if isinstance(f, ImageFeature)]
    image_columns = image_columns or [k for k in IMAGE_COLUMNS if k in table.features]
    if not image_columns:
        raise InputError(f"{name} has columns {', '.join(table.column_names)}: expected one with images")
    if not len(table):
        raise InputError(f"{name} holds no images")
    column = image_columns[0]
    if isinstance(table.features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    label_columns = [k for k in LABEL_COLUMNS if k in table.column_names]
    labels = check_labels(table[label_columns[0]], name, num_classes) if label_columns else None
    names = getattr(table.features[label_columns[0]], "names", None) if labels is not None else None
    classes = tuple(names) if names is not None and len(names) == num_classes else None
    if names is not None and classes is None:
        index = class_index(names, num_classes, name)
        labels = tuple(index[names[label]] for label in labels)
    root = Path(name) if Path(name).is_dir() else Path(name).parent
    read, describe = (lambda i: decode(table[i][column], root)), (lambda i: f"{name}, row {i}")
    return Images(name, len(table), read, describe, labels, classes=classes)
