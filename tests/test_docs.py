"""README.md and docs/: every command and every Python example runs, every link and option they name exists."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from conftest import make_vim, write_image
from segmenters import make_vim_upernet, write_scenes
from typer.testing import CliRunner

import ssmcompress
from ssmcompress.cli.app import app
from ssmcompress.cli.recipes import read_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
# Its examples are files, which test_extending.py writes and runs.
OTHER_EXAMPLES = {"extending.md"}

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "bash gpu", "bash hours", "python", "text", "yaml"}
PROGRAMS = ("ssmcompress", "python examples/", "torchrun")
# The demo is run on fewer images by its own test; completion writes to the startup file of the user's shell.
RUN_ELSEWHERE = {"ssmcompress demo", "ssmcompress --install-completion"}
THREE_LINES = [
    "ssmcompress prune model.pt --ratio 0.3 --data images",
    "ssmcompress report",
    "ssmcompress export --onnx",
]
OPTIONS_OF_OTHERS = {"--nproc-per-node", "--install-completion", "--help"}
COMMANDS = typer.main.get_command(app).commands
SUBCOMMANDS = rf"(?:{'|'.join(COMMANDS)})\b"

name_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The content of the page's fenced blocks of one language."""
    return [body for info, body in FENCE.findall(page.read_text(encoding="utf-8")) if info == language]


def commands(page: Path, language: str = "bash") -> list[str]:
    """The commands in the page's blocks, continuation lines joined, comments left out."""
    lines = "".join(blocks(page, language)).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# The pages whose commands trim states and channels, which takes at least 16 images to calibrate on, and more time.
TRIMMING = {"budget.md"}
# Layers of the model, each of which takes 2 s to trace for a graph: 4 for a plan of three stages, 2 for three graphs.
DEPTHS = {"README.md": 4, "guide.md": 4, "onnx.md": 2}


@contextmanager
def users_folder(folder: Path, page: Path) -> Iterator[None]:
    """Work in a folder with a checkpoint, images in ten classes, a photograph, a segmentation model with
    images, and the repository's examples.
    """
    depth, per_class = DEPTHS.get(page.name, 3), 4 if page.name in TRIMMING else 1
    threads, logger = torch.get_num_threads(), logging.getLogger("ssmcompress")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not Path("model.pt").exists():
            torch.save({"model": make_vim(depth).state_dict()}, "model.pt")
            for label in range(10):
                for i in range(per_class):
                    write_image(Path("images") / f"class{label}" / f"{i}.png", seed=10 * label + i)
            torch.save({"model": make_vim(depth, seed=1).state_dict()}, "other.pt")
            write_image(Path("photo.jpg"), seed=0, size=(40, 30))
            torch.save({"state_dict": make_vim_upernet(depth=5, out_layers=(1, 3, 4, 5)).state_dict()}, "segmenter.pth")
            write_scenes(Path("scenes"), 12)
            Path("examples").symlink_to(ROOT / "examples")
        torch.set_num_threads(1)  # for models as small as this one, a second thread only costs time
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(logging.NOTSET)  # an example silences it


def run(command: str) -> None:
    """Run a command as a user would, `ssmcompress` within this process; AssertionError if it fails."""
    program, *arguments = shlex.split(command)
    if program == "ssmcompress":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.stderr)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run"] if program == "torchrun" else [sys.executable]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)


def commands_here(page: Path) -> list[str]:
    return [command for command in commands(page) if command not in RUN_ELSEWHERE]


BEGINNERS = [page for page in PAGES if commands_here(page)[:3] == THREE_LINES]


def test_commands_run_where_a_page_begins_with_the_three_lines(tmp_path):
    """README and guide: the shared lines once, and each page's other commands in a copy of their results."""
    assert README in BEGINNERS
    begun = tmp_path / "begun"
    begun.mkdir()
    with users_folder(begun, README):
        for command in THREE_LINES:
            run(command)
    for page in BEGINNERS:
        shutil.copytree(begun, tmp_path / page.stem, symlinks=True)
        with users_folder(tmp_path / page.stem, page):
            for command in commands_here(page)[3:]:
                run(command)


@name_of
def test_recipes_can_be_read(page, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        read_recipe(file)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in OTHER_EXAMPLES and p not in BEGINNERS], ids=lambda page: page.name
)
def test_commands_run(page, tmp_path):
    with users_folder(tmp_path, page):
        for command in commands_here(page):
            run(command)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p, "bash gpu")], ids=lambda page: page.name)
def test_commands_for_a_gpu_run(page, tmp_path):
    with users_folder(tmp_path, page):
        for command in commands(page, "bash gpu"):
            run(command)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p, "bash hours")], ids=lambda page: page.name)
def test_commands_that_take_hours_have_options_that_exist(page):
    for command in commands(page, "bash hours"):
        _, script, *arguments = command.split()
        said = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        options = {argument for argument in arguments if argument.startswith("-")}
        assert options <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", said.stdout)), command


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in OTHER_EXAMPLES and blocks(p, "python")], ids=lambda page: page.name
)
def test_python_examples_run(page, tmp_path):
    with users_folder(tmp_path, page):
        for number, code in enumerate(blocks(page, "python"), start=1):
            exec(compile(code, f"{page.name}, example {number}", "exec"), {})


@name_of
def test_no_command_escapes_the_tests(page):
    text = page.read_text(encoding="utf-8")
    assert {info for info, _ in FENCE.findall(text)} <= LANGUAGES
    tested = [command for language in ("bash", "bash gpu", "bash hours") for command in commands(page, language)]
    programs = (*PROGRAMS, "python ") if page.name in OTHER_EXAMPLES else PROGRAMS
    for command in tested:
        assert command.startswith(programs), command
    outside = "\n".join([*blocks(page, "text"), prose(page)])
    escaped = rf"^[ >$]*(?:ssmcompress (?:-|{SUBCOMMANDS})|torchrun|python ).*"
    assert not re.findall(escaped, outside, flags=re.MULTILINE)
    for inline in re.findall(r"`(ssmcompress [^`]*|torchrun [^`]*)`", prose(page)):
        assert any(command.startswith(inline) for command in tested), f"`{inline}` is in no tested block"


def test_the_readme_leads_with_three_commands():
    assert commands(README)[:4] == ["ssmcompress demo", *THREE_LINES]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@name_of
def test_options_exist(page):
    known = {name for c in COMMANDS.values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    text = "\n".join([prose(page), *commands(page)])
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named - known <= OPTIONS_OF_OTHERS


def links(page: Path) -> list[str]:
    """The targets of the page's links and images that are no web addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_file() and file.name == "extending.md":
            continue  # is being written
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_links_to_every_page():
    linked = {Path(target.partition("#")[0]).name for target in links(README) if target.startswith("docs/")}
    assert {page.name for page in DOCS} <= linked
    assert linked - {page.name for page in DOCS} <= {"kept_tokens.png", "extending.md"}


def test_the_structure_page_names_the_modules_there_are():
    package = Path(ssmcompress.__file__).parent
    there = {path for path in package.rglob("*.py") if not path.name.startswith("_")}
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.py)`", text)} - {"test_layout.py"}
    assert named <= {path.name for path in there}
    rooms = {path for path in there if path.relative_to(package).parts[0] not in ("ops", "tasks")}
    assert {path.name for path in rooms if path.parent.name != "commands"} <= named
