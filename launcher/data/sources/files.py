"""The files that a local source names: one, those of a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launcher.data.sources.kinds import KNOWN, kind
from launcher.data.sources.ranges import File
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

_LEFT_OUT = re.compile(
    r"(readme|licen[cs]e|notice)(\..*)?|dataset_infos?\.json|_SUCCESS|_metadata|_common_metadata", re.IGNORECASE
)
"""What describes data, and what Spark leaves behind."""
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
    "test": {"test", "testing"},
}


def local_files(source: SourcePlan) -> list[File]:
    """The files of a local `source`, in the order of their names below the folder or pattern.

    A folder that `datasets.save_to_disk` wrote is one File, or the one of its split. Raises DataError for a path that
    is missing or unreadable, and for a folder or pattern without data or with files of no known kind.
    """
    path = Path(source.path)
    if not _exists(path) and glob.has_magic(source.path):
        _no_split(source)
        return [_file(found) for found in _matching(source.path)]
    _require(path)
    if is_saved_dataset(path):
        return [saved_dataset(path, source.split)]
    _no_split(source)
    if path.is_dir():
        below = {found.relative_to(path).as_posix(): found for found in _walk(path)}
        return [_file(below[name]) for name in data_files(source.path, below, one_split=True)]
    if kind(path.name) is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}", hint=f"known kinds: {KNOWN}")
    return [_file(path)]


def data_files(place: str, names: Iterable[str], *, one_split: bool = False) -> list[str]:
    """Those of `names` (relative, with /) that hold data, sorted; READMEs, licenses and hidden files are left out.

    Raises DataError where none is left, where one is of no known kind, where they belong to a folder written by
    `datasets.save_to_disk`, and if `one_split` where their names say that they are training and held-out data.
    """
    kept = sorted(
        name
        for name in names
        if not _LEFT_OUT.fullmatch(name.rpartition("/")[2])
        and not any(part.startswith(".") for part in name.split("/"))
    )
    saved = next((name for name in kept if name.rpartition("/")[2] in ("state.json", "dataset_dict.json")), None)
    if saved is not None:
        raise DataError(
            f"{place}: {saved} belongs to a folder written by datasets.save_to_disk",
            hint="give that folder itself, on this machine; it cannot be read together with others",
        )
    unknown = [name for name in kept if kind(name) is None]
    if unknown:
        raise DataError(
            f"{place}: files of no known kind: {_some(unknown)}",
            hint=f"take them out of it, or give a pattern such as {place.rstrip('/')}/*.jsonl; known kinds: {KNOWN}",
        )
    if not kept:
        raise DataError(f"{place}: no data in it", hint=f"known kinds of files: {KNOWN}")
    if one_split:
        _require_one_split(place, kept)
    return kept


def stamp(path: Path) -> str:
    """Size in bytes and time of change of a file, or of every file of a folder. Raises DataError."""
    if path.is_dir():
        parts = [f"{found.relative_to(path)}:{stamp(found)}" for found in sorted(_walk(path))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file", hint="write what it gives to a file first")
    return f"{status.st_size} bytes, changed {status.st_mtime_ns}"


def contents(file: File) -> Sequence[Path]:
    """The local files that hold `file`, in a fixed order."""
    path = Path(file.name)
    return sorted(_walk(path)) if path.is_dir() else [path]


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return os.path.isfile(path / "dataset_dict.json") or _is_one_dataset(path)


def saved_dataset(path: Path, split: str | None) -> File:
    """The folder that holds `split` of a data set written by `datasets.save_to_disk`. Raises DataError."""
    if _is_one_dataset(path):
        own = _described(path / "state.json").get("_split")
        if split is not None and own != split:
            raise DataError(f"{path}: no split {split!r} in a folder that holds one data set", hint="leave `split` out")
        return File(str(path), stamp(path))
    splits = [str(name) for name in _described(path / "dataset_dict.json").get("splits", ())]
    chosen = split if split is not None or len(splits) != 1 else splits[0]
    if chosen is None or chosen not in splits:
        asked = f"no split {chosen!r}" if chosen else "several splits and none asked for"
        raise DataError(f"{path}: {asked}", hint=f"give split: one of {', '.join(splits)}")
    return File(str(path / chosen), stamp(path / chosen))


def unreadable(path: Path | str, error: OSError) -> DataError:
    """`error` as what the user can mend."""
    return DataError(f"{path}: {error.strerror or error}", hint="check that the file is there and its permissions")


def _file(path: Path) -> File:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{str(path)!a}: the file's name is not UTF-8", hint="rename it: its rows are named by it"
        ) from error
    return File(str(path), stamp(path))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL byte, which is in no name
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def _require(path: Path) -> None:
    if not _exists(path):
        near = _nearest(path)
        raise DataError(
            f"{path}: no such file",
            hint=f"did you mean {near}?" if near else "a path is looked up beside the recipe, then in this directory",
        )
    try:
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from error


def _nearest(path: Path) -> Path | None:
    try:
        names = get_close_matches(path.name, os.listdir(path.parent), n=1)
    except (OSError, ValueError):
        return None
    return path.with_name(names[0]) if names else None


def _matching(pattern: str) -> list[Path]:
    found: dict[tuple[str, str], str] = {}  # by real folder and name: a link may lead around in a circle
    for match in sorted(glob.glob(pattern, recursive=True)):
        folder, name = os.path.split(match)
        found.setdefault((os.path.realpath(folder), name), match)
    files = {match: Path(match) for match in found.values() if not os.path.isdir(os.path.realpath(match))}
    if found and not files:
        raise DataError(f"{pattern}: matches folders only", hint=f"for the files in them: {pattern.rstrip('/')}/**")
    if not files:
        raise DataError(f"{pattern}: nothing matches", hint="`*` matches within a folder, `**` any number of folders")
    above = os.path.commonpath([path.parent for path in files.values()])
    below = {os.path.relpath(name, above).replace(os.sep, "/"): path for name, path in files.items()}
    return [below[name] for name in data_files(pattern, below)]


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below `folder`; links to folders are followed, each folder once."""
    seen = {os.path.realpath(folder)}

    def stop(error: OSError) -> None:
        raise unreadable(error.filename or folder, error)

    for top, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = {name: os.path.realpath(os.path.join(top, name)) for name in sorted(folders)}
        folders[:] = [name for name, target in real.items() if target not in seen]
        seen.update(real.values())
        yield from (Path(top, name) for name in names)


def _is_one_dataset(path: Path) -> bool:
    return os.path.isfile(path / "state.json") and os.path.isfile(path / "dataset_info.json")


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged", hint="write the folder again with datasets.save_to_disk")
    return found


def _no_split(source: SourcePlan) -> None:
    if source.split is not None:
        raise DataError(
            f"{source.path}: a file has no split {source.split!r}",
            hint="leave `split` out and name the files of that split; data sets of the hub and folders written by "
            "datasets.save_to_disk have splits",
        )


def _require_one_split(place: str, names: Sequence[str]) -> None:
    """Files named train and test in one folder: to read all of them would train on the test."""
    first: dict[str, str] = {}
    for name in names:
        words = set(re.split(r"[^a-z]+", name.lower()))
        splits = [split for split, spellings in _SPLIT_NAMES.items() if words & spellings]
        if len(splits) == 1:
            first.setdefault(splits[0], name)
    if len(first) > 1:
        raise DataError(
            f"{place}: holds several splits: {', '.join(first.values())}",
            hint="give the files of one split, such as a pattern that matches only the training files",
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
