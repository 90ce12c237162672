"""ONNX files of segmentation models: logits of every pixel, dropped tokens, neck and head, and their verification."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import images_of, write_image
from onnx_runs import open_session, run_file
from segmenters import make_random

import ssmcompress
from ssmcompress.compression.reconstruct.levels import map_levels
from ssmcompress.compression.trim.layers import drop_directions
from ssmcompress.errors import VerificationError
from ssmcompress.evaluation import latency
from ssmcompress.export import onnx as export
from ssmcompress.export.graph import KEPT_PREFIX, assemble, find_values, trace
from ssmcompress.export.lowering import adaptive_avg_pool, name_number, read_number
from ssmcompress.export.runtime import choose_forms, newest_opset
from ssmcompress.export.verify import takes_batches, verify_onnx
from ssmcompress.models.plain_mamba_upernet import PlainMambaUperNet, PlainMambaUperNetConfig
from ssmcompress.models.vim_upernet import VimUperNet, VimUperNetConfig
from ssmcompress.pruning.plan import Plan, Stage

SIZES = {"d_model": 8, "depth": 4, "d_inner": 16, "d_state": 4, "dt_rank": 1, "in_chans": 3, "num_classes": 5,
         "head_channels": 8, "out_layers": (1, 2, 3, 4)}  # fmt: skip
VIM = {"d_conv": 4, "patch_size": (16, 16), "stride": 16, "image_size": (64, 96), "level": "hidden"}
PLAIN_MAMBA = {"window": 5, "dw_layers": (), "dw_window": 0, "stem_width": 8, "stem_depth": 1, "stem_window": 7,
               "patch_size": 16, "stride": 16, "image_size": (80, 100), "trained_grid": (4, 4)}  # fmt: skip
EMPTY = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.zeros([0, *session.get_inputs()[0].shape[1:]], np.float32)
print(json.dumps([part.shape for part in session.run(None, {"images": images})]))
"""


def make_vim(**changes):
    return ssmcompress.load(make_random(VimUperNet(VimUperNetConfig(**SIZES | VIM | changes))))


def make_plain_mamba(**changes):
    return ssmcompress.load(make_random(PlainMambaUperNet(PlainMambaUperNetConfig(**SIZES | PLAIN_MAMBA | changes))))


def prune_and_map(dense, *layers, **changes):
    """The model with stages after these layers, and with maps of its levels."""
    plan = Plan(tuple(Stage(layer, 0.3) for layer in layers), **changes)
    return map_levels(ssmcompress.prune(dense, plan), dense, images_of(dense, 10))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of different sizes, with meaningless masks: labels go up to 255 for 5 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(70, 110), (64, 300), (200, 90), (30, 20)]):
        write_image(folder / "images" / f"{number}.png", number, size)
        write_image(folder / "annotations" / f"{number}.png", number, size, mode="L")
    return folder


@pytest.fixture(scope="module")
def vim():
    """Its tokens enter again before the last layer; and its graph, to be assembled with any form of scan."""
    dense = drop_directions(make_vim(), {1: [0], 3: [1], 4: [0]})
    dense.classes = ("wall", "sky", "tree", "road", "person")
    model = prune_and_map(dense, 1, 2, reenter=1)
    return model, trace(model, newest_opset(), ("names", "that", "the", "data", "has"))


@pytest.fixture(scope="module")
def plain_mamba(pictures, tmp_path_factory):
    """Its images have another grid than its position embedding, and partial patches; and its file in float16."""
    dense = drop_directions(make_plain_mamba(), {1: [0, 1, 2], 2: [0, 1, 3], 3: [1, 2], 4: [1, 2, 3]})
    model, file = prune_and_map(dense, 2), tmp_path_factory.mktemp("onnx") / "model.onnx"
    options = ssmcompress.OnnxOptions(data=pictures, opset=18, dtype="float16", scan="scan", debug_outputs=True)
    return model, file, ssmcompress.export_onnx(model, file, options)


@torch.no_grad()
@pytest.mark.parametrize("form", choose_forms("auto", newest_opset())[0])
def test_a_pruned_vim_in_onnx_gives_the_logits_of_every_pixel(vim, form):
    model, traced = vim
    assert any(isinstance(part, torch.nn.Linear) for part in model.level_maps.modules())
    graph = assemble(traced, form, debug_outputs=find_values(traced, KEPT_PREFIX))
    onnx.checker.check_model(graph, full_check=True)
    session = open_session(graph)
    for batch in (1, 3):
        images = images_of(model, batch, seed=batch)
        expected, decisions = model.trace(images)
        logits, *kept = session.run(None, {"images": images.numpy()})
        assert logits.shape == (batch, 5, 64, 96)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5 * float(expected.abs().max()))
        for theirs, decision in zip(kept, decisions, strict=True):
            np.testing.assert_array_equal(theirs, decision.kept.numpy())


