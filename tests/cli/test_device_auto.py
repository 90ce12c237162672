"""`--device auto`, the default: CUDA if torch can compute on it, else the CPU."""

import warnings

import pytest
import torch
import typer
from command_line import call, process, refused

import ssmcompress
from ssmcompress.cli.app import app
from ssmcompress.cli.devices import choose_device
from ssmcompress.cli.groups import Hardware

COMMANDS = typer.main.get_command(app).commands

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


class FakeCuda:
    """GPUs as torch.cuda reports them; the tensors are on the CPU."""

    def __init__(self, monkeypatch, count=1, available=True, error=None, init_error=None):
        self.error, self.init_error, self.tried = error or init_error, init_error, []
        self.zeros = torch.zeros
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
        monkeypatch.setattr(torch.cuda, "init", self.init)
        monkeypatch.setattr(torch, "zeros", self.make)

    def init(self):
        if self.init_error is not None:
            raise self.init_error

    def make(self, *size, device=None, **others):
        if torch.device(device or "cpu").type == "cuda":
            self.tried.append(str(device))
            if self.error is not None:
                raise self.error
            device = "cpu"
        return self.zeros(*size, device=device, **others)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    """Simulate a machine without a GPU."""
    FakeCuda(monkeypatch, 0, available=False, init_error=RuntimeError("Found no NVIDIA driver on your system. More."))


def test_every_command_with_a_device_takes_auto_by_default():
    devices = [p for command in COMMANDS.values() for p in command.params if "--device" in p.opts]
    assert len(devices) >= 6
    assert {parameter.default for parameter in devices} == {"auto"}


def test_cuda_is_taken_where_it_works_and_a_line_says_so(monkeypatch, capsys):
    FakeCuda(monkeypatch)
    hardware = Hardware()
    assert hardware.start() == hardware.start() == torch.device("cuda")
    assert capsys.readouterr().err == "using CUDA, H200 (--device cpu: the CPU)\n"


def test_a_device_that_is_named_is_taken_without_a_line(monkeypatch, capsys):
    FakeCuda(monkeypatch)
    assert Hardware(device="cpu").start() == torch.device("cpu")
    assert Hardware(device="cuda").start() == torch.device("cuda")
    assert capsys.readouterr().err == ""


def test_without_a_gpu_there_is_no_line(no_gpu, checkpoint):
    assert call("evaluate", checkpoint).stderr == call("evaluate", checkpoint, "--device", "cpu").stderr


@pytest.mark.parametrize("text", ["Torch not compiled with CUDA enabled", "No CUDA GPUs are available"])
def test_no_gpu_is_recognised(monkeypatch, text):
    FakeCuda(monkeypatch, 0, available=False, init_error=AssertionError(text))
    assert choose_device("auto") == ("cpu", "")


@pytest.mark.parametrize(
    "options",
    [
        {"error": RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")},
        {"error": RuntimeError("CUDA error: no kernel image is available for execution on the device")},
        {"available": False, "init_error": RuntimeError("The NVIDIA driver on your system is too old. Please update.")},
    ],
    ids=["full", "unknown GPU", "old driver"],
)
def test_a_gpu_that_cannot_be_used_means_the_cpu_and_one_line_why(monkeypatch, checkpoint, options):
    FakeCuda(monkeypatch, **options)
    error = options.get("error") or options["init_error"]
    why = str(error).splitlines()[0].partition(". ")[0]
    result = call("evaluate", checkpoint)
    assert result.stderr.splitlines()[0] == f"using the CPU: CUDA cannot be used, {why}"
    assert result.stderr.count("using") == 1
    assert "using" not in call("evaluate", checkpoint, "--quiet").stderr
    assert refused("evaluate", checkpoint, "--device", "cuda").startswith("error: --device cuda: ")


def test_torch_warns_of_nothing_that_the_line_says(monkeypatch, recwarn):
    FakeCuda(monkeypatch, init_error=RuntimeError("The driver is too old"))

    def unavailable():
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert choose_device("auto") == ("cpu", "using the CPU: CUDA cannot be used, The driver is too old")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("gpus", "local", "device"),
    [(2, "2", "cuda"), (8, "2", "cuda"), (1, "2", "cpu"), (4, "", "cpu")],
)
def test_processes_take_cuda_where_each_has_a_gpu(monkeypatch, gpus, local, device):
    fake = FakeCuda(monkeypatch, gpus)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    found, line = choose_device("auto")
    assert found == device
    assert line == (
        "using CUDA, a GPU for each process (--device cpu: the CPU)"
        if device == "cuda"
        else f"using the CPU: {local or 8} processes on this machine, but {gpus} CUDA devices"
    )
    assert not fake.tried  # all processes on the first GPU


def test_processes_start_with_the_gpu_of_their_rank(monkeypatch):
    FakeCuda(monkeypatch, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []
    monkeypatch.setattr("ssmcompress.processes.start", lambda device: asked.append(device) or "cpu")
    Hardware().start()
    assert asked == ["cuda"]  # which `start` makes cuda:1 in the second process, as with --device cuda


@pytest.mark.parametrize(("typed", "hint"), [("auot", "auto"), ("Auto", "auto"), ("cuad", "cuda")])
def test_a_typo_is_answered_and_the_default_named(no_gpu, checkpoint, typed, hint):
    said = refused("evaluate", checkpoint, "--device", typed)
    assert f"did you mean {hint}? Without --device, CUDA is used if it works, else the CPU" in said


def test_help_says_what_auto_is_and_does_not_wait_for_torch():
    shown = " ".join(call("evaluate", "--help").stdout.split())
    assert "auto: cuda if it works, else cpu. [default: auto]" in shown
    done = process("evaluate", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert "torch" not in done.stderr.split()


def test_the_python_interface_stays_on_the_cpu(monkeypatch, checkpoint):
    FakeCuda(monkeypatch)
    assert next(ssmcompress.load(checkpoint).parameters()).device.type == "cpu"
