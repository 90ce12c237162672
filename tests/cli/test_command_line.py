"""The command line as a whole: the three lines, help, exit codes, one-line errors, nothing left behind."""

import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from command_line import BETWEEN, call, call_json, forked, process, refused
from conftest import BUNDLED, make_plain_mamba, make_vim, write_image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_the_three_lines_in_an_empty_folder():
    """Each command in a separate process."""
    torch.save({"model": make_vim(depth=2).state_dict()}, "model.pt")
    lines = "prune model.pt --ratio 0.3", "report", "export --onnx"
    done = forked("in-turn", *(["ssmcompress", *line.split()] for line in lines))
    first, second, third = done.stdout.split(BETWEEN)
    assert "accuracy was not measured" in first + done.stderr
    assert "of 17 tokens after layer 1" in second
    assert "100.0% in the same class" in third
    assert sorted(p.name for p in os.scandir("compressed/model-r0.30")) == [
        "README.md", "config.json", "kept_tokens.png", "model.onnx", "model.safetensors", "recipe.yaml", "report.json",
    ]  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr  # no animation and no colours


def test_every_command_takes_a_plain_mamba(class_folders):
    torch.save({"meta": {"epoch": 3}, "state_dict": make_plain_mamba(depth=2).state_dict()}, "model.pth")
    assert call_json("inspect", "model.pth")["architecture"]["type"] == "plain_mamba"
    options = "--ratio", "0.5", "--stages", "1", "--importance", "clip-paths", "--data", class_folders
    found = call_json("prune", "model.pth", *options)
    assert found["stages"] == [{"after": 1, "kept": 8, "of": 16, "importance": "clip-paths"}]
    assert {k: v for k, v in found["alignment"].items() if k != "pool"} == {
        "conv": True, "scan": True, "gap": "calibrated",
    }  # fmt: skip
    assert isinstance(found["alignment"]["pool"], bool)
    assert found["reconstruction"]["images"] == 10
    folder = "compressed/model-r0.50-s1-clip-paths"
    assert call_json("evaluate", folder, "--data", class_folders)["agreement"]["top1"] is not None
    assert call_json("report") == found
    exported = call_json("export", "--onnx")
    assert exported["max_difference"] <= 1e-4
    assert {(row["model"], row["by"]) for row in exported["latency"]} == {
        (model, by) for model in ("dense", "pruned") for by in ("torch", "onnxruntime")
    }
    noted = call_json("report")["onnx"]
    assert (noted["file"], noted["latency"]) == ("model.onnx", exported["latency"])
    assert "ONNX (model.onnx)" in call("report").stdout
    assert call_json("verify", folder, f"{folder}/model.onnx")["top1_agreement"] == 100
    graph = onnx.load(f"{folder}/model.onnx")
    weight = next(t for t in graph.graph.initializer if t.name == "head.fc.weight")
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, "wrong.onnx")
    assert "other values in head.fc.weight" in refused("verify", folder, "wrong.onnx", code=4)
    assert call_json("verify", folder, "wrong.onnx", code=4)["weights"] == ["head.fc.weight"]
    call_json("export", "-o", "one.safetensors")
    assert call_json("inspect", "one.safetensors")["pruned"]
    rows = call_json("benchmark", folder, "--batch-sizes", "1", "--repeats", "1")["models"]
    assert [row["times_faster"] > 0 for row in rows] == [True, True]


def test_bad_checkpoints(vim, tmp_path):
    assert "no such file" in refused("prune", "none.pt")
    torch.save(vim.state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:9000])
    assert "damaged" in refused("prune", tmp_path / "cut.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    assert "vim has cls_token" in refused("inspect", tmp_path / "other.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system))
    assert "could run code" in refused("export", tmp_path / "evil.pt", "--onnx")
    assert "no compressed model under compressed/" in refused("report")
    assert "no report.json" in refused("report", tmp_path)
    assert "Missing argument" in refused("prune")


