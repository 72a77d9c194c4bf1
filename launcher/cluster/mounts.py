"""Files that `ray up` copies to the hosts: what a recipe names, to places where the recipe finds it there."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import UserError
from launcher.plan.resolve_data import find_source
from launcher.recipe import catalog
from launcher.recipe.load import LoadedRecipe, load, resolve_path
from launcher.recipe.named import files, sources
from launcher.recipe.origin import shown


def file_mounts(recipes: Sequence[str], paths: Sequence[str]) -> tuple[dict[str, str], list[Path]]:
    """{place on the hosts: absolute place here} of recipes with all they name, and of `paths`; and what stays here.

    What is below the current folder comes to the same place below the home folder of the hosts, where `ray submit` runs
    the job: so RECIPE is typed as it is here. A path given outright comes to its own place from anywhere. What a recipe
    names elsewhere is taken to be on storage that the hosts share, and is returned second.

    Raises:
        RecipeError: a recipe is wrong; UserError: a path is not there.
    """
    here = Path.cwd().resolve()
    mounts, elsewhere = {}, []
    for path in sorted({path.resolve() for name in recipes for path in named(load(name))}):
        if path.is_relative_to(here) and path != here:
            mounts[f"~/{path.relative_to(here).as_posix()}"] = str(path)
        else:
            elsewhere.append(path)
    for text in paths:
        path = Path(text).expanduser().resolve()
        if not path.exists():
            raise UserError(f"--mount {text}: not found", hint="it takes a file or folder of this machine")
        place = f"~/{path.relative_to(here).as_posix()}" if path.is_relative_to(here) else str(path)
        mounts[place.removesuffix("/.")] = str(path)
    return mounts, elsewhere


def named(loaded: LoadedRecipe) -> Iterator[Path]:
    """The recipe's own files, and the local files and folders that it names and that exist; not what is packaged."""
    packaged = catalog.folder().resolve()
    for path in [*loaded.files, *_values(loaded)]:
        if not path.resolve().is_relative_to(packaged):
            yield path


def _values(loaded: LoadedRecipe) -> Iterator[Path]:
    model = loaded.recipe.model.path
    for key, text in [*([("model.path", model)] if model else []), *files(loaded.recipe)]:
        if path := resolve_path(text, loaded.origin(key)):
            yield path
    for key, source in sources(loaded.recipe):
        found = find_source(source.path, loaded.origin(f"{key}.path"))
        if found is not None and found[0] == "local":
            yield from map(Path, glob.glob(found[1], recursive=True) or [found[1]])


def places(paths: Sequence[Path]) -> str:
    """Paths in words."""
    return ", ".join(shown(path) for path in paths)
