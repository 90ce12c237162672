"""Configurations as text in a checkpoint: which parts count, what is computed of them, and what is noted."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, make_vim

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.models import config_texts
from ssmcompress.progress import hold_notes

BACKBONE = (
    "backbone=dict(type='VisionMambaSeg', out_indices=[1, 2, 4, 5], if_rope=False, use_residual_as_feature=False)"
)
MODEL = f"model = dict(type='EncoderDecoder', {BACKBONE}, decode_head=dict(align_corners=False))\n"
NOT_READ = "the configuration in meta.config could not be read: "


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    names = ("upernet_vim", "upernet_plain_mamba")
    return {name: torch.load(GOLDEN / f"{name}.pth", weights_only=True)["state_dict"] for name in names}


@pytest.fixture
def load(states):
    """A function that loads a UperNet with this configuration; returns the model and the notes."""

    def load(config, name="upernet_vim"):
        with hold_notes() as notes:
            model = ssmcompress.load({"state_dict": states[name], "meta": {"config": config}})
        return model, list(notes)

    return load


OTHERS = {
    "a teacher in front": "teacher = dict(out_indices=(2, 3, 4, 5), if_rope=True, if_cls_token=True)\n" + MODEL,
    "a teacher of another kind": "teacher = dict(backbone=dict(type='VideoMamba', if_cls_token=True))\n" + MODEL,
    "an auxiliary head in front": MODEL.replace("backbone=", "auxiliary_head=dict(align_corners=True), backbone=", 1),
    "a teacher in the model": MODEL.replace("backbone=", "teacher=dict(backbone=dict(if_rope=True)), backbone=", 1),
    "another part in front": "x = dict(out_indices=(2, 3, 4, 5), if_rope=True, align_corners=True)\n" + MODEL,
    "its optimizer": "optimizer = dict(type='AdamW', if_rope=True, paramwise_cfg=dict(if_cls_token=True))\n" + MODEL,
    "a neck": MODEL.replace("backbone=", "neck=dict(if_rope=True, out_indices=(0, 1, 2, 3)), backbone=", 1),
    "a model in a name": f"parts = dict({BACKBONE})\nmodel = dict(**parts)\n",
    "a model in a dictionary": f"cfg = dict(if_rope=True, {MODEL.strip().replace(' = ', '=', 1)})\n",
    "a dictionary alone": f"dict(if_rope=True, {MODEL.strip().replace(' = ', '=', 1)})\n",
    "braces": "model = {'backbone': {'out_indices': [1, 2, 4, 5], 'use_residual_as_feature': False}}",
    "a student": f"model = dict(teacher=dict(backbone=dict(if_rope=True)), student=dict({BACKBONE}))\n",
    "values by name": "indices = (1, 2, 4, 5)\nmodel = dict(backbone=dict(out_indices=indices, if_rope=False,"
    " use_residual_as_feature=False))\n",
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_the_backbone_and_the_head_of_the_model_count(load, text):
    model, notes = load(text)
    assert (model.config.level, model.config.out_layers) == ("hidden", (2, 3, 5, 6))
    assert not notes


@pytest.mark.parametrize("place", ["{aux}, {head}", "{head}, {aux}"])
def test_the_auxiliary_head_does_not_say_what_the_head_computes(load, place):
    parts = {"aux": "auxiliary_head=dict(align_corners={})", "head": "decode_head=dict(align_corners={})"}
    text = f"model = dict({BACKBONE}, {place})".format(**parts)
    with pytest.raises(InputError, match="meta.config.align_corners says align_corners=True"):
        load(text.format(*((False, True) if place.startswith("{aux") else (True, False))))
    load(text.format(*((True, False) if place.startswith("{aux") else (False, True))))


def test_a_configuration_that_is_no_text_has_the_same_parts(load):
    model = {"backbone": {"out_indices": [1, 2, 4, 5], "use_residual_as_feature": False}}
    parts = {"auxiliary_head": {"align_corners": True}, "decode_head": {"align_corners": False}}
    wrong = {"auxiliary_head": {"align_corners": False}, "decode_head": {"align_corners": True}}
    for form in (dict, json.dumps):
        assert load(form({"model": {**model, **parts}}))[0].config.out_layers == (2, 3, 5, 6)
        with pytest.raises(InputError, match="model.decode_head.align_corners says align_corners=True"):
            load(form({"model": {**model, **wrong}}))


def test_options_of_the_head_are_not_hidden_by_nested_ones_of_the_backbone(load):
    nested = BACKBONE.replace("out_indices=", "layer_cfgs=dict(out_indices=[0, 1, 2, 5], if_rope=True), out_indices=")
    assert load(f"model = dict({nested})")[0].config.out_layers == (2, 3, 5, 6)


def test_the_size_of_training_images_is_read_from_the_test_configuration_or_the_pipelines(load):
    model = "model = dict(backbone=dict(type='PlainMambaSeg'), test_cfg=dict({}))\n"
    pipeline = "data = dict(train=dict(pipeline=[dict(type='RandomCrop', crop_size=(96, 64))]))\n"
    teacher = "teacher = dict(pipeline=dict(crop_size=(96, 64)))\n"
    sizes = {
        pipeline + model.format("mode='slide', crop_size=(64, 32)"): (64, 32),
        pipeline + model.format(""): (96, 64),
        teacher + model.format(""): (64, 64),
        "crop_size = (80, 48)\n" + model.format(""): (80, 48),
    }
    for text, size in sizes.items():
        assert load(text, "upernet_plain_mamba")[0].config.image_size == size


IMAGENET = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"
HALF = ((0.5,) * 3, (0.5,) * 3)
NORMALISATIONS = {
    "img_norm_cfg = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)\n": HALF,
    "img_norm_cfg = dict(mean=(255 / 2,) * 3, std=3 * [120 + 7.5])\n": HALF,
    "img_norm_cfg = dict(mean=[127.5] + [255 * 0.5] * 2, std=[- -127.5, +127.5, 128 - 0.5])\n": HALF,
    "half = [127.5] * 3\nimg_norm_cfg = {'mean': half, 'std': half}\n": HALF,
    "img_norm_cfg = dict(mean=[0.0] * 3, std=[1.0] * 3)\n": ((0.0,) * 3, (1 / 255,) * 3),
    f"img_norm_cfg = dict({IMAGENET})\n": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    f"test_pipeline = [dict(type='Normalize', {IMAGENET}, to_rgb=True)]\n": (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
    "data_preprocessor = dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)\n": HALF,
    f"img_norm_cfg = dict({IMAGENET})\n"
    + MODEL.replace("backbone=", "data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3), backbone=", 1): HALF,
    f"teacher = dict(data_preprocessor=dict({IMAGENET}))\n"
    "data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)\n": HALF,
}


@pytest.mark.parametrize(("text", "expected"), NORMALISATIONS.items())
def test_mean_and_std_of_the_configuration_are_used(load, text, expected):
    model, notes = load(text if "model = " in text else text + MODEL)
    found = model.preprocessing
    assert (found.mean, found.assumed) == (expected[0], False)
    assert found.std == pytest.approx(expected[1], rel=1e-10)
    name = next(name for name in ("data_preprocessor", "img_norm_cfg", "Normalize") if name in text)
    assert notes == [f"mean and std of the images are taken from meta.config.{name}; `short_side` 128 is assumed"]


def test_mean_and_std_for_a_classifier_and_from_a_dictionary():
    text = "img_norm_cfg = dict(mean=[127.5] * 3, std=[127.5] * 3)\nmodel = dict(backbone=dict(type='Vim'))"
    state = make_vim().state_dict()
    config = {"model": {"data_preprocessor": {"mean": [127.5] * 3, "std": [127.5] * 3}}}
    for meta in ({"config": text}, {"cfg": config}):
        with hold_notes() as notes:
            preprocessing = ssmcompress.load({"state_dict": state, "meta": meta, "arch": "vim"}).preprocessing
        assert (preprocessing.mean, preprocessing.std) == HALF
        assert any(note.startswith("mean and std of the images are taken from meta.c") for note in notes)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("mean=[127.5] * 3, std=[127.5] * 3, to_rgb=False", "they are of images in BGR order"),
        ("mean=[0.485] * 3, std=[0.229] * 3", "expected those of values up to 255"),
        ("mean=[127.5] * 2, std=[127.5] * 3", "2 values, the model has 3 channels"),
        ("mean=[127.5] * 100000000000, std=[127.5] * 3", "they are not lists of numbers"),
        ("mean=[1 / 0] * 3, std=[127.5] * 3", "they are not lists of numbers"),
        ("mean=[2 ** 999999999] * 3, std=[127.5] * 3", "they are not lists of numbers"),
        ("mean=[m for m in (1, 2, 3)], std=[127.5] * 3", "they are not lists of numbers"),
        ("mean=[127.5] * 3, std=[-127.5] * 3", "positive deviations"),
    ],
)
def test_mean_and_std_that_cannot_be_used_are_noted(load, values, reason):
    model, notes = load(f"img_norm_cfg = dict({values})\n{MODEL}")
    assert (model.preprocessing.mean, model.preprocessing.assumed) == ((0.485, 0.456, 0.406), True)
    assert len(notes) == 1
    assert notes[0].startswith("mean and std of meta.config.img_norm_cfg are not used: ")
    assert reason in notes[0]


DEEP = {
    "dictionaries": "model = " + "dict(a=" * 190 + "1" + ")" * 190,
    "parentheses": "model = " + "(" * 5000 + ")" * 5000,
    "signs": "model = dict(a=" + "-" * 200_000 + "1)",
    "sums": "model = dict(a=" + "+".join(["1"] * 200_000) + ")",
    "brackets of YAML": "a: " + "[" * 20_000,
    "names": "a0 = dict(x=1)\n" + "".join(f"a{i + 1} = dict(p=a{i}, q=a{i})\n" for i in range(60)),
    "copies": "a = dict(" + ", ".join(f"k{i}=1" for i in range(1000)) + ")\n" + "b = dict(**a)\n" * 20_000,
    "lists": "a = [\n" + "[0] * 4096,\n" * 20_000 + "]",
    "products": "a = 1" + "\na = a * 9223372036854775807" * 1000,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deep_and_large_texts_are_survived(load, text):
    assert load(f"{text}\n{MODEL}")[0].config.level == "hidden"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "model = dict(backbone=dict(out_indices=[1, 2, 4, 5]),\n",
            f"{NOT_READ}neither JSON nor YAML, and as Python: ",
        ),
        ("model = dict(\n  type='x',,\n)\n", "invalid syntax in line 2; what the weights do not show is assumed"),
        ('{"model": {"backbone": {"out_indices": [1, 2,\n', NOT_READ),
        ("model = dict(a=" + "(" * 5000 + ")" * 5000 + ")", f"{NOT_READ}neither"),
        (MODEL + "#" * (1 << 20), f"{NOT_READ}it has {len(MODEL) + (1 << 20)} characters, expected at most 1048576"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_noted(load, text, note):
    model, notes = load(text)
    assert (model.config.level, model.config.out_layers) == ("hidden", (1, 3, 4, 6))
    assert sum(note in found for found in notes) == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model = dict(backbone=dict(out_indices=[i for i in (1, 2, 4, 5)]))", "out_indices is"),
        ("x = dict(out_indices=[1, 2, 4, 5])\nmodel = dict(backbone=dict(out_indices=find()))", "out_indices is"),
        ("model = dict(backbone=dict(out_indices=indices, if_rope=rope))", "out_indices, if_rope are"),
        ("model = dict(backbone=dict(out_indices=(1, 2, last(), 5)))", "out_indices is"),
        ("model = dict(backbone=make())", "backbone is"),
        ("model = dict(backbone=dict(**base))", r"\*\*base is"),
        ("model = make()", "model is"),
    ],
)
def test_options_that_would_have_to_be_computed_are_noted(load, text, names):
    model, notes = load(text)
    assert model.config.out_layers == (1, 3, 4, 6)
    expected = f"the configuration in meta.config could not be read in full: {names} not literal; what the weights do "
    assert sum(expected.replace("\\", "") in found for found in notes) == 1


def test_a_teacher_that_would_have_to_be_computed_is_no_news(load):
    assert load(f"teacher = dict(backbone=make(), if_rope=find())\n{MODEL}")[1] == []


def test_nothing_of_a_text_is_executed(load, tmp_path):
    touch = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    model, _ = load(f"{touch}\nx = [{touch}] * 3\nmodel = dict({BACKBONE}, a={touch}, b=(lambda: {touch})())\n")
    assert model.config.out_layers == (2, 3, 5, 6)
    assert not (tmp_path / "ran").exists()


def test_an_option_is_reported_as_the_file_has_it(load):
    backbone = BACKBONE.replace("feature=False", "feature=True, last_layer_process='none'")
    with pytest.raises(InputError, match="says .*last_layer_process='none'.*not supported"):
        load(f"model = dict({backbone})")


def test_the_lines_of_a_yaml_file_are_not_taken_for_python(load):
    model, notes = load("model:\n  backbone:\n    out_indices: [1, 2, 4, 5]\n    use_residual_as_feature: false\n")
    assert (model.config.out_layers, notes) == ((2, 3, 5, 6), [])


def test_the_limit_is_one_of_characters(load, monkeypatch):
    monkeypatch.setattr(config_texts, "LONGEST_TEXT", len(MODEL))
    assert load(MODEL)[1] == []
    assert any("could not be read: it has" in note for note in load(MODEL + " ")[1])
