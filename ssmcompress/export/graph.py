"""From a model to an ONNX graph: traced once, then given the functions of one form of the scan."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.base import TokenModel
from ..models.checkpoint import describe, versions
from ..ops import register_backend, use_backend
from . import lowering
from .functions import function_text
from .lowering import DOMAIN

if TYPE_CHECKING:
    import onnx

# Not for computing: while it is in use, each op becomes a node of a graph.
register_backend("onnx", lowering)

KEPT_PREFIX = "kept_after_"
FEATURES_PREFIX = "features_after_"
METADATA_KEY = "ssmcompress"
OLDEST_OPSET = 18  # torch's exporter writes none older
NEWEST_TRACED = 25  # nor newer ones than this


def trace(model: TokenModel, opset: int, classes: Sequence[str] | None = None) -> onnx.ModelProto:
    """The graph of `model` with a call of a function for each op, but without those functions.

    Weights have the names and values of the model's, nodes those of the layer that they belong to. The tokens that
    each stage keeps and the features after each layer are named values, `kept_after_5` and `features_after_5`.

    Args:
        opset: of the file. classes: names of the classes, for the metadata.

    Raises:
        InputError: an opset that cannot be written.
    """
    import onnx
    import onnxscript.optimizer

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset}: expected one from {OLDEST_OPSET} to {newest}, the newest this onnx knows")
    model = copy.deepcopy(model).cpu().float().eval()
    config = model.config
    kept = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
    features = [f"{FEATURES_PREFIX}{layer}" for layer in range(1, len(model.blocks) + 1)]
    with use_backend("onnx"), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _WithInsides(model),
            (torch.zeros(2, config.in_chans, *config.image_size),),
            dynamo=True,
            optimize=False,
            opset_version=min(opset, NEWEST_TRACED),
            input_names=["images"],
            output_names=["logits", *kept, *features],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        # Weights are left as they are: what is computed of them alone, a runtime computes once when it loads the file.
        onnxscript.optimizer.optimize_ir(program.model, should_fold=_unless_of_weights, inline=False)
    graph = program.model_proto
    _name_for_people(graph)
    graph.graph.value_info.extend(graph.graph.output[1:])
    del graph.graph.output[1:]
    _stamp(graph, opset)
    about = {**_public(describe(model)), "classes": list(classes) if classes else None, "versions": versions()}
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(about)})
    graph.producer_name, graph.producer_version = "ssmcompress", versions()["ssmcompress"]
    return graph


def assemble(
    traced: onnx.ModelProto, scan: str, half: bool = False, debug_outputs: Sequence[str] = ()
) -> onnx.ModelProto:
    """A copy of a traced graph that can be run.

    Args:
        scan: the form of `onnx_functions.FORMS` that scans are computed in.
        half: store the matrices as float16; they are cast to float32 where they are used.
        debug_outputs: named values of the graph that become outputs, beside the logits.
    """
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(traced)
    opset = next(o.version for o in graph.opset_import if o.domain == "")
    names = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}
    graph.functions.extend(onnx.parser.parse_function(function_text(name, opset, scan)) for name in sorted(names))
    domains = {o.domain for function in graph.functions for o in function.opset_import}
    for domain in domains - {o.domain for o in graph.opset_import}:
        graph.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    if half:
        _store_half(graph)
    add_outputs(graph, debug_outputs)
    return graph


def add_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make named values outputs, of the type that is noted for them in the graph."""
    import onnx

    known = {info.name: info for info in graph.graph.value_info}
    for name in names:
        graph.graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))


def values_named(graph: onnx.ModelProto, prefix: str) -> list[str]:
    """Names of the values that begin so, in the order of the graph."""
    return [name for node in graph.graph.node for name in node.output if name.startswith(prefix)]


class _WithInsides(nn.Module):
    """The model, with what its stages keep and what its layers give as outputs."""

    def __init__(self, model: TokenModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens, kept, features = self.model.embed(images), [], []
        for layer in range(1, len(self.model.blocks) + 1):
            tokens, decision = self.model.step(layer, tokens)
            kept += [decision.kept] if decision else []
            features.append(tokens.features)
        return self.model.readout(tokens), *kept, *features


def _unless_of_weights(node: Any) -> bool | None:
    return False if any(value is not None and value.is_initializer() for value in node.inputs) else None


def _name_for_people(graph: onnx.ModelProto) -> None:
    """Weights as in the checkpoint; nodes by their layer, "layers.3.mixer.in_proj/MatMul"; values by their node.

    And no traces of this machine: the exporter leaves file names and lines of code.
    """
    wrapper = "model."
    values = {t.name: t.name.removeprefix(wrapper) for t in graph.graph.initializer if t.name.startswith(wrapper)}
    fixed = {"images", "logits", *(v.name for v in graph.graph.output)}
    seen: Counter[str] = Counter()
    scope = ""
    for node in graph.graph.node:
        about = {p.key: p.value for p in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" in about:  # what the optimizer made belongs to what is around it
            scopes = [s for s in ast.literal_eval(about["pkg.torch.onnx.name_scopes"])[:-1] if s.startswith(wrapper)]
            scope = scopes[-1].removeprefix(wrapper) if scopes else ""
        name = f"{scope or 'model'}/{node.op_type.split('_')[0]}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for index, value in enumerate(node.output):
            if value and value not in fixed:
                values[value] = node.name if len(node.output) == 1 else f"{node.name}:{index}"
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [values.get(name, name) for name in names]
    weights = {tensor.name for tensor in graph.graph.initializer}
    noted = [info for info in graph.graph.value_info if info.name not in weights]  # a weight says itself what it is
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(noted)
    for named in (*graph.graph.initializer, *graph.graph.value_info):
        named.name = values.get(named.name, named.name)
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output,
                 *graph.graph.value_info, *graph.graph.initializer):  # fmt: skip
        del part.metadata_props[:]
        part.doc_string = ""


def _stamp(graph: onnx.ModelProto, opset: int) -> None:
    """Give the graph its opset: the one it was traced for, or a newer one.

    Operators here have gained types and attributes since (Range in 27), no other meaning; and a file is run before it
    is there.
    """
    import onnx

    entry = next(o for o in graph.opset_import if o.domain == "")
    entry.version = opset
    graph.ir_version = max(10, onnx.helper.find_min_ir_version_for([entry]))


def _store_half(graph: onnx.ModelProto) -> None:
    """Matrices and convolutions as float16. What is a vector, or belongs to the state, is small and stays float32."""
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
        wide = f"{name}/float32"
        nodes.append(onnx.helper.make_node("Cast", [name], [wide], name=f"{name}/Cast", to=onnx.TensorProto.FLOAT))
        for node in graph.graph.node:
            node.input[:] = [wide if i == name else i for i in node.input]
    everything = [*nodes, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(everything)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the paths of the machine it was made on: an ONNX file is made to be given away.

    So without the record of the reconstruction, too, which names the data.
    """
    pruning = config["pruning"]
    if pruning is not None:
        pruning = {k: v for k, v in pruning.items() if k not in ("source", "command", "reconstruction")}
        pruning["source"] = {"sha256": config["pruning"]["source"]["sha256"]}
    return {**config, "data": None, "pruning": pruning}


@contextlib.contextmanager
def _quiet():
    """The exporter prints to stdout, which belongs to this program's own output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
