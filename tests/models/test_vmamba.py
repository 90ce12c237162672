"""VMamba: the authors' logits, published sizes, alignment on its four paths, and dropping inside a section."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, images_of, make_vmamba
from hypothesis import given, settings
from hypothesis import strategies as st

import ssmcompress
from ssmcompress.compression.reconstruct import reconstruct
from ssmcompress.compression.reconstruct.levels import map_levels
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops, flops_by_part, flops_by_section, remaining_share
from ssmcompress.models.vmamba import VMamba, VMambaConfig
from ssmcompress.models.vmamba_block import make_paths
from ssmcompress.ops import selective_scan
from ssmcompress.pruning.alignment import UNALIGNED
from ssmcompress.pruning.plan import Plan, Stage
from ssmcompress.pruning.tokens import Tokens


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "vmamba_s2.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture
def vmamba():
    return make_vmamba()


def test_golden_logits_of_images_that_are_not_square(golden):
    model = ssmcompress.load(GOLDEN / "vmamba_s2.pth", image_size=tuple(golden["images"].shape[2:]))
    with torch.no_grad():
        torch.testing.assert_close(model(golden["images"].float()), golden["logits"].float(), atol=1e-5, rtol=0)
        exact = model.double()(golden["images"].double())
    torch.testing.assert_close(exact, golden["logits"].double(), atol=1e-8, rtol=0)


# Widths of the first section, depths, ratio of the inner width; parameters, and GFLOPs derived from the shapes.
SIZES = {
    "tiny s1l8": (96, (2, 2, 8, 2), 1, 30_249_064, 4.88),
    "tiny s2l5": (96, (2, 2, 5, 2), 2, 30_705_832, 4.82),
    "small s2l15": (96, (2, 2, 15, 2), 2, 50_147_752, 8.67),
    "base s2l15": (128, (2, 2, 15, 2), 2, 88_557_800, 15.29),
}


def make_published(name):
    width, depths, ratio, parameters, gflops = SIZES[name]
    widths = tuple(width * 2**section for section in range(4))
    config = VMambaConfig(
        widths=widths,
        depths=depths,
        d_inner=tuple(ratio * width for width in widths),
        dt_rank=tuple(width // 16 for width in widths),
        mlp_dim=tuple(4 * width for width in widths),
        d_state=1,
        stem_width=width // 2,
        window=3,
        in_chans=3,
        num_classes=1000,
        stride=4,
        image_size=(224, 224),
    )
    with torch.device("meta"):
        return VMamba(config), parameters, gflops


@pytest.mark.parametrize("name", SIZES)
def test_published_flops_and_parameters(name):
    model, parameters, gflops = make_published(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert flops(model)["full"] == pytest.approx(gflops, rel=0.005)


SHARES = {"tiny s1l8": (13, 13, 50, 13), "tiny s2l5": (17, 16, 40, 16), "small s2l15": (10, 9, 67, 9)}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_the_sections(name):
    """Stem, downsampling and head are the rest."""
    model, *_ = make_published(name)
    shares = [100 * section["gflops"] / flops(model)["full"] for section in flops_by_section(model)]
    assert shares == pytest.approx(SHARES[name], abs=1)


def test_flops_of_a_pruned_model_are_its_matrix_products(vmamba):
    """Dropped tokens are missing only in the products of their own section, from the MLP of the stage's layer on."""
    plan = Plan((Stage(1, 0.5), Stage(3, 0.25), Stage(5, 0.5), Stage(7, 0.25)))
    pruned = ssmcompress.prune(vmamba, plan)
    parts = flops_by_part(pruned)
    named = {"in_proj", "x_proj", "dt_proj", "out_proj", "mlp", "embedding", "downsampling", "head"}
    products = sum(rows * weight.numel() for rows, weight in pruned.matrix_products())
    assert sum(parts[name] for name in named) * 1e9 == pytest.approx(products)
    assert pruned.token_counts() == [192, 96, 48, 48, 36, 12, 12, 6, 6, 4, 3]
    assert pruned.kept_counts() == [96, 36, 6, 3]
    with torch.no_grad():
        runs = list(pruned.run_layers(pruned.embed(images_of(pruned))))
    assert [run.before.features.shape[1] for run in runs] == [192, 48, 48, 12, 12, 6, 4]
    assert [run.after.features.shape[1] for run in runs] == [96, 48, 36, 12, 6, 6, 3]


# ------------------------------------------------------------------------------------------------------------- paths


