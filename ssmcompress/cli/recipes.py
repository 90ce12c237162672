"""A whole run of a command as a YAML file: written into every folder that `prune` and `finetune` write, read by `run`.

Its keys are the options of the command, by their long names with `_` for `-`. So a new option is in recipes and in
their schema without further code. Relative names of files are relative to the folder of the recipe.
"""

from __future__ import annotations

import difflib
import enum
import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import RECIPE_FILE, read_text, sha256
from ..hub_names import parse_hub_name
from .option_data import FILES, Option, describe_options
from .options import HARDWARE, OUTPUT, chosen, list_parameters
from .recipe_names import from_recipe, to_recipe

FORMAT_VERSION = 1
COMMANDS = ("prune", "finetune")
LARGEST = 1 << 20  # bytes

# Options that a recipe does not have, because a person has to say them at each call; and ways to say how much to prune,
# of which one given on the command line replaces that of the recipe.
NOT_IN_RECIPES = ("unsafe_load", "force", "json", "quiet", "verbose", "dry_run", "resume", "log_file")
WAYS = ("ratio", "flops", "flops_backbone", "latency", "max_drop", "plan", "merge")
# Options whose value is recorded even where it is the default, and those of the hardware that change the report.
ALWAYS, MEASURED = ("seed", "samples"), ("dtype", "no_latency")

HEADER = f"""\
# The whole compression as a file: `ssmcompress run {RECIPE_FILE}` makes the same weights again. Options on its command
# line override what is here; `ssmcompress run --schema` prints a JSON schema for editors.
"""


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
                typed += option.arguments(from_recipe(value, key, self.file.parent) if key in FILES else value)
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
    options = describe_options(list_parameters(function)[0])
    return {option.key: option for _, option in options if option.key not in NOT_IN_RECIPES}


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
    recipe = Recipe(file, command, from_recipe(model, "model", file.parent), digest, content)
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
    recipe |= {"model": to_recipe(recorded, folder), "model_sha256": digest}
    for parameter, option in describe_options(parameters):
        value = values[parameter.name]
        of_this_call = option.panel == OUTPUT or (option.panel == HARDWARE and option.key not in MEASURED)
        if of_this_call or option.key in (*NOT_IN_RECIPES, "tensorboard"):
            continue
        value = value.value if isinstance(value, enum.Enum) else value
        if value not in (None, [], option.default) or option.key in ALWAYS:
            recipe[option.key] = to_recipe(value, folder) if option.key in FILES else _plain(value)
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
