"""From a recipe's name and the command line's overrides to a Recipe, or to every mistake in it at once."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.errors import RecipeError, UserError
from launcher.recipe import catalog
from launcher.recipe.check import check
from launcher.recipe.document import Document, Finding, Key, Reader, dotted, read
from launcher.recipe.explain import describe, explain
from launcher.recipe.layers import overlay, override
from launcher.recipe.origin import DEFAULT, Origin, candidates, resolve_path, shown
from launcher.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Origin", "candidates", "load", "resolve_path"]

OWN = ("name", "description")
"""Keys that speak of one file and are not inherited by those that extend it."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that is right in itself, with where each of its values was written."""

    recipe: Recipe
    origins: dict[str, Origin]
    """Of every leaf that was written, by its dotted key (`data.train.0.path`); what is not here is a default."""
    text: str
    """All layers merged, as YAML: the run's recipe.yaml. It extends nothing, and its paths are absolute."""
    file: Path
    """The recipe that was asked for; absolute."""
    files: tuple[Path, ...]
    """Every file that was read, the one asked for first."""
    hash: str
    """First 16 hex digits of the SHA-256 of the merged values."""

    def origin(self, key: str) -> Origin:
        """Where the value of a dotted key was written."""
        return self.origins.get(key, DEFAULT)


