"""A command with its options as a YAML file: `prune` and `finetune` write one to their output folder, `run` reads it.

Its keys are the long names of the command's options, with `_` for `-`, so new options are available in recipes and in
their schema without further code. Relative file names are relative to the folder of the recipe.
"""

from __future__ import annotations

import difflib
import enum
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import RECIPE_FILE, read_text, sha256
from ..hub_names import parse_hub_name
from .option_data import FILES, Option, describe_options
from .options import HARDWARE, OUTPUT, chosen, list_parameters
from .recipe_names import from_recipe, to_recipe
from .terminal import say

if TYPE_CHECKING:
    from ..models.base import TokenModel
    from ..models.records import Source

FORMAT_VERSION = 1
COMMANDS = ("prune", "finetune")
LARGEST = 1 << 20  # bytes

# Options that are not part of a recipe because users must give them in each call; and alternative ways to set the
# budget: one given on the command line replaces the one in the recipe.
NOT_IN_RECIPES = ("unsafe_load", "force", "json", "quiet", "verbose", "dry_run", "resume", "log_file")
WAYS = ("ratio", "flops", "flops_backbone", "latency", "max_drop", "plan", "merge")
# Options that are recorded even at their default, and hardware options that affect the report.
ALWAYS, MEASURED = ("seed", "samples"), ("dtype", "no_latency")
# File options whose hash is recorded as KEY_sha256; and the key for the hash of the calibration images, with the
# options that determine them.
WHAT = {"model": "model", "plan": "plan", "sensitivity": "sensitivity", "dense": "dense model"}
HASHED = tuple(WHAT)
IMAGES = "images_digest"
CHOOSE_IMAGES = ("data", "eval_data", "samples", "seed", "finetune_epochs", "reduce_zero_label")
HASH, IMAGES_HASH = "[0-9a-fA-F]{64}", "[0-9a-fA-F]{16}"

HEADER = f"""\
# The whole compression as a file: `ssmcompress run {RECIPE_FILE}` makes the same weights again. Options on its command
# line override what is here; `ssmcompress run --schema` prints a JSON schema for editors.
"""

