"""Export of a model as one file, next to it or in its folder, recorded in its report."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..export.onnx import Exported, OnnxOptions, export_onnx
from ..files import MODEL, ONNX, check_target, write_file
from ..hub_names import WEIGHTS, name_model, parse_hub_name
from ..models.base import TokenModel
from ..models.saved import serialise
from .report import read_report, record_export


def choose_file(model: str, output: str | None, onnx: bool, force: bool) -> Path:
    """Return the file that an export of a model folder or checkpoint writes, checked before the long work.

    By default ONNX goes into a model folder, a .safetensors file next to it, and both next to a checkpoint file. For a
    model on the Hub, both go into the working directory.

    Raises:
        InputError: the file exists, cannot be written, is the input, or has the suffix of another kind.
    """
    path, suffix = Path(model), ".onnx" if onnx else ".safetensors"
    if output is not None:
        file = Path(output)
        ending = file.suffix.lower()
        if not onnx and ending == ".onnx":
            raise InputError(f"{file} is the name of an ONNX file: give `onnx=True`, or a name that ends in {suffix}")
        if onnx and ending in WEIGHTS:
            raise InputError(f"{file} is not the name of an ONNX file: expected a name that ends in {suffix}")
    elif parse_hub_name(model) is not None:
        file = Path(f"{name_model(model)}{suffix}")
    elif path.is_dir():
        file = path / f"model{suffix}" if onnx else path.resolve().with_name(path.resolve().name + suffix)
    else:
        same = path.suffix == suffix
        file = path.with_name(f"{path.stem}-export{suffix}") if same else path.with_suffix(suffix)
    check_target(file, force, [path], kind=ONNX if onnx else MODEL)
    return file


def export_weights(model: TokenModel, source: str, file: Path, force: bool) -> None:
    """Write a self-describing .safetensors file, including the report of the folder `source` if there is one."""
    try:
        report = json.dumps(read_report(source)[1])
    except InputError:  # a report is optional
        report = None
    write_file(file, serialise(model, report), force, MODEL)


def export_graph(
    model: TokenModel, source: str, file: Path, options: OnnxOptions, *, dense: TokenModel | None, force: bool
) -> Exported:
    """Write a verified ONNX file, and record it in the report of the folder `source`.

    Raises:
        VerificationError: the outputs of the graph differ; no file is written.
    """
    result = export_onnx(model, file, options, dense=dense, force=force)
    record_export(source, file, result)
    return result