def test_the_paths_are_rows_columns_and_their_reverses():
    paths = make_paths(2, 3).tolist()
    assert paths == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


@st.composite
def masked_grids(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    mask = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns).filter(any))
    return rows, columns, torch.tensor(mask), draw(st.integers(0, 2**16))


@given(masked_grids())
@settings(deadline=None, max_examples=40)
def test_an_aligned_layer_equals_a_dense_one_with_nothing_coming_in_where_pruned(drawn):
    """Spelt out: zeros in the convolution, and on each path delta alone, of the gap, where a token is missing."""
    rows, columns, mask, seed = drawn
    model = make_vmamba(depths=(1,), image=(4 * rows, 4 * columns)).double()
    generator, block, length = torch.Generator().manual_seed(seed), model.blocks[0], rows * columns
    gap_delta = torch.rand(4, block.op.in_proj.out_features, generator=generator).double()
    block.set_gap_delta(gap_delta)
    features = torch.randn(1, int(mask.sum()), model.d_model, generator=generator).double()
    full = model.embed(images_of(model, 1).double())
    tokens = Tokens(features, length, positions=mask.nonzero().T, orders=full.orders, grid=(rows, columns), dropped=())

    op = block.op
    everything = torch.zeros(1, length, op.in_proj.out_features).double()
    everything[:, mask] = op.in_proj(F.layer_norm(features, (8,), block.norm.weight, block.norm.bias, 1e-5))
    u = F.silu(op.conv2d(everything.transpose(1, 2).unflatten(2, (rows, columns)))).flatten(2).transpose(1, 2)
    u[:, ~mask] = 0
    total = 0
    for k, order in enumerate(make_paths(rows, columns)):
        dt, B, C = (u @ op.x_proj.weight.chunk(4)[k].T)[:, order].split(op.split, -1)
        delta = F.softplus(dt @ op.dt_projs_weight[k].T + op.dt_projs_bias[k])
        delta[:, ~mask[order]] = gap_delta[k]
        A = -op.A_logs.chunk(4)[k].exp()
        y = torch.zeros_like(u)
        y[:, order] = selective_scan(u[:, order], delta, A, B, C, op.Ds.chunk(4)[k], backend="reference")
        total = total + y[:, mask]
    norm = op.out_norm
    expected = features + op.out_proj(F.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, 1e-5))
    torch.testing.assert_close(block.begin(tokens).features, expected, atol=1e-9, rtol=0)


def test_each_path_has_gaps_of_its_own(vmamba):
    pruned = ssmcompress.prune(vmamba, Plan((Stage(2, 0.5), Stage(4, 0.3))))
    with torch.no_grad():
        runs = list(pruned.run_layers(pruned.embed(images_of(pruned))))
    tokens = runs[2].before  # of the second section, 8 x 6, after the stage in its first layer
    for order, path in zip(make_paths(8, 6), tokens.paths, strict=True):
        for positions, visited, gaps in zip(tokens.positions, path.order, path.gaps, strict=True):
            steps = [step for step, place in enumerate(order.tolist()) if place in positions.tolist()]
            assert positions[visited].tolist() == order[steps].tolist()
            assert gaps.tolist() == [0, *(after - before - 1 for before, after in pairwise(steps))]


# -------------------------------------------------------------------------------------------------- dropped tokens


def test_a_ratio_of_zero_is_the_dense_model_to_the_bit(vmamba):
    images = images_of(vmamba)
    pruned = ssmcompress.prune(vmamba, ratio=0.0, stages=(1, 3, 6))
    with torch.no_grad():
        assert torch.equal(pruned(images), vmamba(images))


@pytest.mark.parametrize("fill", ["stale", "zero"])
def test_the_grid_is_whole_again_where_a_section_ends(vmamba, fill):
    """Dropped tokens have their last features, or zeros; kept tokens are unchanged."""
    pruned = ssmcompress.prune(vmamba, Plan((Stage(2, 0.5),), UNALIGNED, fill=fill))
    with torch.no_grad():
        runs = list(pruned.run_layers(pruned.embed(images_of(pruned))))
        last, next_one = runs[2].after, runs[3].before
        seen = pruned.blocks[1].begin(runs[1].before)
        expected = torch.zeros_like(seen.features) if fill == "zero" else seen.features.clone()
        index = last.positions[..., None].expand(-1, -1, 16)
        expected = expected.scatter(1, index, last.features)
        maps = expected.transpose(1, 2).unflatten(2, (8, 6))
        downsample = pruned.layers[1].downsample
        features = downsample["3"](downsample["1"](maps).flatten(2).transpose(1, 2))
    torch.testing.assert_close(next_one.features, features, atol=1e-5, rtol=0)
    assert next_one.positions is None
    assert next_one.grid == (4, 3)


