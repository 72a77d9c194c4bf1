"""`slipway recipes`: the recipes that come with Slipway, and every key a recipe may have."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, Overrides, RecipeName


def list_(as_json: Json = False) -> None:
    """List the packaged recipes."""
    from launcher.recipe import catalog
    from launcher.recipe.document import read

    described = []
    for name in catalog.names():
        file = catalog.folder() / f"{name}.yaml"
        described.append((name, str(read(file).values.get("description") or ""), str(file)))
    if as_json:
        render.print_json([{"name": name, "description": text, "file": file} for name, text, file in described])
    elif described:
        render.print_columns([(name, text) for name, text, _ in described])


def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    merged: Annotated[bool, typer.Option("--merged", help="With what it extends, as one file")] = False,
) -> None:
    """Print a recipe: as it is written, or merged with what it extends and with overrides."""
    from launcher.recipe.load import find, load

    if merged or overrides:
        print(load(recipe, overrides or ()).text, end="")
    else:
        print(find(recipe).read_text(encoding="utf-8"), end="")


def schema() -> None:
    """Print every key of a recipe with its type, default and meaning, as JSON Schema."""
    from launcher.recipe.schema import Recipe

    render.print_json(Recipe.model_json_schema())


commands = {"list": list_, "show": show, "schema": schema}
