"""A model as an ONNX file that was run and compared before it is there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ..data.labels import class_names
from ..errors import InputError
from ..evaluation.latency import device_name
from ..files import check_target, replace_files
from ..models.base import TokenModel
from ..progress import track
from .functions import FORMS
from .graph import KEPT_PREFIX, assemble, trace, values_named
from .runtime import BATCHES, block, fastest, forms_for, milliseconds, newest_opset, provider_named
from .verify import ATOL, Verification, verify_onnx

if TYPE_CHECKING:
    import onnx

EXTERNAL_BYTES = 2**31 - 2**24  # protobuf's limit is 2 GB, all but what is around the weights
LATENCY_REPEATS = 4  # in a row, twice
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Exported(Verification):
    """What was written, beside how it compares with its model.

    Attributes:
        opset, dtype, bytes: of the file, with the weights beside it if it has any.
        scan: the form of its scans. scan_ms: milliseconds of each form that was timed, by batch size, the one taken
            first.
        refused: why the other forms were not.
        provider: of onnxruntime, that it was timed and verified on.
        latency: rows {`model` ("dense" or "pruned"), `by` ("torch" or "onnxruntime"), `batch`, `ms`}, medians of
            runs in blocks that take turns; None: not measured. latency_settings: how.
    """

    opset: int = 0
    dtype: str = "float32"
    bytes: int = 0
    scan: str = "scan"
    scan_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    provider: str = "cpu"
    latency: list[dict[str, Any]] | None = None
    latency_settings: dict[str, Any] | None = None


def export_onnx(
    model: TokenModel,
    file: str | Path,
    *,
    data: str | Path | None = None,
    atol: float = ATOL,
    opset: int | None = None,
    scan: str = "auto",
    dtype: str = "float32",
    provider: str = "cpu",
    debug_outputs: bool = False,
    latency: bool = False,
    dense: TokenModel | None = None,
    force: bool = False,
) -> Exported:
    """Write `model`, pruned or dense, as an ONNX file with a dynamic batch, after checking it in onnxruntime.

    Kept counts are static, input `images` is prepared as `model.preprocessing` says, output `logits`. Preprocessing,
    class names, pruning and versions are in the file's metadata, as JSON under "ssmcompress". Weights beyond 2 GB go
    into a file beside it, `<file>.data`.

    Args:
        data: images to verify on, as `open_images` takes them; None: those the model names, else photographs.
        atol: allowed difference of a logit.
        opset: None: the newest that the installed onnxruntime runs.
        scan: how scans are computed, one of `FORMS`, or "auto": the fastest here, at batch 1 and 8.
        dtype: of the matrices in the file, "float32" or "float16"; states and arithmetic are float32 in either.
        provider: onnxruntime's, to choose the scan for and to verify on: "cpu", "cuda", ...
        debug_outputs: the positions that each stage keeps as outputs, too.
        latency: also time onnxruntime beside torch, and beside `dense` in both where that is given.

    Raises:
        VerificationError: the graph computes something else; no file is written.
        InputError: the file exists, or cannot be written; what was asked for cannot be had here.
    """
    import onnx
    import onnxruntime

    file = Path(file)
    if not 0 <= atol < float("inf"):
        raise InputError(f"atol {atol}: expected a number from 0")
    if scan not in (*FORMS, "auto"):
        raise InputError(f"scan {scan!r}: expected auto, {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    check_target(file, force)
    opset = newest_opset() if opset is None else opset
    if opset > newest_opset():
        raise InputError(f"opset {opset}: the installed onnxruntime runs opsets up to {newest_opset()}")
    where = provider_named(provider)
    forms, refused = forms_for(scan, opset)
    images = model.find_images(data)
    traced = trace(model, opset, class_names(images, model.config.num_classes))
    times: dict[str, dict[str, float]] = {}
    if len(forms) > 1:
        with TemporaryDirectory() as place:
            files = {form: _save(assemble(traced, form), Path(place) / f"{form}.onnx") for form in forms}
            times = fastest(files, _image_shape(model), where)
        refused |= {form: f"{provider} does not run it" for form in forms if form not in times}
    form = next(iter(times), forms[0])
    graph = assemble(traced, form, dtype == "float16", values_named(traced, KEPT_PREFIX) if debug_outputs else ())
    with replace_files(file, force) as folder:
        _save(graph, folder / file.name)
        onnx.checker.check_model(str(folder / file.name), full_check=True)
        written = sum(part.stat().st_size for part in folder.iterdir())
        checked = verify_onnx(model, folder / file.name, data=data, atol=atol, provider=provider)
        rows = _latency(model, folder / file.name, dense, form, opset, where) if latency else None
    settings = {
        "repeats": 2 * LATENCY_REPEATS,
        "torch_threads": torch.get_num_threads(),
        "torch_device": device_name(next(model.parameters()).device),
        "onnxruntime": onnxruntime.__version__,
    }
    return Exported(
        **vars(checked),
        opset=opset,
        dtype=dtype,
        bytes=written,
        scan=form,
        scan_ms=times,
        refused=refused,
        provider=provider,
        latency=rows,
        latency_settings=settings if latency else None,
    )


def build_onnx(model: TokenModel, opset: int | None = None, scan: str = "scan") -> onnx.ModelProto:
    """The graph of `model`, checked by onnx but not run."""
    import onnx

    graph = assemble(trace(model, opset or newest_opset()), scan)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _image_shape(model: TokenModel) -> tuple[int, int, int]:
    return model.config.in_chans, *model.config.image_size


def _save(graph: onnx.ModelProto, file: Path) -> Path:
    """Write a graph, with large weights in a file beside it; they are not in the graph any more then."""
    import onnx

    if sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > EXTERNAL_BYTES:
        onnx.save_model(
            graph,
            file,
            save_as_external_data=True,
            location=f"{file.name}.data",
            size_threshold=1024,
            format="protobuf",
        )
    else:
        onnx.save_model(graph, file, format="protobuf")
    return file


def _latency(model, file: Path, dense: TokenModel | None, form: str, opset: int, provider: str) -> list[dict[str, Any]]:
    """Rows of `Exported.latency`."""
    models = {"dense" if model.plan is None else "pruned": (model, file)}
    if dense is None or model.plan is None:
        return _timed(models, provider)
    with TemporaryDirectory() as place:
        beside = _save(assemble(trace(dense, opset), form), Path(place) / "dense.onnx")
        return _timed({"dense": (dense, beside), **models}, provider)


def _timed(models: Mapping[str, tuple[TokenModel, Path]], provider: str) -> list[dict[str, Any]]:
    """Both runtimes on models and their ONNX files, in blocks of runs that take turns."""
    times: dict[tuple[int, str, str], list[float]] = {}
    for batch, name in track([(b, n) for _ in range(2) for b in BATCHES for n in models], "timing", 4 * len(models)):
        (each, file), shape = models[name], (batch, *_image_shape(models[name][0]))
        there = torch.zeros(shape, device=next(each.parameters()).device)
        with torch.inference_mode():
            found = milliseconds(lambda: each(there).cpu(), LATENCY_REPEATS)  # noqa: B023
        times.setdefault((batch, name, "torch"), []).extend(found)
        found = block(file, provider, shape, LATENCY_REPEATS)
        times.setdefault((batch, name, "onnxruntime"), []).extend(found)
    return [
        {"model": name, "by": by, "batch": batch, "ms": statistics.median(values)}
        for (batch, name, by), values in times.items()
    ]