def test_maps_and_reconstruction_come_closer_to_the_dense_model(vmamba):
    images, others = images_of(vmamba, 256, seed=1), images_of(vmamba, 64, seed=2)
    plan = ssmcompress.calibrate(vmamba, images, stages=(1, 2, 4, 5), ratio=0.4)
    pruned = ssmcompress.prune(vmamba, plan)
    mapped, refitted = map_levels(pruned, vmamba, images), reconstruct(pruned, vmamba, images)
    with torch.no_grad():
        dense = vmamba(others)
        errors = [float((model(others) - dense).square().mean()) for model in (pruned, mapped, refitted)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]
    assert list(mapped.level_maps) == list(refitted.level_maps) == ["1", "2", "3"]
    names = [fit.weight for fit in refitted.find_record("reconstruction").fits]
    assert "level 2, dropped by stage 1" in names
    assert "layers.3.blocks.0.op.out_proj" in names
    counted = sum(rows * weight.numel() for rows, weight in refitted.level_products())
    assert refitted.count_level_maps() == counted > 0


def test_a_stage_in_the_last_layer_of_a_section_spares_its_mlp_alone(vmamba):
    """Then the tokens after the section are those of the dense model but for the MLP of the dropped ones."""
    pruned = ssmcompress.prune(vmamba, Plan((Stage(3, 0.5),)))
    with torch.no_grad():
        ours = list(pruned.run_layers(pruned.embed(images_of(pruned))))
        theirs = list(vmamba.run_layers(vmamba.embed(images_of(vmamba))))
    kept = ours[2].after.positions[..., None].expand(-1, -1, 16)
    torch.testing.assert_close(ours[2].after.features, theirs[2].after.features.gather(1, kept), atol=1e-5, rtol=0)
    mlp = 2 * vmamba.config.widths[1] * vmamba.config.mlp_dim[1]
    assert remaining_share(vmamba, pruned.plan.stages) == pytest.approx(1 - 24 * mlp / flops(vmamba)["full"] / 1e9)


def test_reconstruction_begins_after_a_stage_in_the_last_layer_of_a_section(vmamba):
    images = images_of(vmamba, 48)
    refitted = reconstruct(ssmcompress.prune(vmamba, Plan((Stage(3, 0.5),), gap="bias")), vmamba, images)
    names = [fit.weight for fit in refitted.find_record("reconstruction").fits]
    assert names[:2] == ["level 2, dropped by stage 1", "level 2, kept"]
    assert names[2].startswith("layers.2.blocks.0.")


@pytest.mark.parametrize("method", ["row", "raw", "rollout", "attribution"])
def test_maps_of_a_coarser_section_are_divided_among_its_patches(vmamba, method):
    """The last section has 2 x 2 tokens, the first one 16 x 12 and the second one 8 x 6."""
    images, plan = images_of(vmamba), Plan((Stage(2, 0.5), Stage(6, 0.5)))
    pruned = ssmcompress.prune(vmamba, plan)
    maps = ssmcompress.attention_maps(pruned, images, layer=7, method=method)
    assert maps.shape == (5, 16, 12)
    cells = maps.unflatten(1, (2, 8)).unflatten(3, (2, 6))
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
    both = ssmcompress.attention_maps(pruned, images, layer=(3, 7), method=method)
    assert (both != 0).flatten(1).any(1).all()
    assert (both == 0).flatten(1).sum(1).min() >= 96  # the half of the second section that was dropped


# ------------------------------------------------------------------------------------------------------------- files


def published(model):
    return model.publish({key: value.clone() for key, value in model.state_dict().items()})


def test_the_forms_of_published_files_are_the_same_model(vmamba, tmp_path):
    """As released; matrices as 1x1 convolutions; and as the single file of the repository has them."""
    state = published(vmamba)
    assert tuple(state["layers.0.blocks.0.op.x_proj_weight"].shape) == (4, 3, 16)
    assert "classifier.head.weight" in state
    projections = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    convolutions = {k: v[..., None, None] if k.endswith(projections) else v for k, v in state.items()}
    single = {
        k.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): (
            v.flatten(0, 1) if k.endswith(("x_proj_weight", "dt_projs_weight")) else v
        )
        for k, v in state.items()
    }
    images = images_of(vmamba)
    with torch.no_grad():
        expected = vmamba(images)
        for weights in (state, convolutions, single):
            torch.save({"model": weights}, tmp_path / "vssm_tiny.pth")
            assert torch.equal(ssmcompress.load(tmp_path / "vssm_tiny.pth", image_size=(64, 48))(images), expected)


