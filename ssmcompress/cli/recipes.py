"""A whole run of a command as a YAML file: written into every folder that `prune` and `finetune` write, read by `run`.

Its keys are the options of the command, by their long names with `_` for `-`. So a new option is in recipes and in
their schema without further code. Relative names of files are relative to the folder of the recipe.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import json
import os
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import typer

from ..errors import InputError
from ..files import RECIPE_FILE, read_text, sha256
from ..hub_names import parse_hub_name
from .options import HARDWARE, OUTPUT, chosen, list_parameters

FORMAT_VERSION = 1
COMMANDS = ("prune", "finetune")
LARGEST = 1 << 20  # bytes

# Options that name files; those that a recipe does not have, because a person has to say them at each call; and ways
# to say how much to prune, of which one given on the command line replaces that of the recipe.
FILES = ("data", "eval_data", "sensitivity", "plan", "recipe", "dense", "output", "tensorboard")
NOT_IN_RECIPES = ("unsafe_load", "force", "json", "quiet", "verbose", "dry_run", "resume", "log_file")
WAYS = ("ratio", "flops", "flops_backbone", "latency", "max_drop", "plan", "merge")
WRITTEN = ("output", "tensorboard")  # of FILES, those that need not be there yet
# Options whose value is recorded even where it is the default, and those of the hardware that change the report.
ALWAYS, MEASURED = ("seed", "samples"), ("dtype", "no_latency")

HEADER = f"""\
# The whole compression as a file: `ssmcompress run {RECIPE_FILE}` makes the same weights again. Options on its command
# line override what is here; `ssmcompress run --schema` prints a JSON schema for editors.
"""


@dataclass(frozen=True)
class Option:
    """An option of a command, as a recipe has it.

    Attributes:
        key: its key. flag: as it is typed; opposite: its negative, or "". kind: bool, int, float or str.
        default: the value if it is not given.
        several: whether it can be given more than once. choices: the values that there are, if they are limited.
        least, most: limits of a number. panel: the heading it is under. text: its help.
    """

    key: str
    flag: str
    opposite: str
    kind: type
    default: Any
    several: bool
    choices: tuple[str, ...]
    least: float | None
    most: float | None
    panel: str
    text: str

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of its value."""
        names = {bool: "boolean", int: "integer", float: "number"}
        if self.choices:
            value: dict[str, Any] = {"enum": [*self.choices]}
        elif self.kind is str and self.several:
            value = {"type": "array", "items": {"type": "string"}}
        elif self.kind is str and self.key not in FILES:
            value = {"type": ["string", "number", "array"], "items": {"type": ["string", "number"]}}
        else:
            value = {"type": names.get(self.kind, "string")}
        limits = {"minimum": self.least, "maximum": self.most}
        return {**value, **{k: v for k, v in limits.items() if v is not None}, "description": self.text}

    def arguments(self, value: Any) -> list[str]:
        """Return what is typed for a value; ValueError for one that the option cannot have."""
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return [self.flag] if value else [self.opposite] if self.opposite else []
        if self.several:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError("a list of texts")
            return [text for v in value for text in (self.flag, v)]
        if self.kind is str:
            return [self.flag, self._text(value)]
        whole = self.kind is int
        if isinstance(value, str):  # 1e-1 is a text in YAML
            with suppress(ValueError):
                value = int(value) if whole else float(value)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError("a whole number" if whole else "a number")
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            ends = [f"at least {self.least}" if self.least is not None else ""]
            ends += [f"at most {self.most}" if self.most is not None else ""]
            raise ValueError(f"a number of {' and '.join(filter(None, ends))}")
        return [self.flag, str(value)]

    def _text(self, value: Any) -> str:
        if self.choices and value not in self.choices:
            raise ValueError(f"one of {', '.join(self.choices)}")
        parts = value if isinstance(value, list) and self.key not in FILES else [value]
        if not parts or not all(isinstance(p, (str, int, float)) and not isinstance(p, bool) for p in parts):
            raise ValueError("a name" if self.key in FILES else "a text, a number or a list of these")
        return ",".join(map(str, parts))


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Attributes:
        file: where it was read from. command: its command. model: the model, as a name for the command.
        sha256: of the model's file; None where it is not said. values: key -> value of the options.
    """

    file: Path
    command: str
    model: str
    sha256: str | None
    values: Mapping[str, Any]

    def arguments(self, overrides: tuple[str, ...]) -> list[str]:
        """Return the arguments of the command.

        Args:
            overrides: further arguments from the command line, which count more than the recipe.

        Raises:
            InputError: a value that its option cannot have.
        """
        options, typed = options_of(self.command), []
        given = {name.partition("=")[0] for name in overrides}
        replaced = any(options[key].flag in given for key in WAYS if key in options)
        for key, value in self.values.items():
            option = options[key]
            if value is None or (replaced and key in WAYS):
                continue
            try:
                typed += option.arguments(_found(value, key, self.file.parent) if key in FILES else value)
            except ValueError as error:
                raise InputError(f"{self.file}: {key} is {show(value)}: expected {error}") from error
        model = self.model if not self.model.startswith("-") else os.path.join(os.curdir, self.model)
        return [*typed, model, *overrides]

    def check_model(self) -> None:
        """Raise an InputError if the file of the model is another one than the recipe was made with."""
        if self.sha256 is not None and _identify(self.model)[1] != self.sha256.lower():
            raise InputError(
                f"{self.model} has changed since {self.file} was made: give the model as it was by `model`, or remove "
                "model_sha256 from the recipe to run it on this one"
            )


def options_of(command: str) -> dict[str, Option]:
    """Return the options of a command that a recipe can have, by key."""
    function = getattr(import_module(f".commands.{command}", __package__), command)
    options = (_describe(p) for p in list_parameters(function)[0] if _info(p, typer.models.OptionInfo))
    return {option.key: option for option in options if option.key not in NOT_IN_RECIPES}


def read_recipe(file: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: it is no YAML, or not a recipe that this version can run.
    """
    content = _read_yaml(file)
    command = content.pop("command", "prune")
    if command not in COMMANDS:
        raise InputError(f"{file}: command is {show(command)}: expected {' or '.join(COMMANDS)}")
    version = content.pop("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise InputError(f"{file}: format_version is {show(version)}: this version reads {FORMAT_VERSION}")
    model, digest = content.pop("model", None), content.pop("model_sha256", None)
    if not isinstance(model, str) or not model.strip():
        raise InputError(f"{file}: model is {'missing' if model is None else show(model)}: expected its name")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-fA-F]{64}", digest)):
        raise InputError(f"{file}: model_sha256 is {show(digest)}: expected 64 hexadecimal digits")
    if not isinstance(content.pop("versions", {}), dict):
        raise InputError(f"{file}: versions: expected package names with their versions")
    options = options_of(command)
    for key in content:
        if key not in options:
            raise InputError(f"{file}: {_unknown(key, command, options)}")
    recipe = Recipe(file, command, _found(model, "model", file.parent), digest, content)
    recipe.arguments(())  # values that cannot be
    return recipe


