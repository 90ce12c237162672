"""The ONNX file: its results, its contents, and the detection of a wrong file."""

import json
import pickle
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import GOLDEN, images_of, make_plain_mamba, make_vim
from onnx import parser
from onnx_runs import open_session, run_file

import ssmcompress
from ssmcompress.errors import InputError, VerificationError
from ssmcompress.export import onnx as export
from ssmcompress.export import runtime as onnx_runtime
from ssmcompress.export.functions import FORMS, STANDARD_OPSET, function_text
from ssmcompress.export.graph import assemble, trace
from ssmcompress.export.onnx import build_onnx
from ssmcompress.export.runtime import choose_forms, newest_opset
from ssmcompress.export.verify import Verification, compare_kept, verify_onnx
from ssmcompress.models.records import StepRecord
from ssmcompress.models.running import Decision
from ssmcompress.ops import causal_conv1d, selective_scan
from ssmcompress.pruning.alignment import Alignment
from ssmcompress.pruning.plan import Plan, Stage


@pytest.fixture(scope="module", autouse=True)
def one_trace_of_a_model():
    """Tests that use a graph share its trace, which takes 3 s."""
    traces = {}

    def trace_once(model, opset, classes=None):
        key = pickle.dumps((model, opset, classes))
        if key not in traces:
            traces[key] = trace(model, opset, classes)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", trace_once)
        yield


FORMS_HERE, _ = choose_forms("auto", newest_opset())


def run(graph, **inputs):
    return open_session(graph).run(None, {k: v.numpy() for k, v in inputs.items()})[0]


def function_model(name, tensors, results=1, form="scan", opset=None):
    """A model that is one call of an op's function."""
    opset = opset or newest_opset()
    inputs, outputs = [f"i{k}" for k in range(len(tensors))], [f"o{k}" for k in range(results)]
    types = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    entries = [
        onnx.helper.make_tensor_value_info(i, types[t.dtype], list(t.shape))
        for i, t in zip(inputs, tensors, strict=True)
    ]
    outs = [onnx.helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, list(tensors[0].shape)) for o in outputs]
    node = onnx.helper.make_node(name, inputs, outputs, domain="ssmcompress")
    domains = {"": opset, "ssmcompress": 1, "com.microsoft": 1}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()]
    graph = onnx.helper.make_graph([node], "g", entries, outs)
    function = parser.parse_function(function_text(name, opset, form))
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets)
    model.ir_version = max(10, onnx.helper.find_min_ir_version_for(opsets[:1]))
    onnx.checker.check_model(model, full_check=True)
    return model


def call(model, tensors):
    session = open_session(model)
    return session.run(None, {f"i{k}": t.numpy() for k, t in enumerate(tensors)})


@pytest.mark.parametrize("form", FORMS_HERE)
@pytest.mark.parametrize("parts", ["f", "b_D_bias_softplus", "b_gap", "f_D_bias_missing_softplus", "fb_D_softplus"])
@pytest.mark.parametrize("length", [1, 6])
def test_the_scan_function_is_the_op(parts, length, form):
    torch.manual_seed(length)
    ways, *flags = parts.split("_")
    tensors, expected = [], []
    for way in ways:
        u, delta, gap = (torch.randn(2, length, 3) for _ in range(3))
        B, C = (torch.randn(2, length, 4) for _ in range(2))
        A, D, bias, gap_delta = -torch.rand(3, 4), torch.randn(3), torch.randn(3), torch.rand(3)
        missing = torch.randint(0, 4, (2, length)).float()
        delta, gap = delta.abs(), gap.abs()
        given = {"D": D, "bias": bias, "gap": gap, "missing": (missing, gap_delta)}
        used = {name: given[name] for name in given if name in flags}
        named = {"bias": "delta_bias", "missing": "gap"}
        tensors += [u, delta, A, B, C]
        for tensor in used.values():
            tensors += tensor if isinstance(tensor, tuple) else [tensor]
        options = {named.get(name, name): tensor for name, tensor in used.items()}
        expected.append(
            selective_scan(u, delta, A, B, C, **options, delta_softplus="softplus" in flags, reverse=way == "b")
        )
    model = function_model("_".join(["SelectiveScan", ways, "3", *flags]), tensors, len(ways), form)
    for found, wanted in zip(call(model, tensors), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-5)  # 8 units of float32's last place


