"""docs/extending.md: each example is one new file, and works as the page says."""

import hashlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from command_line import BETWEEN, forked
from conftest import make_vim, write_image

import ssmcompress
from ssmcompress.models import MODELS, TokenModel, recognise, register_architecture
from ssmcompress.models.plain_mamba import PlainMamba
from ssmcompress.models.vim import VisionMamba

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PACKAGE = Path(ssmcompress.__file__).parent
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))


def fenced(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], flags=re.DOTALL | re.MULTILINE)


def example(section: str) -> tuple[str, str, list[str]]:
    """(file name, content, commands) of a section."""
    (code,) = fenced(section, "python")
    (name,) = re.findall(r"\A# (\S+\.py)\n", code)
    return name, code, "".join(fenced(section, "bash")).splitlines()


def files_of(folder: Path) -> dict[str, str]:
    """Content digests of the Python files in a folder."""
    return {str(f.relative_to(folder)): hashlib.sha1(f.read_bytes()).hexdigest() for f in folder.rglob("*.py")}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a checkpoint and images, as a developer has it."""
    torch.save({"model": make_vim().state_dict()}, tmp_path / "model.pt")
    for label in range(10):
        for i in range(2):
            write_image(tmp_path / "images" / f"class{label}" / f"{i}.png", seed=10 * label + i)
    return tmp_path


@pytest.mark.parametrize(
    "says",
    [
        {
            "A metric": "same class as dense",
            "A step": "StepRecord(kind='rounding', values={'bits': 8})",
            "A backend": "agrees with the reference",
        },
        {"An architecture": "100.0% in the same class"},
        {"A command": '"tokens": ['},
    ],
    ids=["scripts", "architecture", "command"],
)
def test_one_new_file_is_enough(place, says):
    examples = {section: example(section) for section in says}
    names = [name for name, *_ in examples.values()]
    package = PACKAGE
    if names[0].startswith("ssmcompress/"):  # belongs to the package: written into a copy of it
        package = place / "ssmcompress"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = files_of(place) | files_of(package)
    for name, code, _ in examples.values():
        (place / name).write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    commands = [(section, shlex.split(line)) for section, (_, _, lines) in examples.items() for line in lines]
    done = forked("in-turn", *(command for _, command in commands), cwd=place, env=environment)
    printed = dict.fromkeys(says, "")
    for (section, _), output in zip(commands, done.stdout.split(BETWEEN), strict=True):
        printed[section] += output
    assert all(text in printed[section] for section, text in says.items()), printed
    shown = [(section, line) for section in says for text in fenced(section, "text") for line in text.splitlines()]
    assert [(section, line) for section, line in shown if line not in printed[section].splitlines()] == []
    after = files_of(place) | files_of(package)
    changed = {file for file in after if after[file] != before.get(file)}
    assert {file.removeprefix("ssmcompress/") for file in changed} == {n.removeprefix("ssmcompress/") for n in names}
    assert before.keys() <= after.keys()


@pytest.fixture
def as_before():
    """The registry of architectures is as it was after a test."""
    before = MODELS[:]
    yield
    MODELS[:] = before


@pytest.mark.usefixtures("as_before")
def test_an_own_architecture_comes_before_the_packages_and_what_it_refuses():
    refused = {"patch_embed.conv_down.0.weight": torch.zeros(1)}
    with pytest.raises(ssmcompress.InputError, match="MambaVision"):
        recognise(refused)

    @register_architecture
    class Own(PlainMamba):
        architecture = "mamba_vision"

        @classmethod
        def recognises(cls, state):
            return refused.keys() <= state.keys()

    assert recognise(refused) is Own
    assert recognise(make_vim().state_dict()) is VisionMamba


@pytest.mark.usefixtures("as_before")
def test_an_architecture_with_a_taken_name_or_without_a_part_is_refused():
    class Same(VisionMamba):
        architecture = "Plain-Mamba"

    class Unfinished(TokenModel):
        architecture = "unfinished"

    for model_class, message in ((Same, "'Plain-Mamba' is already registered"), (Unfinished, "config_class.* embed")):
        with pytest.raises(ValueError, match=message):
            register_architecture(model_class)
    assert not {Same, Unfinished} & {*MODELS}
