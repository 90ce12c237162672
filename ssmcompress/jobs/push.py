"""Publishing a compressed model on the Hugging Face Hub, with a card, and without the paths of this machine."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.find import HUB_NAME
from ..errors import InputError
from ..extras import require_extra
from ..files import RECIPE_FILE, is_model_folder, read_text
from ..hub_names import HubName, check_revision, is_repository, parse_hub_name
from ..models.hub import Target, inspect_target, read_license, upload
from ..models.registry import MODELS
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from ..models.state_dict import read_metadata
from ..tasks import CLASSIFICATION, SEGMENTATION, find_task
from .local_paths import PathRemover, is_absolute
from .report import REPORT_FILE
from .report_text import PICTURES

CARD_FILE = "README.md"
# The pictures of a report. Those of `visualize` are left out: they show the user's own images in large.
PICTURE_FILES = (*PICTURES, "finetuning.png")
PIPELINES = {CLASSIFICATION.name: "image-classification", SEGMENTATION.name: "image-segmentation"}
# All files that are published, apart from the weights and an exported ONNX file.
FILES = (CONFIG_FILE, REPORT_FILE, RECIPE_FILE, CARD_FILE, *PICTURE_FILES)
METRICS = {"top1": "accuracy", "miou": "mean_iou"}
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)
# A note of the card, whose names of images are not published.
SKIPPED = re.compile(r"(\d+ unreadable images were skipped) \(.*?\)(?=\n|\Z)", re.DOTALL)
LARGEST_RECIPE = 1 << 20  # bytes
EXPECTED = "expected a folder that `ssmcompress prune` wrote"
# What values of the JSON files are, where they are read here. All but those of REQUIRED may be missing or null.
KINDS = {dict: "an object", list: "a list", str: "a text"}
OF_CONFIG = {
    "architecture": dict, "architecture.type": str, "data": str, "pruning": dict, "pruning.source": dict,
    "pruning.source.path": str, "pruning.steps": list, "pruning.command": str,
}  # fmt: skip
OF_REPORT = {"data": dict, "data.name": str, "pruned": dict, "onnx": dict, "onnx.file": str, "task": str}
REQUIRED = {"architecture", "architecture.type"}


@dataclass(frozen=True)
class PushRequest:
    """What is published, and where.

    Attributes:
        repository: owner/name; it is created if it does not exist.
        private: create a private one; a public one that exists is refused.
        revision: the branch to write; None: the main one. message: of the commit.
        license: identifier of the licence on the Hub, as "mit"; None: that of the dense model, if it is on the Hub.
        bars: whether huggingface_hub may draw its bars.
        force: write into a repository with files that ssmcompress did not write.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    message: str | None = None
    license: str | None = None
    bars: bool = False
    force: bool = False

    @property
    def name(self) -> HubName:
        """The repository as a name of the Hub; InputError if it, or its branch, cannot be one."""
        if not is_repository(self.repository):
            more = "; a branch is given by `revision`" if re.search("[@:]", self.repository) else ""
            raise InputError(f"{self.repository}: expected owner/name, a repository of the Hub{more}")
        if self.revision is not None:
            check_revision(self.revision)
        return HubName(self.repository, self.revision)


