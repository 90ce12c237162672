"""`ssmcompress run`: run a whole compression from a recipe file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError
from ..options import OUTPUT, option
from ..recipes import read_recipe, schema
from ..terminal import is_quiet

EXAMPLE = """
ssmcompress run recipe.yaml
ssmcompress run compressed/model-r0.30/recipe.yaml --samples 512 -o again
"""
# Options of the command that the recipe is for.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def run(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="FILE", help="Recipe file; every folder that prune wrote has one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to use instead of the one in the recipe.")] = None,
    print_schema: Annotated[
        bool, option(OUTPUT, "--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
) -> None:
    """Run a recipe, a YAML file with a model and options of prune or finetune; further options override it."""
    if print_schema:
        print(schema())
        return
    if recipe is None:
        raise InputError("no recipe to run: give FILE, a recipe.yaml")
    if recipe.startswith("-"):
        raise InputError(f"{recipe}: expected the recipe first, then options that override it")
    asked = read_recipe(Path(recipe))
    overrides = tuple(context.args)
    if model is not None:
        others = {key: digest for key, digest in asked.hashes.items() if key != "model"}
        asked = replace(asked, model=model, hashes=others)
    asked.check_files(overrides)
    command = context.parent.command.get_command(context, asked.command)
    with command.make_context(asked.command, asked.arguments(overrides), parent=context.parent) as inner:
        command.invoke(inner)
    asked.say_if_images_differ(overrides, is_quiet())
