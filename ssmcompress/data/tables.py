"""Images in tables: parquet and arrow files, and data sets of the hub, read with `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..progress import note
from .columns import image_column, is_text, read_labels
from .images import Images, decode
from .listing import LeftOut, kind_in_folder

# Largest parquet file, in bytes, that is read into memory; larger ones are converted to a memory-mapped arrow file.
IN_MEMORY = 1 << 28


def read_tables(files: Sequence[Path], name: str, num_classes: int) -> Images:
    """Return the rows of parquet or arrow files, concatenated.

    Raises:
        InputError: a file is damaged, tables have different columns, or there are no images or other labels than the
            head's.
    """
    return _from_table(_read_tables(files), name, num_classes, files[0].parent)


def _read_tables(files: Sequence[Path]) -> Any:
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet

    parts = []
    for file in files:
        try:
            if file.suffix.lower() == ".arrow":
                parts.append(Dataset.from_file(str(file)))
            elif file.stat().st_size > IN_MEMORY:
                parts.append(Dataset.from_parquet(str(file)))  # converted to an arrow file in the cache of `datasets`
            else:
                parts.append(Dataset(parquet.read_table(file)))
        except Exception as error:  # pyarrow and datasets raise many kinds of errors for a damaged file
            raise InputError(f"{file}: not a whole {file.suffix[1:]} file ({_first_line(error)})") from error
    try:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # likewise
        raise InputError(f"{files[0].parent}: the tables in it do not go together ({_first_line(error)})") from error


def read_saved(path: Path, name: str, num_classes: int) -> Images:
    """Return the images of a folder that `Dataset.save_to_disk` wrote: those in the files that its state.json lists."""
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(path))
    except Exception as error:  # as above
        message = f"{path}: not a whole folder of `save_to_disk` ({_first_line(error)})"
        raise InputError(message) from error
    used = {Path(file["filename"]).name for file in table.cache_files}
    left_out = LeftOut()
    for file in sorted(path.iterdir()):
        if kind_in_folder(file.name) and file.name not in used:
            left_out.add("file outside of state.json", file.name)
    left_out.tell(name)
    return _from_table(table, name, num_classes, path)


# Kinds of columns of `datasets` that hold no images; reading some of them needs further packages.
OTHER_FEATURES = ("Audio", "Video", "Pdf", "Nifti", "ClassLabel", "Translation", "TranslationVariableLanguages")


def read_hub(repo: str, split: str, num_classes: int) -> Images:
    """Return the images of a split of a data set on the hub; InputError if they cannot be used.

    Args:
        split: a split, or a configuration and a split with a colon in between.
    """
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry; the error below is enough
    name = f"{repo}:{split}"
    config, colon, rest = split.partition(":")
    if not colon or "[" in config:  # the colon of a slice, as in train[:100]
        config, rest = "", split
    try:
        table = load_dataset(repo, config or None, split=rest)
    except Exception as error:  # the hub, the network and loading scripts raise many kinds of errors
        if "config name is missing" in str(error).lower():
            found = " ".join(str(error).split())[:300]
            raise InputError(f"{repo} has several configurations; name one, as {repo}:NAME:{rest} ({found})") from error
        raise InputError(f"no data at {name}, neither here nor on the hub ({_first_line(error)})") from error
    return _from_table(table, name, num_classes, Path())


def is_table(data: Any) -> bool:
    """Return whether this is a `datasets.Dataset` whose rows are as they were stored, with no format or transform."""
    return type(data).__module__.startswith("datasets.") and getattr(data, "format", {}).get("type", "") is None


def read_dataset(table: Any, num_classes: int) -> Images:
    """Return the images of a `datasets.Dataset`; InputError if they cannot be used."""
    return _from_table(table, "data set", num_classes, Path())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _from_table(table: Any, name: str, num_classes: int, root: Path) -> Images:
    from datasets import Image as ImageFeature

    column, notes = image_column(table, name)
    if not len(table):
        raise InputError(f"{name} holds no images")
    feature = table.features[column]
    if (kind := type(feature).__name__) in OTHER_FEATURES:
        raise InputError(f"{name}: the column {column} holds {kind}, expected images")
    if isinstance(feature, ImageFeature) or is_text(feature):
        table = table.cast_column(column, ImageFeature(decode=False))  # a path of a file, where it is text
    labels = read_labels(table, name, num_classes)
    for text in (*notes, *labels.notes):
        note(f"{name}: {text}")

    pictures = table.select_columns(column)  # reading a row reads all of its columns

    def read(i: int) -> Any:
        return decode(pictures[i][column], root)

    return Images(name, len(table), read, lambda i: f"{name}, row {i}", labels.values, classes=labels.classes)
