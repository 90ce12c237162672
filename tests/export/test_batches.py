"""Input batches of an ONNX file: no, one or many images, values that are not finite, other sizes."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim
from onnx_runs import open_session

import ssmcompress
from ssmcompress.export.functions import STANDARD_OPSET
from ssmcompress.export.graph import KEPT_PREFIX, _set_opset, assemble, find_values, trace
from ssmcompress.export.runtime import choose_forms, newest_opset
from ssmcompress.export.verify import verify_onnx

# In a separate process, because onnxruntime's Scan crashed with SIGFPE on an empty batch.
SCRIPT = """
import json, sys
import numpy as np, onnxruntime
shapes = {}
for file in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shape = [0, *session.get_inputs()[0].shape[1:]]
    shapes[file] = [part.shape for part in session.run(None, {"images": np.zeros(shape, np.float32)})]
print(json.dumps(shapes))
"""


def pruned(make):
    model = make(depth=2)
    return ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.5))


@pytest.fixture(scope="module", params=[make_vim, make_plain_mamba], ids=["vim", "plain_mamba"])
def traced(request):
    """A pruned model and its graph, to be assembled with any form of scan."""
    model = pruned(request.param)
    return model, trace(model, newest_opset())


def run_empty(files):
    """The shapes of the outputs of each file for no image."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, files)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:] or f"ended by signal {-result.returncode}"
    return list(json.loads(result.stdout).values())


def test_an_empty_batch_has_no_logits_and_no_kept_tokens(traced, tmp_path):
    model, graph = traced
    forms, _ = choose_forms("auto", newest_opset())
    files, expected = [], []
    for form in forms:
        for half in (False, True):
            for names in ((), find_values(graph, KEPT_PREFIX)):
                files.append(tmp_path / f"{len(files)}.onnx")
                onnx.save(assemble(graph, form, half, names), files[-1])
                expected.append([[0, 10], *([[0, model.token_counts()[1]]] if names else [])])
    assert run_empty(files) == expected


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_an_empty_batch_of_a_dense_model_in_the_oldest_opset(make, tmp_path):
    model = make(depth=1)
    options = ssmcompress.OnnxOptions(opset=18, scan="scan")
    ssmcompress.export_onnx(model, tmp_path / "m.onnx", options)
    assert run_empty([tmp_path / "m.onnx"]) == [[[0, 10]]]


def test_the_standard_form_is_valid_with_the_guard_against_an_empty_batch(traced):
    """No runtime is needed for that; `test_an_empty_batch...` runs the forms that the installed one has."""
    if onnx.defs.onnx_opset_version() < STANDARD_OPSET:
        pytest.skip("this onnx does not know the operator")
    _, graph = traced
    graph = copy_of(graph)  # for both opsets, `trace` writes the same graph except for the opset number
    _set_opset(graph, STANDARD_OPSET)
    graph = assemble(graph, "standard")
    onnx.checker.check_model(graph, full_check=True)
    assert {node.op_type for node in graph.graph.node} >= {"FillBatch", "TrimBatch"}


def test_other_batches_are_computed_as_before(traced):
    model, graph = traced
    session = open_session(assemble(graph, "scan", debug_outputs=find_values(graph, KEPT_PREFIX)))
    for batch in (1, 2, 70):
        images = images_of(model, batch, seed=batch)
        with torch.no_grad():
            expected, decisions = model.trace(images)
        logits, kept = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
        np.testing.assert_array_equal(kept, decisions[0].kept.numpy())


def test_an_image_of_nan_spoils_no_other(traced):
    model, graph = traced
    session = open_session(assemble(graph, "scan"))
    images = images_of(model, 3)
    (expected,) = session.run(None, {"images": images.numpy()})
    images[1] = torch.nan
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert np.isnan(found[1]).all()


def test_images_of_another_size_or_dtype_are_an_error(traced):
    model, graph = traced
    session = open_session(assemble(graph, "scan"))
    images = images_of(model, 2).numpy()
    for wrong in (images[..., :-4], images[:, :1], images[0], images.astype(np.float64)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT|[Ii]nvalid|Got"):
            session.run(None, {"images": wrong})


def test_inner_values_do_not_claim_the_batch_of_the_input(traced):
    """onnxruntime plans memory by names of dimensions, and the inner batch is 1 where that of the images is 0."""
    _, graph = traced
    graph = assemble(graph, "scan", debug_outputs=find_values(graph, KEPT_PREFIX))

    def batches(infos):
        return {dim.dim_param for info in infos for dim in info.type.tensor_type.shape.dim if dim.dim_param}

    outside = [*graph.graph.input, *graph.graph.output]
    assert batches(outside) == {"batch"}
    assert batches(graph.graph.value_info) == {"filled_batch"}
    names = [info.name for info in graph.graph.value_info]
    assert len(names) == len(set(names))


def test_a_file_without_the_guard_is_still_verified(traced):
    """Files of earlier versions have none; the check sends no empty batch."""
    model, graph = traced
    old = assemble(graph, "scan")
    kinds = ("FillBatch", "TrimBatch")
    renamed = {node.output[0]: node.input[0] for node in old.graph.node if node.op_type == "FillBatch"}
    (trim,) = (node for node in old.graph.node if node.op_type == "TrimBatch")
    renamed[trim.input[0]] = trim.output[0]
    nodes = [node for node in old.graph.node if node.op_type not in kinds]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    infos = [info for info in old.graph.value_info if info.name not in renamed]
    functions = [function for function in old.functions if function.name not in kinds]
    for field, kept in ((old.graph.node, nodes), (old.graph.value_info, infos), (old.functions, functions)):
        kept = [copy_of(part) for part in kept]
        del field[:]
        field.extend(kept)
    assert verify_onnx(model, old).passed


def copy_of(message):
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
