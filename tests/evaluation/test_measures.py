"""The metrics of the report: accuracy, agreement, FLOPs, latency."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import images_of, make_plain_mamba, make_vim
from torch.utils.flop_counter import FlopCounterMode

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops, flops_by_part, remaining_share, smallest_share
from ssmcompress.evaluation.latency import benchmark, latency, peak_memory, summarize_times
from ssmcompress.evaluation.measure import autocast, measure
from ssmcompress.evaluation.op_benchmark import _by_mambapy, _make_inputs, benchmark_ops
from ssmcompress.models.vim import VimConfig, VisionMamba
from ssmcompress.ops import selective_scan, use_backend
from ssmcompress.pruning.plan import Plan, Stage, default_stages


class Fixed(torch.nn.Module):
    """Returns the logits that are passed as images (B, 1, 1, classes)."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.as_tensor(shift))

    def forward(self, images):
        return images[:, 0, 0] + self.shift


def test_accuracy_agreement_and_divergence():
    logits = torch.eye(6)[[0, 1, 2, 3]] * 5 - torch.arange(6) / 100
    labels = torch.tensor([0, 1, 5, 0])
    batches = [(logits[:3, None, None], labels[:3]), (logits[3:, None, None], labels[3:])]
    shift = torch.tensor([0.0, 0, 0, 9, 0, 0])
    found = measure({"dense": Fixed(), "model": Fixed(shift)}, batches)
    assert (found["dense"].top1, found["dense"].images, found["dense"].agreement) == (50.0, 4, None)
    assert (found["model"].top1, found["model"].agreement) == (0.0, 25.0)
    p, q = logits.double().softmax(1), (logits + shift).double().softmax(1)
    assert found["model"].kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-5)
    assert found["dense"].top5 == 75.0  # the third image's label is its last class


def test_unlabelled_and_few_classes():
    images = F.one_hot(torch.tensor([0, 1]), 3).float()[:, None, None]
    unlabelled = ssmcompress.evaluate(Fixed(), [images])
    assert (unlabelled.top1, unlabelled.top5, unlabelled.labelled) == (None, None, False)
    labelled = ssmcompress.evaluate(Fixed(), [(images, torch.tensor([0, 1]))])
    assert (labelled.top1, labelled.top5) == (100.0, None)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_batch_size_changes_nothing(vim, images, batch_size):
    pruned = ssmcompress.prune(vim, ssmcompress.calibrate(vim, images))
    labels = torch.arange(5)
    whole = measure({"dense": vim, "pruned": pruned}, [(images, labels)])
    parts = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    for name, found in measure({"dense": vim, "pruned": pruned}, parts).items():
        assert (found.top1, found.agreement) == (whole[name].top1, whole[name].agreement)
        assert found.kl == pytest.approx(whole[name].kl, abs=2e-6)


def test_bfloat16_is_autocast(vim, images):
    pruned = ssmcompress.prune(vim, ssmcompress.make_plan(vim))
    for model in (vim, pruned):
        wide, narrow = (
            measure({"dense": vim, "m": model}, images, dtype=d)["m"] for d in (torch.float32, torch.bfloat16)
        )
        assert wide.kl != narrow.kl or model is vim
        with autocast(images.device, torch.bfloat16):
            logits = model(images)
        assert 1e-5 < (logits.float() - model(images)).abs().max() < 0.5