def load(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file or a packaged recipe, what it extends, and `key.path=value` overrides.

    Raises RecipeError with all that is wrong in it, in the order of the files, and UserError where there is no recipe.
    """
    chain = _read_chain(find(name_or_path))
    files = tuple(chain.documents)
    merged = Document()
    for document in reversed(chain.documents.values()):
        for key in OWN:
            merged.values.pop(key, None)
            merged.origins.pop((key,), None)
        overlay(merged, document)
    merged.findings.extend(chain.findings)
    for position, text in enumerate(overrides, start=1):
        override(merged, text, position)
    if merged.values.pop("extends", None) is not None:
        origin = merged.origins.pop(("extends",))
        hint = "write a recipe file that extends it"
        merged.findings.append(Finding(origin, ("extends",), "cannot be given on the command line", hint))

    recipe = _validate(merged, files[0])
    if merged.findings or recipe is None:
        raise RecipeError([finding.problem() for finding in sorted(merged.findings, key=_in_order(files))])

    return LoadedRecipe(
        recipe=recipe,
        origins={dotted(key): origin for key, origin in merged.origins.items() if _is_leaf(merged.values, key)},
        text=_text(merged, files, overrides),
        file=files[0],
        files=files,
        hash=hashlib.sha256(json.dumps(merged.values, sort_keys=True).encode()).hexdigest()[:16],
    )


def find(name_or_path: str) -> Path:
    """The file that a recipe's name or path means, absolute; a file comes before a packaged recipe of that name."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return Path(os.path.normpath(path.absolute()))
    if found := catalog.find(name_or_path):
        return found
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{name_or_path} is a run's folder, not a recipe", f"its recipe is {path / 'recipe.yaml'}")
    message = f"recipe not found: {name_or_path} (neither a file nor a packaged recipe)"
    raise UserError(message, _near(name_or_path, Path()))


def _near(wanted: str, folder: Path) -> str:
    """What may have been meant by a recipe that is not there, written the way it should have been."""
    path = Path(wanted).expanduser()
    siblings = [str(path.parent / file.name) for file in (folder / path).parent.glob("*.yaml")]
    if f"{path}.yaml" in siblings:
        return f"did you mean {path}.yaml?"
    names = catalog.names()
    # The last part on its own finds `llama-3.1/8b-qlora` from `8b-qlora`.
    by_last_part = {name.rpartition("/")[2]: name for name in reversed(names)}
    close = get_close_matches(wanted, [*names, *siblings], n=1)
    close = close or [by_last_part[last] for last in get_close_matches(path.name, by_last_part, n=1, cutoff=0.7)]
    return f"did you mean {close[0]}?" if close else "`slipway recipes list` shows the packaged ones"


@dataclass
class _Chain:
    """A recipe and what it extends, nearest first, with what is wrong in the links."""

    documents: dict[Path, Document] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def _read_chain(top: Path) -> _Chain:
    chain = _Chain()
    path: Path | None = top
    while path:
        document = chain.documents[path] = read(path)
        parent = document.values.pop("extends", None)
        origin = document.origins.pop(("extends",), DEFAULT)
        path = None if parent is None else _parent(parent, origin, chain)
    return chain


def _parent(parent: Any, origin: Origin, chain: _Chain) -> Path | None:
    """The file that `extends` names, or None with a finding."""
    if not isinstance(parent, str):
        message = f"expected text, got {describe(parent)}"
        chain.findings.append(Finding(origin, ("extends",), message, "a recipe extends one other"))
        return None
    assert origin.file is not None
    beside = Path(os.path.normpath(origin.file.parent / Path(parent).expanduser()))
    path = beside if beside.is_file() else catalog.find(parent)
    if path is None:
        message = f"not found: {parent} (looked for {shown(beside)}, and for a packaged recipe)"
        chain.findings.append(Finding(origin, ("extends",), message, _near(parent, origin.file.parent)))
    elif path in chain.documents:
        circle = [*list(chain.documents)[list(chain.documents).index(path) :], path]
        message = f"goes in a circle: {' -> '.join(shown(file) for file in circle)}"
        chain.findings.append(Finding(origin, ("extends",), message, "a recipe cannot extend itself; cut one link"))
        return None
    return path


def _validate(merged: Document, top: Path) -> Recipe | None:
    """The Recipe, or None with the reasons added to `merged.findings`.

    Values that are wrong by themselves are set aside, so that what is wrong between the others is found too. Not so
    where a file is missing or no YAML: what it would have given cannot be called missing.
    """
    whole = not any(finding.origin.file and finding.key in ((), ("extends",)) for finding in merged.findings)
    values = copy.deepcopy(merged.values)
    wrong: list[Key] = [finding.key for finding in merged.findings if finding.key]
    recipe = None
    try:
        recipe = _recipe(values)
    except ValidationError as error:
        for key, message, hint in explain(error, values):
            merged.findings.append(Finding(_origin(merged, key, top), key, message, hint))
            wrong.append(key)
        for key in wrong:
            _remove(values, key)
        try:
            recipe = _recipe(values)
        except ValidationError:
            return None
    if whole:
        for conflict in check(recipe):
            keys = [_split(key) for key in conflict.keys]
            if not any(_overlap(key, bad) for key in keys for bad in wrong):
                origin = _origin(merged, keys[0], top)
                merged.findings.append(Finding(origin, keys[0], conflict.message, conflict.hint))
    return recipe


def _recipe(values: dict[str, Any]) -> Recipe:
    # Strict, so that `seed: true` and `packing: 1` are mistakes; through JSON, where a list may still fill a tuple.
    return Recipe.model_validate_json(json.dumps(values), strict=True)


def _origin(document: Document, key: Key, top: Path) -> Origin:
    """Where a key was written; where it was not, the section around it, or the recipe as a whole."""
    for length in range(len(key), 0, -1):
        if key[:length] in document.origins:
            return document.origins[key[:length]]
    return Origin("file", top)


def _remove(values: Any, key: Key) -> None:
    """Take out a value; an element of a list takes the list with it, since the others would move."""
    here = values
    for step, following in itertools.pairwise([*key, None]):
        if not isinstance(here, dict) or step not in here:
            return
        if following is None or isinstance(following, int):
            del here[step]
            return
        here = here[step]


def _overlap(one: Key, other: Key) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _split(key: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _is_leaf(values: Any, key: Key) -> bool:
    for step in key:
        values = values[step]
    return not (isinstance(values, dict | list) and values)


def _in_order(files: tuple[Path, ...]) -> Any:
    def position(finding: Finding) -> tuple[int, int]:
        origin = finding.origin
        return (files.index(origin.file) if origin.file else len(files), origin.line or 0)

    return position


class _Writer(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our Reader would take for something else."""


_Writer.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *Reader.yaml_implicit_resolvers[None]]
    for first in [None, *yaml.SafeDumper.yaml_implicit_resolvers]
}


def _text(merged: Document, files: tuple[Path, ...], overrides: Sequence[str]) -> str:
    values = copy.deepcopy(merged.values)
    for key, origin in merged.origins.items():
        _make_absolute(values, key, origin)
    layers = [f"# {shown(file)}" for file in files] + [f"#   {text}" for text in overrides]
    body = yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "\n".join(["# Merged by Slipway from:", *layers, body])


def _make_absolute(values: dict[str, Any], key: Key, origin: Origin) -> None:
    """The merged recipe lies in the run's folder, where a path beside its author's file means nothing."""
    match key:
        case ("model", "path" | "tokenizer"):
            marker = "*config.json"  # or a folder that happens to be called gpt2 would take the hub id's place
        case ("model", "chat_template") | ("data", "train" | "test", int(), "path"):
            marker = ""
        case ("data", "eval", "sources", int(), "path"):
            marker = ""
        case _:
            return
    here: Any = values
    for step in key[:-1]:
        here = here[step]
    path = resolve_path(here[key[-1]], origin) if isinstance(here[key[-1]], str) else None
    if path and (not marker or any(path.glob(marker))):
        here[key[-1]] = str(path)
