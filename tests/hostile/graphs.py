"""ONNX files for `verify`: damaged, of other models, with external data, with operators that do not exist."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .cases import Box, Case, Run, maker

KIND = "graphs"
NAME = "model.onnx"


@functools.cache
def _graph(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def content(box: Box) -> bytes:
    """The graph of the pruned model."""
    return _graph(str(box.world.onnx))


def checking(box: Box, right: Any = None, name: str = NAME, **options: Any) -> Case:
    """`verify` of the pruned model with a graph."""
    return Case(("verify", box.world.pruned, name), right, **options)


def write(box: Box, graph: Any, name: str = NAME) -> None:
    """Write a graph, given as a model or as bytes."""
    (box.folder / name).write_bytes(graph if isinstance(graph, bytes) else graph.SerializeToString())


def small(nodes: list, outputs: list | None = None, initializers: list = (), inputs: list | None = None) -> Any:
    """A graph of few nodes that takes images and gives logits."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs or [images], outputs or [logits], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _same(run: Run) -> str | None:
    return None if "100.0%" in run.stdout else "exit 0 without full agreement"


@maker(KIND, times=4)
def cut_off(rng, box):
    whole = content(box)
    write(box, whole[: rng.choice([rng.randrange(64), rng.randrange(len(whole)), len(whole) - rng.randrange(1, 9)])])
    return checking(box)


_FILES = {
    "empty": b"", "text": b"a graph", "random": bytes(range(256)) * 4,
    "pickle": b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
    "html": b"<html>404</html>", "deep": b"\x3a\x7f" * 500, "varint": b"\x08" + b"\xff" * 40,
}  # fmt: skip


@maker(KIND, variants=[*_FILES, "folder", "pipe", "link", "missing", "safetensors", "/dev/zero", "/dev/null"])
def files_that_are_no_graphs(rng, box, variant):
    file = box.folder / NAME
    if variant.startswith("/"):
        return checking(box, name=variant)
    if variant in _FILES:
        file.write_bytes(_FILES[variant])
    elif variant == "folder":
        file.mkdir()
    elif variant == "pipe":
        os.mkfifo(file)
    elif variant == "link":
        file.symlink_to(NAME)
    elif variant == "safetensors":
        shutil.copy(box.world.pruned / "model.safetensors", file)
    return checking(box)


@maker(KIND, variants=["a weight", "nan", "no weights", "an output renamed", "the input renamed", "twice the outputs"])
def changed(rng, box, variant):
    model = onnx.load_from_string(content(box))
    graph = model.graph
    weights = [t for t in graph.initializer if t.name.endswith("weight")]
    right = None
    if variant in ("a weight", "nan"):
        tensor = rng.choice(weights)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[rng.randrange(values.size)] = float("nan") if variant == "nan" else 9
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    elif variant == "no weights":
        del graph.initializer[:]
    elif variant == "the input renamed":
        old = graph.input[0].name
        graph.input[0].name = "pixels"
        for node in graph.node:
            node.input[:] = ["pixels" if name == old else name for name in node.input]
        right = _same
    elif variant == "an output renamed":
        graph.output[0].name = "nothing"
    else:
        graph.output.append(graph.output[0])
        right = _same
    write(box, model)
    return checking(box, right)


@maker(KIND, variants=[("opset", 5), ("opset", 9999), ("opset", -1), ("ir", 1), ("ir", 10**6), ("domain", 7)])
def versions(rng, box, variant):
    model = onnx.load_from_string(content(box))
    what, number = variant
    if what == "opset":
        model.opset_import[0].version = number
    elif what == "ir":
        model.ir_version = number
    else:
        model.graph.node[rng.randrange(len(model.graph.node))].domain = "evil.example"
    write(box, model)
    return checking(box, _same)


_LOCATIONS = (
    "/etc/passwd",
    "../../../../../../etc/passwd",
    "nowhere.bin",
    "../secret",
    "",
    "/dev/zero",
    "x\0y",
    "link",
)


@maker(KIND, variants=_LOCATIONS)
def external_data(rng, box, variant):
    model = onnx.load_from_string(content(box))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("weight"))
    if variant == "link":
        (box.folder / "link").symlink_to("/etc/passwd")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", variant), ("offset", "0"), ("length", "10")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    write(box, model)
    return checking(box)


