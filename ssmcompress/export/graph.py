"""Conversion of a model to an ONNX graph: `trace` exports it once, `assemble` adds the functions of a form of scan."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.base import TokenModel
from ..models.running import Decision
from ..models.saved import describe, versions
from ..ops import register_backend, use_backend
from ..pruning.tokens import Tokens
from . import lowering
from .functions import function_text
from .lowering import DOMAIN
from .runtime import METADATA_KEY, SESSION

if TYPE_CHECKING:
    import onnx

# This backend computes nothing: while it is in use, each op becomes a node of the graph.
register_backend("onnx", lowering)

KEPT_PREFIX = "kept_after_"
FEATURES_PREFIX = "features_after_"
FILLED = "filled_batch"  # the dimension of the batch inside the graph, which is 1 for an empty batch
OLDEST_OPSET = 18  # the oldest opset that torch's exporter writes
NEWEST_TRACED = 25  # the newest opset that torch's exporter writes


def trace(model: TokenModel, opset: int, classes: Sequence[str] | None = None) -> onnx.ModelProto:
    """Export `model` as a graph that calls a function for each op; `assemble` adds the functions.

    Weights keep the names and values of the model; each node is named after its layer. The kept tokens of each stage
    and the features after each layer are named values, for example `kept_after_5` and `features_after_5`.

    Args:
        opset: opset of the file. classes: class names for the metadata if the model has none.

    Raises:
        InputError: the opset is not supported.
    """
    import onnx
    import onnxscript.optimizer

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset}: expected one from {OLDEST_OPSET} to {newest}, the newest this onnx knows")
    model = copy.deepcopy(model).cpu().float().eval()
    lowering.lower_modules(model)
    kept = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
    features = [f"{FEATURES_PREFIX}{layer}" for layer in range(1, len(model.blocks) + 1)]
    with use_backend("onnx"), _silence_exporter(), torch.no_grad():
        program = torch.onnx.export(
            _WithIntermediates(model),
            (torch.zeros(2, *model.input_shape, dtype=torch.float32, device="cpu"),),
            dynamo=True,
            optimize=False,
            opset_version=min(opset, NEWEST_TRACED),
            input_names=["images"],
            output_names=["logits", *kept, *features],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        # Expressions of weights are not folded, so that weights keep their values. A runtime computes such expressions
        # once, when it loads the file.
        onnxscript.optimizer.optimize_ir(program.model, should_fold=_should_fold, inline=False)
    graph = program.model_proto
    _rename_nodes(graph)
    graph.graph.value_info.extend(graph.graph.output[1:])
    del graph.graph.output[1:]
    _fill_batch(graph)
    _set_opset(graph, opset)
    metadata = {
        **_remove_paths(describe(model)),
        "task": model.task.name,
        "classes": list(model.classes or classes or ()) or None,
        "session": SESSION,
        "versions": versions(),
    }
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(metadata)})
    graph.producer_name, graph.producer_version = "ssmcompress", versions()["ssmcompress"]
    return graph


def assemble(
    traced: onnx.ModelProto, scan: str, half: bool = False, debug_outputs: Sequence[str] = ()
) -> onnx.ModelProto:
    """Return a runnable copy of a traced graph, with the functions that it calls.

    Args:
        scan: form of the scans, one of `functions.FORMS`.
        half: whether to store the matrices as float16; they are cast to float32 before use.
        debug_outputs: named values of the graph that become outputs, in addition to the logits.
    """
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(traced)
    add_outputs(graph, debug_outputs)
    for output in graph.graph.output:
        _trim_batch(graph, output)
    opset = next(o.version for o in graph.opset_import if o.domain == "")
    names = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}
    graph.functions.extend(onnx.parser.parse_function(function_text(name, opset, scan)) for name in sorted(names))
    domains = {DOMAIN, *(o.domain for function in graph.functions for o in function.opset_import)}
    for domain in domains - {o.domain for o in graph.opset_import}:
        graph.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    if half:
        _store_half(graph)
    return graph


def add_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make named values outputs of the graph, with the types in its value_info."""
    import onnx

    infos = {info.name: info for info in graph.graph.value_info}
    for name in names:
        graph.graph.output.append(infos.get(name) or onnx.ValueInfoProto(name=name))


def find_values(graph: onnx.ModelProto, prefix: str) -> list[str]:
    """Return the names of the values that start with `prefix`, in the order of the graph."""
    names = (name for node in graph.graph.node for name in node.output)
    return [name for name in names if isinstance(name, str) and name.startswith(prefix)]  # invalid UTF-8 gives bytes


class _WithIntermediates(nn.Module):
    """Wraps a model with the kept positions of its stages and the features after its layers as additional outputs.

    Args:
        model: its `step` is replaced.
    """

    def __init__(self, model: TokenModel):
        super().__init__()
        self.model = model
        self.recorder = model.step = _Recorder(model.step)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.recorder.kept, self.recorder.features = [], []
        logits, _ = self.model.trace(images)
        return logits, *self.recorder.kept, *self.recorder.features


