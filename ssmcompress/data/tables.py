"""Images in tables: parquet and arrow files, and datasets on the hub, read with `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, raise_if_out_of_memory
from ..progress import note
from ..tasks import CLASSIFICATION, Task
from .columns import find_missing, image_column, is_text, mask_column, read_labels
from .images import Images, decode
from .labels import some_names
from .listing import LeftOut, kind_in_folder
from .masks import Header, MaskRules, check_pairs, decide_rules, drop_empty_masks, make_rules, read_headers, read_mask

# Columns of ADE20K on the hub, in `scene_parse_150`.
ADE_COLUMNS = {"image", "annotation", "scene_category"}
# Maximum size in bytes of a parquet file read into memory; larger ones are converted to a memory-mapped arrow file.
IN_MEMORY = 1 << 28


def read_tables(files: Sequence[Path], name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the rows of parquet or arrow files, concatenated.

    Args:
        masks: meaning of the masks, for models that need them; None: each row has one label.

    Raises:
        InputError: a file is damaged, tables have different columns, there are no images, or the labels do not match
            the head.
    """
    return _from_table(_read_tables(files), name, num_classes, files[0].parent, masks)


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
            raise_if_out_of_memory(error)
            raise InputError(f"{file}: not a whole {file.suffix[1:]} file ({_first_line(error)})") from error
    try:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # as above
        raise_if_out_of_memory(error)
        raise InputError(f"{files[0].parent}: the tables in it are not compatible ({_first_line(error)})") from error


def read_saved(path: Path, name: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the images of a folder written by `Dataset.save_to_disk`, from the files listed in its state.json."""
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(path))
    except Exception as error:  # as above
        raise_if_out_of_memory(error)
        message = f"{path}: not a whole folder of `save_to_disk` ({_first_line(error)})"
        raise InputError(message) from error
    used = {Path(file["filename"]).name for file in table.cache_files}
    left_out = LeftOut()
    for file in sorted(path.iterdir()):
        if kind_in_folder(file.name) and file.name not in used:
            left_out.add("file outside of state.json", file.name)
    left_out.tell(name)
    return _from_table(table, name, num_classes, path, masks)


# Kinds of `datasets` columns that contain no images; reading some of them requires further packages.
OTHER_FEATURES = ("Audio", "Video", "Pdf", "Nifti", "ClassLabel", "Translation", "TranslationVariableLanguages")


def read_hub(repo: str, split: str, num_classes: int, masks: MaskRules | None = None) -> Images:
    """Return the images of a dataset split on the hub; InputError if they cannot be used.

    Args:
        split: a split, or a configuration and a split separated by a colon.
        masks: as for `read_tables`.
    """
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry; the error below suffices
    name = f"{repo}:{split}"
    config, colon, rest = split.partition(":")
    if not colon or "[" in config:  # the colon of a slice, as in train[:100]
        config, rest = "", split
    try:
        table = load_dataset(repo, config or None, split=rest)
    except Exception as error:  # the hub, the network and loading scripts raise many kinds of errors
        raise_if_out_of_memory(error)
        if "config name is missing" in str(error).lower():
            found = " ".join(str(error).split())[:300]
            raise InputError(
                f"{repo} has several configurations; name one, such as {repo}:NAME:{rest} ({found})"
            ) from error
        raise InputError(f"no data at {name}, neither here nor on the hub ({_first_line(error)})") from error
    return _from_table(table, name, num_classes, Path(), masks)


def is_table(data: Any) -> bool:
    """Return whether this is a `datasets.Dataset` whose rows are unmodified, without a format or transform."""
    return type(data).__module__.startswith("datasets.") and getattr(data, "format", {}).get("type", "") is None


def read_dataset(
    table: Any, num_classes: int, *, task: Task = CLASSIFICATION, reduce_zero_label: bool | None = None
) -> Images:
    """Return the images of a `datasets.Dataset`; InputError if they cannot be used.

    Args:
        task, reduce_zero_label: as for `ssmcompress.open_images`.
    """
    masks = make_rules(task, num_classes, reduce_zero_label)
    return _from_table(table, "data set", num_classes, Path(), masks)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _from_table(table: Any, name: str, num_classes: int, root: Path, masks: MaskRules | None = None) -> Images:
    if masks is not None:
        return _with_masks(table, name, root, masks)
    table, column, notes = _image_rows(table, name)
    labels = read_labels(table, name, num_classes)
    for text in (*notes, *labels.notes):
        note(f"{name}: {text}")
    read, describe = _readers(table, column, name, root)
    return Images(name, len(table), read, describe, labels.values, classes=labels.classes)


def _image_rows(table: Any, name: str) -> tuple[Any, str, list[str]]:
    """Return a table whose images are not decoded, the column with them, and notes on other columns.

    Raises:
        InputError: it contains no images, or it is ambiguous which column they are in.
    """
    from datasets import Image as ImageFeature

    column, notes = image_column(table, name)
    if not len(table):
        raise InputError(f"{name} holds no images")
    feature = table.features[column]
    if (kind := type(feature).__name__) in OTHER_FEATURES:
        raise InputError(f"{name}: the column {column} holds {kind}, expected images")
    if isinstance(feature, ImageFeature) or is_text(feature):
        table = table.cast_column(column, ImageFeature(decode=False))  # text becomes a file path
    return table, column, notes


def _readers(
    table: Any, column: str, name: str, root: Path, *, shown: bool = False
) -> tuple[Callable[[int], Any], Callable[[int], str]]:
    """Return a function that reads an image of a table, `shown` as for `decode`, and one that returns its name."""
    pictures = table.select_columns(column)  # otherwise each read would include all columns
    return lambda i: decode(pictures[i][column], root, shown=shown), lambda i: f"{name}, row {i}"


def _with_masks(table: Any, name: str, root: Path, masks: MaskRules) -> Images:
    """Return the images of a table with their masks, or unlabelled if it has none.

    Raises:
        InputError: it is ambiguous which columns are meant, rows have no mask, or masks cannot be used.
    """
    from datasets import Image as ImageFeature

    columns = table.column_names
    mask, notes = mask_column(table, name)
    rest, column, others = _image_rows(table if mask is None else table.remove_columns(mask), name)
    for text in (*notes, *others):
        note(f"{name}: {text}")
    read, describe = _readers(rest, column, name, root, shown=True)
    if mask is None:
        return Images(name, len(table), read, describe)
    feature = table.features[mask]
    if isinstance(feature, ImageFeature) or is_text(feature):
        table = table.cast_column(mask, ImageFeature(decode=False))
    rows = table.select_columns(mask)
    missing = find_missing(rows, mask)
    if len(missing) == len(table):
        note(f"{name}: the column {mask} is empty; the images count as unlabelled")
        return Images(name, len(table), read, describe)
    if len(missing):
        shown = some_names([f"row {row}" for row in missing])
        raise InputError(f"{name}: {len(missing)} of {len(table)} images have no mask in the column {mask} ({shown})")
    pictures = rest.select_columns(column)

    def headers(i: int) -> tuple[Header | None, Header | None]:
        return read_headers(pictures[i][column], rows[i][mask], root)

    check_pairs(name, [f"row {row}" for row in range(len(table))], headers)
    rules = decide_rules(masks, set(columns) >= ADE_COLUMNS, name)

    def read_row(i: int) -> Any:
        return read_mask(rows[i][mask], root, rules, f"{name}, row {i}, {mask}")

    return drop_empty_masks(Images(name, len(table), read, describe, masks=read_row))
