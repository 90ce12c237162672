"""Files of every kind: published, our own, wrapped, damaged and hostile."""

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import images_of, make_plain_mamba, make_video_mamba, make_vim, make_vit, make_vmamba
from safetensors.torch import save_file

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.files import check_target, write_file
from ssmcompress.models.checkpoint import find_dense
from ssmcompress.progress import hold_notes


def same(a, b, images):
    with torch.no_grad():
        return torch.equal(a(images), b(images))


def test_every_container_of_a_state_dict(vim, images, tmp_path):
    state = vim.state_dict()
    files = {
        "bare-vim.pth": state,
        "training.pth": {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1e-3)},
        "wrapped.pt": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        "numbers.pth": {
            "model": state,
            "best": np.float64(76.1),
            "epoch": np.int64(3),
            "args": argparse.Namespace(output=pathlib.Path("out"), lr=np.float32(0.1)),
        },
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert same(ssmcompress.load(tmp_path / name), vim, images), name
    torch.save(files["numbers.pth"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(ssmcompress.load(tmp_path / "old.pth"), vim, images)
    for name in ("vim.safetensors", "renamed-vim.pth"):
        save_file(state, tmp_path / name)
        assert same(ssmcompress.load(tmp_path / name), vim, images)


def test_averaged_weights_on_request(vim, images, tmp_path):
    average = make_vim(seed=5)
    torch.save({"model": vim.state_dict(), "model_ema": average.state_dict()}, tmp_path / "v.pth")
    assert same(ssmcompress.load(tmp_path / "v.pth"), vim, images)
    assert same(ssmcompress.load(tmp_path / "v.pth", weights="model_ema"), average, images)
    torch.save({"model": vim.state_dict(), "epoch": 1}, tmp_path / "v.pth")
    with pytest.raises(InputError, match="no weights under 'model_ema'.*entries model, epoch"):
        ssmcompress.load(tmp_path / "v.pth", weights="model_ema")


def test_half_precision_weights_are_read_as_float32(vim, tmp_path):
    torch.save({k: v.half() for k, v in vim.state_dict().items()}, tmp_path / "vim-half.pth")
    assert next(ssmcompress.load(tmp_path / "vim-half.pth").parameters()).dtype == torch.float32


def test_the_published_name_of_a_finer_model_tells_its_stride(tmp_path):
    state = make_vim(image=(20, 20), stride=2).state_dict()
    args = argparse.Namespace(model="vim_tiny_patch4_stride2_20_bimambav2_final_pool_mean")
    torch.save({"model": state, "args": args}, tmp_path / "v.pth")
    assert ssmcompress.load(tmp_path / "v.pth").config.image_size == (20, 20)


def test_pruned_folders_reload_in_a_new_process_with_identical_logits(vim, plain_mamba, tmp_path):
    expected = {}
    for name, model in (("vim", vim), ("plain_mamba", plain_mamba)):
        images = images_of(model)
        plan = ssmcompress.calibrate(model, images, stages=(1, 3), ratio=0.4, importance="random", seed=3)
        pruned = ssmcompress.prune(model, plan)
        ssmcompress.save(pruned, tmp_path / name)
        torch.save(images, tmp_path / f"{name}.images.pt")
        with torch.no_grad():
            expected[name] = pruned(images)
    code = (
        "import sys, torch, ssmcompress; torch.set_num_threads(int(sys.argv[1]))\n"
        "for folder in sys.argv[2:]:\n"
        "    model, images = ssmcompress.load(folder), torch.load(folder + '.images.pt')\n"
        "    with torch.no_grad(): torch.save(model(images), folder + '.logits.pt')"
    )
    folders = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", code, str(torch.get_num_threads()), *folders], check=True)
    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.logits.pt"), logits)


def test_saving_and_loading_keeps_everything(model, tmp_path):
    images = images_of(model)
    model.preprocessing = model.preprocessing.changed(mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    for name, plan in (
        ("calibrated", ssmcompress.calibrate(model, images)),
        ("naive", ssmcompress.make_plan(model, alignment=False)),
        ("dense", None),
    ):
        made = ssmcompress.prune(model, plan) if plan else model
        folder = ssmcompress.save(made, tmp_path / name)
        for path in (folder, folder / "model.safetensors"):  # the file alone describes itself
            again = ssmcompress.load(path)
            assert same(again, made, images)
            assert (again.plan, again.config, again.preprocessing) == (made.plan, model.config, model.preprocessing)


def test_a_pruned_model_reloads_for_another_image_size(vim, images, tmp_path):
    ssmcompress.save(ssmcompress.prune(vim, ssmcompress.calibrate(vim, images, ratio=0.5)), tmp_path / "m")
    model = ssmcompress.load(tmp_path / "m", image_size=24)
    assert model.token_counts() == [37, 19, 10, 6, 6]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 24, 24)).isfinite().all()


def test_nothing_is_overwritten_unless_asked_and_nothing_is_left_on_failure(vim, tmp_path, monkeypatch):
    folder = ssmcompress.save(vim, tmp_path / "a" / "m")
    with pytest.raises(InputError, match="exists.*`force=True`"):
        ssmcompress.save(vim, folder)
    (folder / "old").write_text("")
    ssmcompress.save(vim, folder, force=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]

    monkeypatch.setattr("ssmcompress.models.saved.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ssmcompress.save(vim, folder, force=True)
    with pytest.raises(ZeroDivisionError):
        ssmcompress.save(vim, tmp_path / "b" / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_dense_model_is_found_again_unless_it_changed(vim, images, checkpoint, tmp_path):
    dense = ssmcompress.load(checkpoint)
    ssmcompress.save(ssmcompress.prune(dense, ssmcompress.make_plan(dense)), tmp_path / "m")
    pruned = ssmcompress.load(tmp_path / "m")
    assert same(find_dense(pruned), dense, images)
    torch.save({"model": make_vim(seed=9).state_dict()}, checkpoint)
    with pytest.raises(InputError, match="has changed since"):
        find_dense(pruned)
    checkpoint.rename(tmp_path / "moved.pt")
    with pytest.raises(InputError, match="is gone"):
        find_dense(pruned)
    assert find_dense(pruned, tmp_path / "moved.pt").plan is None
    torch.save({"model": make_vim(classes=3).state_dict()}, checkpoint)
    with pytest.raises(InputError, match="3 classes"):
        find_dense(pruned, checkpoint)


def test_the_dense_model_is_read_from_the_entry_that_was_pruned(vim, images, tmp_path):
    raw, averaged = tmp_path / "raw.pt", tmp_path / "averaged.pt"
    torch.save({"model": make_vim(seed=9).state_dict(), "model_ema": vim.state_dict()}, averaged)
    torch.save({"model": make_vim(seed=9).state_dict()}, raw)
    dense = ssmcompress.load(averaged, weights="model_ema")
    ssmcompress.save(ssmcompress.prune(dense, ratio=0.3), tmp_path / "m")
    pruned = ssmcompress.load(tmp_path / "m")
    moved = averaged.rename(tmp_path / "moved.pt")
    with hold_notes() as notes:
        assert same(find_dense(pruned, moved), dense, images)
    assert not any("SHA-256" in text for text in notes)
    with hold_notes() as notes:
        assert same(find_dense(pruned, raw), make_vim(seed=9), images)
    assert f"{raw} is not the file that the model was made from: it has another SHA-256" in notes


# ---------------------------------------------------------------------------------------- damaged and hostile


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "plain pickle 2"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(vim, tmp_path, form):
    content = {"model": vim.state_dict(), "args": Evil(tmp_path / "ran")}
    file = tmp_path / "evil.pth"
    if form == "zip":
        torch.save(content, file)
    elif form == "legacy":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(content["args"], protocol=2 if form.endswith("2") else None))
    with pytest.raises(InputError, match=r"refused: this pickle asks for \w+\.system.*`unsafe_load=True`"):
        ssmcompress.load(file)
    assert not (tmp_path / "ran").exists()
    if form == "zip":
        assert ssmcompress.load(file, unsafe_load=True).config == vim.config
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_truncated_file_is_said_to_be_one(vim, tmp_path, share, kind):
    file = tmp_path / f"v.{kind}"
    torch.save(vim.state_dict(), file) if kind == "pth" else save_file(vim.state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"v\.(pth|safetensors): not a (checkpoint, or a damaged one|whole)"):
        ssmcompress.load(file)


def test_one_changed_bit_of_a_weight_is_noticed(vim, tmp_path):
    torch.save({"model": vim.state_dict()}, tmp_path / "v.pth")
    content = bytearray((tmp_path / "v.pth").read_bytes())
    position = content.index(vim.head.weight.detach().numpy().tobytes())
    content[position] ^= 1
    (tmp_path / "v.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged: 1 of \d+ records differ from their checksums"):
        ssmcompress.load(tmp_path / "v.pth")


def edited(vim, **changes):
    state = dict(vim.state_dict())
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__2__mixer__x_proj__weight": torch.zeros(3, 4)}, r"layers.2.mixer.x_proj.weight is \(3, 4\)"),
        ({"pos_embed": torch.zeros(1, 17, 9)}, "contradicting shapes: pos_embed"),
        ({"pos_embed": torch.zeros(17)}, "expected 3 dimensions"),
        ({"head__weight": None}, "'head.weight' is missing"),
        ({"layers__1__norm__weight": None}, r"1 missing \(layers.1.norm.weight\)"),
        ({"layers__0__mixer__A_log": None}, "'layers.0.mixer.A_log' is missing"),
        ({"rope__freqs": torch.zeros(3)}, r"1 unknown \(rope.freqs\)"),
        ({"layers__99999999__x": torch.zeros(1)}, "layer numbers go up to 99999999"),
        ({"norm_f__weight": torch.full((16,), torch.nan)}, "norm_f.weight holds values that are not finite"),
        ({"head__bias": torch.zeros(10, dtype=torch.int64)}, "head.bias holds torch.int64"),
        ({"patch_embed__proj__weight": torch.zeros(0, 3, 4, 4)}, "none empty"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_state_dict_that_contradicts_itself(vim, changes, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.load(edited(vim, **changes))


def test_a_state_dict_of_something_else_says_what_was_expected(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(InputError, match=r"found 2 tensors \(bias, weight.*vim has cls_token, pos_embed"):
        ssmcompress.load(tmp_path / "linear.pth")
    for content in ([1, 2], {"model": 3}, {}, "text"):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(InputError, match=r"expected a"):
            ssmcompress.load(tmp_path / "other.pth")


def test_paths_that_are_no_models(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ssmcompress.load(tmp_path / "none.pth")
    with pytest.raises(InputError, match="a folder without model.safetensors"):
        ssmcompress.load(tmp_path)
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="git lfs pull"):
        ssmcompress.load(tmp_path / "lfs.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a checkpoint"):
        ssmcompress.load(tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format version 2.*upgrade"),
        (lambda c: c.update(format_version="x"), "not one of ssmcompress"),
        (lambda c: c.pop("architecture"), "not one of ssmcompress"),
        (lambda c: c["architecture"].update(type="resnet"), "'resnet': this version knows vim"),
        (lambda c: c["architecture"].update(image_size=[0, -4]), "bad architecture block"),
        (lambda c: c["architecture"].update(image_size="big"), "bad architecture block"),
        (lambda c: c["architecture"].update(image_size=[float("inf"), 3]), "bad architecture block"),
        (lambda c: c["architecture"].update(image_size=[10**6, 10**6]), "not the grid of its image size|at most"),
        (lambda c: c["pruning"].update(seed=1e30), "not a pruning plan"),
        (lambda c: c["preprocessing"].update(mean=[10**400, 0, 0]), "not a preprocessing block"),
        (lambda c: c["pruning"].update(stages=[{"after": 9, "ratio": 0.3}]), "the model has 4 layers"),
        (lambda c: c["pruning"].update(stages=[{"after": 3, "ratio": 0.3}]), "gap deltas do not fit"),
        (lambda c: c["pruning"].update(stages=[{"after": 1, "ratio": "lots"}]), "not a pruning plan"),
        (lambda c: c["preprocessing"].update(std=[0, 0, 0]), "positive deviations"),
        (lambda c: c["preprocessing"].update(crop_pct=0), "crop_pct"),
        (lambda c: c.update(preprocessing=3), "not a preprocessing block"),
    ],
)
def test_a_damaged_configuration(vim, tmp_path, change, message):
    folder = ssmcompress.save(ssmcompress.prune(vim, ssmcompress.make_plan(vim, stages=(1,))), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        ssmcompress.load(folder)


def test_a_configuration_that_is_no_json(vim, tmp_path):
    folder = ssmcompress.save(vim, tmp_path / "m")
    for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(InputError, match="configuration|not a text file"):
            ssmcompress.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        ssmcompress.load(folder)


def test_gap_deltas_that_are_not_finite(vim, tmp_path):
    plan = ssmcompress.make_plan(vim, stages=(1,))
    pruned = ssmcompress.prune(vim, plan)
    pruned.blocks[2].mixer.gap_delta[0, 0] = torch.nan
    ssmcompress.save(pruned, tmp_path / "m")
    with pytest.raises(InputError, match="gap_delta holds values that are not finite"):
        ssmcompress.load(tmp_path / "m")


def test_data_named_by_a_folder_is_found_beside_it(vim, tmp_path):
    vim.source = replace(ssmcompress.load(ssmcompress.save(vim, tmp_path / "x")).source, data="images")
    folder = ssmcompress.save(vim, tmp_path / "m")
    (folder / "images").mkdir()
    assert ssmcompress.load(folder).source.data == str(folder / "images")


@pytest.mark.parametrize("size", [(8, 32), (16, 36), (24, 20)], ids=str)
def test_grids_that_are_not_square_reload_with_identical_logits(vim, tmp_path, size):
    model = ssmcompress.load(vim, image_size=size)
    images = torch.randn(2, 3, *size)
    ssmcompress.save(ssmcompress.prune(model, ssmcompress.make_plan(model)), tmp_path / "m")
    again = ssmcompress.load(tmp_path / "m")
    assert same(again, ssmcompress.prune(model, ssmcompress.make_plan(model)), images)
    assert ssmcompress.load(tmp_path / "m", image_size=16).config.grid == (4, 4)


def test_a_patch_stride_is_remembered(tmp_path):
    model = make_vim(image=(20, 20), stride=2)
    ssmcompress.save(model, tmp_path / "m")
    assert ssmcompress.load(tmp_path / "m").config == model.config


def test_force_never_takes_away_what_is_not_ours(vim, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.jpg").write_text("")
    with pytest.raises(InputError, match="did not write"):
        ssmcompress.save(vim, tmp_path / "photos", force=True)
    with pytest.raises(InputError, match="is a folder"):
        write_file(tmp_path / "photos", b"", force=True)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["precious.jpg"]
    folder = ssmcompress.save(vim, tmp_path / "m")
    for target, source in ((folder, folder), (tmp_path / "photos", tmp_path / "photos" / "precious.jpg")):
        with pytest.raises(InputError, match="is, or holds, the input"):
            check_target(target, True, [source])


def test_the_model_does_not_share_memory_with_the_module_it_came_from(vim):
    loaded = ssmcompress.load(vim)
    with torch.no_grad():
        loaded.head.bias += 1
    assert not torch.equal(loaded.head.bias, vim.head.bias)


def test_a_wrapped_live_module_brings_its_stride():
    made = make_vim(image=(20, 20), stride=2)
    assert ssmcompress.load(torch.nn.DataParallel(made)).config == made.config


def test_safetensors_have_one_set_of_weights(vim, tmp_path):
    save_file(vim.state_dict(), tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="no 'model_ema' entry"):
        ssmcompress.load(tmp_path / "v.safetensors", weights="model_ema")


def test_a_pruned_model_is_no_dense_one(vim, tmp_path):
    pruned = ssmcompress.prune(vim, ssmcompress.make_plan(vim))
    folder = ssmcompress.save(pruned, tmp_path / "m")
    with pytest.raises(InputError, match="pruned itself"):
        find_dense(pruned, folder)
    with pytest.raises(InputError, match="never a file"):
        find_dense(ssmcompress.load(folder))


MAKERS = {
    "vim": make_vim,
    "images": make_video_mamba,
    "videos": lambda: make_video_mamba(frames=4, image=(8, 8)),
    "plain_mamba": make_plain_mamba,
    "vit": make_vit,
    "vmamba": make_vmamba,
}
RESHAPED = {
    "a number": lambda v: v.flatten()[0].clone(),
    "empty": lambda v: v[:0],
    "more dimensions": lambda v: v[None, None, None],
}


@pytest.mark.parametrize("change", RESHAPED)
@pytest.mark.parametrize("kind", MAKERS)
def test_no_shape_of_a_tensor_is_more_than_an_input_error(kind, change):
    model = MAKERS[kind]()
    state = model.publish({key: value.clone() for key, value in model.state_dict().items()})
    first = {key for key in state if ".0." in key or ("layers." not in key and "blocks." not in key)}
    keys = sorted(key for key in first if state[key].ndim)
    heads = {"head.weight", "head.bias", "classifier.head.weight", "head.fc.weight"}  # one of no classes may be empty
    for key in keys if change != "empty" else sorted({*keys} - heads):
        changed = {"model": state | {key: RESHAPED[change](state[key])}, "args": {"model": model.architecture}}
        with pytest.raises(InputError):
            ssmcompress.load(changed)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(16).to_sparse(), torch.zeros(1).expand(10**9), torch.empty(4, device="meta")],
    ids=["sparse", "expanded", "meta"],
)
def test_tensors_that_are_not_plain(vim, tensor):
    with pytest.raises(InputError, match="no plain dense tensor"):
        ssmcompress.load(edited(vim, norm_f__weight=tensor))


@pytest.mark.parametrize("key", ["module.head.bias", "_orig_mod.head.bias", "head._orig_mod.bias"])
def test_two_tensors_that_are_one_parameter_without_the_marks_of_wrappers(vim, key):
    with pytest.raises(InputError, match=f"holds 'head.bias' twice, once as '{key}'"):
        ssmcompress.load({"model": vim.state_dict() | {key: torch.zeros(10)}})


def test_weights_too_large_for_float32(vim):
    state = {k: v.double() for k, v in vim.state_dict().items()}
    state["head.weight"] = state["head.weight"] * 1e300
    with pytest.raises(InputError, match=r"head.weight holds values that are not finite"):
        ssmcompress.load(state)


def test_names_that_torchs_reader_refuses_are_told_whichever_they_are(tmp_path):
    for protocol in (2, 4):
        for function, name in ((torch.load, "torch.serialization.load"), (np.load, "numpy.*load")):
            (tmp_path / "v.pth").write_bytes(pickle.dumps(function, protocol=protocol))
            with pytest.raises(InputError, match=f"asks for {name}.*`unsafe_load=True`"):
                ssmcompress.load(tmp_path / "v.pth")