class _Recorder:
    """`TokenModel.step` that records the outputs of the layers."""

    def __init__(self, step: Callable[[int, Tokens], tuple[Tokens, Decision | None]]):
        self.step = step
        self.kept: list[Tensor] = []
        self.features: list[Tensor] = []

    def __call__(self, layer: int, tokens: Tokens, protected_only: bool = False) -> tuple[Tokens, Decision | None]:
        tokens, decision = self.step(layer, tokens, protected_only)
        self.kept += [decision.kept] if decision else []
        self.features.append(tokens.features)
        return tokens, decision


def _should_fold(node: Any) -> bool | None:
    """Return False for a node that reads a weight; else None, to let the optimizer decide."""
    return False if any(value is not None and value.is_initializer() for value in node.inputs) else None


def _rename_nodes(graph: onnx.ModelProto) -> None:
    """Name weights as in the checkpoint, nodes after their layer ("layers.3.mixer.in_proj/MatMul"), values after nodes.

    The exporter's metadata is removed, because it contains file names and lines of code of this machine.
    """
    wrapper = "model."
    values = {t.name: t.name.removeprefix(wrapper) for t in graph.graph.initializer if t.name.startswith(wrapper)}
    fixed = {"images", "logits", *(v.name for v in graph.graph.output)}
    uses: Counter[str] = Counter()
    scope = ""
    for node in graph.graph.node:
        metadata = {p.key: p.value for p in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" in metadata:  # nodes created by the optimizer belong to the enclosing scope
            scopes = [s for s in ast.literal_eval(metadata["pkg.torch.onnx.name_scopes"])[:-1] if s.startswith(wrapper)]
            scope = scopes[-1].removeprefix(wrapper) if scopes else ""
        name = f"{scope or 'model'}/{node.op_type.split('_')[0]}"
        uses[name] += 1
        node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"
        for index, value in enumerate(node.output):
            if value and value not in fixed:
                values[value] = node.name if len(node.output) == 1 else f"{node.name}:{index}"
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [values.get(name, name) for name in names]
    weights = {tensor.name for tensor in graph.graph.initializer}
    infos = [info for info in graph.graph.value_info if info.name not in weights]  # a weight already has its type
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(infos)
    for value in (*graph.graph.initializer, *graph.graph.value_info):
        value.name = values.get(value.name, value.name)
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output,
                 *graph.graph.value_info, *graph.graph.initializer):  # fmt: skip
        del part.metadata_props[:]
        part.doc_string = ""


def _fill_batch(graph: onnx.ModelProto) -> None:
    """Make the graph process one image of zeros for an empty batch; `_trim_batch` removes it from an output."""
    import onnx

    filled = "images/filled"
    for node in graph.graph.node:
        node.input[:] = [filled if name == "images" else name for name in node.input]
    node = onnx.helper.make_node("FillBatch", ["images"], [filled], name="images/FillBatch", domain=DOMAIN)
    graph.graph.node.insert(0, node)
    for info in graph.graph.value_info:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = FILLED


def _trim_batch(graph: onnx.ModelProto, output: onnx.ValueInfoProto) -> None:
    """Remove the row of an image that `_fill_batch` added from an output of the graph."""
    import onnx

    name = output.name
    filled = f"filled/{name}"
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [filled if value == name else value for value in names]
    for info in graph.graph.value_info:
        if info.name == name:
            info.name = filled
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    output.type.tensor_type.shape.dim[0].dim_param = batch
    node = onnx.helper.make_node("TrimBatch", [filled, "images"], [name], name=f"{name}/TrimBatch", domain=DOMAIN)
    graph.graph.node.append(node)


def _set_opset(graph: onnx.ModelProto, opset: int) -> None:
    """Set the graph's opset to the one it was traced for, or a newer one.

    In newer opsets the operators used here gained types and attributes (Range in 27) without changing their meaning,
    and every file is tested before it is written to its final location.
    """
    import onnx

    entry = next(o for o in graph.opset_import if o.domain == "")
    entry.version = opset
    graph.ir_version = max(10, onnx.helper.find_min_ir_version_for([entry]))


def _store_half(graph: onnx.ModelProto) -> None:
    """Store matrices and convolutions as float16; vectors and parameters of the state are small and stay float32."""
    import onnx

    nodes = []
    for tensor in graph.graph.initializer:
        if not tensor.name.endswith("weight") or len(tensor.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if not np.isfinite(halved).all():
            raise InputError(f"{tensor.name} has values beyond float16's 65504; export it as float32")
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halved, name))
        cast = f"{name}/float32"
        nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=f"{name}/Cast", to=onnx.TensorProto.FLOAT))
        for node in graph.graph.node:
            node.input[:] = [cast if i == name else i for i in node.input]
    nodes += graph.graph.node
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


# Entries of `pruning` that describe how a model was made.
RECORDS = ("source", "command", "reconstruction", "finetuning", "steps")


def _remove_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without local paths, because ONNX files are meant to be shared.

    The records of the steps, among them reconstruction and fine-tuning, are also removed, because they name data.
    """
    pruning = config["pruning"]
    if pruning is not None:
        pruning = {k: v for k, v in pruning.items() if k not in RECORDS}
        pruning["source"] = {"sha256": config["pruning"]["source"]["sha256"]}
    return {**config, "data": None, "pruning": pruning}


@contextlib.contextmanager
def _silence_exporter():
    """Silence the exporter's log and warnings, and redirect its prints from stdout, which is for program output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