@dataclass(frozen=True)
class Content:
    """What is in a folder, as far as it is published.

    Attributes:
        config, report, recipe: the objects in the JSON files and in recipe.yaml; a model that `save` wrote has neither
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
        """The dense model, if that is on the Hub."""
        path = (self.config["pruning"].get("source") or {}).get("path")
        return _parse_name(path) if path is not None and not is_absolute(path) else None

    @property
    def task(self) -> str:
        """The task of the model, by name."""
        kind = self.config["architecture"]["type"]
        known = {model_class.architecture: model_class.task.name for model_class in MODELS}
        named = self.report.get("task")
        return named if named in PIPELINES else known.get(kind, CLASSIFICATION.name)


def push_folder(folder: str | Path, request: PushRequest, dry_run: bool = False) -> dict[str, Any]:
    """Upload the folder of a compressed model to the Hub, as one commit.

    Uploaded are the weights, config.json, report.json, recipe.yaml, the card, the pictures of the report and an
    exported ONNX file, with the last component of each path in them, and without names of images. The folder is not
    changed. Those of these files that are in the repository from an earlier upload, but not in this one, are deleted.

    Args:
        dry_run: say what would be uploaded; needs neither the network nor a token.

    Returns:
        A JSON object: `repository`, `revision`, `private`, `files` (name and size in bytes of each), `card`, and of
        what was uploaded its `commit` and `url` and the names of the files `deleted`, else null.

    Raises:
        InputError: no folder of a compressed model, no licence, no token, no permission, a public repository where
            `private` is asked for, or one with files that ssmcompress did not write, without `force`.
        SsmCompressError: the Hub cannot be reached.
    """
    name, content = request.name, read_content(Path(folder))
    license_name = request.license or find_license(content, dry_run)
    with cleaned_copy(Path(folder), content, name, license_name) as copy:
        files = {file: copy / file for file in content.files}
        result = {
            "repository": name.repository,
            "revision": name.revision,
            "private": request.private,
            "files": [{"name": file, "bytes": path.stat().st_size} for file, path in files.items()],
            "card": (copy / CARD_FILE).read_text(encoding="utf-8"),
            "commit": None,
            "url": None,
            "deleted": None,
        }
        if not dry_run:
            target = inspect_target(name, (CONFIG_FILE, REPORT_FILE))
            deleted = list_stale(target, request, content.files)
            message = request.message or f"Upload {name.title}, compressed with ssmcompress"
            options = {"deleted": deleted, "private": request.private, "bars": request.bars}
            result["commit"], result["url"] = upload(name, files, message, **options)
            result["deleted"] = deleted
    return result


def list_stale(target: Target | None, request: PushRequest, files: Collection[str]) -> list[str]:
    """Return which files in a repository are of an earlier upload and not among the `files` of this one.

    Raises:
        InputError: the repository is public where `private` is asked for, or has files that ssmcompress did not write.
    """
    if target is None:
        return []
    if request.private and not target.private:
        raise InputError(
            f"{request.repository} exists and is public: choose another name, or make it private on the Hub first"
        )
    config = target.contents.get(CONFIG_FILE, {})
    if not {"format_version", "pruning"} <= config.keys():
        foreign = sorted(set(target.files) - {".gitattributes"})
        if foreign and not request.force:
            listed = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise InputError(
                f"{request.repository} exists and holds what ssmcompress did not write ({listed}): choose another "
                "name, or write into it by `force=True`"
            )
        return []
    own = {WEIGHTS_FILE, *FILES, *list_graphs(target.contents.get(REPORT_FILE, {}))}
    return sorted(own & set(target.files) - set(files))


def read_content(folder: Path) -> Content:
    """Read what is published of a folder.

    Raises:
        InputError: it is no folder of a compressed model, or a file of it cannot be read.
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
    """Return the names of the ONNX file that was exported into the folder of a report, and of its external data."""
    onnx = report.get("onnx")
    name = onnx.get("file") if isinstance(onnx, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\][^/\\]*\.onnx", name):
        return ()
    return name, f"{name}.data"


def check_file(folder: Path, name: str) -> None:
    """Raise an InputError unless a name in a folder is a regular file, and one of this folder if it is a link.

    A folder in the cache of the Hub has links to files in the folder blobs of its repository.
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
        raise InputError(f"{path} is a link to a file outside the folder: put a copy in its place, or remove it")


def read_recipe(file: Path) -> dict[Any, Any]:
    """Return the mapping in a recipe; InputError if there is none."""
    import yaml

    try:
        if file.stat().st_size > LARGEST_RECIPE:
            raise ValueError(f"larger than {LARGEST_RECIPE >> 20} MB")
        text = read_text(file)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases (*)")  # which could make it endless
        value = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected lines such as 'model: vim.pth'")
    return value


def list_hub_names(folder: Path, content: Content) -> set[str]:
    """Return the repositories of the Hub that a folder names: of models, and of data sets.

    In the configuration, and in the recipe, local names are told from those: they are absolute in the one, and
    relative to the folder in the other.
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


