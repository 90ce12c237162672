"""Models in bfloat16: weights in bfloat16, the same results as under autocast, and the parts kept in float32."""

import pytest
import torch
from command_line import call, call_json
from conftest import make_plain_mamba, make_vim, make_vit
from torch import nn

import ssmcompress
from ssmcompress.evaluation.measure import autocast, measure, run_in
from ssmcompress.models.precision import narrow_products


def make(kind: str) -> nn.Module:
    if kind == "plain_mamba":
        return make_plain_mamba()
    if kind == "vit":
        return make_vit()
    vim = make_vim(depth=4)
    if kind == "pruned":
        return ssmcompress.prune(vim, ssmcompress.make_plan(vim, ratio=0.4))
    return vim


@pytest.mark.parametrize("kind", ["dense", "pruned", "plain_mamba", "vit"])
def test_results_are_those_of_autocast(kind):
    model = make(kind)
    images = torch.randn(3, model.config.in_chans, *model.config.image_size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        with autocast(images.device, torch.bfloat16):
            expected = model(images)
        assert torch.equal(run_in(model, torch.bfloat16)(images), expected)
        assert not torch.equal(model(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert run_in(model, torch.float32) is model


def test_a_quantised_model_runs_as_under_autocast(vim, images):
    quantised = torch.ao.quantization.quantize_dynamic(vim, {nn.Linear})
    with torch.no_grad(), autocast(images.device, torch.bfloat16):
        expected = quantised(images)
    with torch.no_grad():
        assert torch.equal(run_in(quantised, torch.bfloat16)(images), expected)


def test_a_module_of_other_code_is_left_as_it_is(images):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = 4
            self.linear = nn.Linear(3 * 16 * 16, 10)

        def forward(self, x):
            return self.linear(x.flatten(1))

    other = Other()
    assert ssmcompress.evaluate(other, images, dtype=torch.bfloat16).images == 5
    assert other.linear.weight.dtype == torch.float32


def test_only_products_of_layers_are_narrow(vim):
    narrow = narrow_products(vim, torch.bfloat16)
    linear = {name for name, module in narrow.named_modules() if isinstance(module, nn.Linear)}
    halves = {name for name, value in narrow.named_parameters() if value.dtype == torch.bfloat16}
    assert halves == {f"{name}.weight" for name in linear if name.startswith("layers.")}


def test_no_weight_is_converted_at_each_forward(vim, images):
    """The activations of a layer also stay in bfloat16, so that only a few small tensors are converted."""
    converted = []

    class Conversions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
                converted.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    model = run_in(vim, torch.bfloat16)
    with torch.no_grad(), Conversions():
        model(images)
    weights = {tuple(p.shape) for p in vim.blocks.parameters() if p.ndim == 2}
    assert not weights & set(converted)


def test_pruned_models_are_measured_in_both(images):
    pruned = make("pruned")
    pair = measure({"dense": pruned, "narrow": run_in(pruned, torch.bfloat16)}, images)
    assert pair["narrow"].figures["agreement"] > 50
    assert 0 < pair["narrow"].figures["kl"] < 0.1


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_report_has_float32_beside_bfloat16(checkpoint, class_folders):
    options = ["prune", checkpoint, "--ratio", 0.3, "--data", class_folders, "--no-latency", "--no-reconstruct"]
    assert "float32" not in call_json(*options, "-o", "wide")
    report = call_json(*options, "--dtype", "bfloat16", "-o", "narrow")
    assert report["dtype"] == "bfloat16"
    assert set(report["float32"]) == {"dense", "pruned"}
    assert report["float32"]["dense"]["agreement"]["top1"] > 50
    assert "the pruned model in float32: " in call("report", "narrow").stdout
