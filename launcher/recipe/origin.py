"""Where a value of a recipe was written, and so where a path in it is looked up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Origin:
    """The place a value comes from; `str()` gives it as messages quote it."""

    kind: Literal["file", "command line", "default"]
    file: Path | None = None
    """Absolute; with kind `file` only."""
    line: int | None = None
    """Counted from 1, None where the file as a whole is meant. Of the command line: which override."""

    def __str__(self) -> str:
        if self.file is None:
            return self.kind
        return shown(self.file) if self.line is None else f"{shown(self.file)}:{self.line}"


DEFAULT = Origin("default")


def shown(path: Path) -> str:
    """A path as a person would type it: relative to the current directory where that is shorter."""
    absolute = str(path.absolute())
    return min(os.path.relpath(absolute), absolute, key=len)


def candidates(value: str, origin: Origin) -> tuple[Path, ...]:
    """Absolute places where a path is looked up: beside the file that names it, then in the current directory.

    A path given on the command line is relative to the current directory alone, as with any other command.
    """
    path = Path(value).expanduser()
    folders = [origin.file.parent] if origin.file else []
    return tuple(dict.fromkeys(folder / path for folder in [*folders, Path.cwd()]))


def resolve_path(value: str, origin: Origin) -> Path | None:
    """The first of `candidates` that exists, absolute and without `..`; None where none does."""
    return next((path.resolve() for path in candidates(value, origin) if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text too long for a name, such as a template given in the place of its file
        return False
