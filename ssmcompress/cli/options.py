"""Options under headings, and `takes`, which expands groups of them into the parameters of a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, get_type_hints

import typer

from ..errors import InputError
from ..hub_names import check_no_address
from .devices import explain_memory

BUDGET, PRUNING, IMAGES, MODEL_FILE = "Budget", "What to prune", "Images", "Model file"
FINETUNING, MAPS, OUTPUT, HARDWARE = "Fine-tuning", "Maps", "Output", "Hardware"
PANELS = (BUDGET, PRUNING, MAPS, IMAGES, MODEL_FILE, FINETUNING, OUTPUT, HARDWARE)


class Chosen(NamedTuple):
    """The command being run: its function, its parameters, and their values by name."""

    command: Callable[..., None]
    parameters: tuple[inspect.Parameter, ...]
    values: Mapping[str, Any]


chosen: ContextVar[Chosen] = ContextVar("ssmcompress_chosen")


def option(panel: str, *names: str, **settings: Any) -> Any:
    """Return an option under a heading of `--help`."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def list_parameters(
    command: Callable[..., None],
) -> tuple[list[inspect.Parameter], dict[str, tuple[type, list[str]]]]:
    """Return the parameters of a command with its option groups expanded to their fields, and these groups.

    The groups are keyed by the name of the parameter that takes them, with the names of their fields.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = get_type_hints(hints[name], include_extras=True)
        groups[name] = hints[name], [field.name for field in dataclasses.fields(hints[name])]
        for field in dataclasses.fields(hints[name]):
            kind, default = inspect.Parameter.KEYWORD_ONLY, field.default
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=fields[field.name]))
    return parameters, groups


def takes(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that expands the option groups of a command into parameters that Typer can read.

    If a group has a method `begin`, it is called before the command.
    """
    parameters, groups = list_parameters(command)
    by_name = {parameter.name: parameter for parameter in parameters}

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, text in _texts(values):
            # An unset shell variable expands to an empty text, which must not be taken for the default or the working
            # directory.
            if not text.strip():
                raise InputError(f"{_shown(by_name[name])} is empty: give a value, or leave it out")
            check_no_address(text)
        chosen.set(Chosen(command, tuple(parameters), dict(values)))
        built = {
            name: group(**{field: values.pop(field) for field in names}) for name, (group, names) in groups.items()
        }
        for group in built.values():
            if hasattr(group, "begin"):
                group.begin()
        with explain_memory(command.__name__, chosen.get().values):
            command(**values, **built)

    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__
    return call


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each text among the values of parameters, including texts in lists."""
    for name, value in values.items():
        texts = value if isinstance(value, list) else [value]
        yield from ((name, text) for text in texts if isinstance(text, str))


def _shown(parameter: inspect.Parameter) -> str:
    """Return the name of a parameter in messages: arguments appear in the help as CKPT or MODEL."""
    infos = getattr(parameter.annotation, "__metadata__", ())
    names = [info.metavar for info in infos if isinstance(info, typer.models.ArgumentInfo) and info.metavar]
    return names[0] if names else f"`{parameter.name}`"
