"""A search and a reconstruction killed at any point and resumed give the weights of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import call
from conftest import make_vim, select_bundled_images

from ssmcompress.compression.remember import forget_results, hash_of, keep, keep_results, recall, remembered
from ssmcompress.pruning.plan import Plan

OPTIONS = ["--flops", "75%", "--search-images", "24", "--samples", "64", "--no-latency"]


def weights(folder) -> bytes:
    content = Path(folder, "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a model, images, and the result `whole` of an unbroken run."""
    folder = tmp_path_factory.mktemp("resuming")
    torch.save({"model": make_vim(depth=4).state_dict()}, folder / "model.pt")
    select_bundled_images(96, folder / "images.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("prune", "model.pt", "--data", "images.parquet", *OPTIONS, "-o", "whole")
    return folder


SCRIPT = """
import os, sys
from ssmcompress.cli.app import app
from ssmcompress.compression import remember
stop, kept = int(sys.argv[1]), remember.keep
def keep(name, value):
    global stop
    if stop == 0 and {signal} == 2:
        raise KeyboardInterrupt  # the signal itself is ignored in the background of a shell
    if stop == 0:
        os.kill(os.getpid(), {signal})
    stop -= 1
    kept(name, value)
remember.keep = keep
import ssmcompress.compression.reconstruct.layerwise as layerwise
import ssmcompress.jobs.prune as prune
layerwise.keep, prune.WORTH_KEEPING = keep, 0
app(sys.argv[2:])
"""


def stopped(work: Path, results: int, output: str, *more: str, by: str = "9") -> subprocess.CompletedProcess:
    """A run that is stopped when it is about to cache another result."""
    command = [sys.executable, "-c", SCRIPT.replace("{signal}", by), str(results), "prune", "model.pt"]
    command += ["--data", "images.parquet", *OPTIONS, "-o", output, *more]
    return subprocess.run(command, cwd=work, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_run_killed_at_random_moments_makes_the_same_weights(work, monkeypatch):
    monkeypatch.chdir(work)
    chance, results, seen = random.Random(0), Path("broken.results"), 0
    for count in (3, chance.randrange(5, 20), chance.randrange(20, 60), chance.randrange(5, 20), 4):
        run = stopped(work, count, "broken", *(["--resume"] if seen else []))
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert len(list(results.iterdir())) > seen
        seen = len(list(results.iterdir()))
    if not Path("broken").exists():
        call("prune", "model.pt", "--data", "images.parquet", *OPTIONS, "-o", "broken", "--resume")
    assert weights("broken") == weights("whole")
    broken, whole = (json.loads(Path(name, "config.json").read_text())["pruning"] for name in ("broken", "whole"))
    assert broken["reconstruction"] == whole["reconstruction"]
    assert any(fit.get("half") for fit in broken["reconstruction"]["fits"])
    assert not results.exists()


def test_what_is_left_of_an_interrupted_run_is_not_taken_unasked(work, monkeypatch):
    monkeypatch.chdir(work)
    interrupted = stopped(work, 6, "asked", by="2")
    assert interrupted.returncode == 130
    assert "asked.results: resume with `ssmcompress prune model.pt" in interrupted.stderr
    assert "--resume`" in interrupted.stderr
    arguments = ["prune", "model.pt", "--data", "images.parquet", *OPTIONS, "-o", "asked"]
    error = call(*arguments, code=2).stderr
    assert "asked.results holds results of an interrupted run: --resume continues it, --force starts over" in error
    call(*arguments, "--force")
    assert weights("asked") == weights("whole")
    assert not Path("asked.results").exists()


def test_other_images_or_options_take_nothing_from_an_interrupted_run(work, monkeypatch):
    monkeypatch.chdir(work)
    assert stopped(work, 12, "other").returncode == -signal.SIGKILL
    call("prune", "model.pt", "--data", "images.parquet", *OPTIONS, "--seed", 1, "-o", "other", "--resume")
    call("prune", "model.pt", "--data", "images.parquet", *OPTIONS, "--seed", 1, "-o", "seed1")
    assert weights("other") == weights("seed1")


def test_a_run_that_fails_leaves_nothing(work, monkeypatch):
    monkeypatch.chdir(work)
    call("prune", "model.pt", "--data", "images.parquet", "--flops", "1%", "-o", "failed", "--no-latency", code=3)
    assert not [path for path in Path().iterdir() if path.name.startswith("failed")]


# ------------------------------------------------------------------------------------------------------ the results


def test_results_are_computed_once_and_forgotten_at_the_end(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"tensor": torch.arange(3.0), "values": (1, None, "text")}

    with keep_results(tmp_path / "results"):
        first = remembered(lambda: hash_of("key"), compute)
    with keep_results(tmp_path / "results"):
        second = remembered(lambda: hash_of("key"), compute)
        remembered(lambda: hash_of("other key"), compute)
        assert len(calls) == 2
        assert torch.equal(first["tensor"], second["tensor"])
        assert first["values"] == second["values"]
        forget_results()
    assert not (tmp_path / "results").exists()
    assert remembered(lambda: hash_of("key"), compute)
    assert len(calls) == 3


def test_a_hash_is_of_the_content():
    one, two = torch.zeros(2000), torch.zeros(2000)
    two[1000] = 1  # `repr` shows the ends alone
    assert hash_of(one) != hash_of(two)
    assert hash_of((one, 1)) != hash_of((two, 1))
    assert hash_of([one]) == hash_of([one.clone()])
    assert hash_of("a", "bc") != hash_of("ab", "c")
    assert hash_of(("a",), "b") != hash_of("a", ("b",))
    assert hash_of(one) != hash_of(one.view(2, 1000))
    assert hash_of(one.int()) != hash_of(one)
    assert hash_of(Plan((), calibration=None)) != hash_of(Plan((), seed=1))
    with pytest.raises(TypeError, match="dict"):
        hash_of({"a": one})


def damage_nothing_but_a_number(content: bytes) -> bytes:
    """A block that was not written before a power cut, within the data of a tensor."""
    place = content.index(torch.ones(64).numpy().tobytes()[:64])
    return content[:place] + bytes(64) + content[place + 64 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "other": lambda content: bytes(range(100)),
    "number": damage_nothing_but_a_number,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_result_is_computed_again(tmp_path, damage):
    with keep_results(tmp_path):
        keep("a", torch.ones(256))
        (file,) = tmp_path.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        assert recall("a") is None
        assert remembered(lambda: "a", lambda: 2) == 2
        assert recall("a") == (2,)


def test_results_of_other_threads_or_devices_are_not_taken(tmp_path):
    """They differ in the last bits."""
    threads = torch.get_num_threads()
    with keep_results(tmp_path):
        keep("a", 1)
    try:
        torch.set_num_threads(threads + 1)
        with keep_results(tmp_path):
            assert recall("a") is None
    finally:
        torch.set_num_threads(threads)
    with keep_results(tmp_path):
        assert recall("a") == (1,)
    with keep_results(tmp_path, "meta"):
        assert recall("a") is None


def test_a_folder_with_anything_else_is_left_as_it_is(work, monkeypatch):
    monkeypatch.chdir(work)
    Path("mine.results").mkdir()
    Path("mine.results/paper.txt").write_text("mine")
    for option in ("--force", "--resume"):
        arguments = ["prune", "model.pt", "--ratio", "0.3", "--data", "images.parquet", "--no-latency", "-o", "mine"]
        assert "mine.results holds paper.txt" in call(*arguments, option, code=2).stderr
        assert Path("mine.results/paper.txt").read_text() == "mine"


def test_a_wrong_budget_leaves_what_a_stopped_run_had_found(work, monkeypatch):
    monkeypatch.chdir(work)
    assert stopped(work, 8, "typo").returncode == -signal.SIGKILL
    before = sorted(Path("typo.results").iterdir())
    wrong = ["--flops", "1%", "--search-images", "24", "--samples", "64", "--no-latency"]
    call("prune", "model.pt", "--data", "images.parquet", *wrong, "-o", "typo", "--resume", code=3)
    assert set(before) <= set(Path("typo.results").iterdir())


def test_no_room_for_results_stops_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with keep_results(tmp_path):
        assert remembered(lambda: "a", lambda: 2) == 2
    assert not list(tmp_path.iterdir())


def test_results_inside_a_result_are_not_kept(tmp_path):
    with keep_results(tmp_path):
        remembered(lambda: "outer", lambda: remembered(lambda: "inner", lambda: 1))
        assert len(list(tmp_path.iterdir())) == 1
        assert recall("outer") == (1,)
        assert recall("inner") is None
