"""Splits of a dataset (train, validation, test) by the names of its files and folders, as in `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import TypeVar

from ..errors import InputError

T = TypeVar("T")

# Word in a name -> its split.
KEYWORDS = dict.fromkeys(("train", "training", "trainset"), "train")
KEYWORDS |= dict.fromkeys(("validation", "valid", "val", "dev", "valset"), "validation")
KEYWORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation", "testset"), "test")
# Additional words that the name of a split folder may contain: `train_images`, `test-set`, `val2017`.
FILLERS = {"image", "images", "img", "imgs", "set", "data", "split", "folder", "photos", "pictures"}
SHARDED = re.compile(r"(.+)-\d{5}-of-\d{5}", re.ASCII)


def _words(name: str) -> tuple[str | None, list[str]]:
    """Return the split word of a name, None unless there is exactly one, and the remaining words."""
    words = [word for word in re.split(r"[\W\d_]+", name.lower()) if word]
    keywords = [word for word in words if word in KEYWORDS]
    return (keywords[0] if len(keywords) == 1 else None), [word for word in words if word not in KEYWORDS]


def split_of_file(path: str) -> str | None:
    """Return the split in the name of a table or shard: train for `train-00000-of-00002.parquet`, `pets.train.tar`."""
    stem = PurePosixPath(path).stem  # only the last suffix: names such as `v1.0-test.parquet` contain dots
    sharded = SHARDED.match(stem)
    word, _ = _words(stem)
    return word or (sharded[1] if sharded else None)


def split_folders(folders: Iterable[str]) -> dict[str, str]:
    """Return folder -> split if sibling folders are splits; {} if they are classes or anything else.

    A class may have the name of a split (CIFAR-100 has a class `train`). Therefore, folders are splits only if at
    least two different splits are among them (`train` and `val2017`), or all have such names (also `pets-train` and
    `pets-test`).
    """
    folders = list(folders)
    words = {folder: _words(folder) for folder in folders}
    bare = {folder: word for folder, (word, rest) in words.items() if word and set(rest) <= FILLERS}
    if len({KEYWORDS[word] for word in bare.values()}) > 1 or (bare and len(bare) == len(folders)):
        return bare
    same = {frozenset(rest) for _, rest in words.values()}
    if len(same) == 1 and all(word for word, _ in words.values()):
        splits = {folder: word for folder, (word, _) in words.items() if word}
        return splits if len({KEYWORDS[word] for word in splits.values()}) > 1 else {}
    return {}


def choose_split(splits: Mapping[str, T], asked: str | None, where: str) -> T:
    """Return the value of the requested split; val, valid and validation are the same.

    Raises:
        InputError: there is no such split, or none is requested and there are several.
    """
    names = ", ".join(sorted(splits))
    if asked is None:
        if len(splits) == 1:
            return next(iter(splits.values()))
        held_out = [name for name in sorted(splits) if _canonical(name) in ("validation", "test")]
        example = max(held_out or splits, key=lambda name: _canonical(name) == "validation")
        raise InputError(f"{where} holds several splits ({names}); name one of them, such as {where}:{example}")
    same = find_split(splits, asked)
    if len(same) == 1:
        return splits[same[0]]
    raise InputError(f"{where} has no split {asked}; it has {names}")


def find_split(names: Iterable[str], asked: str) -> list[str]:
    """Return the names that match the requested split: the name itself, else those of the same split."""
    names = list(names)
    return [asked] if asked in names else [name for name in names if _canonical(name) == _canonical(asked)]


def _canonical(split: str) -> str:
    word, _ = _words(split)
    return KEYWORDS[word] if word else split