# The recipe that the command wrote last.
_written: ContextVar[Mapping[str, Any] | None] = ContextVar("ssmcompress_recipe", default=None)


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe.

    Attributes:
        file: where it was read from. command: its command. model: the model, as a name for the command.
        hashes: key of a file -> SHA-256, if recorded. images: hash of the calibration images, or None.
        values: key -> value of the options.
    """

    file: Path
    command: str
    model: str
    hashes: Mapping[str, str]
    images: str | None
    values: Mapping[str, Any]

    def arguments(self, overrides: tuple[str, ...]) -> list[str]:
        """Return the arguments of the command.

        Args:
            overrides: further arguments from the command line, which take precedence over the recipe.

        Raises:
            InputError: a value is invalid for its option.
        """
        options, typed = options_of(self.command), []
        for key, value in self._used(overrides).items():
            try:
                typed += options[key].arguments(self._name(key) if key in FILES else value)
            except ValueError as error:
                raise InputError(f"{self.file}: {key} is {show(value)}: expected {error}") from error
        model = self.model if not self.model.startswith("-") else os.path.join(os.curdir, self.model)
        return [*typed, model, *overrides]

    def check_files(self, overrides: tuple[str, ...]) -> None:
        """Raise an InputError if a file has changed since the recipe was written.

        Args:
            overrides: further arguments from the command line; files that they replace are not read.
        """
        given, used = _flags(overrides), self._used(overrides)
        options = options_of(self.command)
        for key, expected in self.hashes.items():
            if key != "model" and (key not in used or options[key].flag in given):
                continue
            name = self.model if key == "model" else self._name(key)
            if _hash_file(key, name) not in (None, expected.lower()):
                raise InputError(
                    f"{name} has changed since {self.file} was made: give the original {WHAT[key]} with `{key}`, or "
                    f"remove {key}_sha256 from the recipe to run it with this one"
                )

    def say_if_images_differ(self, overrides: tuple[str, ...], quiet: bool) -> None:
        """Warn after the run if the calibration images differ from those that the recipe was written with.

        Args:
            overrides: further arguments from the command line, which may select other images.
        """
        options, written = options_of(self.command), _written.get()
        asked = _flags(overrides) & {options[key].flag for key in CHOOSE_IMAGES if key in options}
        if self.images is None or written is None or asked or written.get(IMAGES) in (None, self.images.lower()):
            return
        say(f"warning: the calibration images are not the ones that {self.file} was made with", quiet)

    def _used(self, overrides: tuple[str, ...]) -> dict[str, Any]:
        """Return the values of the options, except a budget that the command line replaces by another one."""
        options, given = options_of(self.command), _flags(overrides)
        replaced = any(options[key].flag in given for key in WAYS if key in options)
        return {k: v for k, v in self.values.items() if v is not None and not (replaced and k in WAYS)}

    def _name(self, key: str) -> Any:
        """Return a file name converted for the command."""
        return from_recipe(self.values[key], key, self.file.parent)


def _flags(arguments: tuple[str, ...]) -> set[str]:
    """Return the options among arguments as they were typed."""
    return {name.partition("=")[0] for name in arguments}


def options_of(command: str) -> dict[str, Option]:
    """Return the options of a command that a recipe can have, by key."""
    function = getattr(import_module(f".commands.{command}", __package__), command)
    options = describe_options(list_parameters(function)[0])
    return {option.key: option for _, option in options if option.key not in NOT_IN_RECIPES}


def read_recipe(file: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: it is not valid YAML, or not a recipe that this version can run.
    """
    content = _read_yaml(file)
    command = content.pop("command", "prune")
    if command not in COMMANDS:
        raise InputError(f"{file}: command is {show(command)}: expected {' or '.join(COMMANDS)}")
    version = content.pop("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise InputError(f"{file}: format_version is {show(version)}: this version reads {FORMAT_VERSION}")
    model = content.pop("model", None)
    if not isinstance(model, str) or not model.strip():
        raise InputError(f"{file}: model is {'missing' if model is None else show(model)}: expected its name")
    options = options_of(command)
    hashes = {key: content.pop(f"{key}_sha256", None) for key in HASHED if key == "model" or key in options}
    images = content.pop(IMAGES, None) if command == "prune" else None
    for key, digest in hashes.items():
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(HASH, digest)):
            raise InputError(f"{file}: {key}_sha256 is {show(digest)}: expected 64 hexadecimal digits")
        if digest is not None and key != "model" and key not in content:
            raise InputError(f"{file}: {key}_sha256 is given, but {key} is missing")
    if images is not None and not (isinstance(images, str) and re.fullmatch(IMAGES_HASH, images)):
        raise InputError(f"{file}: {IMAGES} is {show(images)}: expected 16 hexadecimal digits")
    if not isinstance(content.pop("versions", {}), dict):
        raise InputError(f"{file}: versions: expected package names with their versions")
    for key in content:
        if key not in options:
            raise InputError(f"{file}: {_unknown(key, command, options)}")
    hashes = {key: digest for key, digest in hashes.items() if digest is not None}
    recipe = Recipe(file, command, from_recipe(model, "model", file.parent), hashes, images, content)
    recipe.arguments(())  # raises an error for invalid values
    return recipe


def _unknown(key: Any, command: str, options: Mapping[str, Option]) -> str:
    """Return an error message for a key that recipes do not have."""
    name = str(key)
    if name in NOT_IN_RECIPES:
        return f"{name} is not in recipes: give --{name.replace('_', '-')} on the command line"
    common = ("command", "format_version", "model", *(f"{key}_sha256" for key in HASHED), IMAGES, "versions")
    close = difflib.get_close_matches(name.replace("-", "_").lower(), [*options, *common], 1, 0.5)
    others = [other for other in COMMANDS if other != command and name in options_of(other)]
    advice = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(options)}"
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
    """Return PyYAML's safe loader, extended to reject aliases, which recipes do not need, and duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):  # a few aliases can expand to a billion values
                raise yaml.YAMLError(f"an alias (line {self.peek_event().start_mark.line + 1}): write the value itself")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"a key that is not a string (line {key.start_mark.line + 1})")
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} is duplicated (line {key.start_mark.line + 1})")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def show(value: Any) -> str:
    """Return a value of a recipe for a message, shortened."""
    return reprlib.repr(value)


def make_recipe(folder: Path, name: str, model: TokenModel) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that creates the recipe of the running command from the report of its result.

    Args:
        folder: the folder that the recipe is written to. name: model name as given to the command.
        model: the model that was loaded by this name.
    """
    command, parameters, values = chosen.get()
    found: dict[str, Any] = {}
    for parameter, option in describe_options(parameters):
        value = values[parameter.name]
        of_this_call = option.panel == OUTPUT or (option.panel == HARDWARE and option.key not in MEASURED)
        if of_this_call or option.key in (*NOT_IN_RECIPES, "tensorboard"):
            continue
        value = value.value if isinstance(value, enum.Enum) else value
        if value not in (None, [], option.default) or option.key in ALWAYS:
            found[option.key] = value
    return describe_run(folder, command.__name__, name, model, found)


