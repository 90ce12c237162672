"""Unsupported models that resemble supported ones: each is named, with its task."""

import json

import pytest
import torch
from conftest import make_video_mamba, make_vim, make_vmamba
from safetensors.torch import save_file

import ssmcompress
from ssmcompress.errors import InputError

SCANS = {"in_proj.weight": (32, 8), "conv2d.weight": (16, 1, 3, 3), "conv2d.bias": (16,), "x_proj_weight": (4, 33, 16),
         "dt_projs_weight": (4, 16, 1), "dt_projs_bias": (4, 16), "A_logs": (64, 16), "Ds": (64,),
         "out_norm.weight": (16,), "out_norm.bias": (16,), "out_proj.weight": (8, 16)}  # fmt: skip


def zeros(shapes, prefix=""):
    return {f"{prefix}{key}": torch.zeros(shape) for key, shape in shapes.items()}


def first_vmamba(scans="self_attention", norm="ln_1", **more):
    """Names and shapes of one layer of VMamba's first version, and what is built on it."""
    layer = "layers.0.blocks.0."
    around = {"patch_embed.proj.weight": (8, 3, 4, 4), f"{layer}{norm}.weight": (8,), "head.weight": (10, 8)}
    return zeros(around) | zeros(SCANS, f"{layer}{scans}.") | zeros({layer + key: v for key, v in more.items()})


def published_vmamba(*removed):
    model = make_vmamba()
    state = model.publish({key: value.clone() for key, value in model.state_dict().items()})
    return {key: value for key, value in state.items() if not key.startswith(removed)}


def backbone(state, **more):
    return {f"backbone.{key}": value for key, value in state.items()} | zeros(
        {key.replace("__", "."): shape for key, shape in more.items()}
    )


MAMBA_VISION = {"patch_embed.conv_down.0.weight": (4, 3, 3, 3), "levels.0.blocks.0.conv1.weight": (6, 6, 3, 3),
                "levels.2.blocks.0.mixer.A_log": (12, 8), "head.weight": (10, 48)}  # fmt: skip
UPERNET = {"decode_head__conv_seg__weight": (5, 16, 1, 1)}
OTHER_HEAD = {"decode_head__linear_pred__weight": (5, 16, 1, 1)}

LOOKALIKES = {
    "first version": (first_vmamba(), "VMamba, first version, image classification"),
    "VM-UNet": (first_vmamba() | zeros({"layers_up.1.blocks.0.ln_1.weight": (8,)}), "VM-UNet, semantic segmentation"),
    "MedMamba": (first_vmamba(**{"conv33conv33conv11.0.weight": (4,)}), "MedMamba, image classification"),
    "LocalVMamba": (first_vmamba(**{"self_attention.multi_scan.attn.norm.weight": (8,)}), "LocalMamba, image"),
    "LocalVMamba, op": (first_vmamba("op", "norm", **{"op.multi_scan.attn.norm.weight": (8,)}), "LocalMamba, image"),
    "LocalVim": (make_vim().state_dict() | zeros({"layers.0.mixer.multi_scan.weights": (1, 4)}), "LocalMamba, image"),
    "EfficientVMamba": (
        first_vmamba("op", "norm", **{"conv_branch.0.weight": (8, 1, 3, 3)}),
        "EfficientVMamba, image classification",
    ),
    "first version, op": (first_vmamba("op", "norm"), "a VMamba with a bias of the convolution and .* and a gate is"),
    "VSSD": (
        zeros({"layers.0.blocks.0.attn.A_log": (2,), "layers.0.blocks.0.cpe1.weight": (8, 1, 3, 3)}),
        "VSSD, image classification",
    ),
    "UperNet": (backbone(published_vmamba("classifier"), **UPERNET), "UperNet on a VMamba backbone, semantic"),
    "UperNet, first version": (backbone(first_vmamba(), **UPERNET), "a model with a head of mmseg, semantic"),
    "another head": (backbone(published_vmamba("classifier"), **OTHER_HEAD), "a model with a head of mmseg, semantic"),
    "another head, Vim": (backbone(make_vim().state_dict(), **OTHER_HEAD), "a model with a head of mmseg, semantic"),
    "another head, MambaVision": (backbone(zeros(MAMBA_VISION), **OTHER_HEAD), "a model with a head of mmseg, sem"),
    "detector": (backbone(published_vmamba("classifier"), rpn_head__rpn_conv__weight=(2,)), "a detector of mmdet"),
    "MambaVision": (zeros(MAMBA_VISION), "MambaVision, image classification"),
    "pretraining": (
        {k: v for k, v in make_video_mamba(frames=2).state_dict().items() if not k.startswith(("head", "norm_f"))}
        | zeros({"clip_decoder.0.head.weight": (4, 16), "norm.weight": (16,)}),
        "VideoMamba, masked pretraining",
    ),
}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "vmunet."])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_supported_model_is_named(name, prefix):
    state, message = LOOKALIKES[name]
    state = {f"{prefix}{key}": value for key, value in state.items()}
    for content in (state, {"state_dict": state, "epoch": 3}):
        with pytest.raises(InputError, match=f"^{message}.*not supported"):
            ssmcompress.load(content)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_code_next_to_a_mamba_vision_is_not_run(tmp_path, monkeypatch, prefix):
    save_file(zeros(MAMBA_VISION, prefix), tmp_path / "model.safetensors")
    names = {"AutoConfig": "configuration_a.Config", "AutoModelForImageClassification": "modeling_a.Model"}
    config = {"architectures": ["MambaVisionModelForImageClassification"], "auto_map": names, "depths": [1, 1, 3, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for module in ("configuration_a", "modeling_a", "__init__"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="MambaVision, image classification, .*not supported"):
        ssmcompress.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "title"),
    [("local_vmamba_t", "LocalMamba"), ("efficient_vmamba_s", "EfficientVMamba"), ("MedMamba_T", "MedMamba"),
     ("vmunet_best", "VM-UNet"), ("vssd_tiny", "VSSD"), ("mambavision_tiny_1k", "MambaVision")],
)  # fmt: skip
def test_a_name_of_another_family_counts_where_its_weights_fit(tmp_path, name, title):
    torch.save({"model": published_vmamba()}, tmp_path / f"{name}.pth")
    with pytest.raises(InputError, match=f"says that the model is {title}, which is not supported, although"):
        ssmcompress.load(tmp_path / f"{name}.pth")
    assert ssmcompress.load(tmp_path / f"{name}.pth", architecture="vmamba", image_size=32).architecture == "vmamba"
