"""`finetune`: its report, rejected arguments, and interrupted runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from command_line import TUNE, call, call_json, refused
from conftest import write_image

import ssmcompress
from ssmcompress.compression.finetune import loop

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_finetune_reports_beside_what_it_began_with(pruned_folder, class_folders):
    found = call_json("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned", "--tensorboard", "logs")
    assert sorted(os.listdir("tuned")) == [
        "README.md", "config.json", "finetuning.png", "kept_tokens.png", "last.safetensors", "model.safetensors",
        "recipe.yaml", "report.json",
    ]  # fmt: skip
    assert not os.path.exists("tuned.training.pt")
    assert found == call_json("report", "tuned")
    before = json.loads((pruned_folder / "report.json").read_text())
    name = "reconstructed" if before["reconstruction"]["kept"] else "aligned"
    assert (found["data"]["images"], found["data"]["overlap"]) == (2, 0)
    assert found[name]["flops"] == found["pruned"]["flops"] == before["pruned"]["flops"]
    tuned = found["finetuning"]
    assert (tuned["images"], tuned["steps"], tuned["labels"], tuned["teacher"]) == (18, 6, True, True)
    assert [entry["epoch"] for entry in tuned["history"]] == [1, 2]
    assert all(entry["loss"] > 0 and entry["top1"] is not None for entry in tuned["history"])
    assert "fine-tuned for 2 epochs on 18 images" in call("report", "tuned").stdout
    assert "fine-tuned" in Path("tuned/README.md").read_text()
    assert os.listdir("logs")
    loaded, last = ssmcompress.load("tuned"), ssmcompress.load("tuned/last.safetensors")
    assert loaded.find_record("finetuning").steps == last.find_record("finetuning").steps == 6
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), last.parameters(), strict=True))  # none held out
    assert call_json("evaluate", "tuned", "--data", class_folders)["agreement"]["top1"] is not None
    assert "expected a dense" not in refused("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned")


def test_a_finished_run_is_done_at_once(pruned_folder, class_folders):
    arguments = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned", "--resume"
    first = call_json(*arguments)  # there is no state to resume from: it starts from scratch
    stamp = os.stat("tuned/model.safetensors").st_mtime_ns
    assert call_json(*arguments) == first
    assert os.stat("tuned/model.safetensors").st_mtime_ns == stamp
    assert "another fine-tuned model, with epochs 2 instead of 3" in refused(*arguments, "--epochs", 3)
    call("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned", "--force", "--seed", 1)
    assert call_json("report", "tuned")["finetuning"]["seed"] == 1


def test_a_model_may_be_replaced_by_its_finetuned_self(pruned_folder, class_folders):
    assert "exists" in refused("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "pruned")
    call("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "pruned", "--force")
    again = call_json("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "twice")
    assert again["before"]["top1"] is not None
    assert again["finetuning"]["steps"] == 6


def test_what_cannot_be_fine_tuned(checkpoint, class_folders, pruned_folder, tmp_path):
    for i in range(6):
        write_image(tmp_path / "plain" / f"{i}.png", seed=i)
    where = "-o", "tuned"
    assert "prunes nothing" in refused("finetune", checkpoint, "--data", class_folders, *where)
    assert "give --data" in refused("finetune", "pruned", *where)
    assert "give -o" in refused("finetune", "pruned", "--data", class_folders)
    assert "one of them" in refused("finetune", "pruned", "--data", class_folders, *where, "--resume", "--force")
    assert "expected NAME=VALUE" in refused("finetune", "pruned", "--data", class_folders, *where, "--set", "speed=1")
    assert "no labels" in refused("finetune", "pruned", "--data", tmp_path / "plain", *where, "--no-teacher")
    Path("tuned.training.pt").write_bytes(b"nothing")
    assert "--resume continues it" in refused("finetune", "pruned", "--data", class_folders, *where)
    assert "tuned.training.pt" in refused("finetune", "pruned", "--data", class_folders, *where, "--resume")
    call("finetune", "pruned", "--data", class_folders, *where, "--force", *TUNE)


def test_without_the_dense_model_labels_teach(checkpoint, class_folders, pruned_folder, tmp_path):
    for i in range(6):
        write_image(tmp_path / "plain" / f"{i}.png", seed=i)
    call("finetune", "pruned", "--data", tmp_path / "plain", *TUNE, "-o", "taught")  # unlabelled, with its teacher
    checkpoint.unlink()
    said = call("finetune", "pruned", "--data", tmp_path / "plain", "-o", "a", code=2).stderr
    assert "no dense model to learn from" in said.splitlines()[-1]
    result = call("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned")
    assert "training on labels only" in result.stderr
    found = call_json("report", "tuned")
    assert found["agreement"] == {"top1": None, "kl": None}
    assert found["dense"]["flops"]["full"] > found["pruned"]["flops"]["full"]


def test_a_class_without_images_is_named(class_folders, pruned_folder):
    for file in (class_folders / "class7").iterdir():
        file.unlink()
    result = call("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned")
    assert "no training images for 1 class: class7" in result.stderr


def long_run(folder, images, *more):
    command = "finetune", folder, "--data", images, "--epochs", 16, "--set", "batch_size=4", "--set", "ema=0.99"
    return *command, "--no-latency", "--workers", 1, "-o", *more


def start(*arguments, **options):
    """A running process of the command, whose stderr can be read."""
    command = [sys.executable, "-m", "ssmcompress", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process, text):
    """Read stderr up to a line with `text`."""
    while text not in process.stderr.readline():
        assert process.poll() is None


def ended(pids, seconds=15.0):
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_a_killed_run_goes_on_to_the_same_weights(class_folders, pruned_folder):
    """SIGKILL at random times during training; a state that exists afterwards is complete."""
    call(*long_run("pruned", class_folders, "whole"))
    kills, generator = 0, np.random.default_rng()
    for _ in range(2):
        process = start(*long_run("pruned", class_folders, "cut", "--resume"))
        wait_for(process, "epoch ")
        time.sleep(generator.uniform(0, 0.7))  # 16 epochs take 2 s or more
        workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert ended(workers)
        if os.path.exists("cut.training.pt"):
            assert ssmcompress.load("cut.training.pt").plan is not None
        if os.path.exists(".cut.training.pt.part"):
            # A truncated file is rejected; after a kill between the last write and the rename, it is complete.
            with contextlib.suppress(ssmcompress.errors.InputError):
                assert ssmcompress.load(".cut.training.pt.part").plan is not None
    assert kills
    call(*long_run("pruned", class_folders, "cut", "--resume"))
    for file in ("model.safetensors", "last.safetensors"):
        one, other = (ssmcompress.load(f"{name}/{file}") for name in ("whole", "cut"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not os.path.exists("cut.training.pt")


def test_ctrl_c_leaves_a_state_to_go_on_from(class_folders, pruned_folder):
    """Send the signal to every process of the group, as a terminal does."""
    process = start(*long_run("pruned", class_folders, "cut", "--set", "epochs=4000"), start_new_session=True)
    assert "epoch 1 of" in process.stderr.readline()
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    said = process.stderr.read().splitlines()
    assert said[-1].startswith("error: interrupted")
    assert "--resume`" in said[-2]
    assert not any("Traceback" in line for line in said)
    assert ended(workers)
    state = torch.load("cut.training.pt", weights_only=True)
    assert state["run"]["step"] > 0
    assert not os.path.exists("cut")


def interrupted(monkeypatch, *arguments):
    """Call a command that gets Ctrl-C after its first step, so that it leaves a state."""
    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_any_process", lambda self, value: True)
        return call(*arguments, code=130)


def test_a_second_run_in_place_that_is_interrupted_goes_on(pruned_folder, class_folders, monkeypatch):
    """The folder is the result of the first run, with the same options; the state is of the second one."""
    options = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", "pruned"
    call(*options, "--force")
    first = Path("pruned/model.safetensors").read_bytes()
    interrupted(monkeypatch, *options, "--force")
    again = call(*options, "--resume")
    assert "resuming after step 1 of 6" in again.stderr
    assert "is finished" not in again.stderr
    assert Path("pruned/model.safetensors").read_bytes() != first
    assert "before" in call_json("report", "pruned")
    assert not os.path.exists("pruned.training.pt")
    assert "is finished" in call(*options, "--resume").stderr


def test_a_forced_run_that_is_interrupted_replaces_the_older_result(pruned_folder, class_folders, monkeypatch):
    options = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned"
    call(*options)
    changed = *options, "--epochs", 3
    interrupted(monkeypatch, *changed, "--force")
    assert call_json("report", "tuned")["finetuning"]["recipe"]["epochs"] == 2
    assert "resuming after step 1 of 9" in call(*changed, "--resume").stderr
    assert call_json("report", "tuned")["finetuning"]["recipe"]["epochs"] == 3
    assert not os.path.exists("tuned.training.pt")


def test_a_state_of_another_run_stays_where_the_folder_is_finished(pruned_folder, class_folders, monkeypatch):
    options = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned"
    report = call_json(*options)
    interrupted(monkeypatch, *options, "--seed", 5, "--force")
    assert call_json(*options, "--resume") == report
    assert os.path.exists("tuned.training.pt")


@pytest.mark.parametrize("output", ["tuned", "pruned"])
def test_a_run_that_was_ended_while_it_wrote_its_folder_is_finished(pruned_folder, class_folders, monkeypatch, output):
    options = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", output
    with monkeypatch.context() as patched:
        patched.setattr("ssmcompress.jobs.finetune.remove_state", lambda file: None)
        report = call_json(*options, *(["--force"] if output == "pruned" else []))
    assert os.path.exists(f"{output}.training.pt")
    found = call(*options, "--resume", "--json")
    assert "is finished" in found.stderr
    assert json.loads(found.stdout) == report
    assert not os.path.exists(f"{output}.training.pt")


def test_a_folder_that_another_command_wrote_meanwhile_is_not_replaced(
    pruned_folder, checkpoint, class_folders, monkeypatch
):
    options = "finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned"
    interrupted(monkeypatch, *options)
    call("prune", checkpoint, "--ratio", 0.3, "--data", class_folders, "--no-latency", "-o", "tuned")
    later = time.time() + 10
    os.utime("tuned/config.json", (later, later))
    assert "exists" in refused(*options, "--resume")


def test_when_fine_tuning_is_killed_the_pruned_folder_is_there(checkpoint, class_folders):
    """`prune` writes it before the first step; `finetune --resume` continues from the state."""
    options = "--set", "batch_size=6", "--no-latency", "--data", class_folders
    command = "prune", checkpoint, "--ratio", 0.5, "--finetune-epochs", 4000, *options, "-o", "m"
    process = start(*command)
    wait_for(process, "epoch 2 of")
    process.kill()
    process.wait()
    pruned = ssmcompress.load("m")
    assert pruned.plan is not None
    assert pruned.find_record("finetuning") is None
    assert "reconstruction" in call_json("report", "m")
    done = int(torch.load("m.training.pt", weights_only=True)["run"]["step"])
    assert done > 0
    state = torch.load("m.training.pt", weights_only=True)
    state["run"]["about"]["recipe"]["epochs"] = 5  # so that the end is near
    torch.save(state, "m.training.pt")
    again = call("finetune", "m", *options, "--epochs", 5, "--resume", "-o", "m")
    assert f"resuming after step {done} of" in again.stderr
    assert ssmcompress.load("m").find_record("finetuning") is not None