def test_bad_data(checkpoint, class_folders, tmp_path):
    os.mkdir("empty")
    assert "no images in empty" in refused("prune", checkpoint, "--data", "empty")
    assert "no images in empty" in refused("evaluate", checkpoint, "--data", "empty")
    write_image(class_folders / "class10" / "a.png", 0)
    assert "11 classes" in refused("prune", checkpoint, "--data", class_folders)
    assert "11 classes" in refused("evaluate", checkpoint, "--data", class_folders)
    write_image(tmp_path / "one" / "a.png", 0)
    assert "has 1 image" in refused("prune", checkpoint, "--data", tmp_path / "one")


def test_a_target_that_cannot_be_written(checkpoint):
    assert "cannot write /proc/" in refused("prune", checkpoint, "-o", "/proc/nothing/m")
    assert "cannot write" in refused("export", checkpoint, "-o", "/dev/null/m.safetensors")
    assert "cannot write" in refused("prune", checkpoint, "-o", f"{checkpoint}/m")


def test_a_full_disk(checkpoint):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = process("prune", checkpoint, "--no-latency", "-o", "a/m", code=None, preexec_fn=small_files)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: cannot write a/m: ")
    assert os.listdir() == []


def test_an_interruption(checkpoint, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssmcompress.jobs.measuring.measure", lambda *a, **k: interrupted())
    assert refused("prune", checkpoint, code=130) == "error: interrupted\n"


def test_a_broken_program_still_ends_with_one_line(checkpoint, monkeypatch):
    monkeypatch.setattr("ssmcompress.jobs.measuring.measure", lambda *a, **k: 1 / 0)
    assert "internal error, ZeroDivisionError" in refused("prune", checkpoint, code=1)


def test_help_and_version_do_not_import_torch():
    code = (
        "import sys; from ssmcompress.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    )
    for arguments in (["--help"], ["prune", "--help"], ["--version"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == "False"
    assert "Share of tokens REMOVED" in process("prune", "--help").stdout


def test_the_options_of_loading_reach_the_loader(vim, tmp_path):
    torch.save({"model": vim.state_dict(), "hook": print}, tmp_path / "odd.pth")
    assert "__builtin__.print" in refused("inspect", tmp_path / "odd.pth")
    assert call_json("inspect", tmp_path / "odd.pth", "--unsafe-load")["params"] > 0
    fine = tmp_path / "fine.pth"
    torch.save({"model": make_vim(image=(20, 20), stride=2).state_dict()}, fine)
    assert call_json("inspect", fine, "--stride", 2)["architecture"]["image_size"] == [20, 20]
    assert call_json("inspect", fine, "--stride", 2, "--image-size", "24x28")["architecture"]["image_size"] == [24, 28]
    write_image(tmp_path / "pictures" / "a.png", 0)
    found = call_json(
        "evaluate", fine, "--stride", 2, "--dense", fine, "--data", tmp_path / "pictures", "--dtype", "bfloat16",
        "--threads", torch.get_num_threads(), "--workers", 1, "--interpolation", "bilinear",
    )  # fmt: skip
    assert found["agreement"]["top1"] == 100


def test_force_does_not_replace_what_is_read(checkpoint, class_folders):
    assert "is, or holds, the input" in refused(
        "prune", checkpoint, "--data", class_folders, "-o", class_folders, "--force"
    )
    call("export", BUNDLED, "-o", "dense.safetensors")
    assert "is, or holds, the input" in refused("export", "dense.safetensors", "-o", "dense.safetensors", "--force")
    call("export", "dense.safetensors", "--quiet")
    assert os.path.isfile("dense-export.safetensors")


def test_names_that_no_system_takes(checkpoint):
    assert "too long" in refused("prune", checkpoint, "--data", "x" * 300)
    assert "too long" in refused("inspect", "x" * 300)


def test_the_program_alone_shows_its_help():
    assert "Commands:" in call().stdout
