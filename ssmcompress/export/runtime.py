"""Capabilities and timing of onnxruntime on this machine."""

from __future__ import annotations

import json
import math
import reprlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import InputError, raise_if_out_of_memory
from ..progress import note, track
from .functions import FORMS, STANDARD_OPSET

BATCHES = (1, 8)
METADATA_KEY = "ssmcompress"  # of the metadata of an ONNX file, a JSON object
# The session options recommended in the metadata of exported files. No number of threads is right for every machine: 0
# stands for all cores that the process may use. Measurements are in docs/onnx.md.
SESSION = {"intra_op_num_threads": 0, "config": {"session.intra_op.allow_spinning": "0"}}
# The entries of `config` that a file may set, each "0" or "1"; they only affect the speed. Others are not applied: some
# make onnxruntime write files, or change its results.
CONFIG_ENTRIES = ("session.intra_op.allow_spinning", "session.force_spinning_stop")


@cache
def newest_opset() -> int:
    """Return the newest opset that both the installed onnxruntime and the installed onnx support."""
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
    """Return onnxruntime's name of an execution provider, such as CPUExecutionProvider for "cpu".

    Raises:
        InputError: the installed onnxruntime does not have it.
    """
    import onnxruntime

    providers = {p.removesuffix("ExecutionProvider").lower(): p for p in onnxruntime.get_available_providers()}
    if name.lower() not in providers:
        raise InputError(f"provider {name}: the installed onnxruntime has {', '.join(sorted(providers))}")
    return providers[name.lower()]


def read_session(metadata: str | bytes | None) -> dict[str, Any]:
    """Return the session options recommended by an ONNX file, in the form of `SESSION`.

    Unknown entries are ignored, with a note.

    Args:
        metadata: the JSON text under `METADATA_KEY` in the file's metadata. If it is missing, or has no recommended
            options, as in files of earlier versions, the options are `SESSION`.

    Raises:
        InputError: the text is not a JSON object, or an option has an invalid value.
    """
    if metadata is None:
        return SESSION
    try:
        about = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_METADATA} is not JSON: export the file again") from error
    _expect(isinstance(about, dict), "", about, "an object")
    found = about.get("session")
    if found is None:
        return SESSION
    _expect(isinstance(found, dict), "session", found, "an object")
    threads, config = found.get("intra_op_num_threads", 0), found.get("config", {})
    # bool is a subclass of int in Python, but not in JSON
    whole = isinstance(threads, int) and not isinstance(threads, bool) and threads >= 0
    _expect(whole, "session.intra_op_num_threads", threads, "a whole number from 0")
    _expect(isinstance(config, dict), "session.config", config, "an object")
    used = {key: config[key] for key in CONFIG_ENTRIES if key in config}
    for key, value in used.items():
        _expect(value in ("0", "1"), f"session.config[{key!r}]", value, 'the text "0" or "1"')
    if unknown := [*(found.keys() - SESSION.keys()), *(config.keys() - used.keys())]:
        names = ", ".join(map(reprlib.repr, sorted(unknown)[:3]))
        note(f"{_METADATA}: {len(unknown)} unknown session options are not applied ({names})")
    return {"intra_op_num_threads": threads, "config": used}


_METADATA = f"the metadata {METADATA_KEY!r} of the ONNX file"


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise an InputError that names an entry of the metadata if its value is not as expected."""
    if not holds:
        where = f"{_METADATA}: {name}" if name else _METADATA
        raise InputError(f"{where} is {reprlib.repr(value)}, expected {expected}; export the file again")


def describe_session(recommended: Mapping[str, Any]) -> str:
    """Format session options, in the form of `SESSION`, as a line of text."""
    entries = [f"{key}={value}" for key, value in recommended["config"].items()]
    return ", ".join([f"intra_op_num_threads={recommended['intra_op_num_threads'] or 'all cores'}", *entries])


def session_options(recommended: Mapping[str, Any] = SESSION) -> Any:
    """Return the onnxruntime session options.

    Args:
        recommended: options in the form of `SESSION`, from an exported file. The number of threads is limited to that
            of torch, which stands for the cores that the process may use.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    cores = torch.get_num_threads()
    # 0 is replaced here, because in onnxruntime 0 also pins each thread to a core.
    options.intra_op_num_threads = min(recommended["intra_op_num_threads"] or cores, cores)
    for key, value in recommended["config"].items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 4  # errors are raised, and reported in one line
    return options


def open_session(
    content: bytes | Path,
    provider: str = "CPUExecutionProvider",
    weights: str = "",
    recommended: Mapping[str, Any] = SESSION,
) -> Any:
    """Load an ONNX file, given by its content or its path, into an onnxruntime session.

    Args:
        weights: folder with the external data of a file given by its content.
        recommended: the session options, from `read_session`.

    Raises:
        InputError: onnxruntime cannot load the file, or the provider does not work on this machine.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # errors are reported below, in one line
    options = session_options(recommended)
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = onnxruntime.InferenceSession(
            content if isinstance(content, bytes) else str(content), options, providers=providers
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise_if_out_of_memory(error)
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
        raise_if_out_of_memory(error)
        raise InputError(f"onnxruntime cannot run the graph: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def choose_forms(scan: str, opset: int) -> tuple[list[str], dict[str, str]]:
    """Return the candidate forms of the scan, and the reason why each of the others is unavailable.

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

    They are sorted by the product of the times over the batch sizes. Files that the provider cannot run are omitted.

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

    The threads end with the session, so that none of them competes with the next measurement.
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