def find_license(content: Content, dry_run: bool) -> str | None:
    """Return the licence of the dense model; None in a dry run, which does not look it up.

    Raises:
        InputError: the dense model is not on the Hub, or states no licence.
    """
    advice = "give `license`, as mit or apache-2.0: that of the dense model's weights binds those of this one"
    if content.source is None:
        raise InputError(f"the licence of the weights is not known; {advice}")
    if dry_run:
        return None
    if (found := read_license(content.source)) is None:
        raise InputError(f"{content.source.repository} states no licence; {advice}")
    return found


@contextmanager
def cleaned_copy(folder: Path, content: Content, name: HubName, license_name: str | None) -> Iterator[Path]:
    """Yield a temporary folder with the files to publish, without the paths of this machine."""
    metadata = [_parse(text) for text in content.metadata.values()]
    values = [content.config, content.report, content.recipe, *metadata]
    with tempfile.TemporaryDirectory(prefix="ssmcompress-") as temporary:
        copy = Path(temporary)
        try:
            remover = PathRemover(values, list_hub_names(folder, content))
            for file in content.files:
                if file == WEIGHTS_FILE:
                    copy_weights(folder / file, copy / file, remover)
                elif file == CARD_FILE:
                    text = make_card(folder, content, name, license_name, remover)
                    (copy / file).write_text(text, encoding="utf-8")
                elif file == RECIPE_FILE:
                    text = clean_recipe(read_text(folder / file), content.recipe, remover)
                    (copy / file).write_text(text, encoding="utf-8")
                elif file in (CONFIG_FILE, REPORT_FILE):
                    value = remover.clean(content.config if file == CONFIG_FILE else content.report)
                    (copy / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
                elif file.endswith(".onnx"):
                    copy_graph(folder / file, copy / file, remover)
                else:
                    (copy / file).write_bytes((folder / file).read_bytes())
        except OSError as error:
            raise InputError(f"{folder}: cannot be read or copied: {error.strerror or error}") from error
        except RecursionError as error:
            raise InputError(f"{folder}: values in its files are nested too deeply; {EXPECTED}") from error
        yield copy


def clean_recipe(text: str, recipe: Mapping[Any, Any], remover: PathRemover) -> str:
    """Return a recipe without paths.

    Args:
        text: of the file, whose comment lines stay in their places. recipe: the mapping in it.
    """
    import yaml

    parts = {
        str(key): yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120)
        for key, value in remover.clean(dict(recipe)).items()
    }
    lines = []
    for line in text.splitlines():
        if line.startswith("#"):
            lines.append(remover.clean_text(line) + "\n")
        elif match := re.match(r"""['"]?([^\s:'"]+)['"]?\s*:""", line):
            lines.append(parts.pop(match[1], ""))
    return "".join((*lines, *parts.values()))


def copy_weights(source: Path, target: Path, remover: PathRemover) -> None:
    """Copy a .safetensors file with cleaned texts in its header."""
    with open(source, "rb") as read, open(target, "wb") as write:
        header = json.loads(read.read(int.from_bytes(read.read(8), "little")))
        texts = header.get("__metadata__") or {}
        header["__metadata__"] = {key: _clean_json_text(text, remover) for key, text in texts.items()}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors begin at multiples of eight bytes
        write.write(len(encoded).to_bytes(8, "little") + encoded)
        while chunk := read.read(1 << 20):
            write.write(chunk)


def copy_graph(source: Path, target: Path, remover: PathRemover) -> None:
    """Copy an ONNX file with cleaned texts in its metadata."""
    require_extra("onnx")
    import onnx

    try:
        model = onnx.load(str(source), load_external_data=False)
    except Exception as error:  # protobuf's own, and those of onnx
        raise InputError(f"{source}: not an ONNX file ({type(error).__name__})") from error
    texts = {entry.key: _clean_json_text(entry.value, remover) for entry in model.metadata_props}
    if texts == {entry.key: entry.value for entry in model.metadata_props}:
        target.write_bytes(source.read_bytes())
        return
    for entry in model.metadata_props:
        entry.value = texts[entry.key]
    target.write_bytes(model.SerializeToString())


