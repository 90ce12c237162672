"""Use of the models by other code: torch's conversions, dtypes, tracing, empty batches, unusual images."""

import copy
import io
import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim

import ssmcompress
from ssmcompress import Plan
from ssmcompress.errors import InputError
from ssmcompress.export.onnx import build_onnx
from ssmcompress.ops import use_backend
from ssmcompress.pruning.plan import Stage

MAKERS = {"vim": make_vim, "plain_mamba": make_plain_mamba}
MERGED = {"ordered": "similarity", "grouped": "clip"}
KINDS = ["dense", "clip", "delta", "clip-paths", "random", "saliency", "naive", "ordered", "grouped", "reconstructed"]


def variant(make, kind):
    """A small model: dense, pruned by a metric, without alignment, by merging in two stages, or with refitting."""
    model = make(depth=3 if kind in MERGED else 2)
    images = images_of(model, 8)
    if kind == "dense":
        return model
    if kind in MERGED:
        stages = tuple(Stage(after, 0.4, MERGED[kind], kind) for after in (1, 2))
        return ssmcompress.prune(model, Plan(stages, gap="bias"))
    metric = "clip" if kind in ("naive", "reconstructed") else kind
    plan = ssmcompress.calibrate(model, images, ratio=0.4, importance=metric, alignment=kind != "naive")
    pruned = ssmcompress.prune(model, plan)
    return ssmcompress.reconstruct(pruned, model, images) if kind == "reconstructed" else pruned


@pytest.fixture(scope="module", params=[(name, kind) for name in MAKERS for kind in KINDS], ids="-".join)
def any_model(request):
    name, kind = request.param
    return variant(MAKERS[name], kind)


@pytest.fixture(scope="module", params=[(name, kind) for name in MAKERS for kind in ("dense", "clip")], ids="-".join)
def plain_or_pruned(request):
    name, kind = request.param
    return variant(MAKERS[name], kind)


def quantised(model, dtype=torch.qint8):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its quantisation
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=dtype)


def close_logits(found, expected, tolerance):
    """Rounding may change the kept tokens of a few images; all other logits are close."""
    assert found.isfinite().all()
    errors = (found.float() - expected).abs().amax(1) / expected.abs().max()
    assert errors.median() < tolerance


@torch.no_grad()
def test_a_traced_model_computes_the_same_for_other_images_and_batches(any_model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each check of a shape
        traced = torch.jit.trace(any_model, images_of(any_model, 3), check_trace=False)
    for batch in (1, 4, 0):
        images = images_of(any_model, batch, seed=10 + batch)
        # The last layer of a Vim has a longer span where shapes do not depend on values: another order of rounding.
        torch.testing.assert_close(traced(images), any_model(images), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["saliency", "grouped"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_exported_program_computes_the_same(name, kind):
    model = variant(MAKERS[name], kind)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images_of(model, 3),), dynamic_shapes={"images": {0: batch}})
    images = images_of(model, 5, seed=11)
    torch.testing.assert_close(program.module()(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_an_empty_batch_has_no_logits(any_model, backend):
    images = images_of(any_model, 0)
    if backend is None:
        logits = any_model(images)
    else:
        with use_backend(backend):
            logits = any_model(images)
    assert (tuple(logits.shape), logits.dtype) == ((0, 10), torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_copies_of_another_dtype_compute_nearly_the_same(any_model, dtype, tolerance):
    images = images_of(any_model, 8, seed=12)
    found = copy.deepcopy(any_model).to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    close_logits(found, any_model(images), tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.qint8, 0.3), (torch.float16, 0.01)])
def test_a_quantised_copy_computes_nearly_the_same(any_model, dtype, tolerance):
    images = images_of(any_model, 8, seed=13)
    close_logits(quantised(any_model, dtype)(images), any_model(images), tolerance)


@torch.no_grad()
def test_the_states_of_a_bfloat16_copy_are_float32():
    """Only its weights are rounded, not the sums: the same rounded weights in float32 differ less."""
    model = make_vim(depth=6)
    images = images_of(model, 8)
    rounded = copy.deepcopy(model).bfloat16()
    difference = (rounded(images.bfloat16()).float() - rounded.float()(images.bfloat16().float())).abs().max()
    assert difference < 0.02 * model(images).abs().max()


def test_the_draws_of_random_pruning_do_not_depend_on_the_dtype():
    """bfloat16 has 8 bits: of 197 random numbers some would be equal."""
    model = make_vim(depth=2, image=(56, 56))
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.5, importance="random"))
    images = images_of(model, 2)
    with torch.no_grad():
        kept = pruned.trace(images)[1][0].kept
        half = copy.deepcopy(pruned).bfloat16().trace(images.bfloat16())[1][0].kept
    assert torch.equal(kept, half)


