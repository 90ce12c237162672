"""Out of memory: one line that names the step and the options of the command that reduce its memory."""

import errno
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from command_line import call, refused
from PIL import Image

from ssmcompress import progress
from ssmcompress.cli.app import app
from ssmcompress.cli.devices import LOWERABLE
from ssmcompress.data.masks import MaskRules, read_header, read_mask
from ssmcompress.errors import is_out_of_memory

COMMANDS = typer.main.get_command(app).commands
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99999999999 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 10 GiB.")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

# Command -> (arguments, step that runs out of memory, options named in the message, with their values).
# DENSE is a checkpoint, IMAGES are class folders, pruned is a folder, m.onnx is made from it.
SIZE = "--image-size (now as trained)"
CASES = {
    "prune": [
        ("prune DENSE --data IMAGES --batch-size 3 --samples 7 -o out", "calibrating",
         ["--batch-size (now 3)", "--samples (now 7)", SIZE]),
        ("prune DENSE --data IMAGES -o out --image-size 32", "reconstructing",
         ["--batch-size (now 64)", "--samples (now 1024)", "--image-size (now 32)"]),
        ("prune DENSE --data IMAGES --flops 80% --search-images 9 -o out", "measuring sensitivity",
         ["--batch-size (now 64)", "--samples (now 1024)", "--search-images (now 9)", SIZE]),
        ("prune DENSE --data IMAGES --finetune-epochs 1 --set batch_size=6 -o out", "fine-tuning",
         ["--set accumulate=NUMBER", SIZE]),
    ],
    "finetune": [
        ("finetune pruned --data IMAGES --set batch_size=8 --set accumulate=2 -o out", "fine-tuning",
         ["--set accumulate=NUMBER (now 2)", SIZE]),
        ("finetune pruned --data IMAGES --set batch_size=6 --batch-size 5 -o out", "measuring",
         ["--batch-size (now 5)", SIZE]),
    ],
    "evaluate": [
        ("evaluate DENSE --data IMAGES --batch-size 5 --workers 2", "measuring",
         ["--batch-size (now 5)", "--workers (now 2)", SIZE]),
        ("evaluate DENSE --data IMAGES --batch-size 1", "measuring", [SIZE]),
    ],
    "compare": [
        ("compare DENSE --data IMAGES --ratios 0.5 --methods naive -o out", "measuring the dense model",
         ["--batch-size (now 64)", "--samples (now 1024)", SIZE]),
    ],
    "benchmark": [
        ("benchmark DENSE --batch-sizes 1,8 --repeats 1", "timing, batch 1", ["--batch-sizes (now 1,8)", SIZE]),
        ("benchmark --ops --shape 1,9,4,2", None, ["--shape (now 1,9,4,2)"]),
    ],
    "visualize": [
        ("visualize pruned --data IMAGES --batch-size 4", "attention maps", ["--batch-size (now 4)", SIZE]),
    ],
    "export": [("export pruned --onnx -o e.onnx --no-latency", "verifying", [SIZE])],
    "verify": [("verify pruned m.onnx", "verifying", [SIZE])],
    "inspect": [("inspect DENSE", None, [SIZE])],
}  # fmt: skip
FLAT = [case for cases in CASES.values() for case in cases]


def fail(error):
    raise error


@pytest.fixture
def run_out(monkeypatch):
    """Simulates running out of memory at the first item of the named loop, or (None) at the start of a job."""

    def run_out(step, error):
        track, jobs = progress.FrontEnd.track, ("benchmark.benchmark_all", "inspect.inspect_file")

        def failing(self, items, what, total, done=0):
            return (fail(error) for _ in items) if what == step else track(self, items, what, total, done)

        monkeypatch.setattr(progress.FrontEnd, "track", failing)
        for job in jobs if step is None else ():
            monkeypatch.setattr(f"ssmcompress.jobs.{job}", lambda *_: fail(error))

    return run_out


@pytest.fixture
def words(checkpoint, class_folders, request):
    """The arguments in a text, with the names of the files."""

    def words(text):
        if "pruned" in text:
            request.getfixturevalue("pruned_folder")
        if "m.onnx" in text:
            call("export", "pruned", "--onnx", "-o", "m.onnx", "--no-latency")
        return [{"DENSE": str(checkpoint), "IMAGES": str(class_folders)}.get(word, word) for word in text.split()]

    return words


def options_of(command):
    return {option for parameter in COMMANDS[command].params for option in parameter.opts}


def test_every_command_with_such_options_is_tried():
    named = {"--image-size", *(f"--{name.replace('_', '-')}" for name in LOWERABLE)}
    assert {name for name in COMMANDS if named & options_of(name)} == CASES.keys()


@pytest.mark.parametrize(("text", "step", "options"), FLAT, ids=[case[0] for case in FLAT])
def test_the_step_and_the_options_that_lower_it_are_named(run_out, words, text, step, options):
    arguments = words(text)
    run_out(step, MemoryError())
    said = refused_after_work(arguments)
    command = arguments[0]
    place = f'the step "{step}" of {command}' if step else command
    assert said.startswith(f"error: out of memory in {place}; ")
    advice = said.partition("; then `")[0]  # a fine-tuning that fails in the last step has left a state
    assert re.findall(r"--[a-z][\w-]*(?: accumulate=NUMBER)?(?: \(now [^)]*\))?", advice) == options
    assert {option.split()[0] for option in options} <= options_of(command)