def make_card(folder: Path, content: Content, name: HubName, license_name: str | None, remover: PathRemover) -> str:
    """Return the README.md: a header for the Hub, and the card that is in the folder, without paths."""
    from huggingface_hub import ModelCardData

    card = folder / CARD_FILE
    body = f"# {name.title}\n\nA vision state-space model, compressed with ssmcompress.\n"
    if card.is_file():
        body = SKIPPED.sub(r"\1", FRONT_MATTER.sub("", card.read_text(encoding="utf-8", errors="replace")))
    results = list_results(content, remover)
    kinds = [str(step.get("kind")) for step in content.config["pruning"].get("steps") or () if isinstance(step, dict)]
    base = {}
    if content.source is not None:
        # The Hub knows the relations adapter, merge, quantized and finetune, none of them for pruning: a pruned model
        # has weights of its own that begin at those of the base, which is what finetune means.
        is_quantised = any("quanti" in kind for kind in kinds)
        base = {
            "base_model": content.source.repository,
            "base_model_relation": "quantized" if is_quantised else "finetune",
        }
    data = find_dataset(content)
    header = ModelCardData(
        license=license_name,
        library_name="ssmcompress",
        pipeline_tag=PIPELINES[content.task],
        tags=["ssmcompress", "pruning", "token-pruning", content.config["architecture"]["type"]],
        datasets=[data[0]] if data else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.title,
        eval_results=results or None,
        **base,
    )
    return f"---\n{header.to_yaml()}\n---\n\n{remover.clean_text(body)}"


def list_results(content: Content, remover: PathRemover) -> list[Any]:
    """Return the accuracy in the report as results for the Hub; none without labels."""
    from huggingface_hub import EvalResult

    measured, data, task = content.report.get("pruned"), content.report.get("data"), find_task(content.task)
    if not isinstance(measured, Mapping) or not isinstance(data, Mapping) or not data.get("labelled"):
        return []
    figure = task.figure(task.quality)
    value = measured.get(figure.report_key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return []
    known, shown = find_dataset(content), remover.clean_path(str(data.get("name")))
    repository, split = known or (shown, None)
    return [
        EvalResult(
            task_type=PIPELINES[content.task],
            dataset_type=repository,
            dataset_name=shown,
            dataset_split=split,
            metric_type=METRICS.get(figure.report_key, figure.report_key),
            metric_name=f"{figure.title}, % ({data.get('images')} images)",
            metric_value=round(value, 4),
        )
    ]


def find_dataset(content: Content) -> tuple[str, str] | None:
    """Return (repository, split) of the data that a model was measured on, if that is a data set of the Hub.

    The configuration has the absolute path of local data, so whatever else has the form of a name is one.
    """
    data = content.config.get("data")
    match = HUB_NAME.fullmatch(data) if isinstance(data, str) else None
    return (match["repo"], match["split"]) if match and match["split"] and "/" in match["repo"] else None


def _parse_name(name: str) -> HubName | None:
    """Return what a recorded name means on the Hub, None if it is a local path or an address."""
    try:
        return parse_hub_name(name)
    except InputError:
        return None


def _clean_json_text(text: str, remover: PathRemover) -> str:
    """Clean a text; of one that is JSON, the texts in it, for a path is written differently there."""
    value = _parse(text)
    return json.dumps(remover.clean(value)) if isinstance(value, (dict, list)) else remover.clean_text(text)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_object(file: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the JSON object in a file; InputError if there is none.

    Args:
        kinds: key, or keys of objects in each other with dots -> kind of the value.
    """
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is no JSON object")
    for keys, kind in kinds.items():
        part: Any = value
        for key in keys.split("."):  # an outer one was checked before
            part = part.get(key) if part is not None else None
        if part is None and keys not in REQUIRED:
            continue
        if not isinstance(part, kind):
            raise InputError(f"{file}: {keys} is {part!r:.80}: expected {KINDS[kind]}")
    return value
