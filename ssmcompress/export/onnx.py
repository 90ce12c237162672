"""Export of a model to an ONNX file, which is run and compared with the model before it is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ..data.labels import class_names
from ..errors import InputError
from ..evaluation.latency import device_name, summarize_times
from ..evaluation.timings import describe_load, system_load
from ..extras import require_extra
from ..files import ONNX, check_target, replace_files
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..models.inputs import check_model
from ..models.modes import runs_in_eval_mode
from ..models.precision import to_float32
from ..progress import track
from .functions import FORMS
from .graph import KEPT_PREFIX, assemble, find_values, trace
from .runtime import (
    BATCHES,
    SESSION,
    choose_forms,
    find_provider,
    newest_opset,
    rank_by_speed,
    session_options,
    time_repeats,
    time_round,
)
from .verify import ATOL, Verification, takes_batches, verify_onnx

if TYPE_CHECKING:
    import onnx

EXTERNAL_BYTES = 2**31 - 2**24  # protobuf's limit of 2 GB, less what surrounds the weights
LATENCY_REPEATS = 4  # timed calls per round, in two rounds
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Exported(Verification):
    """Properties of the written file, in addition to the comparison with its model.

    Attributes:
        opset, dtype: of the file. bytes: its size, including a second file with the weights if there is one.
        scan: the form of its scans. scan_ms: milliseconds of each timed form by batch size, with the chosen form first.
        refused: the reason why each of the other forms was not timed.
        provider: onnxruntime's execution provider with which the file was timed and verified.
        session: the session options of onnxruntime recommended in the file's metadata, with which it was timed and
            verified: `intra_op_num_threads`, 0 for all cores that a process may use, and entries of `config`.
        latency: rows {`model` ("dense" or "pruned"), `by` ("torch" or "onnxruntime"), `batch`, `ms`, `ms_low`,
            `ms_high`}, medians and quartiles over alternating rounds of calls; None: not measured.
        latency_settings: the settings of the measurement, with the `load` of the machine before it.
    """

    opset: int = 0
    dtype: str = "float32"
    bytes: int = 0
    scan: str = "scan"
    scan_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    provider: str = "cpu"
    session: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(SESSION))
    latency: list[dict[str, Any]] | None = None
    latency_settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class OnnxOptions:
    """Options for exporting and verifying a model.

    Attributes:
        data: the images for verification, see `open_images`. None: those named by the model, else photographs.
        atol: the largest allowed difference of a logit.
        opset: the ONNX opset. None: the newest one supported by the installed onnxruntime.
        scan: form of the scans, one of `FORMS`, or "auto": the fastest on this machine at batch sizes 1 and 8 (only 1
            if 8 images have more than 34 million logits).
        dtype: dtype of the matrices in the file, "float32" or "float16"; states and arithmetic are float32 in both
            cases.
        provider: onnxruntime's execution provider for timing and verification: "cpu", "cuda", ...
        debug_outputs: whether the kept positions of each stage become additional outputs.
        latency: whether to time onnxruntime and torch, also on the dense model if given.
    """

    data: str | Path | None = None
    atol: float = ATOL
    opset: int | None = None
    scan: str = "auto"
    dtype: str = "float32"
    provider: str = "cpu"
    debug_outputs: bool = False
    latency: bool = False


@runs_in_eval_mode
def export_onnx(
    model: TokenModel,
    file: str | Path,
    options: OnnxOptions = OnnxOptions(),
    *,
    dense: TokenModel | None = None,
    force: bool = False,
) -> Exported:
    """Write `model`, pruned or dense, as an ONNX file with a dynamic batch, after checking it in onnxruntime.

    Kept counts are static, as is the image size, `model.config.image_size`. The input `images` must be preprocessed as
    in `model.preprocessing`; the output is `logits`, (batch, classes), or for segmentation (batch, classes, height,
    width). The file's metadata has the task, preprocessing, class names, pruning, versions and recommended onnxruntime
    session options, as JSON under "ssmcompress". Weights beyond 2 GB are written to a second file in the same folder,
    `<file>.data`.

    Args:
        dense: the model before pruning, timed as well if `options.latency`.
        force: whether to replace an existing file.

    Raises:
        VerificationError: the outputs of the graph differ; no file is written.
        InputError: the file exists or cannot be written, or an option is not available on this machine.
    """
    require_extra("onnx")
    import onnx
    import onnxruntime

    check_model(model)
    model, dense = to_float32(model), None if dense is None else to_float32(dense)
    file, provider = Path(file), options.provider
    if not 0 <= options.atol < float("inf"):
        raise InputError(f"atol {options.atol}: expected a number from 0")
    if options.scan not in (*FORMS, "auto"):
        raise InputError(f"scan {options.scan!r}: expected auto, {', '.join(FORMS)}")
    if options.dtype not in DTYPES:
        raise InputError(f"dtype {options.dtype!r}: expected {' or '.join(DTYPES)}")
    check_target(file, force, kind=ONNX)
    opset = newest_opset() if options.opset is None else options.opset
    if opset > newest_opset():
        raise InputError(f"opset {opset}: the installed onnxruntime runs opsets up to {newest_opset()}")
    provider_name = find_provider(provider)
    forms, refused = choose_forms(options.scan, opset)
    if not any(isinstance(block, ScanBlock) for block in model.blocks):
        forms, refused = forms[:1], {}  # without scans, all forms are the same
    images = model.find_images(options.data)
    traced = trace(model, opset, class_names(images, model.config.num_classes))
    times: dict[str, dict[str, float]] = {}
    if len(forms) > 1:
        with TemporaryDirectory() as folder:
            files = {form: _save(assemble(traced, form), Path(folder) / f"{form}.onnx") for form in forms}
            times = rank_by_speed(files, model.input_shape, provider_name, _batches(model))
        refused |= {form: f"{provider} does not run it" for form in forms if form not in times}
    form = next(iter(times), forms[0])
    kept = find_values(traced, KEPT_PREFIX) if options.debug_outputs else ()
    graph = assemble(traced, form, options.dtype == "float16", kept)
    with replace_files(file, force, ONNX) as folder:
        _save(graph, folder / file.name)
        onnx.checker.check_model(str(folder / file.name), full_check=True)
        size = sum(part.stat().st_size for part in folder.iterdir())
        load = system_load()
        verification = verify_onnx(model, folder / file.name, data=options.data, atol=options.atol, provider=provider)
        rows = (
            _measure_latency(model, folder / file.name, dense, form, opset, provider_name) if options.latency else None
        )
    settings = {
        "repeats": 2 * LATENCY_REPEATS,
        "torch_threads": torch.get_num_threads(),
        "torch_device": device_name(next(model.parameters()).device),
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_threads": session_options().intra_op_num_threads,
        **describe_load(load),
    }
    return Exported(
        **vars(verification),
        opset=opset,
        dtype=options.dtype,
        bytes=size,
        scan=form,
        scan_ms=times,
        refused=refused,
        provider=provider,
        latency=rows,
        latency_settings=settings if options.latency else None,
    )


def build_onnx(model: TokenModel, opset: int | None = None, scan: str = "scan") -> onnx.ModelProto:
    """Build the ONNX graph of `model`, checked by onnx but not run."""
    require_extra("onnx")
    import onnx

    graph = assemble(trace(model, opset or newest_opset()), scan)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _batches(model: TokenModel) -> tuple[int, ...]:
    """Return the batch sizes to time: only one image if 8 would take a few GB, and minutes."""
    return BATCHES if takes_batches(model) else BATCHES[:1]


def _save(graph: onnx.ModelProto, file: Path) -> Path:
    """Write a graph to a file; beyond protobuf's limit, large weights move from `graph` into a second file."""
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