def test_a_pruned_folder_is_read_again(vmamba, tmp_path):
    images = images_of(vmamba, 32)
    plan = ssmcompress.calibrate(vmamba, images, stages=(2, 5), ratio=0.4, importance="saliency")
    model = reconstruct(ssmcompress.prune(vmamba, plan), vmamba, images)
    model.save_pretrained(tmp_path / "folder")
    again = ssmcompress.load(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert again.config == model.config


def add_gate(state):
    for key in list(state):
        if key.endswith("op.in_proj.weight"):
            state[key] = torch.cat([state[key]] * 2)


CHANGES = {
    "conv bias": (lambda s: s.update({"layers.0.blocks.0.op.conv2d.bias": torch.zeros(16)}), "a bias of the convol"),
    "gate": (add_gate, "with a gate is not supported"),
    "no mlp": (lambda s: [s.pop(k) for k in list(s) if ".mlp." in k], "no MLP, as in the first version"),
    "no head": (lambda s: [s.pop(k) for k in list(s) if k.startswith("classifier.")], "backbone without its classif"),
    "merging": (
        lambda s: s.update({"layers.0.downsample.reduction.weight": torch.zeros(16, 32)}),
        "patches that are merged is not supported",
    ),
    "another stem": (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}), "a stem of one convol"),
    "position embedding": (lambda s: s.update({"pos_embed": torch.zeros(1, 8, 16, 12)}), "a position embedding is not"),
    "norms over the batch": (
        lambda s: s.update({"layers.1.blocks.0.norm.running_mean": torch.zeros(16)}),
        "1 unknown .* which means norms over the batch: not supported",
    ),
    "bias of one layer": (
        lambda s: s.update({"layers.2.blocks.1.op.conv2d.bias": torch.zeros(64)}),
        "1 unknown .* which means a bias of the convolution: not supported",
    ),
    "a shape": (lambda s: s.update({"layers.1.blocks.0.op.Ds": torch.zeros(7)}), "contradicting shapes"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_released_vmamba_is_refused(vmamba, change):
    state = published(vmamba)
    alter, message = CHANGES[change]
    alter(state)
    with pytest.raises(InputError, match=message):
        ssmcompress.load({"model": state}, image_size=(64, 48))


def test_what_a_file_says_of_its_layers_is_read(vmamba, tmp_path):
    config = {"MODEL": {"VSSM": {"SSM_FORWARDTYPE": "v05_noz"}}}
    torch.save({"model": published(vmamba), "config": config}, tmp_path / "a.pth")
    assert ssmcompress.load(tmp_path / "a.pth").config.image_size == (224, 224)
    config["MODEL"]["VSSM"]["SSM_FORWARDTYPE"] = "v3noz"
    torch.save({"model": published(vmamba), "config": config}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="supports only a vmamba with layers of type v05_noz"):
        ssmcompress.load(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"args": argparse.Namespace(forward_type="v3noz")},
        {"hyper_parameters": {"model": {"name": "vmamba_tiny", "forward_type": "v052d_noz"}}},
        {"meta": {"config": "model = dict(backbone=dict(type='MM_VSSM', forward_type='v05', ssm_act_layer='silu'))"}},
        {"model_args": {"ssm_act_layer": "gelu"}},
        {"model_args": {"mlp_act_layer": "relu"}},
        {"model_args": {"gmlp": True}},
    ],
    ids=["args", "hyper_parameters", "mmcv", "activation", "MLP", "gate"],
)
def test_arguments_of_the_authors_class_count_as_its_configuration(vmamba, content):
    with pytest.raises(InputError, match="says (SSM_FORWARDTYPE|SSM_ACT_LAYER|MLP_ACT_LAYER|GMLP)=.*supports only"):
        ssmcompress.load({"state_dict": published(vmamba), **content})
    same = {"forward_type": "v05_noz", "ssm_act_layer": "silu", "mlp_act_layer": "gelu", "gmlp": False}
    assert ssmcompress.load({"state_dict": published(vmamba), "model_args": same}).architecture == "vmamba"


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"config": {"MODEL": {"TYPE": "vssm"}, "DATA": {"IMG_SIZE": 96}}}, (96, 96)),
        ({"config": {"DATA": {"IMG_SIZE": [64, 48]}, "TEST": {"IMG_SIZE": 32}}}, (64, 48)),
        ({"config": "MODEL:\n  TYPE: vssm\nDATA:\n  IMG_SIZE: 96\n"}, (96, 96)),
        ({"args": argparse.Namespace(img_size=[64, 48])}, (64, 48)),
        ({"config": {"DATA": {"IMG_SIZE": 0}}}, (224, 224)),
        ({"config": {"DATA": {"IMG_SIZE": "large"}}}, (224, 224)),
        ({"config": {"data": {"img_size": 96}}}, (224, 224)),
        ({"config": {"teacher": {"DATA": {"IMG_SIZE": 96}}}}, (224, 224)),
    ],
    ids=["a side", "a pair", "text", "args", "none", "a word", "of data alone", "of a teacher"],
)
def test_the_image_size_of_a_configuration(vmamba, recwarn, content, size):
    content = {"model": published(vmamba), **content}
    assert ssmcompress.load(content).config.image_size == size
    assumed = any("images of 224 pixels are assumed" in str(w.message) for w in recwarn.list)
    assert assumed == (size == (224, 224))
    assert ssmcompress.load(content, image_size=40).config.image_size == (40, 40)