def _constant(name: str, value: Any, kind: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.asarray(value, kind), name)


def _graphs() -> dict[str, Any]:
    node = helper.make_node
    zeros, nan = _constant("w", np.zeros((3072, 12))), _constant("w", np.full((3072, 12), np.nan))
    flat = [node("Flatten", ["images"], ["f"]), node("MatMul", ["f", "w"], ["logits"])]
    huge = _constant("s", [2**40, 2**20], np.int64)
    text = helper.make_tensor_value_info("images", TensorProto.STRING, ["n", 3, 32, 32])
    other = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 28, 28])
    first = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 32])
    second = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n"])
    lying = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    whole = helper.make_tensor_value_info("logits", TensorProto.INT64, None)
    return {
        "identity": small([node("Identity", ["images"], ["logits"])]),
        "zeros": small(flat, initializers=[zeros]),
        "nan": small(flat, initializers=[nan]),
        "one image less": small(
            [node("Slice", ["images", "a", "b"], ["c"]), node("Flatten", ["c"], ["f"]), node("MatMul", ["f",
            "w"], ["logits"])],
            initializers=[zeros, _constant("a", [1], np.int64), _constant("b", [99], np.int64)],
        ),
        "a number": small([node("ReduceSum", ["images"], ["logits"], keepdims=0)]),
        "a huge tensor": small([node("ConstantOfShape", ["s"], ["logits"])], initializers=[huge]),
        "text input": small([node("Identity", ["images"], ["logits"])], inputs=[text]),
        "other input": small([node("Flatten", ["images"], ["logits"])], inputs=[other]),
        "two inputs": small(flat, initializers=[zeros], inputs=[first, second]),
        "lying output": small(flat, [lying], [zeros]),
        "whole numbers": small(
            [*flat[:1], node("MatMul", ["f", "w"], ["m"]), node("Cast", ["m"], ["logits"], to=TensorProto.INT64)],
            [whole], [zeros],
        ),
        "unknown operator": small([node("Exec", ["images"], ["logits"], command="touch ../canary")]),
        "no nodes": small([]),
        "a circle": small([node("Add", ["images", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"],
        ["logits"])]),
        "nothing in": small([node("Relu", ["nowhere"], ["logits"])]),
        "no outputs": small(flat, initializers=[zeros], outputs=[second]),
        "a sequence": small([node("SequenceConstruct", ["images"], ["logits"])]),
    }  # fmt: skip


_GRAPHS = (
    "identity", "zeros", "nan", "one image less", "a number", "a huge tensor", "text input", "other input",
    "two inputs",
    "lying output", "whole numbers", "unknown operator", "no nodes", "a circle", "nothing in", "no outputs",
    "a sequence",
)  # fmt: skip


@maker(KIND, variants=_GRAPHS)
def another_graph(rng, box, variant):
    write(box, _graphs()[variant])
    return checking(box)


@maker(KIND, variants=["negative", "beyond", "short", "type"])
def tensors_that_lie(rng, box, variant):
    model = onnx.load_from_string(content(box))
    tensor = rng.choice([t for t in model.graph.initializer if t.name.endswith("weight") and t.raw_data])
    if variant == "negative":
        tensor.dims[0] = -tensor.dims[0]
    elif variant == "beyond":
        tensor.dims[0] = 2**40
    elif variant == "short":
        tensor.raw_data = tensor.raw_data[:-4]
    else:
        tensor.data_type = rng.choice([0, 8, 99])
    write(box, model)
    return checking(box, detail=tensor.name)


@maker(KIND, times=3)
def bits_flipped_in_the_nodes(rng, box):
    whole = bytearray(content(box))
    first = whole.index(b"images")
    for _ in range(3):
        whole[first + rng.randrange(2000)] ^= 1 << rng.randrange(8)
    write(box, bytes(whole))
    return checking(box, _same)


@maker(KIND, variants=["of the dense model", "with another head", "for the dense model"])
def another_model(rng, box, variant):
    write(box, content(box))
    model = {"of the dense model": box.world.vim12, "with another head": box.world.vim}.get(variant, box.world.plain)
    return Case(("verify", model, NAME))
