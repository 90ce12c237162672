"""Arguments: invalid values for every option of every command, outputs that are inputs, contradictions."""

from __future__ import annotations

import inspect
import random
import shutil
from typing import Any, get_args

import typer

from .cases import Box, Case, maker
from .judges import anything

KIND = "arguments"
LONG = "9" * 5000


def base(command: str, box: Box) -> list[Any]:
    """A command line whose inputs are valid; its output would be `out`."""
    world = box.world
    images = ["--data", world.images]
    return {
        "inspect": [world.vim12],
        "prune": [world.vim12, *images, "-o", "out"],
        "report": [world.pruned],
        "evaluate": [world.vim12, *images],
        "export": [world.pruned, "-o", "out.onnx", "--onnx"],
        "verify": [world.pruned, world.onnx],
        "finetune": [world.pruned, *images, "-o", "out"],
        "benchmark": [world.vim12],
        "compare": [world.vim12, *images, "-o", "out"],
        "demo": ["-o", "out"],
    }.get(command, [world.vim12])


# Values that are invalid for every option of the kind.
_NUMBERS = ("", "nan", "inf", "-1", "1e999", "abc", "0x10", LONG, "1,2", "--", "-999999999999")
_TEXTS: dict[str, tuple[str, ...]] = {
    "--ratio": ("", "nan", "-0.1", "0", "1", "1e999", "abc", "0.3,", ",", "0.3;0.4", "130%", LONG,
    "0.3,0.4,0.5,0.6,0.7"),
    "--flops": ("", "nan", "-5%", "0", "1e999%", "abc", "%", "0.0001%", "1000%", LONG),
    "--latency": ("", "nan", "-5%", "1e999", "abc", "%"),
    "--stages": ("", "0", "-1", "3", "99", "1,1", "2,1", "1.5", "abc", ",", LONG, "1," * 1000 + "1"),
    "--ratios": ("", "nan", "1", "-1", "abc", "0.1,,0.2"),
    "--importance": ("", "best", "clip,l1", "\x1b[31m", "../clip", "clip\n"),
    "--gap": ("", "filled", "None"),
    "--mean": ("", "nan", "abc", "1,2", "1e999", "1,2,3,4", ","),
    "--std": ("", "0", "-1", "nan", "abc", "1,2", "1e999"),
    "--crop-pct": ("", "nan", "0", "-1", "1.5", "abc", "1e999"),
    "--interpolation": ("", "cubic", "BICUBIC ", "random"),
    "--image-size": ("", "0", "-1", "abc", "16x", "x16", "1x1x1", "99999x99999", "7", "1e3", "٣x", LONG),
    "--weights": ("", "ema", "model.layers", "__class__", "../model"),
    "--device": ("", "tpu", "cuda:99", "cuda:-1", "meta", "cpu:7:7", "privateuseone", "\x00", "cpu; touch ../canary"),
    "--dtype": ("", "int8", "float64", "FLOAT16!"),
    "--data": ("", "nowhere", "https://example.com/images", "/dev/null", "x" * 300, "x" * 5000, "a:b",
    "~nobody/x", "\n"),
    "--log-file": ("", ".", "nowhere/run.log", "https://x.y/z"),
    "--eval-data": ("", "nowhere", "/dev/null", "x" * 300),
    "--dense": ("", "nowhere", "/dev/null", "https://example.com/m.pth", "."),
    "--plan": ("", "nowhere", "/dev/null", ".", "x" * 300),
    "--sensitivity": ("", "nowhere", "/dev/null"),
    "--recipe": ("", "nowhere", "/dev/null", "."),
    "--set": ("", "lr", "lr=", "=1", "lr=fast", "lr=nan", "lr=1e999", "epochs=0", "epochs=1.5", "__class__=1",
    "speed=9"),
    "--methods": ("", ";", "magic", "naive; magic", LONG),
    "--batch-sizes": ("", "0", "-1", "abc", "1,,2", "1.5", LONG),
    "--shape": ("", "1,2,3", "0,1,1,1", "abc", "-1,2,3,4"),
    "--provider": ("", "tpu", "cpu,cuda", "../cpu"),
    "--scan": ("", "fast", "auto "),
    "--html": ("", ".", "/", "/dev/null", "/proc/x.html", "nowhere/\0"[:-1], "x" * 300),
    "--output": ("", "/", ".", "/dev/null", "/dev/null/x", "/proc/x", "x" * 300, "..", "/etc/passwd"),
    "--tensorboard": (),
    "--architecture": ("", "transformer", "vim,plain_mamba", "\x1b[31m"),
}  # fmt: skip


def _types_of(annotation: Any) -> set:
    """The types in `Annotated[int | None, ...]`."""
    kind = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    return set(get_args(kind) or (kind,))


