"""The Typer app: every module of `commands` is a command, run by its function of the same name."""

from __future__ import annotations

import io
import os
import pkgutil
import sys
from importlib import import_module
from typing import Annotated

import typer

from .._version import __version__
from . import commands
from .help import Command, Commands
from .options import takes

# Order of the commands in the help; others follow in alphabetical order.
ORDER = (
    "inspect",
    "prune",
    "run",
    "report",
    "evaluate",
    "export",
    "verify",
    "finetune",
    "benchmark",
    "compare",
    "visualize",
    "demo",
)

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make vision state-space models cheaper to run: prune tokens with alignment, measure, export.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ssmcompress {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _register() -> None:
    names = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    for name in sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        module = import_module(f"{commands.__name__}.{name}")
        settings = getattr(module, "SETTINGS", None)
        app.command(name, cls=Command, epilog=module.EXAMPLE, context_settings=settings)(takes(getattr(module, name)))


_register()


def main() -> None:
    """Entry point of the `ssmcompress` command."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):  # redirected output is cp1252 on Windows; names have any characters
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
