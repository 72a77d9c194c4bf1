"""Reading what the user has: .jsonl, .json, or a folder written by `datasets.save_to_disk`, each row with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

Row = tuple[str, dict[str, Any] | DataError]
"""`file:line` and the row's columns, or what is wrong with it: the reader goes on, its caller decides."""

_BLOCK_BYTES = 1 << 20


def read(source: SourcePlan) -> Iterator[Row]:
    """The rows of `source` in order, at most `source.limit` of them.

    Raises DataError for a file that is missing, unreadable, of an unknown kind or without a row. A single row that
    cannot be used is yielded as a DataError that begins with its `file:line`.
    """
    path = Path(source.path)
    _require(path)
    if path.is_dir():
        rows = _read_dataset(path, source.split)
    elif path.suffix == ".jsonl":
        rows = _read_lines(path)
    elif path.suffix == ".json":
        rows = _read_list(path)
    else:
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}",
            hint="give a .jsonl file, a .json file with a list, or a folder written by datasets.save_to_disk",
        )
    if source.split is not None and not path.is_dir():
        raise DataError(
            f"{path}: a file has no split {source.split!r}", hint="leave `split` out, or give a data set's folder"
        )
    empty = True
    for row in islice(rows, source.limit):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: no rows in it", hint="write one JSON object a line")


def fingerprint(source: SourcePlan) -> tuple[str, int | None]:
    """SHA-256 of everything `source` holds, and its number of rows where counting lines tells it.

    Streams; raises DataError where the file is missing or unreadable.
    """
    path = Path(source.path)
    _require(path)
    digest, num_lines = hashlib.sha256(), 0
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                num_lines += block.count(b"\n")
    if path.suffix != ".jsonl":
        return digest.hexdigest(), source.limit
    return digest.hexdigest(), min(num_lines, source.limit or num_lines)


def _require(path: Path) -> None:
    if not path.exists():
        near = _nearest(path)
        raise DataError(
            f"{path}: no such file",
            hint=f"did you mean {near}?" if near else "a path is looked up beside the recipe, then in this directory",
        )
    try:
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="check the file's permissions") from error


def _nearest(path: Path) -> Path | None:
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return None
    names = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return path.with_name(names[0]) if names else None


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows editors write it
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            yield where, _parse(raw, where)


def _parse(raw: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 at byte {error.start + 1} of the line", hint="save the file as UTF-8")
    except json.JSONDecodeError as error:
        hint = "one JSON object a line; data.on_bad_row=drop leaves such rows out"
        if raw.lstrip().startswith(b"["):
            hint = "a list over several lines belongs in a file named .json"
        return DataError(f"{where}: not JSON: {error.msg} at column {error.colno}", hint=hint)
    except RecursionError:
        return DataError(f"{where}: nested too deep to be read", hint="one flat JSON object a line")
    return _object(value, where)


def _object(value: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"{where}: a row is an object, not {type(value).__name__}", hint='write {"column": "text", ...}')


def _read_list(path: Path) -> Iterator[Row]:
    """A JSON list, decoded an element at a time so that each one's line is known."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}", hint="save the file as UTF-8") from error
    decoder = json.JSONDecoder()
    place, line, counted = _skip(text, 0), 1, 0
    if place == len(text):
        return
    expected = "["
    while True:
        line += text.count("\n", counted, place)
        counted = place
        if place >= len(text) or text[place] not in expected:
            raise DataError(
                f"{path}:{line}: not a JSON list: expected {' or '.join(expected)}",
                hint="write [{...}, {...}], or one object a line in a file named .jsonl",
            )
        place = _skip(text, place + 1)
        if text[counted] == "]" or (expected == "[" and text[place : place + 1] == "]"):
            return
        line += text.count("\n", counted, place)
        counted = place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}", hint="mend the file here") from error
        where = f"{path}:{line}"
        yield where, _object(value, where)
        place, expected = _skip(text, place), ",]"


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _read_dataset(path: Path, split: str | None) -> Iterator[Row]:
    # Imported here because it takes seconds, which a .jsonl file should not cost.
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a folder written by datasets.save_to_disk: {error}",
            hint="give a .jsonl file, or save the data set with save_to_disk",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        chosen = split if split is not None or len(splits) != 1 else str(splits[0])
        if chosen is None or chosen not in splits:
            asked = f"no split {chosen!r}" if chosen else "several splits and none asked for"
            raise DataError(f"{path}: {asked}", hint=f"give split: one of {', '.join(splits)}")
        loaded, path = loaded[chosen], path / chosen
    elif split is not None and str(loaded.split) != split:
        raise DataError(f"{path}: no split {split!r} in a folder that holds one data set", hint="leave `split` out")
    for number, row in enumerate(loaded, start=1):
        yield f"{path}:{number}", dict(row)