def _options() -> list[tuple[str, str, tuple[str, ...]]]:
    """(command, option, values that it must refuse), of all commands."""
    from ssmcompress.cli.app import app

    found = []
    callbacks = {command.name: command.callback for command in app.registered_commands}
    for name, command in typer.main.get_command(app).commands.items():
        parameters = inspect.signature(callbacks[name]).parameters
        for parameter in command.params:
            if parameter.param_type_name != "option" or parameter.is_eager:
                continue
            option = max(parameter.opts, key=len)
            if getattr(parameter, "is_flag", False):
                values: tuple[str, ...] = ("=1", "=maybe")
            elif {int, float} & _types_of(parameters[parameter.name].annotation):
                values = _TEXTS.get(option, _NUMBERS)
            else:
                values = _TEXTS.get(option, ("",))
            if values:
                found.append((name, option, values))
    return found


@maker(KIND, times=40)
def nonsense(rng, box):
    options = _options()
    weights = [0.2 if values[0].startswith("=") else 1 for _, _, values in options]
    command, option, values = rng.choices(options, weights)[0]
    value = rng.choice(values)
    if "\x00" in value:  # no operating system can pass it
        value = "x"
    if not value:  # must not be interpreted as the working folder
        shutil.copytree(box.world.images, box.folder, dirs_exist_ok=True)
    given = [f"{option}{value}"] if value.startswith("=") and option not in _TEXTS else [f"{option}={value}"]
    more = [] if option in ("--finetune-epochs", "--json", "--force") or rng.random() < 0.7 else ["--json"]
    line = base(command, box)
    if option in ("--sensitivity", "--latency") and command == "prune":
        more += ["--flops", "80%"] if option == "--sensitivity" else []
    if option == "--output":
        line = [a for a in line if a not in ("-o", "out", "out.onnx")]
    if command == "export" and "--onnx" not in line:
        line.append("--onnx")
    return Case((command, *line, *given, *more))


@maker(KIND, times=6)
def nonsense_that_other_programs_take(rng, box):
    """Values with a special meaning elsewhere; they may be accepted or rejected, but nothing breaks."""
    command = rng.choice(["inspect", "evaluate", "report"])
    unfit = (
        "--html",
        "--log-file",
        "--output",
        "--threads",
        "--workers",
        "--json",
        "--quiet",
        "--force",
        "--verbose",
        "--unsafe-load",
    )
    options = [o for c, o, _ in _options() if c == command and o not in unfit] or ["--verbose"]
    option = rng.choice(options)
    value = rng.choice(
        ["٣", "1_000", "+3", " 3 ", "3.0", "1e2", "TRUE", "null", "None", "0", "1", "%s", "$(touch ..canary)", "'"]
    )
    return Case((command, *base(command, box), f"{option}={value}"), anything, detail=value)


_LINES: dict[str, tuple] = {
    "no command": ("frobnicate",),
    "an unknown option": ("inspect", "{vim}", "--frobnicate"),
    "no model": ("prune",),
    "an empty model": ("inspect", ""),
    "a model of spaces": ("inspect", "  "),
    "too many models": ("inspect", "{vim}", "{vim}"),
    "an option without a value": ("evaluate", "{vim}", "--data"),
    "only dashes": ("inspect", "--", "--json"),
    "an address": ("inspect", "https://example.com/model.pth"),
    "a long name": ("inspect", "x" * 100_000),
    "ratio and flops": ("prune", "{vim}", "--ratio", "0.3", "--flops", "60%", "-o", "out"),
    "plan and ratio": ("prune", "{vim}", "--ratio", "0.3", "--plan", "x.json", "-o", "out"),
    "labels without a search": ("prune", "{vim}", "--by-labels", "-o", "out"),
    "a recipe without epochs": ("prune", "{vim}", "--recipe", "top-vim", "-o", "out"),
    "epochs without data": ("prune", "{vim}", "--finetune-epochs", "1", "-o", "out"),
    "resume and force": ("finetune", "{pruned}", "--data", "{images}", "-o", "out", "--resume", "--force"),
    "fine-tune a dense model": ("finetune", "{vim}", "--data", "{images}", "-o", "out"),
    "prune a pruned model": ("prune", "{pruned}", "--data", "{images}", "-o", "out"),
    "dense is pruned": ("evaluate", "{pruned}", "--data", "{images}", "--dense", "{pruned}"),
    "dense of other classes": ("evaluate", "{pruned}", "--data", "{images}", "--dense", "{vim10}"),
    "data of other classes": ("evaluate", "{vim10}", "--data", "{images}"),
    "model and data swapped": ("evaluate", "{images}", "--data", "{vim}"),
    "a folder of images": ("inspect", "{images}"),
    "a budget out of reach": ("prune", "{vim}", "--flops", "1%", "--data", "{images}", "-o", "out"),
    "more samples than images": ("prune", "{vim}", "--samples", "0", "--data", "{images}", "-o", "out"),
    "report of a checkpoint": ("report", "{vim}"),
    "report of images": ("report", "{images}"),
    "report of nothing": ("report",),
    "export of nothing": ("export",),
    "verify of itself": ("verify", "{onnx}", "{onnx}"),
    "verify with a folder": ("verify", "{pruned}", "{pruned}"),
    "a huge stride": ("inspect", "{vim}", "--stride", "999999999999"),
    "a huge batch of nothing": ("evaluate", "{vim}", "--data", "{images}", "--batch-size", "0"),
    "benchmark nothing": ("benchmark",),
    "ratios and flops": ("compare", "{vim}", "--ratios", "0.1", "--flops", "60%", "-o", "out"),
    "opset 5": ("export", "{pruned}", "--onnx", "--opset", "5", "-o", "out.onnx"),
    "opset 9999": ("export", "{pruned}", "--onnx", "--opset", "9999", "-o", "out.onnx"),
    "negative tolerance": ("verify", "{pruned}", "{onnx}", "--atol", "-1"),
    "tolerance of nan": ("verify", "{pruned}", "{onnx}", "--atol", "nan"),
    "infinite tolerance": ("verify", "{pruned}", "{onnx}", "--atol", "inf"),
    "no data for labels": ("prune", "{vim}", "--by-labels", "--flops", "80%", "--data", "{plain}", "-o", "out"),
    "a model as a plan": ("prune", "{vim}", "--plan", "{vim}", "--data", "{images}", "-o", "out"),
}


