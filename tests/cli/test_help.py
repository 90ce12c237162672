"""Help, completion and the shape of commands."""

import ast
import hashlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import call, refused

from ssmcompress.cli import app as package
from ssmcompress.cli import commands
from ssmcompress.cli.app import app
from ssmcompress.cli.options import MAPS, PANELS, takes
from ssmcompress.cli.values import IMPORTANCE_NAMES
from ssmcompress.pruning.importance import IMPORTANCES

FOLDER = Path(commands.__file__).parent
FILES = {file.stem: file for file in FOLDER.glob("*.py") if not file.stem.startswith("_")}
COMMANDS = typer.main.get_command(app).commands

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_every_module_of_the_folder_is_a_command_and_every_command_is_a_module():
    assert FILES.keys() == COMMANDS.keys()
    assert package is app


@pytest.mark.parametrize("name", FILES)
def test_help_has_sections_and_ends_with_an_example(name):
    shown = call(name, "--help").stdout
    headings = re.findall(r"^(\S.*):$", shown, flags=re.MULTILINE)
    assert headings[-2:] == ["Other", "Example"]
    order = [heading for heading in headings if heading in PANELS]
    assert order == sorted(order, key=PANELS.index)
    assert headings[:-2] == [*(["Arguments"] if "Arguments" in headings else []), *order]
    assert shown.rstrip().splitlines()[-1].startswith(f"  ssmcompress {name}")
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_prune_has_all_sections_but_that_of_maps():
    headings = re.findall(r"^(\S.*):$", call("prune", "--help").stdout, flags=re.MULTILINE)
    assert headings == ["Arguments", *(panel for panel in PANELS if panel != MAPS), "Other", "Example"]


def test_every_option_says_what_it_does():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_summaries_are_readable_in_full():
    shown = " ".join(call("--help").stdout.split())
    for name, command in COMMANDS.items():
        summary = " ".join(command.help.split())
        assert f"{name} {summary}" in shown
    assert "..." not in shown.split("Commands:")[1]


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    """It takes a tenth of a second; importing torch alone would take two."""
    code = (
        "import sys; from ssmcompress.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'timm', 'datasets', 'onnx', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_shell_completes_commands_and_options():
    def complete(line):
        environment = {**os.environ, "_SSMCOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line}
        environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
        done = subprocess.run([sys.executable, "-m", "ssmcompress"], env=environment, capture_output=True, text=True)
        return done.stdout.split()

    assert complete("ssmcompress pr") == ["prune"]
    assert complete("ssmcompress prune --imp") == ["--importance"]
    assert "clip-paths" in complete("ssmcompress prune x --importance c")
    assert "--install-completion" in call("--help").stdout


@pytest.mark.parametrize("name", FILES)
def test_a_command_is_at_most_60_lines(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert function.end_lineno - function.lineno + 1 <= 60


def test_no_two_commands_share_six_lines():
    lines = {name: [line.strip() for line in file.read_text().splitlines()] for name, file in FILES.items()}
    runs = {
        name: {tuple(text[i : i + 6]) for i in range(len(text) - 5) if all(text[i : i + 6])}
        for name, text in lines.items()
    }
    for one in runs:
        for other in runs:
            if one < other:
                shared = [run for run in runs[one] & runs[other] if any(len(line) > 12 for line in run)]
                assert not shared, (one, other, shared[0])


def test_the_metrics_of_the_help_are_those_there_are():
    assert set(IMPORTANCE_NAMES) == {name for name, importance in IMPORTANCES.items() if importance.ranks}


@pytest.mark.parametrize(
    "arguments",
    [["prune", "m", "--plan", "p", "--ratio", "0.3"], ["compare", "m", "--ratios", "2"], ["finetune", "m"]],
    ids=" ".join,
)
def test_usage_errors_do_not_wait_for_torch(arguments):
    code = (
        "import sys; from ssmcompress.cli.app import app\n"
        "print(app(sys.argv[1:], standalone_mode=False), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr


def test_messages_that_are_no_errors_show_options_too(pruned_folder, class_folders, checkpoint):
    checkpoint.write_bytes(pickle.dumps(os.system))
    config = json.loads((pruned_folder / "config.json").read_text())
    config["pruning"]["source"]["sha256"] = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    (pruned_folder / "config.json").write_text(json.dumps(config))
    said = call("evaluate", pruned_folder, "--data", class_folders).stderr
    assert "agreement was not measured" in said
    assert "--unsafe-load reads it all the same" in said
    assert "`" not in said


def test_options_of_a_group_become_parameters_of_the_command():
    from ssmcompress.cli.groups import Printing

    seen = []

    def command(name: str, printing: Printing) -> None:
        seen.append((name, printing))

    spread = takes(command)
    assert list(inspect.signature(spread).parameters) == ["name", "as_json", "quiet", "verbose", "log_file"]
    spread(name="x", as_json=True, quiet=False, verbose=False, log_file=None)
    assert seen == [("x", Printing(as_json=True, quiet=False))]


def test_the_library_names_arguments_and_the_command_line_shows_options(checkpoint, class_folders):
    os.mkdir("taken")
    assert "pass --force to replace it" in refused("prune", checkpoint, "-o", "taken")
    assert "give --data" in refused("prune", checkpoint, "--finetune-epochs", 1)
    assert "--ratio and --flops: expected one of them" in refused("prune", checkpoint, "--ratio", 0.3, "--flops", "60%")
    assert "--align or --no-align" in refused("prune", checkpoint, "--plan", "p.json", "--no-align")
    assert "leave out --no-search" in refused("prune", checkpoint, "--latency", "60%", "--no-search")
    assert "use --scan auto" in refused("export", checkpoint, "--onnx", "--scan", "standard", "--opset", 20)
    package_files = Path(commands.__file__).parents[2].rglob("*.py")
    for file in package_files:
        if "cli" in file.parts:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents
        ]
        assert not [text for text in strings if re.search(r"(?<![-\w])--[a-z]", text)], file
