"""The published content of a folder: its files, and the objects in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.find import HUB_NAME
from ..errors import InputError
from ..files import RECIPE_FILE, is_model_folder, read_text
from ..hub_names import HubName, parse_hub_name
from ..models.registry import MODELS
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from ..models.state_dict import read_metadata
from ..tasks import CLASSIFICATION, SEGMENTATION
from .local_paths import is_absolute
from .report import REPORT_FILE
from .report_text import PICTURES

CARD_FILE = "README.md"
# The pictures of a report. Those of `visualize` are excluded, since they show the user's own images in full size.
PICTURE_FILES = (*PICTURES, "finetuning.png")
PIPELINES = {CLASSIFICATION.name: "image-classification", SEGMENTATION.name: "image-segmentation"}
# All published files, apart from the weights and an exported ONNX file.
FILES = (CONFIG_FILE, REPORT_FILE, RECIPE_FILE, CARD_FILE, *PICTURE_FILES)
LARGEST_RECIPE = 1 << 20  # bytes
EXPECTED = "expected a folder that `ssmcompress prune` wrote"
# Types of the JSON values that are read here. All except those of REQUIRED may be missing or null.
KINDS = {dict: "an object", list: "a list", str: "a text"}
OF_CONFIG = {
    "architecture": dict, "architecture.type": str, "data": str, "pruning": dict, "pruning.source": dict,
    "pruning.source.path": str, "pruning.steps": list, "pruning.command": str,
}  # fmt: skip
OF_REPORT = {"data": dict, "data.name": str, "pruned": dict, "onnx": dict, "onnx.file": str, "task": str}
REQUIRED = {"architecture", "architecture.type"}


@dataclass(frozen=True)
class Content:
    """The published content of a folder.

    Attributes:
        config, report, recipe: the objects in the JSON files and in recipe.yaml; a model written by `save` has neither
            report nor recipe, {}.
        metadata: the texts in the header of the weights. files: names of all files to publish.
    """

    config: dict[str, Any]
    report: dict[str, Any]
    recipe: dict[Any, Any]
    metadata: dict[str, str]
    files: tuple[str, ...]

    @property
    def source(self) -> HubName | None:
        """The dense model, if it is on the Hub."""
        path = (self.config["pruning"].get("source") or {}).get("path")
        return _parse_name(path) if path is not None and not is_absolute(path) else None

    @property
    def pipeline(self) -> str:
        """The Hub's name for the task of the model."""
        videos = "views" in self.report or self.config["architecture"].get("frames") is not None
        return "video-classification" if videos else PIPELINES[self.task]

    @property
    def task(self) -> str:
        """The task of the model, by name."""
        kind = self.config["architecture"]["type"]
        known = {model_class.architecture: model_class.task.name for model_class in MODELS}
        named = self.report.get("task")
        return named if named in PIPELINES else known.get(kind, CLASSIFICATION.name)


def read_content(folder: Path) -> Content:
    """Read the published content of a folder.

    Raises:
        InputError: it is not a folder of a compressed model, or one of its files cannot be read.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}; {EXPECTED}")
    if not is_model_folder(folder) or not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} is not the folder of a compressed model; {EXPECTED}")
    there = [name for name in (WEIGHTS_FILE, *FILES) if os.path.lexists(folder / name)]
    for name in there:
        check_file(folder, name)
    config = _read_object(folder / CONFIG_FILE, OF_CONFIG)
    if config.get("pruning") is None:
        raise InputError(f"{folder} holds a dense model; {EXPECTED}")
    report = _read_object(folder / REPORT_FILE, OF_REPORT) if REPORT_FILE in there else {}
    recipe = read_recipe(folder / RECIPE_FILE) if RECIPE_FILE in there else {}
    metadata = read_metadata(folder / WEIGHTS_FILE)
    graphs = [name for name in list_graphs(report) if os.path.lexists(folder / name)]
    for name in graphs:
        check_file(folder, name)
    return Content(config, report, recipe, metadata, tuple(dict.fromkeys((*there, CARD_FILE, *graphs))))


def list_graphs(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the ONNX files exported into the folder of a report, and of their external data."""
    onnx, files = report.get("onnx"), report.get("files")
    names = [onnx.get("file") if isinstance(onnx, Mapping) else None, *(files if isinstance(files, list) else ())]
    graphs = [name for name in names if isinstance(name, str) and re.fullmatch(r"[^./\\][^/\\]*\.onnx", name)]
    return tuple(part for name in dict.fromkeys(graphs) for part in (name, f"{name}.data"))


def check_file(folder: Path, name: str) -> None:
    """Raise an InputError unless a name in a folder is a regular file or a link to one of the same model.

    A folder in the Hub cache contains links to files in the folder blobs of its repository.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; {EXPECTED}")
    root, found = folder.resolve(), path.resolve()
    repository = root.parent.parent
    is_blob = (
        root.parent.name == "snapshots"
        and repository.name.startswith("models--")
        and found.parent == repository / "blobs"
    )
    if path.is_symlink() and not found.is_relative_to(root) and not is_blob:
        raise InputError(f"{path} is a link to a file outside the folder: replace it with a copy, or remove it")


def read_recipe(file: Path) -> dict[Any, Any]:
    """Return the mapping in a recipe; InputError if there is none."""
    import yaml

    try:
        if file.stat().st_size > LARGEST_RECIPE:
            raise ValueError(f"larger than {LARGEST_RECIPE >> 20} MB")
        text = read_text(file)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases (*)")  # which could expand without end
        value = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected lines such as 'model: vim.pth'")
    return value


def list_hub_names(folder: Path, content: Content) -> set[str]:
    """Return the Hub repositories named in a folder, of models and of datasets.

    Local names can be distinguished from them: they are absolute in the configuration, and relative to the folder in
    the recipe.
    """
    names = {content.source.repository} if content.source is not None else set()
    names |= {data[0]} if (data := find_dataset(content)) else set()
    for key in ("model", "data", "eval_data"):
        value = content.recipe.get(key)
        if not isinstance(value, str) or any(os.path.exists(folder / part) for part in (value, value.split(":")[0])):
            continue
        if key == "model":
            names |= {hub.repository} if (hub := _parse_name(value)) is not None else set()
        elif match := HUB_NAME.fullmatch(value):
            names |= {match["repo"]} if match["split"] else set()
    return names


def find_dataset(content: Content) -> tuple[str, str] | None:
    """Return (repository, split) of the evaluation data, if it is a dataset on the Hub.

    Local data has an absolute path in the configuration, so any other valid name is that of a dataset on the Hub.
    """
    data = content.config.get("data")
    match = HUB_NAME.fullmatch(data) if isinstance(data, str) else None
    return (match["repo"], match["split"]) if match and match["split"] and "/" in match["repo"] else None


def _parse_name(name: str) -> HubName | None:
    """Parse a recorded name as a Hub name; None if it is a local path or a URL."""
    try:
        return parse_hub_name(name)
    except InputError:
        return None


def _read_object(file: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the JSON object in a file; InputError if there is none.

    Args:
        kinds: key, or nested keys joined by dots -> type of the value.
    """
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object")
    for keys, kind in kinds.items():
        part: Any = value
        for key in keys.split("."):  # outer objects were checked before
            part = part.get(key) if part is not None else None
        if part is None and keys not in REQUIRED:
            continue
        if not isinstance(part, kind):
            raise InputError(f"{file}: {keys} is {part!r:.80}: expected {KINDS[kind]}")
    return value