@maker(KIND, variants=list(_LINES))
def command_lines(rng, box, variant):
    world = box.world
    names: dict[str, Any] = {
        "{vim}": world.vim12, "{vim10}": world.vim, "{pruned}": world.pruned, "{images}": world.images,
        "{plain}": world.plain,
    }  # fmt: skip
    line = _LINES[variant]
    if "{onnx}" in line:
        names["{onnx}"] = world.onnx
    return Case([names.get(part, part) for part in line])


_OUTPUTS = (
    "the model", "the model by force", "the data", "the data by force", "a parent by force", "root by force",
    "a file", "a file by force", "a folder of mine by force", "a link to mine by force", "below a file",
    "dangling link",
    "the dense model by force", "the evaluated data by force", "dot by force", "a device by force", "trailing slash",
)  # fmt: skip


@maker(KIND, variants=_OUTPUTS)
def outputs_that_are_inputs(rng, box, variant):
    folder = box.folder
    shutil.copytree(box.world.images, folder / "in/images")
    shutil.copy(box.world.vim12, folder / "in/model.pt")
    shutil.copytree(box.world.pruned, folder / "in/pruned")
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("years of work")
    (folder / "file.txt").write_text("mine")
    (folder / "link").symlink_to("mine")
    (folder / "gone").symlink_to("nowhere/at/all")
    output = {
        "the model": "in/pruned", "the model by force": "in/model.pt", "the data": "in/images",
        "the data by force": "in/images", "a parent by force": "in", "root by force": "/", "a file": "file.txt",
        "a file by force": "file.txt", "a folder of mine by force": "mine", "a link to mine by force": "link",
        "below a file": "file.txt/out", "dangling link": "gone", "the dense model by force": "in/model.pt",
        "the evaluated data by force": "in/images/class00", "dot by force": ".", "a device by force": "/dev/null",
        "trailing slash": "file.txt/",
    }[variant]  # fmt: skip
    force = ["--force"] if "by force" in variant else []
    commands: list[tuple] = [
        ("prune", "in/model.pt", "--data", "in/images", "--no-latency", "-o", output),
        ("finetune", "in/pruned", "--data", "in/images", "--no-latency", "--epochs", 1, "-o", output),
        ("compare", "in/model.pt", "--data", "in/images", "-o", output),
    ]
    forced = ("a file by force", "a device by force", "the model by force", "the dense model by force")
    if variant not in (*forced, "dangling link"):  # replacing a file by a file is the purpose of --force
        commands.append(("export", "in/pruned", "-o", output))
    return Case((*rng.choice(commands), *force), detail=output)


@maker(KIND, times=2)
def random_words(rng, box):
    words = [
        "prune",
        "inspect",
        "--json",
        "--data",
        "-o",
        "out",
        "--force",
        "--ratio",
        "0.5",
        "x",
        "-",
        "--",
        "--flops",
        "%",
    ]
    words += [random.Random(rng.random()).choice(["\u202e", "é" * 10, "-1", "--no", "-x", "=", "--quiet", "--help!"])]
    return Case([w for w in rng.choices(words, k=rng.randrange(1, 9)) if w != "x"] or ["x"], anything)