def test_the_standard_form_is_valid_where_onnx_knows_its_operator():
    """No runtime is needed for that; those that run it are in `FORMS_HERE`."""
    if onnx.defs.onnx_opset_version() < STANDARD_OPSET:
        pytest.skip("this onnx does not know the operator")
    tensors = [torch.zeros(2, 6, 3)] * 2 + [torch.zeros(3, 4)] + [torch.zeros(2, 6, 4)] * 2
    graph = function_model("SelectiveScan_b_3", tensors, form="standard", opset=STANDARD_OPSET)
    assert "LinearAttention" in {node.op_type for node in graph.functions[0].node}


def test_a_small_delta_keeps_its_digits():
    """softplus(-15) is 3e-7: log(1 + 3e-7) in float32 has one digit of it. And softplus(100) is 100."""
    for raw, wanted in ((-15.0, np.log1p(np.exp(-15.0))), (100.0, 100.0), (1000.0, 1000.0)):
        u, delta, A, B = torch.ones(1, 1, 1), torch.full((1, 1, 1), raw), -torch.ones(1, 1), torch.ones(1, 1, 1)
        tensors = [u, delta, A, B, B]
        (found,) = call(function_model("SelectiveScan_f_1_softplus", tensors), tensors)
        np.testing.assert_allclose(found.item(), wanted, rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_the_conv_function_is_the_op(reverse, aligned, length):
    x, weight, bias = torch.randn(2, length, 3), torch.randn(3, 4), torch.randn(3)
    positions = torch.stack([torch.arange(length) * 2, torch.arange(length) + 3])
    expected = causal_conv1d(x, weight, bias, positions if aligned else None, reverse=reverse)
    name = f"CausalConv_4_3_{length}_bias{'_positions' * aligned}_silu{'_reverse' * reverse}"
    tensors = [x, weight, bias, *([positions] if aligned else [])]
    (found,) = call(function_model(name, tensors), tensors)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def sessions_that_agree(model):
    """A session of each form of scan, all verified, and compared with the model for other batch sizes."""
    traced = trace(model, newest_opset())
    for form in FORMS_HERE:
        graph = assemble(traced, form)
        onnx.checker.check_model(graph, full_check=True)
        result = verify_onnx(model, graph)
        assert result.passed
        assert (result.top1_agreement, result.mismatches, result.weights) == (100, [], [])
        session = open_session(graph)
        for batch in (1, 3, 8):
            x = images_of(model, batch, seed=batch)
            with torch.no_grad():
                np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], model(x).numpy(), atol=1e-4)
        yield session


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
@pytest.mark.parametrize("stages", [("clip", "delta", "random"), ("clip",)], ids=["aligned", "naive"])
def test_onnx_and_torch_agree_for_any_batch(stages, make):
    """Stages with a metric each; a layer takes 2 s to trace."""
    model = make(depth=len(stages) + 1)
    plan = Plan(tuple(Stage(after, 0.4, metric) for after, metric in enumerate(stages, 1)))
    if len(stages) == 1:
        plan = replace(plan, alignment=Alignment(conv=False, scan=False, pool=False))
    plan = ssmcompress.calibrate(model, images_of(model), plan)
    assert list(sessions_that_agree(ssmcompress.prune(model, plan)))


@pytest.mark.parametrize(("name", "stride"), [("vim_stride", 4), ("plain_mamba_l1", None), ("plain_mamba_l3", None)])
def test_golden_logits_through_onnx(name, stride):
    golden = np.load(GOLDEN / f"{name}.npz")
    for session in sessions_that_agree(ssmcompress.load(GOLDEN / f"{name}.pth", stride=stride)):
        (found,) = session.run(None, {"images": golden["images"]})
        np.testing.assert_allclose(found, golden["logits"], atol=1e-4)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    file = tmp_path_factory.mktemp("secret-place") / "model.pt"
    torch.save({"model": make_vim(depth=2).state_dict()}, file)
    model = ssmcompress.load(file)
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
    assert "secret-place" in pruned.source.path
    assert b"secret-place" not in content
    assert pruned.source.sha256.encode() in content


def test_the_file_of_a_model_that_was_pruned_twice_says_nothing_about_this_machine(checkpoint, tmp_path):
    model = ssmcompress.prune(ssmcompress.load(checkpoint), ratio=0.2)
    ssmcompress.save(model, tmp_path / "secret-place")
    again = ssmcompress.prune(ssmcompress.load(tmp_path / "secret-place"), ratio=0.4)
    again.steps = (*again.steps, StepRecord("input", {"path": str(tmp_path / "secret-place")}))
    content = build_onnx(again).SerializeToString()
    assert str(tmp_path).encode() not in content
    assert b"secret-place" not in content