def describe_run(
    folder: Path, command: str, name: str, model: TokenModel | None, values: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that creates the recipe of a run from the report of its result.

    Args:
        folder, name: as for `make_recipe`. model: the model that was loaded by this name, or None.
        command: its command. values: key -> value of the command's options.
    """
    dense = model is not None and model.plan is None  # the source of a compressed model is that of its dense one
    recorded, digest = _identify(name, model.source if dense else None)
    recipe: dict[str, Any] = {"format_version": FORMAT_VERSION, "command": command}
    recipe |= {"model": to_recipe(recorded, folder), "model_sha256": digest}
    for key, value in values.items():
        recipe[key] = to_recipe(value, folder) if key in FILES else _plain(value)
        if key in HASHED and (digest := _hash_file(key, value)) is not None:
            recipe[f"{key}_sha256"] = digest
    return partial(_write, recipe)


def _write(recipe: dict[str, Any], report: Mapping[str, Any]) -> str:
    """Return the text of a recipe for the folder with this report."""
    import yaml

    from ..models.saved import versions

    if recipe["command"] == "prune" and (images := report["calibration"].get("content")) is not None:
        recipe = {**recipe, IMAGES: images}
    _written.set(recipe)
    recipe = {**recipe, "versions": {name: str(version) for name, version in versions().items()}}
    return HEADER + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _identify(name: str, source: Source | None = None) -> tuple[str, str]:
    """Return the name of a model (with its commit if it is on the Hub) and the SHA-256 of its file.

    Args:
        source: of a dense model, which includes both if it was loaded by this name; None: unknown.
    """
    from ..models.saved import WEIGHTS_FILE

    hub = parse_hub_name(name)
    if source is not None and (hub is not None or source.path == str(Path(name).absolute())):
        return (name if hub is None else source.path), source.sha256
    if hub is not None:
        from ..models.hub import fetch

        fetched = fetch(hub)
        path, name = fetched.path, str(fetched.name)
    else:
        path = Path(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder")
    return name, sha256(path / WEIGHTS_FILE if path.is_dir() else path)


def _hash_file(key: str, name: str) -> str | None:
    """Return the SHA-256 of the file named by an option; None if it does not exist.

    A plan or a sensitivity may be inside a folder. A missing file is reported by the command itself.
    """
    if key in ("model", "dense"):
        return _identify(name)[1]
    from ..compression.search.sensitivity import SENSITIVITY_FILE
    from ..models.saved import CONFIG_FILE

    path = Path(name)
    path = path / (CONFIG_FILE if key == "plan" else SENSITIVITY_FILE) if path.is_dir() else path
    return sha256(path) if path.is_file() else None


def schema() -> str:
    """Return the JSON schema of recipes."""
    common: dict[str, Any] = {
        "format_version": {"const": FORMAT_VERSION},
        "command": {"enum": [*COMMANDS]},
        "model": {"type": "string", "minLength": 1, "description": "File, folder or name on the Hugging Face Hub."},
        "versions": {"type": "object", "description": "Package versions that the recipe was made with."},
    }
    kinds = {}
    for command in COMMANDS:
        own = {key: option.schema() for key, option in options_of(command).items()}
        hashed = [key for key in HASHED if key == "model" or key in own]
        hashes: dict[str, Any] = {
            f"{key}_sha256": {
                "type": "string", "pattern": f"^{HASH}$",
                "description": f"SHA-256 of the {WHAT[key]}; any other is refused.",
            }
            for key in hashed
        }  # fmt: skip
        if command == "prune":
            text = "Hash of the calibration images; a run on others prints a warning."
            hashes[IMAGES] = {"type": "string", "pattern": f"^{IMAGES_HASH}$", "description": text}
        needs = {f"{key}_sha256": [key] for key in hashed}
        kinds[command] = {
            "properties": {**common, **hashes, **own}, "dependentRequired": needs, "additionalProperties": False,
        }  # fmt: skip
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
    """Convert a text to a number if it is one."""
    for kind in (int, float):
        try:
            if isinstance(value, str) and str(kind(value)) == value:
                return kind(value)
        except ValueError:
            pass
    return value
