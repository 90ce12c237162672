"""Statements of files and live modules about a model are read; unsupported models are rejected."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from conftest import GOLDEN, make_plain_mamba, make_vim
from safetensors.torch import save_file
from torch import nn

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.models.checkpoint import LoadOptions, read_model
from ssmcompress.models.statements import family_of_name, options_of_name
from ssmcompress.progress import hold_notes

PUBLISHED = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
NAMES = {
    PUBLISHED: None,
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2": None,
    "vim_tiny": None,
    "vim_tiny_patch4_stride4_16_bimambav2_final_pool_mean": None,
    PUBLISHED.replace("midclstok", "cls_token"): "use_middle_cls_token=False.*class token in the middle",
    PUBLISHED.replace("midclstok", "clstok"): "use_middle_cls_token=False",
    PUBLISHED.replace("midclstok", "double_cls_token"): "use_double_cls_token=True.*one class token",
    PUBLISHED.replace("_with_midclstok", ""): "if_cls_token=False",
    PUBLISHED.replace("_div2", ""): "if_divide_out=False.*divided by two",
    PUBLISHED.replace("abs_pos_embed", "abs_pos_embed_rope_also_residual"): "if_rope=True.*rotary",
    PUBLISHED.replace("bimambav2", "bimambav1"): "bimamba_type='v1'",
    PUBLISHED.replace("pool_mean", "pool_max"): "final_pool_type='max'",
    "local_vim_tiny": "is LocalMamba",
    "mambar_small_patch16_224": "is Mamba-Reg",
    "plain_mamba_l1": "says plain_mamba, but the weights are a vim's",
}


@pytest.mark.parametrize(("name", "message"), NAMES.items())
def test_the_name_of_the_model_in_a_training_file_is_read(vim, tmp_path, name, message):
    torch.save({"model": vim.state_dict(), "args": argparse.Namespace(model=name, lr=1e-3)}, tmp_path / "v.pth")
    if message is None:
        assert ssmcompress.load(tmp_path / "v.pth").config == vim.config
        return
    with pytest.raises(InputError, match=f"args.model '{name}' .*{message}"):
        ssmcompress.load(tmp_path / "v.pth")


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("args", {"args": argparse.Namespace(if_divide_out=False)}),
        ("args", {"args": {"if_devide_out": "False"}}),
        ("hyper_parameters.net", {"hyper_parameters": {"net": {"final_pool_type": "max"}}}),
        ("config.model.kwargs", {"config": {"model": {"kwargs": {"use_middle_cls_token": False}}}}),
        ("model_config", {"model_config": {"if_rope_residual": True}}),
        ("meta.config", {"meta": {"config": "model = dict(backbone=dict(type='Vim', if_bidirectional=True))"}}),
        ("args", {"args": argparse.Namespace(norm_epsilon=1e-6)}),
        ("args", {"args": argparse.Namespace(flip_img_sequences_ratio=0.5)}),
        ("arch", {"arch": "local_vim_tiny"}),
        ("name", {"name": "mambar_tiny"}),
        ("use_middle_cls_token", {"use_middle_cls_token": False}),
        ("args.model", {"args": ["--lr", "0.1", "--model", "mambar_tiny"]}),
        ("args.model", {"args": json.dumps({"lr": 0.1, "model": "mambar_tiny"})}),
        ("config.model", {"config": "lr: 0.1\nmodel: mambar_tiny"}),
        ("params", {"params": {"if_rope": True}}),
        ("meta.config", {"meta": {"config": "model = dict(backbone={'type': 'Vim', 'use_middle_cls_token': False})"}}),
        ("config.architectures", {"config": {"architectures": ["Classifier", "LocalVimModel"]}}),
        ("config.recipe", {"config": {"recipe": {"if_rope": True, "name": "deit"}}}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_options_are_read_wherever_a_checkpoint_has_them(vim, tmp_path, place, content):
    torch.save({"state_dict": vim.state_dict(), **content}, tmp_path / "v.pth")
    with pytest.raises(InputError, match=rf"{place}.* says"):
        ssmcompress.load(tmp_path / "v.pth")
    with pytest.raises(InputError, match=rf"{place}.* says"):
        ssmcompress.load({"state_dict": vim.state_dict(), **content})


def test_a_text_in_a_configuration_is_not_executed(vim, tmp_path):
    text = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\nmodel = dict(if_rope=True)"
    with pytest.raises(InputError, match="if_rope"):
        ssmcompress.load({"state_dict": vim.state_dict(), "meta": {"config": text}})
    assert not (tmp_path / "ran").exists()


class Mixer(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


def live(model, mixer=None, **attributes):
    """A module of other code with the parameters of `model`, and these attributes."""
    module = nn.Module()
    module.__class__ = type("VisionMamba", (nn.Module,), {})
    for name, child in model.named_children():
        if name not in ("pruners", "corrections"):
            setattr(module, name, child)
    for name, parameter in model.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    for layer in module.layers:
        vars(layer.mixer).update(mixer or {})
    vars(module).update(attributes)
    return module


class Net(nn.Module):
    """A wrapper, as users and trainers write them."""

    def __init__(self, model):
        super().__init__()
        self.model = model


HUSTVL = {"if_cls_token": True, "use_middle_cls_token": True, "use_double_cls_token": False, "if_rope": False,
          "final_pool_type": "mean", "if_bidirectional": False, "flip_img_sequences_ratio": -1.0}  # fmt: skip
DIVIDED = {"bimamba_type": "v2", "if_divide_out": True}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_live_module_that_says_what_is_supported(channels):
    vim = make_vim(channels=channels)
    images = torch.randn(2, channels, 16, 16)
    loaded = ssmcompress.load(live(vim, DIVIDED, **HUSTVL))
    assert torch.equal(loaded(images), vim(images))


@pytest.mark.parametrize(
    ("mixer", "attributes", "message"),
    [
        (DIVIDED, {"use_middle_cls_token": False}, "use_middle_cls_token=False"),
        (DIVIDED, {"if_rope": True}, "if_rope=True"),
        (DIVIDED, {"final_pool_type": "all"}, "final_pool_type='all'"),
        ({"bimamba_type": "v2", "if_devide_out": False}, {}, "if_divide_out=False"),
        ({"bimamba_type": "v2"}, {}, "a mixer without the attribute if_divide_out"),
        ({"bimamba": True}, {}, "a video_mamba with the class token in front"),
    ],
)
def test_a_live_module_that_says_that_it_is_another_model(mixer, attributes, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.load(live(make_vim(), mixer, **{**HUSTVL, **attributes}))


WRAPPERS = {
    "a module around it": Net,
    "compiled": lambda vim: torch.compile(vim),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "an entry": lambda vim: {"model": vim, "epoch": 1},
    "a compiled entry": lambda vim: {"model": torch.compile(Net(vim))},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_hide_nothing_of_a_live_module(wrap):
    fine = make_vim(image=(20, 20), stride=2)
    assert ssmcompress.load(wrap(live(fine, DIVIDED, **HUSTVL))).config == fine.config
    with pytest.raises(InputError, match="use_middle_cls_token=False"):
        ssmcompress.load(wrap(live(make_vim(), DIVIDED, **{**HUSTVL, "use_middle_cls_token": False})))


@pytest.mark.parametrize(
    "content",
    [
        {"args": argparse.Namespace(name="deit_recipe", model="vim_tiny")},
        {"hyper_parameters": {"teacher": {"name": "videomamba", "if_cls_token": False}, "model": {"name": "vim_tiny"}}},
        {
            "config": {
                "model": {"name": "vim", "norm_epsilon": "1e-5"},
                "data": {"image_size": 13},
                "eval": {"stride": 3},
            }
        },
        {"config": {"model": "vim", "recipe": {"name": "deit", "stride": 3}}},
        {"args": argparse.Namespace(model="vim_tiny", input_size=17)},
    ],
)
def test_what_is_said_of_other_things_does_not_count(vim, content):
    assert ssmcompress.load({"model": vim.state_dict(), **content}).config == vim.config


@pytest.mark.parametrize(
    "name",
    ["vim_t_midclstok_76p1acc", "vim_cls", "vim_10_class", "vim_two_class", "vim_no_class_weights", "vim_europe",
     "vim_tropes"],
)  # fmt: skip
def test_ordinary_names_say_no_options(vim, tmp_path, name):
    torch.save(vim.state_dict(), tmp_path / f"{name}.pth")
    assert ssmcompress.load(tmp_path / f"{name}.pth").config == vim.config


@pytest.mark.parametrize("name", ["vim_vs_vmamba.pth", "vim_deit_recipe.pth"])
def test_a_name_of_several_architectures_says_none(vim, tmp_path, name):
    torch.save(vim.state_dict(), tmp_path / name)
    with pytest.raises(InputError, match="nothing says which"):
        ssmcompress.load(tmp_path / name)
    assert ssmcompress.load(tmp_path / name, architecture="vim").config == vim.config


def test_the_architecture_that_the_caller_gives_counts_for_more_than_the_file_name(vim, tmp_path):
    file = tmp_path / f"{PUBLISHED.replace('_div2', '')}.pth"
    torch.save(vim.state_dict(), file)
    with pytest.raises(InputError, match="the name of the file says if_divide_out=False"):
        ssmcompress.load(file)
    assert ssmcompress.load(file, architecture="vim").config == vim.config


def test_a_stride_that_is_said_is_noted(tmp_path):
    made = make_vim(image=(20, 20), stride=2)
    with hold_notes() as notes:
        ssmcompress.load({"model": made.state_dict(), "args": argparse.Namespace(model="vim_tiny", input_size=20)})
    assert list(notes) == ["patches overlap, with a stride of 2 pixels by args.input_size"]


def test_mean_and_std_in_the_arguments_are_used(vim):
    args = argparse.Namespace(model="vim", mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.9, interpolation="random")
    preprocessing = ssmcompress.load({"model": vim.state_dict(), "args": args}).preprocessing
    assert (preprocessing.mean, preprocessing.std, preprocessing.crop_pct) == ((0.5,) * 3, (0.25,) * 3, 0.9)
    assert (preprocessing.interpolation, preprocessing.assumed) == ("bicubic", False)
    for name, value, noted in (("crop_pct", 0.9, True), ("eval_crop_ratio", 0.9, False), ("crop_pct", "x", True)):
        args = argparse.Namespace(model="vim", **{name: value})
        with hold_notes() as notes:
            preprocessing = ssmcompress.load({"model": vim.state_dict(), "args": args}).preprocessing
        used = value == 0.9 and noted  # DeiT's code does not crop images of 32 pixels or smaller
        assert (preprocessing.crop_pct, preprocessing.assumed) == (0.9 if used else 1.0, True)
        assert any(f"args.{name}" in text for text in notes) == noted


def test_the_evaluation_crop_of_deit_is_used():
    vim = make_vim(image=(64, 64), patch=16)
    args = argparse.Namespace(model="vim", eval_crop_ratio=0.875)
    assert ssmcompress.load({"model": vim.state_dict(), "args": args}).preprocessing.crop_pct == 0.875


def test_mean_and_std_of_another_scale_in_the_arguments_are_not_used(vim):
    args = argparse.Namespace(model="vim", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    with hold_notes() as notes:
        preprocessing = ssmcompress.load({"model": vim.state_dict(), "args": args}).preprocessing
    assert preprocessing.assumed
    assert any("mean and std of args.mean are not used" in text and "divide by 255" in text for text in notes)


def test_a_live_module_of_older_code_has_its_class_token_in_front():
    attributes = {k: v for k, v in HUSTVL.items() if k != "use_middle_cls_token"}
    with pytest.raises(InputError, match="without the attribute use_middle_cls_token"):
        ssmcompress.load(live(make_vim(), DIVIDED, **attributes))


def test_norms_of_a_live_module_with_another_epsilon():
    vim = make_vim()
    vim.layers[0].norm.eps = 1e-6
    with pytest.raises(InputError, match="norm_epsilon=1e-06"):
        ssmcompress.load(live(vim, DIVIDED, **HUSTVL))


def test_a_bare_vim_may_be_a_video_mamba_and_is_asked_about(vim, images, tmp_path):
    state = vim.state_dict()
    torch.save(state, tmp_path / "model.pth")
    save_file(state, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.pth", tmp_path / "model.safetensors", state):
        with pytest.raises(InputError, match="a Vim or of a VideoMamba.*nothing says which.*`architecture`"):
            ssmcompress.load(source)
        assert torch.equal(ssmcompress.load(source, architecture="vim")(images), vim(images))
    torch.save(state, tmp_path / "vim_s_81p6acc.pth")
    assert ssmcompress.load(tmp_path / "vim_s_81p6acc.pth").config == vim.config
    torch.save(state, tmp_path / "videomamba_t16_in1k_res224.pth")
    assert ssmcompress.load(tmp_path / "videomamba_t16_in1k_res224.pth").architecture == "video_mamba"
    # The caller overrides the name of a file, but not the statements of the run that wrote it.
    assert ssmcompress.load(tmp_path / "videomamba_t16_in1k_res224.pth", architecture="vim").config == vim.config
    for said, given in (("videomamba_tiny", "vim"), ("vim_tiny", "videomamba")):
        torch.save({"model": state, "args": argparse.Namespace(model=said)}, tmp_path / "m.pth")
        with pytest.raises(InputError, match=f"args.model '{said}' says .*but `architecture` says {given[:3]}"):
            ssmcompress.load(tmp_path / "m.pth", architecture=given)


SAYING_VIDEO_MAMBA = {
    "args.model": {"args": argparse.Namespace(model="videomamba_small")},
    "arch": {"arch": "VideoMamba-T"},
    "architectures": {"config": {"architectures": ["Classifier", "VideoMambaModel"]}},
}


@pytest.mark.parametrize("said", SAYING_VIDEO_MAMBA)
@pytest.mark.parametrize("entry", ["model", "module"])
def test_weights_that_a_vim_could_have_are_the_video_mamba_that_they_are_said_to_be(vim, said, entry):
    state = {f"backbone.{k}": v for k, v in vim.state_dict().items()}
    with hold_notes() as notes:
        loaded = ssmcompress.load({entry: state, **SAYING_VIDEO_MAMBA[said]})
    assert (loaded.architecture, loaded.frames, list(notes)) == ("video_mamba", None, [])
    with pytest.raises(InputError, match="says if_divide_out=True.*a video_mamba with the sum.* not divided"):
        ssmcompress.load({entry: state, **SAYING_VIDEO_MAMBA[said], "if_divide_out": True})


@pytest.mark.parametrize(("width", "depth"), [(576, 1), (16, 32)])
def test_a_size_that_no_vim_has_is_asked_about(width, depth):
    state = make_vim(d_model=width, depth=depth).state_dict()
    with pytest.raises(InputError, match="VideoMamba-M has 32 layers of width 576; give `architecture`.*`evaluate`"):
        ssmcompress.load({"model": state})
    for name in ("vim_custom", "videomamba_custom"):
        assert ssmcompress.load({"model": state, "arch": name}).architecture.startswith(name[:3])


def test_the_size_of_video_mamba_m_in_a_file_that_is_called_a_vim_is_asked_about(vim, monkeypatch, tmp_path):
    monkeypatch.setattr("ssmcompress.models.vim.VIDEO_MAMBA_M", (16, 4))
    torch.save(vim.state_dict(), tmp_path / "vim_m.pth")
    with pytest.raises(InputError, match="No published Vim has this width or depth.*give `architecture`"):
        ssmcompress.load(tmp_path / "vim_m.pth")
    assert ssmcompress.load(tmp_path / "vim_m.pth", architecture="vim").architecture == "vim"


def test_the_size_of_video_mamba_m_alone_is_taken_for_one_with_a_note(vim, monkeypatch):
    monkeypatch.setattr("ssmcompress.models.video_mamba.VIDEO_MAMBA_M", (16, 4))
    with hold_notes() as notes:
        assert ssmcompress.load(vim.state_dict()).architecture == "video_mamba"
    assert "taken for a VideoMamba: its 4 layers of width 16" in next(iter(notes))
    assert ssmcompress.load({"model": vim.state_dict(), "arch": "vim_tiny"}).architecture == "vim"


def test_the_size_and_container_of_video_mamba_b_are_asked_about(vim, monkeypatch):
    monkeypatch.setattr("ssmcompress.models.vim.VIDEO_MAMBA_B", (16, 4))
    with pytest.raises(InputError, match="nothing says which"):
        ssmcompress.load({"model": vim.state_dict()})


def test_a_vim_in_a_checkpoint_that_does_not_name_it_is_read_with_a_note(vim):
    with hold_notes() as notes:
        ssmcompress.load({"model": vim.state_dict()})
    assert "taken for a Vim" in next(iter(notes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba-reg", "Mamba-Reg is not supported"),
        ("resnet50", "unknown architecture 'resnet50'"),
        ("", "unknown"),
        (5, "5: expected"),
    ],
)
def test_an_architecture_that_is_not_supported(vim, name, message):
    with pytest.raises(InputError, match=f"`architecture`:? .*{message}.*vim'?, '?plain_mamba"):
        ssmcompress.load(vim.state_dict(), architecture=name)


def test_an_architecture_that_the_weights_are_not(vim):
    with pytest.raises(InputError, match="`architecture` says plain_mamba, but the weights are a vim's"):
        ssmcompress.load(vim.state_dict(), architecture="plain-mamba")


def test_a_pruned_folder_finds_its_dense_model_although_that_does_not_say_what_it_is(vim, tmp_path):
    from ssmcompress.models.checkpoint import find_dense

    torch.save(vim.state_dict(), tmp_path / "model.pth")
    dense = ssmcompress.load(tmp_path / "model.pth", architecture="vim")
    folder = ssmcompress.save(ssmcompress.prune(dense, ssmcompress.make_plan(dense)), tmp_path / "pruned")
    assert find_dense(ssmcompress.load(folder)).config == vim.config


def test_a_configuration_of_another_tool_next_to_the_weights(vim, images, tmp_path):
    save_file(vim.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["VisionMamba"], "num_classes": 10}))
    assert torch.equal(ssmcompress.load(tmp_path)(images), vim(images))
    for change in ({"architecture": "mambar_tiny"}, {"model_type": "vim", "if_divide_out": False}):
        (tmp_path / "config.json").write_text(json.dumps(change))
        with pytest.raises(InputError, match=r"config.json\..* says"):
            ssmcompress.load(tmp_path)


def test_the_stride_follows_from_the_size_that_a_run_was_given(tmp_path):
    made = make_vim(image=(20, 20), stride=2)
    args = argparse.Namespace(model="vim_tiny", input_size=20)
    torch.save({"model": made.state_dict(), "args": args}, tmp_path / "v.pth")
    assert ssmcompress.load(tmp_path / "v.pth").config == made.config


@pytest.mark.parametrize("name", ["module.", "model.", "net.", "backbone.", "model._orig_mod.", "a.b.module."])
@pytest.mark.parametrize("container", ["model", "state_dict", "module", "weights"])
@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_wrappers_around_the_weights_are_removed(tmp_path, name, container, make):
    made = make(depth=2)
    state = {f"{name}{key}": value for key, value in made.state_dict().items()}
    torch.save({container: state, "epoch": 1}, tmp_path / "v.pth")
    loaded = ssmcompress.load(tmp_path / "v.pth")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in made.state_dict().items())


def test_marks_of_tools_in_the_names_and_a_head_outside_the_backbone(vim, images):
    state = vim.state_dict()
    forms = {
        "layers compiled one by one": {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in state.items()},
        "a FLOPs counter": {**state, "total_ops": torch.zeros(1), "layers.0.total_params": torch.zeros(1)},
        "a head apart": {k if k.startswith("head.") else f"backbone.{k}": v for k, v in state.items()},
        "other parts": {**{f"model.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(3)},
    }
    for name, form in forms.items():
        assert torch.equal(ssmcompress.load({"state_dict": form})(images), vim(images)), name
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}}
    assert torch.equal(ssmcompress.load(averaged)(images), vim(images))
    nested = {"checkpoint": {"state_dict": state, "epoch": 3}}
    assert torch.equal(ssmcompress.load(nested)(images), vim(images))


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
def test_averages_under_their_other_names(vim, images, key):
    average = make_vim(seed=7)
    content = {"state_dict": vim.state_dict(), key: {f"module.{k}": v for k, v in average.state_dict().items()}}
    assert torch.equal(ssmcompress.load(content)(images), vim(images))
    assert torch.equal(ssmcompress.load(content, weights="model_ema")(images), average(images))
    with pytest.raises(InputError, match=f"no weights under 'model'.*`weights` reads one of '{key}'"):
        ssmcompress.load({key: average.state_dict(), "epoch": 1})


def test_averages_that_are_not_read_are_noted(vim, images):
    content = {"model": vim.state_dict(), "model_ema": make_vim(seed=7).state_dict(), "arch": "vim"}
    with hold_notes() as notes:
        ssmcompress.load(content)
    assert list(notes) == [
        "read the weights under 'model'; the averages under 'model_ema' are read with `weights` model_ema"
    ]


def test_a_teacher_and_a_student_are_asked_about(vim, images):
    teacher = make_vim(seed=7)
    entries = {"teacher": teacher.state_dict(), "student": vim.state_dict()}
    parts = {f"{part}.{k}": v for part, state in entries.items() for k, v in state.items()}
    for content in (entries, parts, {"state_dict": parts}):
        with pytest.raises(InputError, match="`weights`.*'teacher'.*'student'"):
            ssmcompress.load(content)
    for content in (entries, {**parts, "n_averaged": torch.tensor(1)}):
        assert torch.equal(ssmcompress.load(content, weights="student")(images), vim(images))
        assert torch.equal(ssmcompress.load(content, weights="teacher")(images), teacher(images))


def test_a_teacher_next_to_the_model_in_one_state_dict(vim, images):
    teacher = make_vim(seed=7)
    parts = {f"{part}.{k}": v for part, m in (("model", vim), ("teacher", teacher)) for k, v in m.state_dict().items()}
    with hold_notes() as notes:
        assert torch.equal(ssmcompress.load({"state_dict": parts})(images), vim(images))
    assert any("left out 58 other tensors (teacher." in text or "other tensors (teacher." in text for text in notes)
    assert torch.equal(ssmcompress.load({"state_dict": parts}, weights="teacher")(images), teacher(images))


def test_mmengines_count_of_averaged_steps(vim, images):
    average = make_vim(seed=7)
    content = {"state_dict": vim.state_dict(), "ema_state_dict": {"steps": torch.tensor(3), **average.state_dict()}}
    assert torch.equal(ssmcompress.load(content, weights="model_ema")(images), average(images))


def test_a_second_classifier_is_asked_about_and_another_name_is_named(vim):
    backbone = {f"backbone.{k}": v for k, v in vim.state_dict().items()}
    with pytest.raises(InputError, match=r"two classifiers, head.weight and backbone.head.weight"):
        ssmcompress.load({"model": {**backbone, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}})
    for model, name in ((vim, "classifier"), (vim, "fc"), (make_plain_mamba(), "head.other")):
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
        with pytest.raises(InputError, match=rf"its classifier may be {name}.weight: rename"):
            ssmcompress.load({"model": {**state, f"{name}.weight": torch.zeros(3, 16)}})


def test_a_backbone_without_its_head_is_named_as_one(vim):
    for model, key in ((vim, "head."), (make_plain_mamba(), "head.")):
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(key)}
        with pytest.raises(InputError, match="backbone without its classifier"):
            ssmcompress.load({"model": state})


def test_class_tokens_that_are_not_supported(vim):
    state = vim.state_dict()
    without = {k: v for k, v in state.items() if k != "cls_token"} | {"pos_embed": state["pos_embed"][:, 1:]}
    with pytest.raises(InputError, match="has no class token"):
        ssmcompress.load({"model": without}, image_size=16)
    registers = {**state, "cls_token": torch.zeros(1, 12, 16)}
    with pytest.raises(InputError, match="12 class tokens"):
        ssmcompress.load({"model": registers})
    rotary = {**state, "rope.freqs_cos": torch.zeros(16, 16)}
    with pytest.raises(InputError, match=r"1 unknown \(rope.freqs_cos\), which means rotary position embedding"):
        ssmcompress.load({"model": rotary})


OTHERS = {
    "UperNet on a VMamba": ["decode_head.conv_seg.weight", "backbone.layers.0.blocks.0.op.A_logs"],
    "a detector": ["backbone.layers.0.mixer.A_log", "rpn_head.rpn_conv.weight"],
    "VMamba, first version": ["patch_embed.proj.weight", "layers.0.blocks.0.self_attention.A_logs"],
    "MambaVision": ["model.patch_embed.conv_down.0.weight", "model.head.weight"],
    "VideoMamba, masked": ["clip_decoder.0.weight", "layers.0.mixer.A_log", "patch_embed.proj.weight"],
    "Mamba-Reg": ["pos_embed_cls", "layers.0.mixer.A_log", "patch_embed.proj.weight"],
    "a Mamba language model": ["backbone.embeddings.weight", "backbone.layers.0.mixer.A_log"],
    "ResNet": ["conv1.weight", "layer1.0.conv1.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_families_are_named(tmp_path, name):
    state = {key: torch.zeros(2) for key in OTHERS[name]}
    torch.save({"state_dict": state, "meta": {"mmcv_version": "1.7"}}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=rf"{name}.*written by mmcv 1.7: not supported; .*vim, plain_mamba"):
        ssmcompress.load(tmp_path / "m.pth")


def test_what_the_golden_files_say():
    assert read_model(GOLDEN / "plain_mamba_l1.pth", LoadOptions()).said.writer == "mmcls 0.25.0"
    said = read_model(GOLDEN / "vim.pth", LoadOptions()).said
    assert (said.writer, said.family) == ("a training script", ("vim", "args.model 'vim_tiny'"))


@pytest.mark.parametrize(
    ("name", "family"),
    [("vim_t_midclstok_76p1acc.pth", "vim"), ("Vim-tiny", "vim"), ("hiervim", None), ("review.pth", None),
     ("vmambav2v_tiny", "vmamba"), ("vssm1_tiny_0230s", "vmamba"), ("model.pth", None), ("VisionMamba", "vim"),
     ("videomamba_m16.pth", "video_mamba"), ("mamba_revision.pth", None)],
)  # fmt: skip
def test_architectures_in_names(name, family):
    assert family_of_name(name) == family


def test_a_name_that_says_nothing_of_options():
    assert options_of_name("vim_fashion_mnist") == {} == options_of_name("my-class-model")
