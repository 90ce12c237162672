"""The last layer of a model that reads out one token: computed for that token alone, with the same logits."""

import copy

import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim
from onnx_runs import run_file

import ssmcompress
from ssmcompress.evaluation.flops import flops, flops_as_run, flops_by_part
from ssmcompress.export.onnx import build_onnx
from ssmcompress.pruning.plan import Plan, Stage


def in_full(model, images):
    """The logits of a model that computes every token of the last layer."""
    return model.readout(model.encode(images)[0])


def dense_and_pruned(**sizes):
    dense = make_vim(**sizes)
    plan = Plan((Stage(1, 0.3), Stage(dense.config.depth - 1, 0.6, "l2")))
    one_scan = ssmcompress.drop_directions(dense, {dense.config.depth: [0], 1: [1]})
    return {
        "dense": dense,
        "pruned": ssmcompress.prune(dense, plan),
        "naive": ssmcompress.prune(dense, Plan(plan.stages, ssmcompress.make_plan(dense, alignment=False).alignment)),
        "one scan": one_scan,
        "one scan, pruned": ssmcompress.prune(one_scan, plan),
    }


@pytest.fixture(params=["dense", "pruned", "naive", "one scan", "one scan, pruned"])
def a_vim(request):
    return dense_and_pruned()[request.param]


@torch.no_grad()
@pytest.mark.parametrize("batch", range(1, 9))
def test_it_gives_the_logits_of_the_full_layer(a_vim, batch):
    images = images_of(a_vim, batch, seed=batch)
    torch.testing.assert_close(a_vim(images), in_full(a_vim, images), rtol=0, atol=1e-6 * a_vim(images).abs().max())


@torch.no_grad()
def test_of_an_image_alone_and_in_a_batch(a_vim):
    images = images_of(a_vim, 6)
    alone = torch.cat([a_vim(image[None]) for image in images])
    torch.testing.assert_close(a_vim(images), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_float64_it_is_exact(a_vim):
    model, images = copy.deepcopy(a_vim).double(), images_of(a_vim, 4).double()
    torch.testing.assert_close(model(images), in_full(model, images), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16(a_vim, how):
    """Both round the same values, except that a matrix product with fewer rows may sum in another order."""
    images = images_of(a_vim, 8)
    if how == "weights":
        model = copy.deepcopy(a_vim).bfloat16()
        found, expected = model(images.bfloat16()), in_full(model, images.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = a_vim(images), in_full(a_vim, images)
    same = (found == expected).double().mean()
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
    assert same > 0.5


def test_its_gradients_are_those_of_the_full_layer(a_vim):
    images, gradients = images_of(a_vim, 3), []
    for forward in (a_vim, lambda x: in_full(a_vim, x)):
        a_vim.zero_grad()
        forward(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in a_vim.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        largest = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * largest + 1e-9, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "pruned", "one scan, pruned"])
def test_onnx_gives_the_logits_of_the_full_layer(name):
    model = dense_and_pruned(depth=3)[name]  # the least that two stages allow; a layer takes 2 s to trace
    graph = build_onnx(model)
    for batch in (1, 5):
        images = images_of(model, batch, seed=7)
        expected = in_full(model, images)
        found = torch.from_numpy(run_file(graph, images))
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_a_hook_on_the_last_layer_sees_one_token(vim, images):
    seen = []
    vim.layers[-1].register_forward_hook(lambda module, args, tokens: seen.append(tokens.features.shape))
    vim(images)
    assert seen == [(5, 1, 16)]


def test_flops_of_the_last_layer():
    """Of n tokens: n + 1 steps of both scans together, one token of the gate and of the projection."""
    model = ssmcompress.prune(make_vim(depth=2), Plan((Stage(1, 0.5),)))
    c, (full, n, _) = model.config, model.token_counts()
    E, N, R, K, D = c.d_inner, c.d_state, c.dt_rank, c.d_conv, c.d_model
    parts = {name: round(1e9 * value) for name, value in flops_by_part(model).items()}
    assert parts["in_proj"] == full * D * 2 * E + n * D * E + D * E
    assert parts["out_proj"] == full * E * D + E * D
    assert parts["conv"] == 2 * (full + K - 1) * E * K + (n + 1 + 2 * (K - 1)) * E * K
    assert parts["x_proj"] == (2 * full + n + 1) * E * (R + 2 * N)
    assert parts["dt_proj"] == (2 * full + n + 1) * R * E
    assert parts["scan"] == 2 * full * (9 * E * N + 2 * E) + (n + 1) * (9 * E * N + E) + 2 * E


def test_a_dense_model_counts_as_published_and_as_run():
    model = make_vim(depth=2)
    copied = ssmcompress.prune(model, ratio=0.0)
    assert flops_as_run(model)["full"] == flops(copied)["full"] < flops(model)["full"]
    assert flops_as_run(model)["paper"] == flops(copied)["paper"] == flops(model)["paper"]


def test_a_model_that_reads_a_mean_computes_all_tokens():
    model = make_plain_mamba(depth=2)
    assert flops_as_run(model) == flops(model)


def test_where_shapes_must_not_depend_on_values_the_span_fits_every_image(vim):
    pruned = ssmcompress.prune(vim, Plan((Stage(1, 0.5),)))
    tokens, _ = pruned.step(1, pruned.embed(images_of(vim, 64, seed=3)))
    index, (lowest, highest) = tokens.protected_index(), tokens._protected_range()
    assert (lowest, highest) == (int(index.min()), int(index.max()))
    positions = tokens.positions.to("meta")
    static = tokens.__class__(tokens.features.to("meta"), tokens.length, tokens.protected, positions)._protected_range()
    assert static[0] <= lowest <= highest <= static[1] < tokens.features.shape[1]