def test_no_image_has_no_logits(plain_mamba):
    """In a separate process, because an empty batch may crash it."""
    _, file, _ = plain_mamba
    result = subprocess.run([sys.executable, "-c", EMPTY, file], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
    assert json.loads(result.stdout) == [[0, 5, 80, 100], [0, 25]]


@torch.no_grad()
def test_a_pruned_plain_mamba_is_exported_and_verified_by_pixels(plain_mamba):
    model, file, result = plain_mamba
    assert result.passed
    assert (result.task, result.weights, result.mismatches) == ("segmentation", [], [])
    assert [stage["kept"] for stage in result.stages] == [25]
    assert all(stage["same"] == result.images for stage in result.stages)
    assert result.max_difference < 1e-5 < result.rounding["max_difference"]
    halved = copy.deepcopy(model)
    halved.load_state_dict(
        {k: v.half().float() if v.ndim > 1 and k.endswith("weight") else v for k, v in model.state_dict().items()}
    )
    images = images_of(model, 3)
    expected = halved(images)
    found = run_file(file, images)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("side", [1, 4, 5, 16])
@pytest.mark.parametrize("size", [1, 3, 6, (2, None)])
def test_means_of_parts_are_those_of_torch(side, size):
    x = torch.randn(2, 3, side, side + 2)
    torch.testing.assert_close(adaptive_avg_pool(size, x), torch.nn.AdaptiveAvgPool2d(size)(x))


def test_a_number_in_a_name_is_read_again():
    for value in (1e-5, 1e-3, 0.01, 1.25e-7, 1.0):
        assert name_number(value).isalnum()
        assert read_number(name_number(value)) == value


def test_the_file_says_its_task_and_the_classes_of_the_model(vim):
    model, graph = vim
    about = json.loads({p.key: p.value for p in graph.metadata_props}["ssmcompress"])
    assert about["task"] == "segmentation"
    assert about["classes"] == ["wall", "sky", "tree", "road", "person"]
    assert about["preprocessing"] == json.loads(json.dumps(model.preprocessing.to_dict()))
    assert about["architecture"]["image_size"] == [64, 96]


def test_weights_of_neck_head_and_maps_are_the_models(vim):
    """onnxscript's optimizer would multiply the norms of the neck into its convolutions."""
    model, graph = vim
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    unused = {"backbone.norm_f.weight", "backbone.layers.0.mixer.gap_delta", "backbone.layers.3.mixer.gap_delta"}
    for name, tensor in state.items():
        if name in unused:  # the first and the last layer process all tokens
            continue
        twins = [values[name]] if name in values else values.values()  # the exporter keeps one of equal tensors
        assert any(np.array_equal(twin, tensor.numpy()) for twin in twins), name
    names = {node.name for node in graph.graph.node}
    assert {"backbone.fpn1.0/ConvTranspose", "decode_head.bottleneck.bn/BatchNorm"} <= names
    assert any(name.startswith("level_maps.3.") for name in names)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.layers.1.mixer.out_proj.weight", 2),
        ("backbone.fpn1.1.running_mean", 0),
        ("level_maps.3.1.own.bias", 0),
    ],
)
def test_a_changed_weight_is_found_and_located(vim, pictures, name, layer):
    model, traced = vim
    wrong = assemble(traced, "scan")
    tensor = next(tensor for tensor in wrong.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.5) + np.float32(0.1), name))
    with pytest.raises(VerificationError, match=r"of the pixels of 4 images in the same class") as caught:
        verify_onnx(model, wrong, data=pictures)
    assert caught.value.result.weights == [name]
    assert caught.value.result.first_layer == layer
    assert ("so in the head" in str(caught.value)) == (layer == 0)


def test_images_of_any_size_are_cut_to_one_and_their_masks_are_not_read(vim, pictures):
    model, traced = vim
    result = verify_onnx(model, assemble(traced, "scan"), data=pictures)
    assert (result.images, result.passed) == (4, True)


def test_pixels_whose_classes_are_equal_up_to_rounding_pass_and_others_do_not(plain_mamba):
    *_, result = plain_mamba
    assert replace(result, top1_agreement=99.9).passed
    assert not replace(result, top1_agreement=98.9).passed
    assert not replace(result, max_difference=2e-4).passed
    assert not replace(result, top1_agreement=99.9, task="classification").passed


def test_large_outputs_are_verified_and_timed_in_small_batches(vim, monkeypatch):
    from ssmcompress.export import verify

    model, traced = vim
    assert takes_batches(model)
    assert export._batches(model) == (1, 8)
    monkeypatch.setattr(verify, "BATCH_LOGITS", 8 * 5 * 64 * 96 - 1)
    assert export._batches(model) == (1,)
    genuine, sizes = verify.run, []

    def note(session, outputs, images):
        sizes.append(len(images))
        return genuine(session, outputs, images)

    monkeypatch.setattr(verify, "run", note)
    assert verify_onnx(model, assemble(traced, "scan")).images == sum(sizes) == 36
    assert sizes == [3] * 11 + [2, 1]


def test_a_segmenter_is_timed_with_its_products_in_parts(monkeypatch):
    monkeypatch.setattr(latency, "PRODUCT_NUMBERS", 1000)
    assert latency._split_rows(10, 400) == [2] * 5
    assert latency._split_rows(5, 400) == [2, 2, 1]
    assert latency._split_rows(3, 4000) == [1] * 3
    inputs, linear = [], F.linear

    def note(values, weight, *bias):
        inputs.append(values.numel())
        return linear(values, weight, *bias)

    model = make_vim()
    run = latency._make_products(model, 1, torch.float32, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", note)
        run()
    assert max(inputs) <= 1000
    assert sum(inputs) == sum(rows * weight.shape[1] for rows, weight in model.matrix_products())
    pruned = ssmcompress.prune(model, Plan((Stage(2, 0.5),)))
    rows = latency.benchmark({"dense": model, "pruned": pruned}, (1,), repeats=1)
    assert [row["model"] for row in rows] == ["dense", "pruned"]
    assert all(row["ms"] > 0 and row["products_ms"] > 0 for row in rows)
