"""Options under headings, and `takes`, which spreads groups of them into the parameters of a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from ..errors import InputError

BUDGET, PRUNING, IMAGES, MODEL_FILE = "Budget", "What to prune", "Images", "Model file"
FINETUNING, OUTPUT, HARDWARE = "Fine-tuning", "Output", "Hardware"
PANELS = (BUDGET, PRUNING, IMAGES, MODEL_FILE, FINETUNING, OUTPUT, HARDWARE)


def option(panel: str, *names: str, **settings: Any) -> Any:
    """An option under a heading of `--help`."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def takes(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its option groups as parameters of its own, which is what Typer reads."""
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

    @functools.wraps(command)
    def call(**values: Any) -> None:
        # An unset variable of a shell gives an empty text, which must not count as the default or the working folder.
        if empty := [name for name, value in values.items() if isinstance(value, str) and not value.strip()]:
            raise InputError(f"`{empty[0]}` is empty: give a value, or leave it out")
        built = {
            name: group(**{field: values.pop(field) for field in names}) for name, (group, names) in groups.items()
        }
        command(**values, **built)

    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__
    return call