def _measure_latency(
    model: TokenModel, file: Path, dense: TokenModel | None, form: str, opset: int, provider: str
) -> list[dict[str, Any]]:
    """Return the rows of `Exported.latency`."""
    models = {"dense" if model.plan is None else "pruned": (model, file)}
    if dense is None or model.plan is None:
        return _time_models(models, provider)
    with TemporaryDirectory() as folder:
        dense_file = _save(assemble(trace(dense, opset), form), Path(folder) / "dense.onnx")
        return _time_models({"dense": (dense, dense_file), **models}, provider)


def _time_models(models: Mapping[str, tuple[TokenModel, Path]], provider: str) -> list[dict[str, Any]]:
    """Time models in torch and their ONNX files in onnxruntime, in alternating rounds, and return the medians."""
    times: dict[tuple[int, str, str], list[float]] = {}
    batches = _batches(next(iter(models.values()))[0])
    rounds = [(batch, name) for _ in range(2) for batch in batches for name in models]
    for batch, name in track(rounds, "timing", len(rounds)):
        (model, file), shape = models[name], (batch, *models[name][0].input_shape)
        images = torch.zeros(shape, dtype=torch.float32, device=next(model.parameters()).device)
        with torch.inference_mode():
            round_ms = time_repeats(lambda: model(images).cpu(), LATENCY_REPEATS)  # noqa: B023
        times.setdefault((batch, name, "torch"), []).extend(round_ms)
        round_ms = time_round(file, provider, shape, LATENCY_REPEATS)
        times.setdefault((batch, name, "onnxruntime"), []).extend(round_ms)
    return [
        {"model": name, "by": by, "batch": batch, **summarize_times(values)}
        for (batch, name, by), values in times.items()
    ]
