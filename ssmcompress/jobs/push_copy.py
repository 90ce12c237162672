"""A copy of a folder for publishing, without local paths."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, raise_if_out_of_memory
from ..extras import require_extra
from ..files import RECIPE_FILE, read_text
from ..hub_names import HubName
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from .local_paths import PathRemover
from .push_card import make_card
from .push_content import CARD_FILE, EXPECTED, Content, list_hub_names
from .report import REPORT_FILE


@contextmanager
def cleaned_copy(folder: Path, content: Content, name: HubName, license_name: str | None) -> Iterator[Path]:
    """Yield a temporary folder with the files to publish, without local paths."""
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
        text: of the file, whose comment lines are kept. recipe: the mapping in it.
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
        encoded += b" " * (-len(encoded) % 8)  # tensors are aligned to eight bytes
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
        raise_if_out_of_memory(error)
        raise InputError(f"{source}: not an ONNX file ({type(error).__name__})") from error
    texts = {entry.key: _clean_json_text(entry.value, remover) for entry in model.metadata_props}
    if texts == {entry.key: entry.value for entry in model.metadata_props}:
        target.write_bytes(source.read_bytes())
        return
    for entry in model.metadata_props:
        entry.value = texts[entry.key]
    target.write_bytes(model.SerializeToString())


def _clean_json_text(text: str, remover: PathRemover) -> str:
    """Clean a text; if it is JSON, clean the texts in it, since paths are escaped there."""
    value = _parse(text)
    return json.dumps(remover.clean(value)) if isinstance(value, (dict, list)) else remover.clean_text(text)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