def test_images_with_ties_may_get_other_classes():
    result = Verification(36, "x", 1e-6, 100 * 35 / 36, ["a"], [], 1e-4)
    assert result.passed
    assert not replace(result, ties=[]).passed
    assert not replace(result, top1_agreement=100 * 34 / 36).passed


def test_nodes_tell_their_layer_and_weights_are_the_models(pruned, graph):
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert {"layers.0.mixer/SelectiveScan", "layers.1.mixer.out_proj/MatMul", "patch_embed.proj/Conv"} <= set(names)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    for name, tensor in pruned.state_dict().items():
        twins = [values[name]] if name in values else values.values()  # the exporter keeps one of equal tensors
        assert any(np.array_equal(twin, tensor.numpy()) for twin in twins), name


def changed(graph, name, change):
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    tensor = next(t for t in wrong.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(values).astype(values.dtype), name))
    return wrong


def test_a_wrong_graph_is_found_out_and_located(pruned, graph):
    places = {
        "patch_embed.proj.weight": 1,
        "layers.0.mixer.out_proj.weight": 1,
        "layers.1.mixer.x_proj.weight": 2,
        "head.bias": 0,
    }
    for name, layer in places.items():
        with pytest.raises(VerificationError, match=f"does not compute what the model does.*{name}") as caught:
            verify_onnx(pruned, changed(graph, name, lambda values: values * 1.5 + 0.1))
        assert caught.value.result.weights == [name]
        assert caught.value.result.first_layer == layer
    with pytest.raises(VerificationError):
        verify_onnx(pruned, changed(graph, "head.bias", lambda values: values * np.nan))


def test_one_number_of_a_weight_is_enough(pruned, graph):
    def nudged(values):
        values.flat[3] = np.nextafter(values.flat[3], np.float32(1))
        return values

    with pytest.raises(VerificationError, match=r"layers\.0\.mixer\.in_proj\.weight") as caught:
        verify_onnx(pruned, changed(graph, "layers.0.mixer.in_proj.weight", nudged))
    assert caught.value.result.max_difference < 1e-4


def test_a_wrong_operator_is_located_where_all_weights_are_right(pruned, graph):
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    # The last layer is computed for the class token alone, outside of the mixer's own forward.
    next(node for node in wrong.graph.node if node.name.startswith("layers.1/Sigmoid")).op_type = "Tanh"
    with pytest.raises(VerificationError, match="first after layer 2") as caught:
        verify_onnx(pruned, wrong)
    assert caught.value.result.weights == []


@pytest.mark.parametrize("opset", [18, 20, 23])  # 25 is that of the test of float16, the newest that of most others
def test_every_opset_computes_the_same(pruned, opset, tmp_path):
    ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(opset=opset))
    graph = onnx.load(tmp_path / "m.onnx")
    assert {o.domain: o.version for o in graph.opset_import}[""] == opset


def test_what_cannot_be_had_is_said(pruned, tmp_path):
    for options, message in (
        ({"opset": 12}, "expected one from 18"),
        ({"opset": 99}, "onnxruntime runs opsets up to"),
        ({"scan": "standard", "opset": 20}, "LinearAttention is in opset 27"),
        ({"scan": "loop"}, "expected auto, scan"),
        ({"dtype": "int8"}, "float32 or float16"),
        ({"provider": "abacus"}, "the installed onnxruntime has .*cpu"),
    ):
        with pytest.raises(InputError, match=message):
            ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_fastest_and_says_what_it_measured(pruned, tmp_path, monkeypatch):
    speeds = iter([9.0, 9.0, 4.0, 4.0])

    def time_round(content, provider, shape, repeats):
        return [next(speeds)]

    monkeypatch.setattr(onnx_runtime, "time_round", time_round)
    monkeypatch.setattr(onnx_runtime, "newest_opset", lambda: 20)
    result = ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(opset=20))
    assert result.scan == "linear-attention"
    assert list(result.scan_ms) == ["linear-attention", "scan"]
    assert set(result.scan_ms) | set(result.refused) == set(FORMS)
    domains = {node.domain for function in onnx.load(tmp_path / "m.onnx").functions for node in function.node}
    assert "com.microsoft" in domains