def _unknown(key: Any, command: str, options: Mapping[str, Option]) -> str:
    """Return what is wrong with a key that a recipe does not have."""
    name = str(key)
    if name in NOT_IN_RECIPES:
        return f"{name} is not in recipes: give --{name.replace('_', '-')} on the command line"
    common = ("command", "format_version", "model", "model_sha256", "versions")
    close = difflib.get_close_matches(name.replace("-", "_").lower(), [*options, *common], 1, 0.5)
    others = [other for other in COMMANDS if other != command and name in options_of(other)]
    advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(options)}"
    return f"unknown key {name[:80]!r} for {command}; " + (f"{others[0]} has it" if others else advice)


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    import yaml

    try:
        if file.is_dir() and (file / RECIPE_FILE).is_file():
            raise InputError(f"{file} is a folder; expected {file / RECIPE_FILE}")
        if file.stat().st_size > LARGEST:
            raise InputError(f"{file}: larger than {LARGEST >> 20} MB; expected a recipe")
        content = yaml.load(read_text(file), _make_loader())
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected lines such as 'model: vim.pth'")
    return content


def _make_loader() -> type:
    """Return PyYAML's safe loader that also refuses aliases, which recipes do not need, and repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for a billion values
                raise yaml.YAMLError(f"an alias (line {self.peek_event().start_mark.line + 1}): write the value itself")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"a key that is no text (line {key.start_mark.line + 1})")
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} is there twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def show(value: Any) -> str:
    """Return a value of a recipe for a message, shortened."""
    return reprlib.repr(value)


def make_recipe(folder: Path, name: str) -> str:
    """Return the recipe of the command that is running, for the folder that it writes.

    Args:
        name: of the model, as the command was given it.
    """
    import yaml

    from ..models.saved import versions

    command, parameters, values = chosen.get()
    recipe: dict[str, Any] = {"format_version": FORMAT_VERSION, "command": command.__name__}
    recorded, digest = _identify(name)
    recipe |= {"model": _seen_from(recorded, folder), "model_sha256": digest}
    for parameter in parameters:
        if not _info(parameter, typer.models.OptionInfo):
            continue
        option, value = _describe(parameter), values[parameter.name]
        of_this_call = option.panel == OUTPUT or (option.panel == HARDWARE and option.key not in MEASURED)
        if of_this_call or option.key in (*NOT_IN_RECIPES, "tensorboard"):
            continue
        value = value.value if isinstance(value, enum.Enum) else value
        if value not in (None, [], option.default) or option.key in ALWAYS:
            recipe[option.key] = _seen_from(value, folder) if option.key in FILES else _plain(value)
    recipe["versions"] = {name: str(version) for name, version in versions().items()}
    return HEADER + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _identify(name: str) -> tuple[str, str]:
    """Return the name of a model, on the Hub with its commit, and the SHA-256 of its file."""
    from ..models.saved import WEIGHTS_FILE

    if (hub := parse_hub_name(name)) is not None:
        from ..models.hub import fetch

        fetched = fetch(hub)
        path, name = fetched.path, str(fetched.name)
    else:
        path = Path(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder")
    return name, sha256(path / WEIGHTS_FILE if path.is_dir() else path)


def schema() -> str:
    """Return the JSON schema of recipes."""
    common: dict[str, Any] = {
        "format_version": {"const": FORMAT_VERSION},
        "command": {"enum": [*COMMANDS]},
        "model": {"type": "string", "minLength": 1, "description": "File, folder or name on the Hugging Face Hub."},
        "model_sha256": {
            "type": "string",
            "pattern": "^[0-9a-fA-F]{64}$",
            "description": "Refuse another file than the one with this hash.",
        },
        "versions": {"type": "object", "description": "What the recipe was made with."},
    }
    kinds = {}
    for command in COMMANDS:
        own = {key: option.schema() for key, option in options_of(command).items()}
        kinds[command] = {"properties": {**common, **own}, "additionalProperties": False}
    of_finetune = {"properties": {"command": {"const": "finetune"}}, "required": ["command"]}
    value = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of ssmcompress",
        "type": "object",
        "required": ["model"],
        "if": of_finetune,
        "then": {"$ref": "#/$defs/finetune"},
        "else": {"$ref": "#/$defs/prune"},
        "$defs": kinds,
    }
    return json.dumps(value, indent=2)


def _plain(value: Any) -> Any:
    """Return a text that is a number as one."""
    for kind in (int, float):
        try:
            if isinstance(value, str) and str(kind(value)) == value:
                return kind(value)
        except ValueError:
            pass
    return value


# ------------------------------------------------------------------------------------------------------------ names


def _candidates(name: str) -> Iterator[tuple[str, str]]:
    """Yield (path, rest) for the ways to read a name of data, of which `:split` may be the end."""
    yield name, ""
    head, colon, tail = name.rpartition(":")
    if head and colon:
        yield head, f":{tail}"


def _found(name: Any, key: str, base: Path) -> Any:
    """Return a name in a recipe as one from the working folder: what is beside the recipe is meant.

    Args:
        key: of the name. What a data set on the hub or a recipe of fine-tuning is called, for instance, stays as it is.
        base: the folder of the recipe.
    """
    if not isinstance(name, str) or os.path.isabs(name):
        return name
    if name.startswith("~"):
        return os.path.expanduser(name)
    base = Path(os.path.realpath(base))
    for path, rest in _candidates(name):
        if (base / path).exists():
            return os.path.relpath(base / path) + rest
    # Not that of the working folder, which may happen to have one of this name.
    local = key in WRITTEN or name.startswith(".") or any(os.path.exists(path) for path, _ in _candidates(name))
    if key == "model":
        local |= parse_hub_name(name) is None
    return os.path.relpath(base / name) if local else name


def _seen_from(name: Any, folder: Path) -> Any:
    """Return a name from the working folder as one from `folder`; absolute ones, and those of no files, stay."""
    if not isinstance(name, str) or os.path.isabs(name):
        return name
    for path, rest in _candidates(name):
        if os.path.exists(path):
            try:
                relative = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
            except ValueError:  # another drive of Windows
                return os.path.abspath(path) + rest
            return (relative if relative.startswith(".") else f"./{relative}") + rest
    return name


# ---------------------------------------------------------------------------------------------------------- options


def _info(parameter: inspect.Parameter, kind: type) -> Any:
    """Return what Typer is told of a parameter, if it is of this kind."""
    return next((info for info in getattr(parameter.annotation, "__metadata__", ()) if isinstance(info, kind)), None)


def _describe(parameter: inspect.Parameter) -> Option:
    info, hint = _info(parameter, typer.models.OptionInfo), get_args(parameter.annotation)[0]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    several = get_origin(hint) is list
    hint = get_args(hint)[0] if several else hint
    declared = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ())]
    names = [name for part in declared for name in part.split("/")] or [f"--{parameter.name.replace('_', '-')}"]
    names = [name for name in names if name.startswith("--")]
    # Of --align/--no-align; --no-latency has no positive form.
    flag, *others = names
    opposite = next((name for name in others if name.startswith("--no-")), "")
    choices = tuple(member.value for member in hint) if issubclass(hint, enum.Enum) else ()
    default = parameter.default.value if isinstance(parameter.default, enum.Enum) else parameter.default
    return Option(
        flag.lstrip("-").replace("-", "_"), flag, opposite, str if choices else hint, default, several, choices,
        info.min, info.max, info.rich_help_panel or "", info.help or "",
    )  # fmt: skip