def shape_only(d_model):
    """A published Vim without memory for its weights."""
    with torch.device("meta"):
        config = VimConfig(d_model, 24, 2 * d_model, 16, -(-d_model // 16), 4, 3, 1000, (16, 16), 16, (224, 224))
        return VisionMamba(config)


@pytest.mark.parametrize(
    ("d_model", "params", "full", "paper"),
    [(192, 7_148_008, 1.823, 1.449), (384, 25_796_584, 5.912, 5.077), (768, 97_598_440, 20.887, 18.868)],
)
def test_published_sizes(d_model, params, full, paper):
    model = shape_only(d_model)
    assert sum(p.numel() for p in model.parameters()) == params
    found = flops(model)
    assert found["full"] == pytest.approx(full, rel=1e-3)
    assert found["paper"] == pytest.approx(paper, rel=1e-3)
    assert sum(flops_by_part(model).values()) == pytest.approx(found["full"])


def test_tiny_has_415_tensors():
    assert len(shape_only(192).state_dict()) == 415


@pytest.mark.parametrize(("d_model", "stages", "paper"), [(384, (5, 10, 15), 3.57), (192, (10,), 1.28)])
def test_published_pruned_sizes(d_model, stages, paper):
    model = shape_only(d_model)
    model.plan = Plan(tuple(Stage(after, 0.2) for after in stages))
    assert flops(model)["paper"] == pytest.approx(paper, rel=1e-2)


# Parts that are matrix products, and those that torch's counter sees as convolutions.
PRODUCTS = ("embedding", "in_proj", "x_proj", "dt_proj", "out_proj", "head")


def to_be_counted(architecture, ratio):
    if architecture == "vim":
        model = make_vim(image=(32, 32), d_model=32)
    else:
        model = make_plain_mamba(image=(64, 96), d_model=32, dw_layers=(0, 3))
    return ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=ratio)) if ratio else model


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("architecture", ["vim", "plain_mamba"])
def test_matrix_products_agree_with_torchs_own_counter(architecture, ratio):
    """Torch counts neither scans nor depthwise convolutions, but both directions; a multiply-add is two FLOPs."""
    model = to_be_counted(architecture, ratio)
    parts, c = flops_by_part(model, as_run=True), model.config
    expected = 1e9 * sum(parts[name] for name in PRODUCTS)
    # The reference, whose read-out of the state the counter can see.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("reference"):
        model(images_of(model, 1))
    # The scan's read-out C h is a matrix product here and is in the formula's 9 per state.
    paths = len(model.embed(images_of(model, 1)).orders)
    *counts, last = model.token_counts()
    steps = paths * sum(counts) - (last - 1 if model.reads_protected else 0)
    expected += steps * c.d_inner * c.d_state
    if architecture == "plain_mamba":  # the reference goes over the whole grid
        expected += model.length * (c.depth * c.d_inner * c.window**2 + len(c.dw_layers) * c.d_model * c.dw_window**2)
    assert counter.get_total_flops() / 2 == pytest.approx(expected)


def test_a_convolution_on_the_grid_costs_a_window_for_each_kept_token():
    model = to_be_counted("plain_mamba", 0.5)
    c, counts = model.config, model.token_counts()
    assert counts == [24, 12, 6, 3, 3]
    taps = c.d_inner * c.window**2 * (24 + 12 + 6 + 3) + c.d_model * c.dw_window**2 * (24 + 3)
    assert flops_by_part(model)["conv"] == taps / 1e9


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("architecture", ["vim", "plain_mamba"])
def test_matrix_products_that_are_timed_alone_are_those_of_the_model(architecture, ratio):
    model = to_be_counted(architecture, ratio)
    parts = flops_by_part(model, as_run=True)
    expected = 1e9 * sum(parts[name] for name in PRODUCTS)
    assert sum(rows * weight.numel() for rows, weight in model.matrix_products()) == pytest.approx(expected)


def test_the_stem_counts_in_what_images_take_at_a_time():
    model = make_plain_mamba(depth=1, d_model=8)
    assert model.activation_bytes() == 2 * 32 * 32 * 8 * 4


def test_spread_is_within_what_was_measured():
    assert summarize_times([1.0, 10.0]) == {"ms": 5.5, "ms_low": 3.25, "ms_high": 7.75}
    assert summarize_times([2.0]) == {"ms": 2.0, "ms_low": 2.0, "ms_high": 2.0}


