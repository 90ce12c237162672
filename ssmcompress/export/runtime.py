"""onnxruntime on this machine: what it runs, and how fast."""

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
    """Return the newest opset that the installed onnxruntime runs and the installed onnx knows."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for opset in range(newest, 1, -1):
        try:
            open_session(_make_smallest_model(opset))
        except InputError:
            continue
        return opset
    raise InputError("the installed onnxruntime runs no opset that the installed onnx knows; update them")


def _make_smallest_model(opset: int) -> bytes:
    """Return an ONNX file of one node, serialised."""
    from onnx import TensorProto, helper

    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "smallest", entries[:1], entries[1:])
    opsets = [helper.make_opsetid("", opset)]
    version = max(10, helper.find_min_ir_version_for(opsets))
    return helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString()


def find_provider(name: str) -> str:
    """Return onnxruntime's name of an execution provider: "cpu" is CPUExecutionProvider.

    Raises:
        InputError: the installed onnxruntime does not have it.
    """
    import onnxruntime

    providers = {p.removesuffix("ExecutionProvider").lower(): p for p in onnxruntime.get_available_providers()}
    if name.lower() not in providers:
        raise InputError(f"provider {name}: the installed onnxruntime has {', '.join(sorted(providers))}")
    return providers[name.lower()]


def open_session(content: bytes | Path, provider: str = "CPUExecutionProvider", weights: str = "") -> Any:
    """Load an ONNX file, given by its content or its path, into an onnxruntime session.

    Args:
        weights: folder with the external data of a file that is given by its content.

    Raises:
        InputError: onnxruntime cannot load the file, or the provider does not work on this machine.
    """
    import onnxruntime
    import torch

    onnxruntime.set_default_logger_severity(4)  # errors are reported below, in one line
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = onnxruntime.InferenceSession(
            content if isinstance(content, bytes) else str(content), options, providers=providers
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise InputError(f"onnxruntime cannot load the graph: {_first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise InputError(f"{provider} does not work on this machine; without `provider`, the CPU is used")
    return session


def run(session: Any, outputs: Sequence[str] | None, images: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of a session for a batch of images.

    Raises:
        InputError: onnxruntime cannot run the graph.
    """
    try:
        return session.run(outputs, {session.get_inputs()[0].name: images})
    except Exception as error:
        raise InputError(f"onnxruntime cannot run the graph: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def choose_forms(scan: str, opset: int) -> tuple[list[str], dict[str, str]]:
    """Return the forms of the scan to choose from, and the reason why each of the others is not available.

    Args:
        scan: one of `FORMS`, or "auto". opset: the opset of the file to be written.

    Raises:
        InputError: the requested form is not available.
    """
    import onnxruntime

    refused = {}
    if opset < STANDARD_OPSET:
        reason = f"LinearAttention is in opset {STANDARD_OPSET} and later, this file is of opset {opset}"
        if newest_opset() < STANDARD_OPSET:
            reason += f", the newest that the installed onnxruntime {onnxruntime.__version__} runs is {newest_opset()}"
        refused["standard"] = reason
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


def rank_by_speed(
    files: Mapping[str, Path], shape: tuple[int, ...], provider: str, batches: Sequence[int] = BATCHES
) -> dict[str, dict[str, float]]:
    """Time ONNX files and return milliseconds by batch size for each, fastest first.

    The order is by the product of the times over the batch sizes. Files that the provider does not run are left out.

    Args:
        shape: shape of one image. batches: the batch sizes.

    Raises:
        InputError: the provider runs none of the files.
    """
    times: dict[str, dict[str, float]] = {}
    failure = None
    for name, file in track(list(files.items()), "timing the scan", len(files)):
        try:
            times[name] = {str(b): statistics.median(time_round(file, provider, (b, *shape), 3)) for b in batches}
        except InputError as error:
            failure = error
    if not times:
        raise failure
    return dict(sorted(times.items(), key=lambda entry: math.prod(entry[1].values())))


def time_round(file: Path, provider: str, shape: tuple[int, ...], repeats: int) -> list[float]:
    """Return milliseconds of consecutive runs of an ONNX file in a new session, after a warm-up run.

    The threads end with the session: those of an idle session keep spinning, and double the time of whatever runs at
    the same time.
    """
    session = open_session(file, provider)
    images = np.zeros(shape, np.float32)
    return time_repeats(lambda: run(session, None, images), repeats)


def time_repeats(call: Callable[[], Any], repeats: int) -> list[float]:
    """Return milliseconds of each of `repeats` calls, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return times
