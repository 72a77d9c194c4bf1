"""`slipway check`: read a recipe, report every mistake in it, and show what it sets and where. Needs no torch."""

from __future__ import annotations

from launcher.cli import render
from launcher.cli.arguments import Json, Overrides, RecipeName
from launcher.plan.resolve_data import find_source
from launcher.recipe.load import LoadedRecipe, candidates, load
from launcher.recipe.named import sources
from launcher.recipe.origin import shown


def command(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Read a recipe and show what it sets and where, or every mistake in it."""
    loaded = load(recipe, overrides or ())
    if as_json:
        render.print_json(
            {
                "recipe": loaded.recipe.model_dump(mode="json"),
                "origins": {key: str(origin) for key, origin in loaded.origins.items()},
                "files": [str(file) for file in loaded.files],
                "hash": loaded.hash,
            }
        )
        return
    render.print_columns([(key, _value(loaded, key), str(origin)) for key, origin in loaded.origins.items()])
    for key, path in _missing_data(loaded):
        places = " and ".join(shown(place) for place in candidates(path, loaded.origin(key)))
        render.note(f"{key}: {path} is not here yet (looked for {places})")
    print(f"ok: {shown(loaded.file)}; every other key has its default; hash {loaded.hash}")


def _value(loaded: LoadedRecipe, key: str) -> str:
    here: object = loaded.recipe
    for step in key.split("."):
        if isinstance(here, dict):
            here = here[step]
        else:
            here = here[int(step)] if isinstance(here, tuple | list) else getattr(here, step)
    text = "null" if here is None else str(here).lower() if isinstance(here, bool) else str(here)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _missing_data(loaded: LoadedRecipe) -> list[tuple[str, str]]:
    """Keys and paths of data files that are not there. Not an error: a recipe may be checked before its data comes."""
    named = [(f"{key}.path", source.path) for key, source in sources(loaded.recipe)]
    return [(key, path) for key, path in named if find_source(path, loaded.origin(key)) is None]
