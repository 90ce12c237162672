"""The README's commands and code do what it says, in the order it says them."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import make_vim, write_image
from typer.testing import CliRunner

from ssmcompress.cli.app import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def _users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": make_vim().state_dict()}, "model.pt")
    for label in range(10):
        for i in range(2):
            write_image(Path("images") / f"class{label}" / f"{i}.png", seed=10 * label + i)


@pytest.mark.usefixtures("_users_folder")
def test_commands():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands[:3] == [
        "ssmcompress prune model.pt --ratio 0.3",
        "ssmcompress report",
        "ssmcompress export --onnx",
    ]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ssmcompress"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.stderr)


@pytest.mark.usefixtures("_users_folder")
def test_python():
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert Path("pruned.onnx").is_file()
