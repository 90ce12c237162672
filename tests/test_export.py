"""The ONNX file: what it computes, what is in it, and that a wrong one is found out."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import GOLDEN, images_of, make_plain_mamba, make_vim
from onnx import parser

import ssmcompress
from ssmcompress.errors import InputError, VerificationError
from ssmcompress.export import _compare_kept, build_onnx, verify_onnx
from ssmcompress.models.base import Decision
from ssmcompress.ops import causal_conv1d, selective_scan
from ssmcompress.ops.onnx import OPSET, function_text


def run(graph, **inputs):
    content = graph.SerializeToString() if isinstance(graph, onnx.ModelProto) else str(graph)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {k: v.numpy() for k, v in inputs.items()})[0]


def function_model(name, tensors):
    """A model that is one call of an op's function."""
    inputs = [f"i{k}" for k in range(len(tensors))]
    types = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    entries = [
        onnx.helper.make_tensor_value_info(i, types[t.dtype], list(t.shape))
        for i, t in zip(inputs, tensors, strict=True)
    ]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, list(tensors[0].shape))
    node = onnx.helper.make_node(name, inputs, ["out"], domain="ssmcompress")
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("ssmcompress", 1)]
    graph = onnx.helper.make_graph([node], "g", entries, [out])
    model = onnx.helper.make_model(graph, functions=[parser.parse_function(function_text(name))], opset_imports=opsets)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return run(model, **dict(zip(inputs, tensors, strict=True)))


@pytest.mark.parametrize("parts", ["", "D_z_bias_softplus", "z_gap_reverse", "D_bias_gap_softplus_reverse"])
@pytest.mark.parametrize("length", [1, 6])
def test_the_scan_function_is_the_op(parts, length):
    flags = parts.split("_") if parts else []
    u, delta, z, gap = (torch.randn(2, length, 3) for _ in range(4))
    B, C = (torch.randn(2, length, 4) for _ in range(2))
    A, D, bias = -torch.rand(3, 4), torch.randn(3), torch.randn(3)
    delta, gap = delta.abs(), gap.abs()
    optional = {"D": D, "z": z, "bias": bias, "gap": gap}
    used = {k: v for k, v in optional.items() if k in flags}
    named = {"bias": "delta_bias"}
    expected = selective_scan(
        u, delta, A, B, C, **{named.get(k, k): v for k, v in used.items()},
        delta_softplus="softplus" in flags, reverse="reverse" in flags,
    )  # fmt: skip
    found = function_model("_".join(["SelectiveScan", *flags]), [u, delta, A, B, C, *used.values()])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_the_conv_function_is_the_op(reverse, aligned, length):
    x, weight, bias = torch.randn(2, length, 3), torch.randn(3, 4), torch.randn(3)
    positions = torch.stack([torch.arange(length) * 2, torch.arange(length) + 3])
    expected = causal_conv1d(x, weight, bias, positions if aligned else None, reverse=reverse)
    taps = torch.cat([weight.flip(1).T, torch.zeros(1, 3)])
    name = f"CausalConv_width4_reach{min(4, length)}_bias{'_positions' * aligned}_silu{'_reverse' * reverse}"
    found = function_model(name, [x, taps, bias, *([positions] if aligned else [])])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