def test_an_image_size_of_a_configuration_that_is_too_large(vmamba):
    with pytest.raises(InputError, match="expected 1 to 8192 pixels"):
        ssmcompress.load({"model": published(vmamba), "config": {"DATA": {"IMG_SIZE": 9999}}})


def test_a_training_checkpoint_with_a_configuration_of_yacs(vmamba, tmp_path, monkeypatch):
    """Its class is not available when the file is read, and is not needed."""
    module = ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        config = module.CfgNode(DATA=module.CfgNode(IMG_SIZE=[64, 48]), MODEL=module.CfgNode(TYPE="vssm"))
        vars(config).update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={})  # as yacs has them
        torch.save({"model": published(vmamba), "config": config, "epoch": 3}, tmp_path / "vssm.pth")
    with torch.no_grad():
        images = images_of(vmamba)
        assert torch.equal(ssmcompress.load(tmp_path / "vssm.pth")(images), vmamba(images))


def test_an_object_in_a_configuration_of_yacs_is_not_made(vmamba, tmp_path, monkeypatch):
    """Neither as an entry nor as an attribute, which a pickle sets afterwards."""
    module = ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    creation = type("Creation", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "ran",))})()
    as_entry, as_attribute = module.CfgNode(A=creation), module.CfgNode(A=1)
    vars(as_attribute)["a"] = creation
    for name, config in (("entry", as_entry), ("attribute", as_attribute)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            torch.save({"model": published(vmamba), "config": config}, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match="refused: this pickle asks for .*nothing was run"):
            ssmcompress.load(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_any_image_size_runs_with_the_same_weights(vmamba):
    other = ssmcompress.load(vmamba, image_size=(37, 90))
    assert other.config.grids == [(10, 23), (5, 12), (3, 6), (2, 3)]
    with torch.no_grad():
        assert other(images_of(other)).isfinite().all()
    with pytest.raises(InputError, match="expected 1 to 8192 pixels"):
        ssmcompress.load(vmamba, image_size=(37, 9000))
    with pytest.raises(InputError, match="tokens of a VMamba are 4 pixels apart"):
        ssmcompress.load(vmamba, stride=8)


def test_layers_and_channels_are_not_trimmed(vmamba):
    for trim, arguments in ((ssmcompress.drop_layers, ((2,),)), (ssmcompress.trim_channels, (4, images_of(vmamba)))):
        with pytest.raises(InputError, match="a vmamba cannot be trimmed"):
            trim(vmamba, *arguments)


TWICE = {
    "classifier": ("head.weight", (10, 64)),
    "norm": ("norm.bias", (64,)),
    "a form of the single file": ("layers.0.blocks.0.op.x_proj.weight", (12, 16)),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_in_two_forms_is_refused(vmamba, name, first):
    key, shape = TWICE[name]
    state, more = published(vmamba), {key: torch.zeros(shape)}
    with pytest.raises(InputError, match="is present twice, once as .*: remove one of them"):
        ssmcompress.load({"model": more | state if first else state | more})