def test_what_a_quantised_model_cannot_do_is_said(tmp_path):
    model = make_vim(depth=2)
    images = images_of(model, 8)
    plan = ssmcompress.make_plan(model)
    pruned = ssmcompress.prune(model, plan)
    small = quantised(model)
    calls = [
        lambda: ssmcompress.prune(small, plan),
        lambda: ssmcompress.calibrate(small, images, importance="saliency"),
        lambda: ssmcompress.reconstruct(quantised(pruned), model, images),
        lambda: ssmcompress.save(small, tmp_path / "out"),
        lambda: ssmcompress.export_onnx(small, tmp_path / "m.onnx"),
        lambda: ssmcompress.load(small),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"is quantised \(layers.0.mixer.in_proj\).*quantise after"):
            call()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="use torch.export"):
        torch.fx.symbolic_trace(model)


@pytest.fixture(scope="module")
def half_model(tmp_path_factory):
    """A pruned model in float16, its file, and the result of its verification."""
    model, file = variant(make_plain_mamba, "clip").half(), tmp_path_factory.mktemp("half") / "m.onnx"
    return model, file, ssmcompress.export_onnx(model, file, ssmcompress.OnnxOptions(scan="scan")).passed


@torch.no_grad()
def test_a_half_model_is_saved_loaded_and_exported(half_model, tmp_path):
    model, _, passed = half_model
    images = images_of(model, 4)
    loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / "m"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    close_logits(model(images.half()), loaded(images), 0.01)
    assert passed
    assert model.classifier.weight.dtype == torch.float16