@pytest.mark.parametrize("case", ["dense", "pruned", "naive", "delta", "random"])
def test_onnx_and_torch_agree_for_any_batch(case, make, tmp_path):
    model = make(depth=3)
    images = images_of(model)
    if case != "dense":
        metric = case if case in ("delta", "random") else "clip"
        plan = ssmcompress.calibrate(model, images, ratio=0.4, importance=metric, alignment=case != "naive")
        model = ssmcompress.prune(model, plan)
    result = ssmcompress.export_onnx(model, tmp_path / "m.onnx")
    assert result.passed
    assert (result.top1_agreement, result.mismatches) == (100, [])
    for batch in (1, 3, 8):
        x = images_of(model, batch, seed=batch)
        with torch.no_grad():
            np.testing.assert_allclose(run(tmp_path / "m.onnx", images=x), model(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(("name", "stride"), [("vim_stride", 4), ("plain_mamba_l1", None), ("plain_mamba_l3", None)])
def test_golden_logits_through_onnx(name, stride, tmp_path):
    golden = np.load(GOLDEN / f"{name}.npz")
    ssmcompress.export_onnx(ssmcompress.load(GOLDEN / f"{name}.pth", stride=stride), tmp_path / "m.onnx")
    found = run(tmp_path / "m.onnx", images=torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(found, golden["logits"], atol=1e-4)


@pytest.fixture(scope="module")
def pruned():
    model = make_vim(depth=2)
    return ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.5))


@pytest.fixture(scope="module")
def graph(pruned):
    return build_onnx(pruned)


def test_the_file_says_what_it_is_and_nothing_about_this_machine(pruned, graph):
    (entry,), (output,) = graph.graph.input, graph.graph.output
    assert (entry.name, output.name) == ("images", "logits")
    batch, *rest = entry.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [d.dim_value for d in rest] == [3, 16, 16]
    about = json.loads({p.key: p.value for p in graph.metadata_props}["ssmcompress"])
    assert about["pruning"]["kept"] == [9]
    assert about["preprocessing"]["interpolation"] == "bicubic"
    content = graph.SerializeToString()
    assert b"site-packages" not in content
    assert str(GOLDEN.parent).encode() not in content


def test_a_wrong_graph_is_found_out(pruned, graph):
    for name, scale in (("head.bias", 1.01), ("patch_embed.proj.weight", 0.9)):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(graph)
        tensor = next(t for t in wrong.graph.initializer if t.name.endswith(name))
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(scale), tensor.name))
        with pytest.raises(VerificationError, match="does not compute what the model does"):
            verify_onnx(pruned, wrong)
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    tensor = next(t for t in broken.graph.initializer if t.name.endswith("head.bias"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), tensor.name))
    with pytest.raises(VerificationError):
        verify_onnx(pruned, broken)


def test_nothing_is_written_when_verification_fails(pruned, tmp_path):
    with pytest.raises(VerificationError):
        ssmcompress.export_onnx(pruned, tmp_path / "sub" / "m.onnx", atol=0.0)
    assert list(tmp_path.iterdir()) == []


def test_other_tokens_are_excused_only_for_equal_scores():
    decision = Decision(
        candidates=torch.tensor([[3, 5, 7, 9]]),
        scores=torch.tensor([[1.0, 0.5, 0.5 + 1e-7, 0.1]]),
        kept=torch.tensor([[3, 7]]),
    )
    assert _compare_kept([decision], [np.array([[3, 7]])], 0) == "same"
    assert _compare_kept([decision], [np.array([[3, 5]])], 0) == "tie"
    assert _compare_kept([decision], [np.array([[3, 9]])], 0) == "mismatch"
    assert _compare_kept([decision], [np.array([[3, 8]])], 0) == "mismatch"


def test_what_is_no_onnx_file_of_this_model(pruned, graph, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="not an ONNX file|cannot load"):
        verify_onnx(pruned, tmp_path / "text.onnx")
    with pytest.raises(InputError, match="cannot read"):
        verify_onnx(pruned, tmp_path / "none.onnx")
    other = make_vim(channels=1)
    with pytest.raises(InputError, match="cannot run the graph"):
        verify_onnx(other, graph)


def test_a_single_nan_is_not_forgotten(pruned, graph, monkeypatch):
    """The first image alone gives a NaN, where its class is, so that numpy still finds the class there."""
    from ssmcompress import export

    genuine = export._session

    def session(*arguments):
        run, kept = genuine(*arguments)
        seen = []

        def spoilt(images):
            logits, *rest = run(images)
            if not seen:
                seen.append(1)
                logits = logits.copy()
                logits[0, logits[0].argmax()] = np.nan
            return [logits, *rest]

        return spoilt, kept

    monkeypatch.setattr(export, "_session", session)
    with pytest.raises(VerificationError):
        verify_onnx(pruned, graph)


def test_a_file_of_a_loaded_model_names_no_path(tmp_path):
    torch.save(make_vim(depth=2).state_dict(), tmp_path / "secret-place.pt")
    model = ssmcompress.load(tmp_path / "secret-place.pt")
    content = build_onnx(ssmcompress.prune(model, ssmcompress.make_plan(model))).SerializeToString()
    assert b"secret-place" not in content
    assert model.source.sha256.encode() in content


def test_the_exporters_backend_computes_nothing():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="torch.onnx.export alone"):
        causal_conv1d(x, torch.zeros(3, 4), backend="onnx")
