"""JSON files that the commands read: config.json of a compressed folder, plans, recipes, sensitivities, states."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from .cases import Box, Case, maker
from .checkpoints import checkpoint
from .judges import anything, same_json
from .pickles import attacks, dumps

KIND = "configs"
JUNK = (
    None, True, False, -1, 0.5, 10**400, 2**63, float("nan"), float("inf"), "", "x", "1", "\x00", "../../etc/passwd",
    "<script>alert(1)</script>", [], [None], {}, {"a": {}}, [[]], "é" * 5000,
)  # fmt: skip


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """The places in a JSON value, as keys and indices."""
    if prefix:
        yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*prefix, key))


def put(value: Any, place: tuple, new: Any) -> None:
    """Replace the value at a place."""
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def take_away(value: Any, place: tuple) -> None:
    """Delete the value at a place."""
    for key in place[:-1]:
        value = value[key]
    del value[place[-1]]


def pruned(box: Box) -> Any:
    """A copy of the pruned folder in the working folder; returns its config.json."""
    shutil.copytree(box.world.pruned, box.folder / "pruned")
    return json.loads((box.folder / "pruned/config.json").read_text())


def write(box: Box, value: Any, name: str = "pruned/config.json") -> None:
    """Write JSON, NaN and infinity as Python writes them."""
    (box.folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def using(rng: random.Random, box: Box, detail: str, refused: bool = False) -> Case:
    """A command that reads the folder; unless it rejects it, the result must equal that of the undamaged folder."""
    world = box.world
    command: tuple = rng.choice([("inspect",), ("evaluate",), ("evaluate",)])
    more = ("--data", world.images) if command == ("evaluate",) else ()
    if refused:
        extra = [("export", "pruned", "--onnx"), ("finetune", "pruned", "--data", world.images, "-o", "out")]
        extra += [("benchmark", "pruned"), (*command, "pruned", *more)]
        return Case(rng.choice(extra), detail=detail)
    right = same_json(lambda: world.baseline(*command, world.pruned, *more), ignore=["agreement"])
    return Case((*command, "pruned", *more, "--json"), right, detail=detail)


@maker(KIND, times=14)
def a_value_replaced(rng, box):
    config = pruned(box)
    place = rng.choice([p for p in paths(config) if "fits" not in p])
    new = rng.choice(JUNK)
    old = config
    for key in place:
        old = old[key]
    put(config, place, new)
    # Changed values of these keys are valid; whether they are true cannot be checked.
    free = {"data", "command", "source", "versions", "seed", "name", "images", "held_out", "kept", "crop_pct"}
    text = json.dumps(config)
    write(box, text)
    case = using(rng, box, f"{'.'.join(map(str, place))}: {old!r:.30} -> {new!r:.30}")
    return Case(case.arguments, anything, detail=case.detail) if free & set(place) else case


@maker(KIND, times=4)
def a_value_taken_away(rng, box):
    config = pruned(box)
    place = rng.choice([p for p in paths(config) if len(p) < 4 and "source" not in p and p != ("data",)])
    take_away(config, place)
    write(box, config)
    return using(rng, box, ".".join(map(str, place)))


_STAGES: dict[str, Any] = {
    "none": [],
    "of text": "5,10,15",
    "after the last layer": [{"after": 3, "ratio": 0.5}],
    "after layer 0": [{"after": 0, "ratio": 0.5}],
    "after layer -1": [{"after": -1, "ratio": 0.5}],
    "after layer 1.5": [{"after": 1.5, "ratio": 0.5}],
    "out of order": [{"after": 2, "ratio": 0.5}, {"after": 1, "ratio": 0.5}],
    "twice": [{"after": 1, "ratio": 0.5}, {"after": 1, "ratio": 0.5}],
    "of ratio 1": [{"after": 1, "ratio": 1}],
    "of ratio -0.1": [{"after": 1, "ratio": -0.1}],
    "of ratio nan": [{"after": 1, "ratio": float("nan")}],
    "of ratio 1e999": [{"after": 1, "ratio": float("inf")}],
    "of ratio true": [{"after": 1, "ratio": True}],
    "of ratio false": [{"after": 1, "ratio": False}],
    "of unknown importance": [{"after": 1, "ratio": 0.5, "importance": "best"}],
    "of a list of importances": [{"after": 1, "ratio": 0.5, "importance": ["clip"]}],
    "merged": [{"after": 1, "ratio": 0.5, "merge": "all"}],
    "a list of merges": [{"after": 1, "ratio": 0.5, "merge": ["ordered"]}],
    "as numbers": [1, 2],
    "of none": None,
    "many": [{"after": 1, "ratio": 0.5}] * 100_000,
}


@maker(KIND, variants=list(_STAGES))
def stages(rng, box, variant):
    config = pruned(box)
    config["pruning"]["stages"] = copy.deepcopy(_STAGES[variant])
    write(box, config)
    return using(rng, box, "", refused=True)


_TEXTS = {
    "empty": "",
    "cut off": '{"format_version": 1, "architecture": {',
    "a list": "[]",
    "null": "null",
    "deep": "[" * 10_000 + "]" * 10_000,
    "very deep": '{"a":' * 100_000,
    "a long number": '{"format_version": ' + "9" * 10_000 + ', "architecture": {}}',
    "another tool's": '{"model_type": "vim", "hidden_size": 192, "architectures": ["VimForImageClassification"]}',
    "yaml": "!!python/object/apply:os.system ['touch ../canary']\n",
}


@maker(KIND, variants=[*_TEXTS, "utf-16", "binary", "missing", "folder", "pipe", "link", "passwd"])
def config_files(rng, box, variant):
    pruned(box)
    file = box.folder / "pruned/config.json"
    if variant in _TEXTS:
        write(box, _TEXTS[variant])
        return using(rng, box, "", refused=True)
    if variant in ("utf-16", "binary"):
        text = file.read_text()
        file.write_bytes(text.encode("utf-16") if variant == "utf-16" else rng.randbytes(500))
        return using(rng, box, "", refused=True)
    file.unlink()
    if variant == "folder":
        file.mkdir()
    elif variant == "pipe":
        os.mkfifo(file)
    elif variant == "link":
        file.symlink_to("config.json")
    elif variant == "passwd":
        file.symlink_to("/etc/passwd")
    return using(rng, box, "", refused=True)


@maker(KIND, variants=["cut off", "dense", "no gaps", "pipe", "missing", "nan", "other shapes"])
def weights_files(rng, box, variant):
    from safetensors.torch import load_file, save_file

    pruned(box)
    file = box.folder / "pruned/model.safetensors"
    state = load_file(file)
    if variant == "cut off":
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
        return using(rng, box, "", refused=True)
    file.unlink()
    if variant == "pipe":
        os.mkfifo(file)
    elif variant == "dense":
        save_file({k: v.contiguous() for k, v in box.world.state.items()}, file)
    elif variant == "no gaps":
        save_file({k: v for k, v in state.items() if not k.endswith("gap_delta")}, file)
    elif variant == "nan":
        key = rng.choice(list(state))
        save_file(state | {key: torch.full_like(state[key], float("nan"))}, file)
    elif variant == "other shapes":
        key = rng.choice([k for k, v in state.items() if v.ndim == 2])
        save_file(state | {key: torch.cat([state[key], state[key]])}, file)
    return using(rng, box, "", refused=True)


_PLANS: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "a number": 7,
    "a plan of text": {"plan": "0.3"},
    "calibration of text": {"stages": [{"after": 1, "ratio": 0.5}], "calibration": "photographs"},
    "gaps of text": {
        "stages": [{"after": 1, "ratio": 0.5}], "gap": "calibrated",
        "calibration": {"name": "x", "images": 2, "gap_deltas": [["a"]]},
    },
    "ragged gaps": {
        "stages": [{"after": 1, "ratio": 0.5}], "gap": "calibrated",
        "calibration": {"name": "x", "images": 2, "gap_deltas": [[[1.0], [1.0, 2.0]]]},
    },
    "gaps of other shapes": {
        "stages": [{"after": 1, "ratio": 0.5}], "gap": "calibrated",
        "calibration": {"name": "x", "images": 2, "gap_deltas": [[[1.0]]] * 3},
    },
    "unknown gap": {"stages": [{"after": 1, "ratio": 0.5}], "gap": "filled"},
    "unknown alignment": {"stages": [{"after": 1, "ratio": 0.5}], "alignment": {"colour": True}},
    "alignment of a list": {"stages": [{"after": 1, "ratio": 0.5}], "alignment": [True]},
    "a seed of text": {"stages": [{"after": 1, "ratio": 0.5}], "seed": "now"},
    "a huge seed": {"stages": [{"after": 1, "ratio": 0.5}], "seed": 10**30},
}  # fmt: skip


@maker(KIND, variants=[*_PLANS, *(f"stages {name}" for name in list(_STAGES)[:14])])
def plans(rng, box, variant):
    plan = _PLANS[variant] if variant in _PLANS else {"stages": _STAGES[variant.removeprefix("stages ")]}
    write(box, plan, "plan.json")
    more = rng.choice([("--dry-run",), ("-o", "out", "--no-latency")])
    if variant == "gaps of other shapes":  # calibrated again, on the images
        command = ("prune", box.world.vim, "--plan", "plan.json", "--data", box.world.plain, *more)
        return Case(command, anything, creates=["out"])
    return Case(("prune", box.world.vim, "--plan", "plan.json", "--data", box.world.plain, *more))


@maker(KIND, variants=["deep", "text", "pipe", "folder", "pickle", "random"])
def plan_files(rng, box, variant):
    file = box.folder / "plan.json"
    if variant == "pipe":
        os.mkfifo(file)
    elif variant == "folder":
        file.mkdir()
    else:
        content = {"deep": b"[" * 200_000, "text": b"stages: 5", "random": rng.randbytes(300)}
        file.write_bytes(content.get(variant) or dumps(attacks(box)["os.system"], 4))
    option = rng.choice(["--plan", "--sensitivity"])
    more = ("--flops", "80%") if option == "--sensitivity" else ()
    return Case(("prune", box.world.vim, option, "plan.json", *more, "--data", box.world.plain, "-o", "out"))


@maker(KIND, times=6)
def recipes(rng, box):
    values = rng.choice([
        {"epochs": 0}, {"epochs": -1}, {"epochs": 1.5}, {"epochs": "3"}, {"epochs": True}, {"epochs": 10**30},
        {"lr": float("nan")}, {"lr": float("inf")}, {"lr": -1}, {"lr": "fast"}, {"batch_size": 3}, {"batch_size": 0},
        {"crop": 0}, {"crop": 2}, {"ema": 1}, {"flip": 7}, {"dtype": "int8"}, {"dtype": None}, {"speed": 1},
        {"recipe": "unknown"}, {"recipe": ["default"]}, {"randaugment": "__import__('os').system('touch ../canary')"},
        {"randaugment": "rand-m9-n999999999"}, {"temperature": 0}, {"norms": "yes"}, [], "text", None, 7,
    ])  # fmt: skip
    write(box, values, "recipe.json")
    command = ("finetune", box.world.pruned, "--data", box.world.images, "-o", "out", "--recipe", "recipe.json")
    return Case(command, detail=str(values)[:60])


_STATES = ("cut off", "text", "a dict", "a run of text", "other format", "a pickle", "pipe", "folder", "dense weights")


@maker(KIND, variants=_STATES)
def states_to_resume(rng, box, variant):
    file = box.folder / "out.training.pt"
    described = (box.world.pruned / "config.json").read_text()
    whole = {"ssmcompress": described, "training_format": 1, "run": {"step": 1}, "model": {}, "optimizer": {}}
    if variant == "pipe":
        os.mkfifo(file)
    elif variant == "folder":
        file.mkdir()
    elif variant == "text":
        file.write_bytes(b"step 7 of 9")
    elif variant == "a pickle":
        file.write_bytes(dumps(attacks(box)["os.system"], 2))
    else:
        changes: dict[str, Any] = {
            "a dict": {"run": None}, "a run of text": {"run": "step 1"}, "other format": {"training_format": "2"},
            "dense weights": checkpoint(box.world.state),
        }  # fmt: skip
        torch.save(whole | changes.get(variant, {}), file)
        if variant == "cut off":
            file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    world = box.world
    command = ("finetune", world.pruned, "--data", world.images, "-o", "out", "--resume", "--epochs", 1, "--no-latency")
    return Case(command)


@maker(KIND, variants=["of another model", "of numbers", "cut off", "of infinite losses"])
def sensitivities(rng, box, variant):
    value: Any = {
        "of another model": {"model": "0" * 64, "depth": 24, "entries": []},
        "of numbers": [1, 2, 3],
        "cut off": '{"format": 1, "losses": [[',
        "of infinite losses": {"losses": [[float("inf")]]},
    }[variant]
    write(box, value, "sensitivity.json")
    world = box.world
    command = ("prune", world.vim, "--flops", "80%", "--data", world.plain, "--sensitivity", "sensitivity.json")
    return Case((*command, "-o", "out"))
