"""Options of commands as data: the values that a recipe file may contain, and the equivalent arguments."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import typer

# Options whose values are file names.
FILES = ("data", "eval_data", "sensitivity", "plan", "recipe", "dense", "output", "tensorboard")


@dataclass(frozen=True)
class Option:
    """An option of a command, as a recipe has it.

    Attributes:
        key: its key. flag: as typed on the command line; opposite: its negative form, or "". kind: bool, int, float or
            str. default: the value if it is not given.
        several: whether it can be given more than once. choices: the allowed values, if they are limited.
        least, most: limits of a number. panel: its heading in the help. text: its help.
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
        """Return the command-line arguments for a value; ValueError if the value is invalid for the option."""
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return [self.flag] if value else [self.opposite] if self.opposite else []
        if self.several:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError("a list of strings")
            return [text for v in value for text in (self.flag, v)]
        if self.kind is str:
            return [self.flag, self._text(value)]
        whole = self.kind is int
        if isinstance(value, str):  # YAML reads 1e-1 as text
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
            raise ValueError("a name" if self.key in FILES else "a string, a number or a list of these")
        return ",".join(map(str, parts))


def describe_options(parameters: Iterable[inspect.Parameter]) -> Iterator[tuple[inspect.Parameter, Option]]:
    """Yield the options among the parameters of a command, each with its description."""
    for parameter in parameters:
        info = _find_info(parameter)
        if info is not None:
            yield parameter, _describe(parameter, info)


def _find_info(parameter: inspect.Parameter) -> typer.models.OptionInfo | None:
    """Return Typer's description of a parameter that is an option; None for an argument."""
    infos = getattr(parameter.annotation, "__metadata__", ())
    return next((info for info in infos if isinstance(info, typer.models.OptionInfo)), None)


def _describe(parameter: inspect.Parameter, info: typer.models.OptionInfo) -> Option:
    hint = get_args(parameter.annotation)[0]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    several = get_origin(hint) is list
    hint = get_args(hint)[0] if several else hint
    declared = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ())]
    names = [name for part in declared for name in part.split("/")] or [f"--{parameter.name.replace('_', '-')}"]
    names = [name for name in names if name.startswith("--")]
    # For --align/--no-align; --no-latency has no positive form.
    flag, *others = names
    opposite = next((name for name in others if name.startswith("--no-")), "")
    choices = tuple(member.value for member in hint) if issubclass(hint, enum.Enum) else ()
    default = parameter.default.value if isinstance(parameter.default, enum.Enum) else parameter.default
    return Option(
        flag.lstrip("-").replace("-", "_"), flag, opposite, str if choices else hint, default, several, choices,
        info.min, info.max, info.rich_help_panel or "", info.help or "",
    )  # fmt: skip