def test_peak_memory_is_what_is_held_at_once():
    def call():
        first, second = torch.empty(1_000_000), torch.empty(500_000)
        del first
        return second, torch.empty(750_000)

    assert peak_memory(call, torch.device("cpu")) == 6_000_000


def test_a_forward_holds_less_than_its_activations_and_no_tensor_of_all_states():
    c = replace(make_vim(image=(64, 64), d_model=32).config, d_state=64)
    model, images = VisionMamba(c).eval(), torch.randn(2, 3, 64, 64)
    model(images)  # one-time allocations are not part of the forward pass
    states = 2 * model.length * c.d_inner * c.d_state * 4
    assert peak_memory(lambda: model(images), torch.device("cpu")) < min(states, 1.5 * 2 * model.activation_bytes())


def test_benchmark_times_each_model_beside_its_products(model):
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.5))
    rows = benchmark({"dense": model, "pruned": pruned}, batch_sizes=(1, 2), repeats=3, reference=True)
    assert [(row["model"], row["batch"]) for row in rows] == [(m, b) for b in (1, 2) for m in ("dense", "pruned")]
    for row in rows:
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["ms"])
        assert row["times_products"] == pytest.approx(row["ms"] / row["products_ms"])
        assert row["times_reference"] == pytest.approx(row["reference_ms"] / row["ms"])
        # Torch's convolutions, a stem of them here, take scratch of their own.
        assert 0 < row["peak_mb"] < (row["activations_mb"] if model.architecture == "vim" else 1)
    assert rows[0]["times_faster"] == 1
    assert rows[1]["times_faster"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])


def test_ops_are_timed_by_every_backend():
    rows = benchmark_ops((1, 5, 7, 2), repeats=2)
    found = {(row["op"], row["by"]) for row in rows}
    ops = "scan", "scan backward", "conv", "conv backward", "snakes", "conv 7x7 pruned"
    expected = {(op, by) for op in ops for by in ("reference", "cpu")}
    assert found >= expected | {("one layer", "matrix products")}
    assert all(row["ns_per_element"] > 0 for row in rows if row["op"] != "one layer")


def test_the_work_that_mambapy_is_timed_at_is_the_scan():
    def pscan(factors, inputs):
        states = [inputs[:, 0]]
        for t in range(1, inputs.shape[1]):
            states.append(factors[:, t] * states[-1] + inputs[:, t])
        return torch.stack(states, 1)

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        scan, _ = _make_inputs((2, 9, 7, 3), dtype, torch.device("cpu"))
        found, expected = _by_mambapy(pscan, scan)().float(), selective_scan(**scan, delta_softplus=True).float()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_reachable_range_is_that_of_two_tokens():
    model = make_vim(image=(32, 32))
    least = smallest_share(model, default_stages(4))
    assert least == remaining_share(model, [Stage(after, 0.999999) for after in default_stages(4)])
    pruned = ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.999))
    assert flops(pruned)["full"] / flops(model)["full"] == pytest.approx(least)


def test_latency_is_measured_for_each(vim, images, monkeypatch):
    clock = iter([0.0, 9.0, 0.0, 9.0, 0.0, 0.001, 0.0, 0.003, 0.0, 0.002, 0.0, 0.004])
    monkeypatch.setattr("ssmcompress.evaluation.latency.perf_counter", lambda: next(clock))
    times = latency({"a": vim, "b": vim}, images[:1], repeats=2)
    assert times == {"a": pytest.approx(1.5), "b": pytest.approx(3.5)}  # the first run of each does not count


def test_logits_that_are_not_finite_are_an_error_and_no_figure(vim, images):
    with torch.no_grad():
        vim.head.bias[0] = torch.nan
    with pytest.raises(InputError, match="not finite on these images"):
        ssmcompress.evaluate(vim, images)
    with pytest.raises(InputError, match="not finite on these images"):
        ssmcompress.calibrate(vim, images)
