"""Error messages for user mistakes: swapped arguments, typos, shares, devices, outputs."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import typer
from command_line import TUNE, call, call_json, process, refused
from conftest import make_vim, write_image

import ssmcompress
from ssmcompress.cli import devices
from ssmcompress.cli.app import app
from ssmcompress.cli.values import parse_share, parse_shares
from ssmcompress.errors import InputError
from ssmcompress.evaluation.timings import Timings
from ssmcompress.export.onnx import Exported
from ssmcompress.jobs.prune import CompressOptions, compress
from ssmcompress.jobs.report import record_export
from ssmcompress.progress import hold_notes

COMMANDS = typer.main.get_command(app).commands

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# ---------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("text", ["30%", "0.3", "30 %", " 30% ", ".3", "3e1%"])
def test_a_share_as_people_type_it(text):
    assert parse_share(text, "--x") == pytest.approx(0.3)


def test_shares_per_stage_may_be_mixed():
    assert parse_shares("20%, 0.3,5%", "--x") == pytest.approx((0.2, 0.3, 0.05))


@pytest.mark.parametrize(
    ("text", "hint"), [("30", "as 30% or 0.3"), ("60.5", "as 60.5% or 0.605"), ("2", "2% or 0.02")]
)
def test_a_number_of_2_and_more_without_a_percent_sign_is_asked_about(text, hint):
    with pytest.raises(InputError, match=hint):
        parse_share(text, "--x")


def test_every_command_takes_shares(checkpoint, class_folders):
    def stages(*options):
        return call_json("prune", checkpoint, *options, "--dry-run")["stages"]

    assert stages("--ratio", "30%") == stages("--ratio", "0.3")
    assert stages("--ratio", "20%,30%", "--stages", "1,3") == stages("--ratio", "0.2,0.3", "--stages", "1,3")
    assert "as 30% or 0.3" in refused("prune", checkpoint, "--ratio", "30")
    assert "as 60% or 0.6" in refused("prune", checkpoint, "--flops", "60")
    assert "as 70% or 0.7" in refused("prune", checkpoint, "--latency", "70")
    assert "as 60% or 0.6" in refused("compare", checkpoint, "--flops", "75%,60")
    assert "as 10% or 0.1" in refused("compare", checkpoint, "--ratios", "10")
    assert "--crop-pct 87.5: expected a share, such as 87.5% or 0.875" in refused(
        "evaluate", checkpoint, "--crop-pct", 87.5
    )
    ramp = "finetune", checkpoint, "--data", class_folders, "-o", "x", "--ramp"
    assert "--ramp 50: expected a share, such as 50% or 0.5" in refused(*ramp, "50")
    assert "ramp -0.5" in refused(*ramp, "-50%")


# ---------------------------------------------------------------------------------------------------- one meaning


def test_latency_is_a_budget_and_no_latency_leaves_timing_out():
    for name, command in COMMANDS.items():
        names = {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)}
        if "--latency" in names:
            (option,) = (parameter for parameter in command.params if "--latency" in parameter.opts)
            assert name == "prune"
            assert not option.is_flag
        assert ("--no-latency" in names) == (name in ("prune", "finetune", "compare", "export"))
    assert "--no-latency" in refused("export", "m", "--latency")


# ---------------------------------------------------------------------------------------------------- order of checks


@pytest.fixture
def taken(pruned_folder):
    """Outputs that exist already: a folder, and a file."""
    os.mkdir("out")
    Path("out", "mine.txt").write_text("mine")
    Path("out.onnx").write_text("mine")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (["prune", "DENSE", "-o", "out"], ["--data", "typo"], "no data at typo"),
        (["prune", "DENSE", "-o", "out"], ["--eval-data", "typo"], "no data at typo"),
        (["prune", "DENSE", "-o", "out"], ["--data", "IMAGES:typo"], "has no splits, so none called typo"),
        (["compare", "DENSE", "-o", "out"], ["--data", "./typo:test"], "no data at ./typo:test"),
        (["prune", "DENSE", "-o", "out"], ["--plan", "typo.json"], "cannot read typo.json"),
        (["prune", "DENSE", "-o", "out"], ["--flops", "90%", "--sensitivity", "typo.json"], "cannot read typo.json"),
        (["prune", "DENSE", "-o", "out"], ["--finetune-epochs", "1", "--recipe", "typo"], "recipe typo"),
        (["finetune", "pruned", "-o", "out"], ["--data", "typo"], "no data at typo"),
        (["finetune", "pruned", "-o", "out"], ["--data", "IMAGES", "--eval-data", "typo"], "no data at typo"),
        (["finetune", "pruned", "-o", "out"], ["--data", "IMAGES", "--dense", "typo.pt"], "typo.pt: no such file"),
        (["finetune", "pruned", "-o", "out"], ["--data", "IMAGES", "--recipe", "typo"], "recipe typo"),
        (["compare", "DENSE", "-o", "out"], ["--data", "typo"], "no data at typo"),
        (["evaluate", "typo.pt"], ["--data", "IMAGES"], "typo.pt: no such file"),
        (["evaluate", "pruned"], ["--data", "typo"], "no data at typo"),
        (["export", "pruned", "--onnx", "-o", "out.onnx"], ["--data", "typo"], "no data at typo"),
        (["export", "pruned", "--onnx", "-o", "out.onnx"], ["--dense", "typo.pt"], "typo.pt: no such file"),
        (["export", "typo.pt", "-o", "out.onnx"], [], "typo.pt: no such file"),
        (["verify", "pruned", "out.onnx"], ["--data", "typo"], "no data at typo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_in_an_input_is_reported_before_an_output_that_exists(
    checkpoint, class_folders, taken, command, options, message
):
    names = {"DENSE": str(checkpoint), "IMAGES": str(class_folders)}
    for key, name in names.items():
        options = [word.replace(key, name) for word in options]
    assert message in refused(*(names.get(word, word) for word in command), *options)
    assert (os.listdir("out"), Path("out.onnx").read_text()) == (["mine.txt"], "mine")


# ---------------------------------------------------------------------------------------------------- swapped arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "graph.onnx", "pruned"], "graph.onnx is an ONNX file and pruned is not: swap them"),
        (["verify", "pruned", "DENSE"], "is not an ONNX file"),
        (["prune", "IMAGES", "--data", "DENSE"], "holds images and --data {DENSE} is a model: swap them"),
        (["prune", "IMAGES", "--eval-data", "DENSE"], "holds images and --eval-data {DENSE} is a model"),
        (["evaluate", "IMAGES", "--data", "DENSE"], "swap them, {DENSE} --data {IMAGES}"),
        (["evaluate", "IMAGES/class1/0.png", "--data", "pruned"], "is a model: swap them"),
        (["evaluate", "IMAGES"], "{IMAGES} holds images; expected a checkpoint"),
        (["prune", "DENSE", "--data", "pruned"], "--data pruned is a model; expected images"),
        (["finetune", "pruned", "--data", "graph.onnx", "-o", "x"], "--data graph.onnx is an ONNX file"),
        (["export", "out.onnx"], "`export MODEL --onnx -o out.onnx` writes it"),
        (["inspect", "graph.onnx"], "graph.onnx is the name of an ONNX file"),
        (["benchmark", "graph.onnx"], "graph.onnx is the name of an ONNX file"),
        (["evaluate", "pruned/report.json"], "pruned/report.json is not a model"),
        (["prune", "pruned", "-o", "x"], "or start from the dense model, {DENSE}"),
        (["prune", "pruned", "--dry-run"], "by this plan it would have"),
        (["compare", "pruned", "-o", "x"], "pruned already; expected the dense model that it was made from, {DENSE}"),
        (["finetune", "DENSE", "--data", "IMAGES", "-o", "x"], "fine-tuning is for pruned models"),
        (["report", "DENSE"], "{DENSE} has no report: expected a folder that `ssmcompress prune` wrote"),
        (["report", "IMAGES"], "no report.json in {IMAGES}: expected a folder"),
        (["report", "nowhere"], "nowhere: no such file or folder: expected a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_swapped_arguments_are_recognised(checkpoint, class_folders, pruned_folder, arguments, message):
    Path("graph.onnx").write_bytes(b"\x08\x0a")
    names = {"DENSE": str(checkpoint), "IMAGES": str(class_folders)}
    for key, name in names.items():
        arguments = [word.replace(key, name) for word in arguments]
    assert message.format(**names) in refused(*arguments)


def test_names_that_only_look_like_another_kind_are_read(checkpoint):
    shutil.copy(checkpoint, "checkpoint.pth.tar")
    assert call_json("inspect", "checkpoint.pth.tar")["params"] > 0
    os.mkdir("run")
    shutil.copy(checkpoint, "run/vim.pth")
    write_image(Path("run/curve.png"), 0)
    assert "a folder without model.safetensors" in refused("evaluate", "run")  # not: a folder of images


# ---------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_read_from_whatever_has_one(checkpoint, pruned_folder):
    def plan(source):
        return call_json("prune", checkpoint, "--plan", source, "--dry-run")["plan"]

    call("export", "pruned", "-o", "one.safetensors", "--quiet")
    report = json.loads(Path("pruned/report.json").read_text())
    Path("printed.json").write_text(json.dumps(report))  # prune --json > printed.json
    expected = plan("pruned")
    assert [stage["ratio"] for stage in expected["stages"]] == [0.5] * 3
    for source in ("pruned/config.json", "pruned/report.json", "one.safetensors", "printed.json"):
        assert plan(source) == expected
    del report["plan"]  # as earlier versions wrote it: counts of tokens, no ratios
    Path("pruned/report.json").write_text(json.dumps(report))
    assert plan("pruned/report.json") == expected
    Path("printed.json").write_text(json.dumps(report))
    assert "a report without its plan" in refused("prune", checkpoint, "--plan", "printed.json")
    call("export", checkpoint, "-o", "dense.safetensors", "--quiet")
    assert "the model prunes nothing" in refused("prune", checkpoint, "--plan", "dense.safetensors")
    assert "not a plan; expected a pruned model's folder" in refused("prune", checkpoint, "--plan", checkpoint)
    os.mkdir("empty")
    assert "cannot read empty/config.json" in refused("prune", checkpoint, "--plan", "empty")


# ------------------------------------------------------------------------------------------------- what --force removes


EXPORTED = Exported(1, "images", 0.0, 100.0, [], [], 1e-4)


def write_graph(name):
    Path(name).write_text("graph")
    return Path(name)


def test_force_names_what_it_would_remove_and_removes_nothing(checkpoint, class_folders, pruned_folder):
    Path("pruned/notes.txt").write_text("mine")
    Path("pruned/.DS_Store").write_bytes(b"")
    os.mkdir("pruned/plots")
    before = sorted(os.listdir("pruned"))
    for arguments in (
        ("prune", checkpoint, "-o", "pruned", "--force"),
        ("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "pruned", "--force"),
        ("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "pruned", "--resume"),
    ):
        said = refused(*arguments)
        assert "pruned holds files that ssmcompress did not write (notes.txt, plots)" in said
        assert sorted(os.listdir("pruned")) == before
    os.remove("pruned/notes.txt")
    os.rmdir("pruned/plots")
    call("prune", checkpoint, "-o", "pruned", "--force", "--no-latency")


def test_an_onnx_file_of_the_model_that_is_replaced_goes_with_a_line(checkpoint, pruned_folder):
    report = json.loads(Path("pruned/report.json").read_text())
    report["onnx"] = {"file": "model.onnx"}
    Path("pruned/report.json").write_text(json.dumps(report))
    for name in ("model.onnx", "model.onnx.data"):
        Path("pruned", name).write_text("graph")
    again = "prune", checkpoint, "--ratio", "0.4", "-o", "pruned", "--force", "--no-latency"
    Path("pruned/other.onnx").write_text("graph")  # there is no record that it was created here
    assert "did not write (other.onnx)" in refused(*again)
    os.remove("pruned/other.onnx")
    assert "removed pruned/model.onnx, pruned/model.onnx.data with the model that was replaced" in call(*again).stderr
    assert not os.path.exists("pruned/model.onnx")
    assert "removed" not in call(*again).stderr


def test_files_written_into_a_folder_stay_its_own_after_another_export(checkpoint, pruned_folder):
    for file in ("pruned/a.onnx", "pruned/b.onnx", "elsewhere.onnx"):
        record_export("pruned", write_graph(file), EXPORTED)
    call("report", "pruned", "--html", "pruned/page.html")
    report = json.loads(Path("pruned/report.json").read_text())
    assert {"a.onnx", "b.onnx", "page.html"} <= set(report["files"])
    assert report["onnx"]["file"] == str(Path("elsewhere.onnx").absolute())
    again = "prune", checkpoint, "--ratio", "0.4", "-o", "pruned", "--force", "--no-latency"
    write_graph("pruned/elsewhere.onnx")  # has the same name as the file outside, but was not exported
    assert "did not write (elsewhere.onnx)" in refused(*again)
    os.remove("pruned/elsewhere.onnx")
    assert "removed pruned/a.onnx, pruned/b.onnx with the model" in call(*again).stderr
    assert not Path("pruned/a.onnx").exists()


def test_a_report_that_cannot_be_written_does_not_fail_an_export(pruned_folder, monkeypatch):
    def refuse(*args, **options):
        raise InputError("cannot write pruned/report.json: Read-only file system")

    monkeypatch.setattr("ssmcompress.jobs.report.write_file", refuse)
    with hold_notes() as notes:
        record_export("pruned", write_graph("elsewhere.onnx"), EXPORTED)
    assert list(notes) == ["the report was not updated: cannot write pruned/report.json: Read-only file system"]


def test_folders_that_cannot_be_replaced_are_refused_before_the_work(checkpoint, pruned_folder, monkeypatch):
    again = "prune", checkpoint.absolute(), "--ratio", "0.4", "--force", "--no-latency", "-o"
    with monkeypatch.context() as mounted:
        mounted.setattr("os.path.ismount", lambda path: Path(path).name == "pruned")
        assert "pruned is a mount point, which cannot be replaced; choose a folder in it" in refused(*again, "pruned")
    os.symlink("pruned", "link")
    os.mkdir("pruned/.ssmcompress-killed")  # left behind by a process that was killed
    call(*again, "link")
    assert os.path.islink("link")
    assert json.loads(Path("pruned/report.json").read_text())["command"].endswith("link")
    assert not os.path.exists("pruned/.ssmcompress-killed")
    with monkeypatch.context() as inside:
        inside.chdir("pruned")
        assert "the working directory and cannot be replaced" in refused(*again, ".")


def test_names_with_any_characters_are_printed_in_any_encoding(pruned_folder):
    report = json.loads(Path("pruned/report.json").read_text())
    report["data"]["name"] = "d\u4e2d"
    Path("pruned/report.json").write_text(json.dumps(report))
    done = process("report", "pruned", env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert "d\\u4e2d" in done.stdout


@dataclass(frozen=True)
class Note:
    """A custom step that adds a file to the folder."""

    name: ClassVar[str] = "noted"

    def __call__(self, model, context):
        context.files["extra.txt"] = b"text"
        return ssmcompress.prune(context.dense, model.plan)


def test_every_file_that_ssmcompress_writes_may_be_replaced(checkpoint, class_folders):
    command = "prune", checkpoint, "--data", class_folders, "--flops", "80%", "--finetune-epochs", 1
    options = "--set", "batch_size=6", "--no-latency", "--stages", "2", "--importance", "clip", "-o", "m", "--force"
    call(*command, *options)
    assert {"sensitivity.json", "last.safetensors", "finetuning.png"} <= set(os.listdir("m"))
    report = json.loads(Path("m/report.json").read_text())
    assert report.pop("files")  # earlier versions did not list these
    Path("m/report.json").write_text(json.dumps(report))
    model = make_vim()
    for _ in range(2):
        compress(model, ssmcompress.make_plan(model), "m", CompressOptions(steps=(Note(),)), force=True)
    assert "extra.txt" in os.listdir("m")


# ---------------------------------------------------------------------------------------------------- other messages


def test_advice_is_not_what_was_given_already(checkpoint, tmp_path):
    for i in range(4):
        write_image(tmp_path / "plain" / f"{i}.png", i)
    result = call("evaluate", checkpoint, "--data", tmp_path / "plain")
    nothing = f"nothing to measure: no labels in {tmp_path / 'plain'}, and no dense model to compare with; labels are "
    assert nothing + "class folders, a column label" in result.stderr
    assert "give --data" not in result.stderr
    assert "measured on" not in result.stdout
    assert "no labels in sample photographs, and no dense model to compare with; give --data" in (
        call("evaluate", checkpoint).stderr
    )
    result = call("evaluate", checkpoint, "--dense", checkpoint)
    assert "accuracy was not measured: no labels in sample photographs; give --data" in result.stderr
    assert "measured on" in result.stdout


def test_export_without_onnx_says_what_it_wrote(checkpoint):
    said = call("export", checkpoint, "-o", "m.safetensors").stderr
    assert "wrote m.safetensors, which every command accepts as MODEL (use --onnx to write an ONNX file)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prun"], "Did you mean 'prune', 'run'?"),
        (["prune", "DENSE", "--ration", "0.3"], "--ratio"),
        (["prune", "DENSE", "--importance", "sailency"], "did you mean saliency?"),
        (["prune", "DENSE", "--data", "IMAGES", "--finetune-epochs", "1", "--set", "mixxup=1"], "did you mean mixup?"),
        (
            ["prune", "DENSE", "--data", "IMAGES", "--finetune-epochs", "1", "--recipe", "topvim"],
            "did you mean top-vim?",
        ),
        (["compare", "DENSE", "--methods", "naiv"], "did you mean naive?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_answered_by_what_is_similar(checkpoint, class_folders, arguments, message):
    names = {"DENSE": str(checkpoint), "IMAGES": str(class_folders)}
    assert message in refused(*(names.get(word, word) for word in arguments))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "expected cpu, cuda, cuda:1, mps or xpu; did you mean cuda?"),
        ("GPU:1", "did you mean cuda:1?"),
        ("cuad", "did you mean cuda?"),
        ("cuda:one", "expected cpu, cuda"),
        ("meta", "expected cpu, cuda"),
    ],
)
def test_a_device_that_does_not_exist(checkpoint, device, message):
    said = refused("evaluate", checkpoint, "--device", device)
    assert f"--device {device}: " in said
    assert message in said


def test_why_a_device_cannot_be_used(monkeypatch):
    driver = RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.\nMore.")

    def init():
        raise driver

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "was built without CUDA; without --device" in devices.explain_device("cuda", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert devices.explain_device("cuda", AssertionError()).startswith("Found no NVIDIA driver on your system;")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "has 1 of these devices, counted from cuda:0" in devices.explain_device("cuda:3", driver)
    assert "out of memory" in devices.explain_device("cuda:0", RuntimeError("CUDA error: out of memory\nlong advice"))


# ---------------------------------------------------------------------------------------------------- latency


def timed(monkeypatch, dense, pruned, load):
    times = Timings({"dense": dense, "pruned": pruned}, load)
    monkeypatch.setattr("ssmcompress.jobs.measuring.time_models", lambda *_: times)


def test_latency_has_quartiles_and_the_speed_up(checkpoint, monkeypatch):
    timed(monkeypatch, [9.0, 10.0, 11.0] * 3, [4.0, 5.0, 6.0] * 3, 0.5)
    found = call_json("prune", checkpoint, "-o", "m")
    assert (found["dense"]["latency_ms"], found["dense"]["latency_quartiles_ms"]) == (10, [9, 11])
    assert (found["pruned"]["latency_ms"], found["pruned"]["latency_quartiles_ms"]) == (5, [4, 6])
    assert found["naive"]["latency_quartiles_ms"] is None
    section = found["latency"]
    assert (section["speed_up"], section["within_noise"]) == (2, False)
    assert (section["load"], section["cores"], section["repeats"]) == (0.5, os.cpu_count(), 9)
    shown = call("report", "m").stdout
    assert "2.00x" in shown
    assert "quartiles of 9 rounds: dense 9.0-11.0 ms, pruned 4.0-6.0 ms" in shown
    assert "noise" not in shown
    assert "busy" not in shown


def test_a_difference_within_the_noise_and_a_busy_machine_are_noted(checkpoint, monkeypatch):
    timed(monkeypatch, [9.0, 10.0, 11.0] * 3, [10.0, 10.0, 10.0] * 3, os.cpu_count() + 3.25)
    call("prune", checkpoint, "-o", "m", "--quiet")
    shown = call("report", "m", "--html", "page.html").stdout
    assert "~1.00x" in shown
    assert "the difference in latency is within the noise" in shown
    assert f"the machine was busy when the models were timed, with a load of {os.cpu_count() + 3.25:g}" in shown
    assert max(map(len, shown[: shown.index("  kept:")].splitlines())) <= 80
    for file in ("page.html", "m/README.md"):
        assert "within the noise" in Path(file).read_text()
    assert call_json("report", "m")["latency"]["within_noise"] is True


def test_without_timing_there_are_no_figures_of_it(checkpoint):
    found = call_json("prune", checkpoint, "--no-latency", "-o", "m")
    assert (found["latency"], found["dense"]["latency_quartiles_ms"]) == (None, None)
    assert "speed-up" not in call("report", "m").stdout
