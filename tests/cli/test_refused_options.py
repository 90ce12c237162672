"""Rejected options: outputs that would replace files of another kind, options without effect, invalid values."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import call, call_json, refused
from conftest import make_vim, write_image

from ssmcompress.cli.inputs import IMAGES, recognise
from ssmcompress.export.onnx import build_onnx
from ssmcompress.files import ONNX, check_target

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def write_plain_images(folder):
    for i in range(4):
        write_image(Path(folder, f"{i}.png"), i)


# ---------------------------------------------------------------------------------------------- what --force replaces


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        (["report", "pruned", "--html"], "victim.pt", "is not a web page, so --force does not replace it"),
        (["report", "pruned", "--html"], "notes.txt", "is not a web page"),
        (["report", "pruned", "--html"], "pruned/report.json", "is part of the model in pruned"),
        (["report", "one.safetensors", "--html"], "one.safetensors", "is, or holds, the input one.safetensors"),
        (["export", "pruned", "-o"], "victim.pt", "is not a model that ssmcompress wrote"),
        (["export", "pruned", "-o"], "foreign.safetensors", "is not a model that ssmcompress wrote"),
        (["export", "pruned", "-o"], "pruned/model.safetensors", "is part of the model in pruned"),
        (["export", "pruned", "--onnx", "-o"], "notes.txt", "is not an ONNX file"),
        (["export", "pruned", "--onnx", "-o"], "graph.onnx", "is not an ONNX file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_force_replaces_files_of_the_same_kind_only(checkpoint, vim, pruned_folder, command, file, message):
    from safetensors.torch import save_file

    shutil.copy(checkpoint, "victim.pt")
    save_file({name: value.contiguous() for name, value in vim.state_dict().items()}, "foreign.safetensors")
    for name in ("notes.txt", "graph.onnx"):
        Path(name).write_text("mine")
    if command[1] == "one.safetensors":
        call("export", "pruned", "-o", "one.safetensors", "--quiet")
    before = Path(file).read_bytes()
    assert message in refused(*command, file, "--force")
    assert Path(file).read_bytes() == before


def test_force_replaces_what_the_command_wrote_before_and_empty_files(checkpoint):
    for command in (
        ["prune", checkpoint, "-o", "m", "--no-latency"],
        ["report", "m", "--html", "page.htm"],
        ["export", "m", "-o", "model.pt"],
    ):
        call(*command, "--quiet")
        call(*command, "--quiet", "--force")
    Path("empty.html").touch()
    call("report", "m", "--html", "empty.html", "--force")
    Path("graph.onnx").write_bytes(build_onnx(make_vim(depth=2)).SerializeToString())
    check_target(Path("graph.onnx"), force=True, kind=ONNX)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.onnx"], "x.onnx is the name of an ONNX file: give --onnx, or a name that ends in .safetensors"),
        (["-o", "X.ONNX", "--force"], "is the name of an ONNX file"),
        (["--onnx", "-o", "x.safetensors"], "is not the name of an ONNX file: expected a name that ends in .onnx"),
        (["--onnx", "-o", "x.pth"], "is not the name of an ONNX file"),
    ],
)
def test_export_refuses_the_name_of_another_format(checkpoint, arguments, message):
    assert message in refused("export", checkpoint, *arguments)


# ------------------------------------------------------------------------------------------- options without effect


@pytest.mark.parametrize(
    "option",
    ["--dtype float16", "--provider cuda", "--opset 20", "--data x", "--scan scan", "--atol 1", "--debug-outputs"],
)
def test_options_of_onnx_without_onnx(checkpoint, option):
    assert f"{option.split()[0]} belongs to --onnx" in refused("export", checkpoint, *option.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensorboard", "tb"], "--tensorboard: options of fine-tuning, but --finetune-epochs is not given"),
        (["--search-images", "5"], "--search-images: only for a search; give --flops or --latency"),
        (["--no-search"], "--no-search needs --flops"),
        (["--ratio", "0.3", "--no-search"], "--no-search needs --flops"),
        (["--flops", "90%", "--no-search", "--search-images", "5", "--by-labels"], "leave out --no-search"),
        (["--stride", "5"], "--stride 5: expected at most 4, the patch size"),
    ],
    ids=" ".join,
)
def test_options_of_prune_that_would_have_no_effect(checkpoint, options, message):
    assert message in refused("prune", checkpoint, *options)


# ------------------------------------------------------------------------------------------- values as they were typed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "130%"], "--ratio 130%: expected the share of tokens to remove"),
        (["--ratio", "20%,0"], "--ratio 20%,0: expected"),
        (["--ratio", "0,3"], "--ratio 0,3: a comma separates shares; did you mean 0.3?"),
        (["--crop-pct", "130%"], "--crop-pct 130%: expected"),
        (["--mean", "0.5,0.5"], "--mean 0.5,0.5: 2 values, the model has 3 channels"),
        (["--std", "1,1,1,1"], "--std 1,1,1,1: 4 values, the model has 3 channels"),
        (["--flops", "100%"], "to below 100%"),
        (["--gap", "calibrted"], "error: Invalid value for '--gap': 'calibrted' is not one of"),
        (["--data", "s3://bucket/images"], "s3://bucket/images is a web address: download the file, and name that"),
    ],
    ids=" ".join,
)
def test_values_are_quoted_as_typed(checkpoint, options, message):
    code = 3 if options[0] == "--flops" else 2
    said = call("prune", checkpoint, *options, code=code).stderr
    assert message in said
    assert not os.listdir()


def test_a_web_address_is_no_model():
    for command in ("prune", "inspect", "report", "benchmark"):
        said = refused(command, "https://example.com/model.pt")
        assert "https://example.com/model.pt is a web address: download the file, and name that" in said


def test_an_empty_argument_is_named_as_in_the_help():
    assert "error: CKPT is empty" in refused("prune", "")
    assert "error: MODEL is empty" in refused("benchmark", " ")
    assert "error: --data is empty" in refused("prune", "m.pt", "--data", "")


def test_usage_errors_point_to_the_help_of_the_command():
    assert "report --help)" in refused("report", "--nope")
    assert "[[" not in call("report", "--help").stdout
    assert "...]..." not in call("benchmark", "--help").stdout


# ---------------------------------------------------------------------------------------------------- files, advice


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"hello\n", "(it is a text file)"), (b"\n<!DOCTYPE html>", "(it is a web page)"), (b"", "(it is empty)")],
)
def test_a_file_that_is_no_checkpoint_is_described(content, what):
    Path("m.pt").write_bytes(content)
    assert f"not a checkpoint, or a damaged one {what}" in refused("inspect", "m.pt")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_of_a_newer_protocol_is_not_called_damaged(zipped):
    state = {"model": make_vim().state_dict()}
    torch.save(state, "m.pt", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    said = refused("inspect", "m.pt")
    assert "a pickle of protocol 4" in said
    assert "--unsafe-load" in said
    call("inspect", "m.pt", "--unsafe-load", "--architecture", "vim")
    Path("m.pt").write_bytes(b"\x80\xff" + bytes(50))
    assert "not a checkpoint, or a damaged one" in refused("inspect", "m.pt")


@pytest.mark.parametrize(("content", "what"), [("{}", "not a pruning plan (stages is missing)"), ("3", "not a p")])
def test_a_file_that_is_no_plan(checkpoint, content, what):
    Path("bad.json").write_text(content)
    said = refused("prune", checkpoint, "--plan", "bad.json")
    assert what in said
    assert "Error" not in said


def test_every_kind_of_image_is_recognised():
    write_image(Path("gray.pgm"), 0, mode="L")
    assert recognise("gray.pgm") == IMAGES


def test_advice_names_options_that_the_command_has(checkpoint):
    write_plain_images("plain")
    assert "--data" not in refused("inspect", "plain")
    assert "--data" not in refused("benchmark", checkpoint, "plain")
    assert "(images: --data)" in refused("evaluate", "plain")


def test_verify_says_how_to_make_the_file(pruned_folder):
    said = refused("verify", "pruned", "missing.onnx")
    assert "missing.onnx: no such file; `ssmcompress export pruned --onnx -o missing.onnx` writes it" in said


def test_errors_about_names_are_short(checkpoint, class_folders, pruned_folder):
    tune = "finetune", "pruned", "--data", class_folders, "-o", "x", "--set"
    for said, end in (
        (refused("compare", checkpoint, "--methods", "xx"), "docs/compare.md lists them all"),
        (refused(*tune, "lrr=1"), "did you mean lr?"),
        (refused(*tune, "zzzz=1"), "docs/finetune.md lists the names"),
        (refused(*tune, "lr"), "lr: expected lr=VALUE"),
    ):
        assert said.rstrip().endswith(end)
        assert len(said) <= 160


def test_the_assumed_preprocessing_of_a_saved_model_is_no_news(checkpoint):
    assert "preprocessing is not in the file" in call("prune", checkpoint, "--no-latency", "-o", "m").stderr
    assert "preprocessing was assumed" in call("report", "m").stdout
    assert "preprocessing" not in call("evaluate", "m").stderr


def test_export_says_which_model_it_took(checkpoint):
    call("prune", checkpoint, "--no-latency", "--quiet")
    assert "compressed/model-r0.30:" in call("export").stderr.splitlines()
    assert call_json("export", "--force")["file"].endswith("model-r0.30.safetensors")


def test_force_says_that_the_onnx_file_goes_with_the_folder():
    for name in ("prune", "finetune"):
        assert "the ONNX file exported from it" in " ".join(call(name, "--help").stdout.split())