def test_float16_halves_the_matrices_and_is_held_against_the_rounded_model(tmp_path):
    model, options = make_vim(depth=1), ssmcompress.OnnxOptions(dtype="float16", scan="scan", opset=25)
    with torch.no_grad():
        model.head.weight[0] *= 1.0001  # so that rounding shows
    result = ssmcompress.export_onnx(model, tmp_path / "m.onnx", options)
    assert result.max_difference < 1e-5 < result.rounding["max_difference"]
    graph = onnx.load(tmp_path / "m.onnx")
    assert {o.domain: o.version for o in graph.opset_import}[""] == 25
    kinds = {t.name: t.data_type for t in graph.graph.initializer}
    assert kinds["layers.0.mixer.in_proj.weight"] == onnx.TensorProto.FLOAT16
    assert kinds["layers.0.mixer.A_log"] == onnx.TensorProto.FLOAT
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    with pytest.raises(InputError, match="head.weight has values beyond float16"):
        ssmcompress.export_onnx(model, tmp_path / "n.onnx", options)


def test_kept_positions_are_outputs_where_asked_for(pruned, tmp_path):
    result = ssmcompress.export_onnx(
        pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(debug_outputs=True, scan="scan")
    )
    assert result.stages == [{"after": 1, "kept": 9, "same": result.images}]
    session = open_session(tmp_path / "m.onnx")
    x = images_of(pruned, 3)
    _, kept = session.run(["logits", "kept_after_1"], {"images": x.numpy()})
    np.testing.assert_array_equal(kept, pruned.trace(x)[1][0].kept.numpy())


def test_large_weights_go_beside_the_file_or_nothing_goes_anywhere(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1000)
    result = ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(scan="scan"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert result.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    x = images_of(pruned, 3)
    with torch.no_grad():
        np.testing.assert_allclose(run_file(tmp_path / "m.onnx", x), pruned(x).numpy(), atol=1e-4)
    assert verify_onnx(pruned, tmp_path / "m.onnx").passed
    with pytest.raises(InputError, match="exists"):
        ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", ssmcompress.OnnxOptions(scan="scan"))
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(InputError, match="cannot load the graph|cannot read the weight"):
        verify_onnx(pruned, tmp_path / "m.onnx")
    with pytest.raises(VerificationError):
        ssmcompress.export_onnx(pruned, tmp_path / "sub" / "m.onnx", ssmcompress.OnnxOptions(scan="scan", atol=0.0))
    assert not (tmp_path / "sub").exists()


def test_latency_is_of_both_runtimes_and_of_the_dense_model(pruned, tmp_path):
    options = ssmcompress.OnnxOptions(latency=True, scan="scan")
    result = ssmcompress.export_onnx(pruned, tmp_path / "m.onnx", options, dense=make_vim(depth=1))
    rows = {(row["model"], row["by"], row["batch"]) for row in result.latency}
    assert rows == {(m, by, b) for m in ("dense", "pruned") for by in ("torch", "onnxruntime") for b in (1, 8)}
    assert all(row["ms"] > 0 for row in result.latency)


def test_nothing_is_written_when_verification_fails(pruned, tmp_path):
    with pytest.raises(VerificationError):
        ssmcompress.export_onnx(pruned, tmp_path / "sub" / "m.onnx", ssmcompress.OnnxOptions(atol=0.0, scan="scan"))
    assert list(tmp_path.iterdir()) == []


def test_other_tokens_are_excused_only_for_equal_scores():
    decision = Decision(
        candidates=torch.tensor([[3, 5, 7, 9]]),
        scores=torch.tensor([[1.0, 0.5, 0.5 + 1e-7, 0.1]]),
        kept=torch.tensor([[3, 7]]),
    )
    assert compare_kept([decision], [np.array([[3, 7]])], 0) == "same"
    assert compare_kept([decision], [np.array([[3, 5]])], 0) == "tie"
    assert compare_kept([decision], [np.array([[3, 9]])], 0) == "mismatch"
    assert compare_kept([decision], [np.array([[3, 8]])], 0) == "mismatch"


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
    from ssmcompress.export import verify as verification

    genuine, seen = verification.run, []

    def spoilt(session, outputs, images):
        logits, *rest = genuine(session, outputs, images)
        if not seen:
            seen.append(1)
            logits = logits.copy()
            logits[0, logits[0].argmax()] = np.nan
        return [logits, *rest]

    monkeypatch.setattr(verification, "run", spoilt)
    with pytest.raises(VerificationError):
        verify_onnx(pruned, graph)


def test_the_exporters_backend_computes_nothing():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="torch.onnx.export alone"):
        causal_conv1d(x, torch.zeros(3, 4), backend="onnx")
