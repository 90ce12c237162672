"""onnxruntime: what it can run on this machine, and how fast."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import InputError
from ..progress import track
from .functions import FORMS, STANDARD_OPSET

BATCHES = (1, 8)


@cache
def newest_opset() -> int:
    """The newest opset that both the installed onnxruntime runs and the installed onnx knows."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for opset in range(newest, 1, -1):
        try:
            session(_smallest(opset))
        except InputError:
            continue
        return opset
    raise InputError("the installed onnxruntime runs no opset that the installed onnx knows; update them")


def _smallest(opset: int) -> bytes:
    from onnx import TensorProto, helper

    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "smallest", entries[:1], entries[1:])
    opsets = [helper.make_opsetid("", opset)]
    version = max(10, helper.find_min_ir_version_for(opsets))
    return helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString()


def provider_named(name: str) -> str:
    """onnxruntime's name of an execution provider: "cpu" is CPUExecutionProvider.

    Raises:
        InputError: not in the installed onnxruntime.
    """
    import onnxruntime

    known = {p.removesuffix("ExecutionProvider").lower(): p for p in onnxruntime.get_available_providers()}
    if name.lower() not in known:
        raise InputError(f"provider {name}: the installed onnxruntime has {', '.join(sorted(known))}")
    return known[name.lower()]


def session(content: bytes | Path, provider: str = "CPUExecutionProvider", weights: str = "") -> Any:
    """A session of an ONNX file, by content or path.

    Args:
        weights: folder of what a file given by content keeps beside it.

    Raises:
        InputError: onnxruntime cannot load it, or the provider does not work on this machine.
    """
    import onnxruntime
    import torch

    onnxruntime.set_default_logger_severity(4)  # what fails is said below, in one line
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        made = onnxruntime.InferenceSession(
            content if isinstance(content, bytes) else str(content), options, providers=providers
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise InputError(f"onnxruntime cannot load the graph: {_first_line(error)}") from error
    if made.get_providers()[0] != provider:
        raise InputError(f"{provider} does not work on this machine")
    return made


def run(made: Any, outputs: Sequence[str] | None, images: np.ndarray) -> list[np.ndarray]:
    """What a session gives for images; an InputError if it cannot run."""
    try:
        return made.run(outputs, {made.get_inputs()[0].name: images})
    except Exception as error:
        raise InputError(f"onnxruntime cannot run the graph: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def forms_for(scan: str, opset: int) -> tuple[list[str], dict[str, str]]:
    """The forms of the scan to choose from, and why others are not among them.

    Args:
        scan: one of `FORMS`, or "auto". opset: of the file to be.

    Raises:
        InputError: the form that was asked for cannot be had.
    """
    import onnxruntime

    refused = {}
    if opset < STANDARD_OPSET:
        why = f"LinearAttention is in opset {STANDARD_OPSET} and later, this file is of opset {opset}"
        if newest_opset() < STANDARD_OPSET:
            why += f", the newest that the installed onnxruntime {onnxruntime.__version__} runs is {newest_opset()}"
        refused["standard"] = why
    if not _has_contributed_attention():
        refused["linear-attention"] = f"onnxruntime {onnxruntime.__version__} has no com.microsoft.LinearAttention"
    if scan in refused:
        raise InputError(f"`scan` {scan}: {refused[scan]}; use `scan` auto")
    if scan != "auto":
        return [scan], {}
    return [form for form in FORMS if form not in refused], refused


@cache
def _has_contributed_attention() -> bool:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas = getattr(state, "get_all_operator_schema", list)()
    return any((s.name, s.domain) == ("LinearAttention", "com.microsoft") for s in schemas)


def fastest(files: Mapping[str, Path], shape: tuple[int, ...], provider: str) -> dict[str, dict[str, float]]:
    """Milliseconds of each ONNX file by batch size, the one with the least product of them first.

    Files that the provider does not run are left out.

    Args:
        shape: of one image.
    """
    times: dict[str, dict[str, float]] = {}
    failed = None
    for name, file in track(list(files.items()), "timing the scan", len(files)):
        try:
            times[name] = {str(b): statistics.median(block(file, provider, (b, *shape), 3)) for b in BATCHES}
        except InputError as error:
            failed = error
    if not times:
        raise failed
    return dict(sorted(times.items(), key=lambda entry: math.prod(entry[1].values())))


def block(file: Path, provider: str, shape: tuple[int, ...], repeats: int) -> list[float]:
    """Milliseconds of runs in a row, in a session of their own, after one that is not timed.

    Its threads end with it: those of a session that waits go on spinning, and double the time of what runs beside it.
    """
    made = session(file, provider)
    images = np.zeros(shape, np.float32)
    return milliseconds(lambda: run(made, None, images), repeats)


def milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Of so many calls, after one that is not timed."""
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return times