def test_a_wrapped_delta_projection_is_not_bypassed(plain_or_pruned):
    """Adapters, as those of LoRA, take the place of a linear layer and have its weight."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 0.5 * x.sum(-1, keepdim=True)

    model = copy.deepcopy(plain_or_pruned)
    images = images_of(model, 2)
    with torch.no_grad():
        before = model(images)
        mixers = [module for module in model.modules() if hasattr(module, "dt_proj")]  # one path of a Vim's two
        for mixer in mixers:
            mixer.dt_proj = Adapted(mixer.dt_proj)
        assert not torch.allclose(model(images), before, atol=1e-4)


@torch.no_grad()
def test_copies_in_memory_and_on_disk_are_the_model(any_model):
    images = images_of(any_model, 3, seed=14)
    expected = any_model(images)
    file = io.BytesIO()
    torch.save(any_model, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    other = copy.deepcopy(any_model)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(any_model.state_dict())
    parallel = torch.nn.DataParallel(any_model)
    for model in (restored, other, parallel, copy.deepcopy(any_model).train().eval()):
        assert torch.equal(model(images), expected)
    assert torch.equal(any_model(images.to(memory_format=torch.channels_last)), expected)


def test_autocast_inference_mode_and_compile(any_model):
    images = images_of(any_model, 3, seed=15)
    with torch.inference_mode():
        expected = any_model(images)
        with torch.autocast("cpu", torch.bfloat16):
            close_logits(any_model(images), expected, 0.05)
            close_logits(any_model(images.bfloat16()), expected, 0.05)
    assert tuple(copy.deepcopy(any_model).to("meta")(images.to("meta")).shape) == (3, 10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "clip"])
def test_compiled_by_torch(kind):
    """A PlainMamba; test_cpu_engine.py compiles a Vim."""
    model = variant(make_plain_mamba, kind)
    images = images_of(model, 3, seed=16)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
    torch.compiler.reset()


def test_images_get_gradients_through_a_pruned_model(any_model):
    """The same as those of the reference in float64, in a direction."""
    images = images_of(any_model, 2, seed=17).requires_grad_()
    (gradient,) = torch.autograd.grad(any_model(images).square().sum(), images)
    exact = images.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(any_model).double()(exact).square().sum(), exact)
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
def test_an_image_of_nan_spoils_no_other(any_model):
    images = images_of(any_model, 3, seed=18)
    expected = any_model(images)
    images[1] = torch.nan
    found = any_model(images)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


def test_images_that_a_model_cannot_take_are_refused_with_what_to_do(plain_or_pruned):
    model = plain_or_pruned
    images = images_of(model, 2)
    half = copy.deepcopy(model).half()
    for case, taker, message in (
        (images.byte(), model, r"images are torch.uint8: expected torch.float32, prepared as model.transform\(\) does"),
        (images.long(), model, "images are torch.int64"),
        (images.double(), model, r"are torch.float64, the model is torch.float32: use images.to\(torch.float32\)"),
        (images.bfloat16(), model, r"use images.to\(torch.float32\)"),
        (images, half, r"are torch.float32, the model is torch.float16: use images.to\(torch.float16\)"),
        (images.to("meta"), model, r"images are on meta, the model is on cpu: use images.to\('cpu'\)"),
        (images[0], model, r"use images\[None\] for one image"),
        (images.permute(0, 2, 3, 1), model, r"use images.permute\(0, 3, 1, 2\)"),
        (images[..., :8], model, "another image_size"),
        (images.numpy(), model, r"a ndarray: expected a tensor \(batch, 3, .*use torch.from_numpy"),
        (images.tolist(), model, "images are a list: expected a tensor"),
        (images.to_sparse(), model, r"use images.to_dense\(\)"),
    ):
        with pytest.raises(InputError, match=message):
            taker(case)


def test_onnx_files_do_not_depend_on_the_defaults_of_torch(half_model):
    model, file, _ = half_model
    found, expected = with_default(torch.float64, "meta", lambda: build_onnx(model)), onnx.load(file)
    for graph in (found, expected):  # a file has the classes of the images with which it was verified
        about = json.loads(graph.metadata_props[0].value)
        del graph.metadata_props[:], about["classes"]
        onnx.helper.set_model_props(graph, {"about": json.dumps(about)})
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def with_default(dtype, device, call):
    """The result of a call under another default dtype or device of torch."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        return call()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def run_everything(architecture, images, folder):
    """Load, calibrate, prune, merge, reconstruct, save and load again; return the logits of each model."""
    dense = ssmcompress.load(folder / "model.pt", architecture=architecture)
    logits = [dense(images)]
    for metric in ("random", "saliency"):
        plan = ssmcompress.calibrate(dense, images, ratio=0.4, importance=metric)
        pruned = ssmcompress.prune(dense, Plan.from_dict(json.loads(json.dumps(plan.to_dict()))))
        logits.append(pruned(images))
    for merge, metric in MERGED.items():
        plan = Plan((Stage(1, 0.4, metric, merge),), gap="bias")
        logits.append(ssmcompress.prune(dense, plan)(images))
    ssmcompress.save(ssmcompress.reconstruct(pruned, dense, images), folder / "saved", force=True)
    loaded = ssmcompress.load(folder / "saved")
    tensors = [*loaded.parameters(), *(b for b in loaded.buffers() if b.is_floating_point())]
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.float32, "cpu")}
    return [*logits, loaded(images)]


@pytest.fixture(scope="module", params=MAKERS)
def usual_run(request, tmp_path_factory):
    """The arguments of `run_everything`, and its logits under torch's own defaults."""
    model, folder = MAKERS[request.param](depth=2), tmp_path_factory.mktemp("usual")
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    arguments = request.param, images_of(model, 6), folder
    return arguments, run_everything(*arguments)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")], ids=str
)
def test_the_defaults_of_torch_change_nothing(usual_run, dtype, device):
    arguments, expected = usual_run
    found = with_default(dtype, device, lambda: run_everything(*arguments))
    for logits, wanted in zip(found, expected, strict=True):
        assert logits.dtype == torch.float32
        assert torch.equal(logits, wanted)


def test_numpy_images_are_used_as_the_message_says(plain_or_pruned):
    images = images_of(plain_or_pruned, 2).double().numpy()
    assert isinstance(images, np.ndarray)
    assert tuple(plain_or_pruned(torch.from_numpy(images).float()).shape) == (2, 10)
