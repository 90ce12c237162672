"""Commands where the optional packages are not installed."""

import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib
from command_line import call, refused

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.extras import EXTRAS, describe_missing, require_extra

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_extras(monkeypatch):
    """No optional package can be found or imported, as if none were installed."""
    for _, modules in EXTRAS.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("in_an_empty_folder", "without_extras")
def test_what_needs_no_optional_package_runs_without(checkpoint, class_folders):
    """`prune`, and the commands that read what it wrote."""
    call("prune", checkpoint, "--data", class_folders, "-o", "out", "--no-latency", "--quiet")
    call("report", "out", "--html", "report.html")
    call("inspect", "out")
    call("evaluate", "out", "--data", class_folders)
    call("benchmark", "out", "--batch-sizes", "1", "--repeats", "1")
    call("visualize", "out", "--data", class_folders, "-o", "pictures")
    call("run", "out/recipe.yaml", "-o", "again")
    call("export", "out", "-o", "out.safetensors")


@pytest.mark.usefixtures("in_an_empty_folder", "without_extras")
def test_what_needs_a_missing_package_says_how_to_install_it(checkpoint, class_folders):
    """One line that names the extra; nothing is written."""
    onnx = "onnx, onnxscript and onnxruntime, which are not installed: pip install 'ssmcompress[onnx]'"
    assert onnx in refused("export", checkpoint, "--onnx")
    Path("model.onnx").write_bytes(b"")
    assert onnx in refused("verify", checkpoint, "model.onnx")
    trainer = "accelerate, which is not installed: pip install 'ssmcompress[finetune]'"
    assert trainer in refused("prune", checkpoint, "--data", class_folders, "--finetune-epochs", "1", "-o", "out")
    assert trainer in refused("finetune", checkpoint, "--data", class_folders, "-o", "out")


def test_only_missing_packages_are_named(monkeypatch, tmp_path, checkpoint):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="need onnxruntime, which is not installed"):
        ssmcompress.export_onnx(ssmcompress.load(checkpoint), tmp_path / "model.onnx")
    assert not describe_missing("finetune")
    require_extra("finetune")


def test_a_process_of_several_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=re.escape("pip install 'ssmcompress[finetune]'")):
        ssmcompress.processes.start("cpu")


def test_extras_bring_the_modules_that_messages_name():
    """Each extra of the table installs its modules, and `all` has every extra that users may want at once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, brings = project["optional-dependencies"], packages_distributions()
    base = {_name(line) for line in project["dependencies"]}
    for extra, (_, modules) in EXTRAS.items():
        names = {_name(line) for line in extras[extra]}
        assert not names & base
        for module in modules:
            assert {_name(n) for n in brings[module]} & names, (extra, module)
    assert set(re.findall(r"[\w-]+", extras["all"][0].partition("[")[2])) == set(EXTRAS)


def _name(requirement: str) -> str:
    """Return the distribution of a requirement, normalised."""
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "install torch and torchvision together"),
        (ModuleNotFoundError("No module named 'pandas'", name="pandas"), "the package pandas is not installed"),
        (ImportError("libGL.so.1: no such file", name="timm"), "the package timm cannot be imported"),
    ],
)
def test_broken_packages_are_named(monkeypatch, checkpoint, error, message):
    """An inconsistent installation is not reported as an error of ssmcompress."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ssmcompress.jobs.measuring.measure", fail)
    text = refused("prune", checkpoint, code=1)
    assert message in text
    assert str(error) in text
    assert "please report it" not in text
