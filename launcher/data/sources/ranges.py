"""What reading gives, and the ranges that it is done in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.errors import DataError

Row = tuple[str, dict[str, Any] | DataError]
"""`file:line` and the row's columns, or what is wrong with it: the reader goes on, its caller decides."""


class Span(NamedTuple):
    """A range of a file: bytes of its (decompressed) text, or rows where it holds a table."""

    start: int
    stop: int | None
    """None: to the end."""
    line: int = 1
    """Number of the line at `start`; of text only."""


@dataclass(frozen=True)
class File:
    """A file, or a folder or data set that is read as one, and what tells that it is still the same."""

    name: str
    """Absolute path, URL, or hub id with subset and split: what stands before the line of each row."""
    stamp: str
    """Of a local file its size and time of change, of a URL's the SHA-256 of the content, of a hub id the commit."""
    remote: bool = False
    """Named by a URL; what was fetched of it lies in the download folder."""