def refused_after_work(arguments):
    """The last line on stderr of a command that fails at run time; earlier steps may have printed notes."""
    result = call(*arguments, code=1)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(ALLOCATOR),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        GPU,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_errors_of_every_allocator_are_recognised(run_out, words, error):
    run_out("measuring", error)
    said = refused("evaluate", *words("DENSE --data IMAGES"), code=1)
    gpu = " of the GPU" if "CUDA" in str(error) else ""
    assert said.startswith(
        f'error: out of memory{gpu} in the step "measuring" of evaluate; lower --batch-size (now 64)'
    )
    assert said.endswith(", or use --device cpu\n") == bool(gpu)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), KeyError(3)])
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)


# Readers with the commands that call them: their errors must not be reported as damaged files.
READERS = {
    "torch.load": "evaluate DENSE --data IMAGES",
    "ssmcompress.data.images.load": "evaluate DENSE --data IMAGES",
    "pyarrow.parquet.read_table": "evaluate DENSE --data images.parquet",
    "onnx.load": "verify pruned m.onnx",
    "onnxruntime.InferenceSession": "verify pruned m.onnx",
}
LACKS = {
    "MemoryError": MemoryError(),
    "OSError": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "RuntimeError": RuntimeError(ALLOCATOR.replace("99999999999", "64")),
    "GPU": GPU,
}


@pytest.mark.parametrize("error", LACKS.values(), ids=LACKS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_there_is_no_memory_for_is_not_damaged(words, monkeypatch, reader, error):
    arguments = words(READERS[reader])
    Path("images.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(reader, lambda *_, **__: fail(error))
    said = refused(*arguments, code=1)
    assert said.startswith("error: out of memory")
    assert f" of {arguments[0]}" in said or f" in {arguments[0]}" in said


@pytest.mark.parametrize("error", LACKS.values(), ids=LACKS)
def test_a_mask_that_there_is_no_memory_for_is_not_damaged(tmp_path, monkeypatch, error):
    Image.new("L", (4, 4)).save(tmp_path / "mask.png")
    monkeypatch.setattr("PIL.Image.open", lambda *_: fail(error))
    rules = MaskRules(3, False)
    for read in (
        lambda: read_mask(tmp_path / "mask.png", tmp_path, rules, "m"),
        lambda: read_header(tmp_path / "mask.png", tmp_path),
    ):
        with pytest.raises((MemoryError, torch.OutOfMemoryError)):
            read()


def test_a_file_that_asks_for_more_memory_than_it_has_bytes_is_damaged(words, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *_, **__: fail(RuntimeError(ALLOCATOR)))
    assert "not a checkpoint, or a damaged one" in refused("evaluate", *words("DENSE --data IMAGES"))


def test_results_that_were_kept_are_gone_on_with(run_out, words, monkeypatch):
    monkeypatch.setattr("ssmcompress.jobs.prune.WORTH_KEEPING", 0)
    arguments, track = words("prune DENSE --data IMAGES --no-latency -o out"), progress.FrontEnd.track
    run_out("reconstructing", MemoryError())
    said = refused_after_work(arguments)
    assert said.endswith(
        f"; then `{shlex.join(['ssmcompress', *arguments])} --resume` continues from the saved results"
    )
    monkeypatch.setattr(progress.FrontEnd, "track", track)
    assert "wrote out" in call(*arguments, "--resume").stderr


def test_without_results_no_resuming_is_advised(run_out, words):
    run_out("reconstructing", MemoryError())
    assert "--resume" not in refused_after_work(words("prune DENSE --data IMAGES --no-latency -o out"))


def test_compiled_kernels_run_out_of_memory(words, monkeypatch):
    """A kernel that cannot allocate its scratch memory leaves its item counter at 0."""
    monkeypatch.setattr("ssmcompress.ops.cpu.run", lambda *_: None)
    said = refused("evaluate", *words("DENSE --data IMAGES"), code=1)
    assert said.startswith('error: out of memory in the step "measuring" of evaluate; lower --batch-size')


def test_a_command_without_such_options_names_none(monkeypatch):
    monkeypatch.setattr("ssmcompress.jobs.demo.run_demo", lambda *_, **__: fail(MemoryError()))
    said = refused("demo", "-o", "out", code=1)
    assert said == "error: out of memory in demo; close other programs, or use a machine with more memory\n"


def test_what_ran_before_is_named_where_no_step_runs(words, monkeypatch):
    monkeypatch.setattr("ssmcompress.cli.commands.evaluate.show_evaluation", lambda *_: fail(MemoryError()))
    said = refused("evaluate", *words("DENSE --data IMAGES"), code=1)
    assert said.startswith('error: out of memory in evaluate, after the step "measuring"; lower')


def test_an_error_in_the_body_of_a_loop_is_of_its_step(words, monkeypatch):
    """Python has closed the loop's generator by the time the error arrives."""
    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", lambda *_: fail(GPU))
    assert 'in the step "measuring" of evaluate' in refused("evaluate", *words("DENSE --data IMAGES"), code=1)


def test_the_innermost_loop_that_an_error_ended_is_the_step():
    def loop(name, body):
        for _ in progress.track(range(2), name, 2):
            body()

    def ended(run):
        with progress.record_steps() as steps:
            try:
                run()
            except MemoryError:
                return steps.left, steps.running, steps.finished
        return None

    oom = MemoryError()
    assert ended(lambda: loop("outer", lambda: loop("inner", lambda: fail(oom)))) == ("inner", [], None)
    assert ended(lambda: (loop("first", int), loop("second", lambda: fail(oom)))) == ("second", [], "first")
    assert ended(lambda: (loop("first", int), fail(oom))) == (None, [], "first")

    def stop_early():
        for _ in progress.track(range(2), "outer", 2):
            for _ in progress.track(range(2), "inner", 2):
                break
        loop("last", lambda: fail(oom))

    assert ended(stop_early) == ("last", [], "outer")
