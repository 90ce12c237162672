"""UperNet on a Vim and on a PlainMamba against golden outputs of the authors' code, and metadata of files."""

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, make_plain_mamba, make_vim
from segmenters import MAKERS, PLAIN_MAMBA_SIZES, VIM_SIZES, make_plain_mamba_upernet, make_vim_upernet

import ssmcompress
from ssmcompress.compression.trim.layers import drop_directions, drop_layers
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops_by_part
from ssmcompress.models.checkpoint import find_dense
from ssmcompress.models.plain_mamba_upernet import PlainMambaUperNet, PlainMambaUperNetConfig
from ssmcompress.models.rotations import rotations
from ssmcompress.models.vim_levels import LEVELS
from ssmcompress.models.vim_upernet import VimUperNet, VimUperNetConfig, window_starts
from ssmcompress.progress import hold_notes

PLAIN_MAMBA, VIM = GOLDEN / "upernet_plain_mamba.pth", GOLDEN / "upernet_vim.pth"
ROPE = ("backbone.rope.freqs_cos", "backbone.rope.freqs_sin")


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """Pictures (n, height, width, 3) uint8 as model input."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return ((torch.from_numpy(pictures).float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    """Within 1e-5 of the largest value."""
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def maps(tokens):
    return [level.fill().transpose(1, 2).unflatten(2, tokens.grid) for level in tokens.levels]


def same_pixels(logits: torch.Tensor, expected: np.ndarray) -> float:
    resized = F.interpolate(logits, size=expected.shape[1:], mode="bilinear", align_corners=False)
    return float((resized.argmax(1).numpy() == expected).mean())


def read(file) -> dict:
    return torch.load(file, weights_only=True)


@pytest.fixture(params=MAKERS)
def segmenter(request):
    return MAKERS[request.param]()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------- golden outputs


@pytest.mark.parametrize("name", ["a", "b", "c"])
@torch.no_grad()
def test_a_plain_mamba_computes_the_golden_outputs_at_any_size(name):
    golden, model = np.load(GOLDEN / "upernet_plain_mamba.npz"), ssmcompress.load(PLAIN_MAMBA)
    images = normalise(golden[f"image_{name}"])
    tokens, _ = model.encode(images)
    logits = model(images)
    assert_close(model.readout(tokens), golden[f"head_{name}"])
    assert same_pixels(logits, golden[f"prediction_{name}"]) >= 0.999
    if name == "b":  # it has the head's outputs only
        return
    assert_close(logits, golden[f"logits_{name}"])
    for number, level in enumerate(maps(tokens)):
        assert_close(level, golden[f"level{number}_{name}"])


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_a_vim_computes_the_golden_outputs_for_each_meaning_of_its_levels(level):
    golden, model = np.load(GOLDEN / "upernet_vim.npz"), ssmcompress.load(VIM, level=level)
    assert model.config.level == level
    images = normalise(golden["image_a"])
    tokens, _ = model.encode(images)
    assert_close(model.readout(tokens), golden[f"head_a_{level}"])
    full = F.interpolate(torch.from_numpy(golden[f"head_a_{level}"]), size=(128, 128), mode="bilinear")
    assert_close(model(images), full.numpy())
    if f"level2_a_{level}" in golden:
        assert_close(maps(tokens)[2], golden[f"level2_a_{level}"])


@pytest.mark.parametrize("level", ["hidden", "residual"])
@torch.no_grad()
def test_larger_images_are_segmented_in_the_golden_windows(level):
    golden, model = np.load(GOLDEN / "upernet_vim.npz"), ssmcompress.load(VIM, level=level)
    logits = model(normalise(golden["image_b"]))
    assert logits.shape == (1, 6, 150, 200)
    assert_close(logits[..., ::5, ::5], golden[f"slide_b_{level}"])
    assert same_pixels(logits, golden[f"prediction_b_{level}"]) >= 0.999


def test_rotary_positions_are_the_published_ones():
    cos, sin = rotations((8, 8), 32)
    np.testing.assert_allclose(cos.numpy(), np.load(GOLDEN / "upernet_vim.npz")["rope_freqs_cos"], atol=1e-6)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


# --------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
def test_images_of_a_batch_do_not_affect_each_other(segmenter):
    for side in (64, 88):
        images = torch.randn(3, 3, side, side + 8)
        single = torch.cat([segmenter(image[None]) for image in images])
        torch.testing.assert_close(segmenter(images), single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_float64_agrees_with_float32_and_narrow_dtypes_are_kept(segmenter, pictures):
    wide = copy.deepcopy(segmenter).double()
    expected = wide(pictures.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(segmenter(pictures).double(), expected, atol=1e-4, rtol=1e-4)
    narrow = copy.deepcopy(segmenter).bfloat16()(pictures.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - expected).abs().mean() < 0.1 * expected.abs().mean()


@torch.no_grad()
def test_rotations_of_a_narrow_model_keep_lengths(pictures):
    rotated, plain = (make_vim_upernet(level=level).bfloat16() for level in ("rope", "residual"))
    lengths = [model.embed(pictures.bfloat16()).features.norm(dim=-1) for model in (rotated, plain)]
    torch.testing.assert_close(*lengths, atol=0, rtol=1e-5)


@pytest.mark.parametrize(("name", "changes"), [("vim", {"level": "rope"}), ("plain_mamba", {})])
def test_an_exported_model_computes_the_same(name, changes):
    model = MAKERS[name](depth=4, out_layers=(1, 2, 3, 4), **changes)
    images = torch.randn(1, 3, 64, 72)  # windows of the one, and another grid than the other's
    with torch.no_grad():
        program = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(program(images), model(images))


@torch.no_grad()
def test_a_plain_mamba_pads_partial_patches_with_zeros_after_its_stem():
    model = make_plain_mamba_upernet()
    embed, padded = model.backbone.patch_embed, torch.zeros(1, 8, 24, 32)
    model.backbone.pos_embed.zero_()
    images = torch.randn(1, 3, 37, 50, generator=torch.Generator().manual_seed(2))
    padded[..., :19, :25] = embed.convs(embed.stem(images))
    tokens = model.embed(images)
    assert (tokens.grid, tokens.length) == ((3, 4), 12)
    torch.testing.assert_close(tokens.features, embed.projection(padded).flatten(2).transpose(1, 2))


@torch.no_grad()
def test_paths_are_those_of_the_images_not_of_the_model(pictures):
    model, other = make_plain_mamba_upernet(), make_plain_mamba_upernet(image_size=(64, 96))
    wide = torch.randn(2, 3, 64, 96)
    for _ in range(2):  # the second time from a cache
        assert torch.equal(model(wide), other(wide))
        assert torch.equal(model(pictures), other(pictures))


def test_gradients_after_a_first_forward_in_inference_mode():
    model, images = make_plain_mamba_upernet(), torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    assert model.backbone.pos_embed.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("side", "window", "starts"),
    [(512, 512, [0]), (513, 512, [0, 1]), (853, 512, [0, 341]), (854, 512, [0, 341, 342]), (150, 128, [0, 22]),
     (200, 128, [0, 72]), (1024, 512, [0, 341, 512])],
)  # fmt: skip
def test_windows_cover_a_side_in_steps_of_two_thirds(side, window, starts):
    assert window_starts(side, window) == starts


@torch.no_grad()
def test_logits_of_windows_are_averaged():
    model = make_vim_upernet()
    images = torch.randn(1, 3, 64, 100)
    left, right = model(images[..., :64]), model(images[..., 36:])
    logits = model(images)
    torch.testing.assert_close(logits[..., :36], left[..., :36])
    torch.testing.assert_close(logits[..., 36:64], (left[..., 36:] + right[..., :28]) / 2)
    torch.testing.assert_close(logits[..., 64:], right[..., 28:])


@torch.no_grad()
def test_images_smaller_than_the_window_are_padded_at_the_bottom_and_at_the_right():
    model = make_vim_upernet()
    images = torch.randn(2, 3, 40, 64)
    padded = torch.cat([images, torch.zeros(2, 3, 24, 64)], dim=2)
    logits = model(images)
    assert logits.shape == (2, 5, 40, 64)
    torch.testing.assert_close(logits, model(padded)[:, :, :40])


def test_what_is_no_image_for_the_model_is_refused(segmenter):
    with pytest.raises(InputError, match=r"images \(2, 1, 64, 64\): expected \(batch, 3, height, width\)"):
        segmenter(torch.zeros(2, 1, 64, 64))
    with pytest.raises(InputError, match=r"images \(64, 64, 3\): expected \(batch, 3"):
        segmenter(torch.zeros(64, 64, 3))
    with pytest.raises(InputError, match="use images.permute"):
        segmenter(torch.zeros(1, 64, 80, 3))
    with pytest.raises(InputError, match="uint8: expected torch.float32"):
        segmenter(torch.zeros(1, 3, 80, 64, dtype=torch.uint8))
    with pytest.raises(InputError, match="images are a ndarray"):
        segmenter(np.zeros((1, 3, 64, 64)))


def test_tokens_of_other_images_than_windows_are_refused():
    with pytest.raises(InputError, match="images of 64x80 pixels: expected windows of 64x64; call the model itself"):
        make_vim_upernet().encode(torch.zeros(1, 3, 64, 80))


@torch.no_grad()
def test_a_vim_with_patches_of_8_pixels_has_another_neck():
    model = make_vim_upernet(patch_size=(8, 8), stride=8, level="residual")
    assert [key for key in model.state_dict() if "fpn1" in key] == ["backbone.fpn1.0.weight", "backbone.fpn1.0.bias"]
    images = torch.randn(1, 3, 64, 64)
    tokens, _ = model.encode(images)
    first, second, third, fourth = maps(tokens)
    expected = [model.backbone.fpn1[0](first), second, F.max_pool2d(third, 2), F.max_pool2d(fourth, 4)]
    assert [tuple(x.shape[-2:]) for x in expected] == model.config.map_sizes
    torch.testing.assert_close(model.readout(tokens), model.decode_head(expected))


@torch.no_grad()
def test_an_output_level_is_what_its_layer_added_or_the_stream(pictures):
    hidden, residual = make_vim_upernet(), make_vim_upernet(level="residual")
    for model in (hidden, residual):
        tokens, number = model.embed(pictures), 0
        for layer in range(1, 7):
            before = tokens.features
            tokens, _ = model.step(layer, tokens)
            if layer in model.config.out_layers:
                expected = tokens.features - before if model is hidden else tokens.features
                torch.testing.assert_close(tokens.levels[number].fill(), expected, atol=1e-5, rtol=1e-4)
                number += 1
        assert len(tokens.levels) == number == 4


# ------------------------------------------------------------------------------------------------------ FLOPs


def published(architecture: str, d_model: int, depth: int = 24, **others):
    common = {"d_model": d_model, "depth": depth, "d_inner": 2 * d_model, "d_state": 16, "dt_rank": -(-d_model // 16),
              "num_classes": 150, "image_size": (512, 512),
              "out_layers": tuple(depth * part // 4 for part in range(1, 5))}  # fmt: skip
    with torch.device("meta"):
        if architecture == "vim":
            return VimUperNet(VimUperNetConfig(**VIM_SIZES | common | {"head_channels": d_model}))
        sizes = {"stem_width": 64, "window": 7, "head_channels": 512, "trained_grid": (14, 14)} | others
        return PlainMambaUperNet(PlainMambaUperNetConfig(**PLAIN_MAMBA_SIZES | common | sizes))


PUBLISHED = {
    "L1": (("plain_mamba", 192), {"stem_depth": 1, "dw_layers": (0,)}, 15.7, None, 0, 27.9, 35.5),
    "L2": (("plain_mamba", 384), {"stem_depth": 2, "dw_layers": ()}, 42.2, None, 0, 29.1, 55.9),
    "L3": (("plain_mamba", 448, 36), {"stem_depth": 2, "dw_layers": ()}, 75.4, None, 0, 29.5, 81.3),
    "Vim-T": (("vim", 192), {}, 7.53, 9.48, 0.906, 30.6, 12.31),
    "Vim-S": (("vim", 384), {}, 26.4, 30.7, 3.62, 121.3, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_and_parameters_of_the_published_sizes(name):
    sizes, others, paper, full, neck, head, parameters = PUBLISHED[name]
    model = published(*sizes, **others)
    for convention, backbone in (("paper", paper), ("full", full)):
        parts = flops_by_part(model, convention)
        assert parts.pop("head") == pytest.approx(head, rel=0.005)
        assert parts.pop("neck", 0) == pytest.approx(neck, rel=0.005)
        assert backbone is None or sum(parts.values()) == pytest.approx(backbone, rel=0.005)
    if parameters is not None:
        d_model, width = model.d_model, 256
        auxiliary = d_model * 9 * width + 2 * width + 150 * width + 150  # the published files have it
        assert (sum(p.numel() for p in model.parameters()) + auxiliary) / 1e6 == pytest.approx(parameters, rel=0.003)


def test_matrix_products_add_up_to_the_counted_parts(segmenter):
    parts = segmenter.flops_by_part(segmenter.token_counts(), "full")
    counted = sum(count for part, count in parts.items() if part not in ("conv", "scan"))
    if isinstance(segmenter, VimUperNet):  # the count has 3 steps more for each path and convolution, in `conv` alone
        assert "neck" in parts
    assert sum(rows * weight.numel() for rows, weight in segmenter.matrix_products()) == counted


@torch.no_grad()
def test_counts_of_the_head_are_those_of_its_convolutions(segmenter, pictures):
    counted = {"head": 0, "neck": 0}

    def count(part, transposed):
        def hook(module, inputs, output):
            pixels = inputs[0] if transposed else output
            counted[part] += module.weight.numel() * pixels.shape[-2] * pixels.shape[-1]

        return hook

    for name, module in segmenter.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and name.startswith(
            ("decode_head.", "backbone.fpn")
        ):
            part = "head" if name.startswith("decode_head.") else "neck"
            module.register_forward_hook(count(part, isinstance(module, torch.nn.ConvTranspose2d)))
    segmenter(pictures[:1])
    parts = segmenter.flops_by_part(segmenter.token_counts(), "full")
    assert counted == {"head": parts["head"], "neck": parts.get("neck", 0)}


# ---------------------------------------------------------------------------------------------------- loading


def test_facts_of_a_file():
    model = ssmcompress.load(PLAIN_MAMBA, task="segmentation")
    assert (model.architecture, model.task.name) == ("plain_mamba_upernet", "segmentation")
    assert model.config.out_layers == (1, 3, 4, 5)
    assert (model.config.image_size, model.config.trained_grid, model.length) == ((64, 64), (4, 4), 16)
    assert model.classes == tuple(f"class{i}" for i in range(6))
    assert model.palette[:2] == ((0, 255, 0), (40, 215, 20))
    assert model.preprocessing.multiple == 32
    vim = ssmcompress.load(VIM)
    assert (vim.architecture, vim.config.level, vim.config.out_layers) == ("vim_upernet", "hidden", (2, 3, 5, 6))
    assert (vim.config.image_size, vim.protected, vim.reads_protected) == ((128, 128), None, False)
    assert torch.equal(vim.patch_positions, torch.arange(64).view(8, 8))


def test_every_size_is_recognised_from_the_weights(segmenter, pictures):
    options = {"level": segmenter.config.level} if isinstance(segmenter, VimUperNet) else {}
    state = segmenter.state_dict()
    if options:
        content = {"state_dict": state, "meta": {"config": "x = dict(out_indices=[0, 2, 4, 5])"}}
    else:
        content = {"state_dict": state}
    found = ssmcompress.load(content, **options)
    assert found.config == segmenter.config
    with torch.no_grad():
        assert torch.equal(found(pictures), segmenter(pictures))


def with_config(text: str, state: dict | None = None, key: str = "config") -> dict:
    return {"state_dict": state or read(VIM)["state_dict"], "meta": {key: text}}


@pytest.mark.parametrize(
    ("options", "level"),
    [("use_residual_as_feature=False, last_layer_process='none'", "hidden"),
     ("use_residual_as_feature=True, last_layer_process='add'", "residual"),
     ("use_residual_as_feature=True, last_layer_process='add & norm'", "residual_norm"),
     ("use_residual_as_feature=True, last_layer_process='add', if_rope=True, if_rope_residual=True", "rope"),
     ("if_rope=True", "rope")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["config", "cfg"])
def test_levels_are_read_from_the_configuration_in_the_file(options, level, key):
    text = f"model = dict(backbone=dict(type='VisionMambaSeg', out_indices=[1, 2, 4, 5], {options}))\nlr = 0.1\n"
    with hold_notes() as notes:
        model = ssmcompress.load(with_config(text, key=key))
    assert (model.config.level, model.config.out_layers) == (level, (2, 3, 5, 6))
    assert not notes


@pytest.mark.parametrize(
    "options",
    ["use_residual_as_feature=True, last_layer_process='none'", "if_rope=True, if_rope_residual=False",
     "use_residual_as_feature=False, if_rope=True", "use_residual_as_feature=True, last_layer_process='add & norm', "
     "if_rope=True"],
)  # fmt: skip
def test_levels_that_are_not_supported_are_refused_unless_they_are_given(options):
    content = with_config(f"model = dict(type='VisionMambaSeg', {options}, out_indices=[1, 2, 4, 5])\n")
    with pytest.raises(InputError, match=r"output levels that are not supported \(see `level`\)"):
        ssmcompress.load(content)
    assert ssmcompress.load(content, level="residual").config.level == "residual"


def test_what_is_assumed_is_said():
    with hold_notes() as notes:
        model = ssmcompress.load({"state_dict": read(VIM)["state_dict"]})
    assert (model.config.level, model.config.out_layers) == ("hidden", (1, 3, 4, 6))
    assert list(notes) == [
        "nothing says what the head reads: taken for the outputs of layers 1, 3, 4, 6, and 'hidden' (see `level`)"
    ]
    with hold_notes() as notes:
        ssmcompress.load(VIM, level="residual")
    assert list(notes) == ["`level` 'residual' takes precedence, although the options in the file say 'hidden'"]


@torch.no_grad()
def test_rotary_tables_in_the_file_say_what_the_levels_are():
    content = read(VIM)
    tables = dict(zip(ROPE, rotations((8, 8), 32), strict=True))
    state = {**content["state_dict"], **tables}
    model = ssmcompress.load({"state_dict": state})
    golden = np.load(GOLDEN / "upernet_vim.npz")
    assert model.config.level == "rope"
    model = ssmcompress.load(with_config("x = dict(out_indices=[1, 2, 4, 5])", state))
    assert_close(model.readout(model.encode(normalise(golden["image_a"]))[0]), golden["head_a_rope"])
    with pytest.raises(InputError, match=r"supported with `level` 'rope' only, not with 'hidden'"):
        ssmcompress.load({"state_dict": state}, level="hidden")
    with pytest.raises(InputError, match=r"freqs_cos does not hold the rotations of a grid of \(8, 8\) patches"):
        ssmcompress.load({"state_dict": {**state, ROPE[0]: tables[ROPE[1]]}})


def test_heads_for_training_and_averages_are_left_out():
    for file in (PLAIN_MAMBA, VIM):
        content = read(file)
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith("auxiliary_head.")}
        averages = {f"ema_{k.replace('.', '_')}": v for k, v in state.items()}
        lean = ssmcompress.load({**content, "state_dict": state})
        full = ssmcompress.load({**content, "state_dict": {**content["state_dict"], **averages}})
        assert lean.config == full.config
        assert lean.state_dict().keys() == full.state_dict().keys() == state.keys()


def test_names_of_classes_in_files_of_mmengine():
    content = read(PLAIN_MAMBA)
    names = [f"thing {i}" for i in range(6)]
    meta = {"dataset_meta": {"classes": names, "palette": [[i, i, i] for i in range(6)]}, "cfg": "x = 1\ny = 2"}
    model = ssmcompress.load({"state_dict": content["state_dict"], "meta": meta})
    assert (model.classes, model.palette[3]) == (tuple(names), (3, 3, 3))
    meta["dataset_meta"]["classes"] = names[:4]
    assert ssmcompress.load({"state_dict": content["state_dict"], "meta": meta}).classes is None


def test_the_size_of_training_images_is_the_one_that_is_counted():
    state, text = read(PLAIN_MAMBA)["state_dict"], "pipeline = [dict(type='RandomCrop', crop_size=(512, 256))]\n"
    model = ssmcompress.load(with_config(text, state))
    assert (model.config.image_size, model.length) == ((512, 256), 32 * 16)
    assert ssmcompress.load(with_config(text, state), image_size=96).config.image_size == (96, 96)


def test_classes_of_mmengine_are_named_and_refused(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {**read(PLAIN_MAMBA), "message_hub": {"log": module.HistoryBuffer()}}
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"asks for mmengine.logging.history_buffer.HistoryBuffer.*unsafe_load=True"):
        ssmcompress.load(tmp_path / "m.pth")
    assert ssmcompress.load(tmp_path / "m.pth", unsafe_load=True).architecture == "plain_mamba_upernet"


def change(file, added=(), removed=()) -> dict:
    state = {k: v for k, v in read(file)["state_dict"].items() if k not in removed}
    return {"state_dict": {**state, **dict(added)}}


WRONG = {
    "a class token": (lambda: change(VIM, {"backbone.cls_token": torch.zeros(1, 1, 32)}), "with a class token"),
    "a fourth norm": (
        lambda: change(PLAIN_MAMBA, {f"backbone.norm_layer1.{k}": torch.ones(20) for k in ("weight", "bias")}),
        r"output levels after layers \(1, 2, 3, 4, 5\).*expected 4 of the 5 layers",
    ),
    "another head": (
        lambda: change(PLAIN_MAMBA, removed=["decode_head.psp_modules.0.1.conv.weight"]),
        "is missing: its head is another one than UperNet's",
    ),
    "a missing weight": (
        lambda: change(VIM, removed=["decode_head.fpn_bottleneck.bn.bias"]),
        "not those of a vim_upernet: 1 missing",
    ),
    "another patch size": (
        lambda: change(VIM, {"backbone.patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)}),
        r"patches of \(14, 14\) pixels: the neck has one for 16 or 8",
    ),
    "a neck of smaller patches": (
        lambda: change(VIM, {"backbone.patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}),
        "a neck for patches of another size: not supported",
    ),
    "an output layer too many": (
        lambda: with_config("x = dict(out_indices=[1, 2, 4, 6])"),
        r"output levels after layers \(2, 3, 5, 7\) \(meta.config.out_indices\), counted from 1: expected 4 of the 6",
    ),
    "other means": (
        lambda: with_config("x = dict(pool_scales=(1, 2), out_indices=[1, 2, 4, 5])"),
        r"pool_scales=\(1, 2\).*supports only a vim_upernet with means over 1, 2, 3, 6",
    ),
    "another classifier than its backbone": (
        lambda: {"state_dict": read(VIM)["state_dict"], "meta": {"config": "x = dict(type='PlainMambaSeg')"}},
        "says plain_mamba, but the weights are a vim_upernet's",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_supported_is_named(name):
    content, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        ssmcompress.load(content())


def test_options_of_other_models_are_refused():
    with pytest.raises(InputError, match="`level` tells what the output levels of a Vim are"):
        ssmcompress.load(PLAIN_MAMBA, level="hidden")
    with pytest.raises(InputError, match=r"`level` 'deep': expected one of 'hidden', 'residual', 'residual_norm'"):
        ssmcompress.load(VIM, level="deep")
    with pytest.raises(InputError, match="stride 4: a segmentation model's patches, 16 pixels"):
        ssmcompress.load(VIM, stride=4)
    with pytest.raises(InputError, match=r"image size \(100, 100\): expected multiples of 16 pixels"):
        ssmcompress.load(VIM, image_size=100)
    with pytest.raises(TypeError, match="unexpected keyword argument 'levels'"):
        ssmcompress.load(VIM, levels="hidden")


def test_models_for_another_task_are_refused():
    for made in (make_vim(), make_plain_mamba()):
        with pytest.raises(InputError, match=r"not a model for semantic segmentation; decode_head.\*, .*is missing"):
            ssmcompress.load(made.state_dict(), task="segmentation")
        assert ssmcompress.load(made, task="classification").task.name == "classification"
    for file in (VIM, PLAIN_MAMBA):
        with pytest.raises(InputError, match=r"not a model for image classification; head.weight .*is missing"):
            ssmcompress.load(file, task="classification")
    with pytest.raises(InputError, match=r"`task` 'detection': expected one of 'classification', 'segmentation'"):
        ssmcompress.load(VIM, task="detection")


# ------------------------------------------------------------------------------------- trimmed and saved models


@torch.no_grad()
def test_dropped_layers_renumber_the_output_layers(segmenter, pictures):
    smaller = drop_layers(segmenter, [2, 4])
    assert smaller.config.out_layers == (1, 2, 3, 4)
    expected = copy.deepcopy(segmenter)
    for layer in (2, 4):
        expected.blocks[layer - 1].begin = lambda tokens, *_: tokens
    torch.testing.assert_close(smaller(pictures), expected(pictures), atol=1e-5, rtol=1e-4)
    assert segmenter.droppable_layers == (2, 4)
    for layer in segmenter.config.out_layers:
        with pytest.raises(
            InputError, match=rf"layer {layer} cannot be dropped: the head reads the output of layers 1, 3"
        ):
            drop_layers(segmenter, [layer])


@pytest.mark.parametrize("changes", [{}, {"level": "residual"}, {"level": "rope"}], ids=str)
@torch.no_grad()
def test_a_trimmed_model_is_the_same_after_saving(tmp_path, pictures, changes):
    for make in (make_vim_upernet, make_plain_mamba_upernet):
        if changes and make is make_plain_mamba_upernet:
            continue
        model = make(**changes)
        model.classes, model.palette = tuple("abcde"), tuple((i, 0, 255) for i in range(5))
        smaller = drop_directions(drop_layers(model, [4]), {2: [1]})
        folder = ssmcompress.save(smaller, tmp_path / model.architecture)
        found = ssmcompress.load(folder, task="segmentation")
        assert found.config == smaller.config
        assert found.origin == smaller.origin
        assert (found.classes, found.palette) == (model.classes, model.palette)
        assert found.preprocessing == model.preprocessing
        assert torch.equal(found(pictures), smaller(pictures))
        block = json.loads((folder / "config.json").read_text())["architecture"]
        assert {"type", "image_size", "stride", "out_layers"} <= block.keys()
        with pytest.raises(InputError, match="not a model for image classification"):
            ssmcompress.load(folder, task="classification")


def test_the_dense_model_of_a_trimmed_one_is_found():
    for file, options in ((VIM, {"level": "residual"}), (PLAIN_MAMBA, {"image_size": 96})):
        model = ssmcompress.load(file, **options)
        smaller = drop_directions(model, {1: [0]})
        assert find_dense(smaller).config == model.config


def test_sizes_of_the_dense_model_are_counted(segmenter):
    smaller = drop_layers(segmenter, [2])
    assert smaller.dense_config == segmenter.config
    parts, dense = (flops_by_part(model) for model in (smaller, segmenter))
    assert parts["head"] == dense["head"]
    assert parts["scan"] == pytest.approx(dense["scan"] * 5 / 6)
