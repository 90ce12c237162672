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

# Options that a recipe does not have, because a person has to say them at each call; and ways to say how much to prune,
# of which one given on the command line replaces that of the recipe.
NOT_IN_RECIPES = ("unsafe_load", "force", "json", "quiet", "verbose", "dry_run", "resume", "log_file")
WAYS = ("ratio", "flops", "flops_backbone", "latency", "max_drop", "plan", "merge")
# Options whose value is recorded even where it is the default, and those of the hardware that change the report.
ALWAYS, MEASURED = ("seed", "samples"), ("dtype", "no_latency")
# Names of files whose hash is recorded, KEY_sha256; and the key of the hash of the images that were calibrated on, with
# the options that decide which these are.
WHAT = {"model": "model", "plan": "plan", "sensitivity": "sensitivity", "dense": "dense model"}
HASHED = tuple(WHAT)
IMAGES = "images_digest"
CHOOSE_IMAGES = ("data", "eval_data", "samples", "seed", "finetune_epochs", "reduce_zero_label")
HASH, IMAGES_HASH = "[0-9a-fA-F]{64}", "[0-9a-fA-F]{16}"

HEADER = f"""\
# The whole compression as a file: `ssmcompress run {RECIPE_FILE}` makes the same weights again. Options on its command
# line override what is here; `ssmcompress run --schema` prints a JSON schema for editors.
"""

# The recipe that the command has written last.
_written: ContextVar[Mapping[str, Any] | None] = ContextVar("ssmcompress_recipe", default=None)


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Attributes:
        file: where it was read from. command: its command. model: the model, as a name for the command.
        hashes: key of a file -> SHA-256, of those that are said. images: hash of the images that were calibrated on, or
            None. values: key -> value of the options.
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
            overrides: further arguments from the command line, which count more than the recipe.

        Raises:
            InputError: a value that its option cannot have.
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
        """Raise an InputError if a file that it names is another one than the recipe was made with.

        Args:
            overrides: further arguments from the command line; the files that they replace are not read.
        """
        given, used = _flags(overrides), self._used(overrides)
        options = options_of(self.command)
        for key, expected in self.hashes.items():
            if key != "model" and (key not in used or options[key].flag in given):
                continue
            name = self.model if key == "model" else self._name(key)
            if _hash_file(key, name) not in (None, expected.lower()):
                raise InputError(
                    f"{name} has changed since {self.file} was made: give the {WHAT[key]} as it was by `{key}`, or "
                    f"remove {key}_sha256 from the recipe to run it with this one"
                )

    def say_if_images_differ(self, overrides: tuple[str, ...], quiet: bool) -> None:
        """Warn after its run if other images were calibrated on than those that the recipe was made with.

        Args:
            overrides: further arguments from the command line, which may ask for other images.
        """
        options, written = options_of(self.command), _written.get()
        asked = _flags(overrides) & {options[key].flag for key in CHOOSE_IMAGES if key in options}
        if self.images is None or written is None or asked or written.get(IMAGES) in (None, self.images.lower()):
            return
        say(f"warning: the images that were calibrated on are not those that {self.file} was made with", quiet)

    def _used(self, overrides: tuple[str, ...]) -> dict[str, Any]:
        """Return the values of the options, without those that the command line replaces by another way to prune."""
        options, given = options_of(self.command), _flags(overrides)
        replaced = any(options[key].flag in given for key in WAYS if key in options)
        return {k: v for k, v in self.values.items() if v is not None and not (replaced and k in WAYS)}

    def _name(self, key: str) -> Any:
        """Return the name of a file as one for the command."""
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
        InputError: it is no YAML, or not a recipe that this version can run.
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
            raise InputError(f"{file}: {key}_sha256 is there, but {key} is missing")
    if images is not None and not (isinstance(images, str) and re.fullmatch(IMAGES_HASH, images)):
        raise InputError(f"{file}: {IMAGES} is {show(images)}: expected 16 hexadecimal digits")
    if not isinstance(content.pop("versions", {}), dict):
        raise InputError(f"{file}: versions: expected package names with their versions")
    for key in content:
        if key not in options:
            raise InputError(f"{file}: {_unknown(key, command, options)}")
    hashes = {key: digest for key, digest in hashes.items() if digest is not None}
    recipe = Recipe(file, command, from_recipe(model, "model", file.parent), hashes, images, content)
    recipe.arguments(())  # values that cannot be
    return recipe


def _unknown(key: Any, command: str, options: Mapping[str, Option]) -> str:
    """Return what is wrong with a key that a recipe does not have."""
    name = str(key)
    if name in NOT_IN_RECIPES:
        return f"{name} is not in recipes: give --{name.replace('_', '-')} on the command line"
    common = ("command", "format_version", "model", *(f"{key}_sha256" for key in HASHED), IMAGES, "versions")
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


def make_recipe(folder: Path, name: str, model: TokenModel) -> Callable[[Mapping[str, Any]], str]:
    """Return what makes the recipe of the command that is running from the report of its result.

    Args:
        folder: the folder that the recipe is written to. name: of the model, as the command was given it.
        model: the model that was read by this name.
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
    """Return what makes the recipe of a run from the report of its result.

    Args:
        folder, name: as for `make_recipe`. model: the model that was read by this name, or None.
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
    """Return the text of a recipe for a folder with this report."""
    import yaml

    from ..models.saved import versions

    if recipe["command"] == "prune" and (images := report["calibration"].get("content")) is not None:
        recipe = {**recipe, IMAGES: images}
    _written.set(recipe)
    recipe = {**recipe, "versions": {name: str(version) for name, version in versions().items()}}
    return HEADER + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _identify(name: str, source: Source | None = None) -> tuple[str, str]:
    """Return the name of a model, on the Hub with its commit, and the SHA-256 of its file.

    Args:
        source: of a dense model, which has them if it was read by this name; None: unknown.
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
    """Return the SHA-256 of the file that an option of this key names; None if there is none.

    That of a plan or a sensitivity may be in a folder; the command says it in its own words if it is not there.
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
        "versions": {"type": "object", "description": "What the recipe was made with."},
    }
    kinds = {}
    for command in COMMANDS:
        own = {key: option.schema() for key, option in options_of(command).items()}
        hashed = [key for key in HASHED if key == "model" or key in own]
        hashes: dict[str, Any] = {
            f"{key}_sha256": {
                "type": "string", "pattern": f"^{HASH}$",
                "description": f"Refuse another {WHAT[key]} than the one with this hash.",
            }
            for key in hashed
        }  # fmt: skip
        if command == "prune":
            text = "Hash of the images that were calibrated on: a run on others warns."
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
    """Return a text that is a number as one."""
    for kind in (int, float):
        try:
            if isinstance(value, str) and str(kind(value)) == value:
                return kind(value)
        except ValueError:
            pass
    return value
