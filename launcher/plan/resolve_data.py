"""The data of a Plan: every path absolute, every source of a known kind."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from launcher.errors import DataError
from launcher.plan.plan import AugmentPlan, CleanPlan, DataPlan, HeldOutPlan, ReplayPlan, SourceKind, SourcePlan
from launcher.recipe.load import LoadedRecipe, Origin, candidates, resolve_path
from launcher.recipe.schema_data import HeldOut, Source

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve_data(loaded: LoadedRecipe) -> DataPlan:
    """The data with absolute paths; a hub id keeps the revision that the recipe names.

    Raises:
        DataError: a file that is not there.
    """
    section, retain = loaded.recipe.data, loaded.recipe.evaluate.retain
    classifies = loaded.recipe.task == "sequence_classification"
    file, name = _function(loaded, section.augment.function)
    return DataPlan(
        train=_sources(loaded, "data.train", section.train),
        eval=_held_out(loaded, "data.eval", section.eval),
        test=_held_out(loaded, "data.test", section.test),
        label=section.label,
        group=section.group,
        stratify=section.stratify,
        balance=section.balance,
        replay=ReplayPlan(
            sources=_sources(loaded, "data.replay.sources", section.replay.sources), share=section.replay.share
        )
        if section.replay
        else None,
        retain=_sources(loaded, "evaluate.retain.sources", retain.sources) if retain else (),
        slices=loaded.recipe.evaluate.slices,
        clean=CleanPlan(
            contamination=_sources(loaded, "data.clean.contamination", section.clean.contamination),
            **section.clean.model_dump(exclude={"contamination"}),
        ),
        augment=AugmentPlan(function_file=file, function_name=name, **section.augment.model_dump(exclude={"function"})),
        max_length=section.max_length,
        packing=section.packing and not classifies,
        too_long=section.too_long,
        on_bad_row=section.on_bad_row,
        supervise=section.supervise,
        special_tokens=section.special_tokens,
        system_turns=section.system_turns,
        head=() if classifies else None,
    )


def _held_out(loaded: LoadedRecipe, key: str, held_out: HeldOut) -> HeldOutPlan:
    return HeldOutPlan(
        split=held_out.split or None,
        rows=held_out.rows,
        sources=_sources(loaded, f"{key}.sources", held_out.sources),
    )


def _sources(loaded: LoadedRecipe, key: str, sources: tuple[Source, ...]) -> tuple[SourcePlan, ...]:
    return tuple(_source(loaded, f"{key}.{i}.path", source) for i, source in enumerate(sources))


def _source(loaded: LoadedRecipe, key: str, source: Source) -> SourcePlan:
    origin = loaded.origins[key]
    found = find_source(source.path, origin)
    if found is None:
        what = f"nothing matches {source.path}" if glob.has_magic(source.path) else f"{source.path} does not exist"
        raise DataError(
            f"{origin}: {key}: {what}",
            hint="paths are looked up beside the recipe, then in the current directory; on the command line: "
            f"{key}=FILE",
        )
    kind, path = found
    return SourcePlan(kind=kind, path=path, **source.model_dump(exclude={"path"}))


def find_source(path: str, origin: Origin) -> tuple[SourceKind, str] | None:
    """What `path` names: an absolute path or pattern, a URL or a hub id; None for a local file that is missing."""
    if _URL.match(path):
        return "url", path
    if found := resolve_path(path, origin):
        return "local", str(found)
    if glob.has_magic(path):
        matching = (str(place) for place in candidates(path, origin) if glob.glob(str(place), recursive=True))
        return next((("local", place) for place in matching), None)
    if _HUB_ID.fullmatch(path) and not Path(path).suffix:
        return "hub", path
    return None


def _function(loaded: LoadedRecipe, value: str | None) -> tuple[str | None, str | None]:
    if value is None:
        return None, None
    return find_function(loaded, "data.augment.function", value)


def find_function(loaded: LoadedRecipe, key: str, value: str) -> tuple[str, str]:
    """The absolute file and the name of the function that `file.py:name` at `key` means.

    Raises:
        DataError: there is no such file, or no name.
    """
    file, _, name = value.rpartition(":")
    origin = loaded.origins[key]
    found = resolve_path(file, origin) if file else None
    if found is None or not found.is_file() or not name.isidentifier():
        raise DataError(
            f"{origin}: {key}: {value!r} names no function in a file",
            hint="write it as file.py:name; the file is looked up beside the recipe",
        )
    return str(found.resolve()), name
