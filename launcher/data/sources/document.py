"""Plain text: a file is one document, and one row with the column `text`."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.data.sources.opening import LONGEST_BYTES, opened, text_start, too_long
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError


def whole(file: File) -> Span:
    """All of `file`."""
    return Span(text_start(file), None)


def spans(file: File, whole: Span, num_bytes: int) -> Iterator[Span]:
    """`whole`: a document is not cut."""
    yield whole


def rows(file: File, span: Span) -> Iterator[Row]:
    """The one row, its line ends as they are."""
    where = f"{file.name}:1"
    with opened(file, span.start) as stream:
        raw = stream.read(LONGEST_BYTES)
        if len(raw) == LONGEST_BYTES:
            raise too_long(where, "a document")
    try:
        yield where, {"text": raw.decode()}
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield where, DataError(f"{where}: not UTF-8 in line {line}", hint="save the file as UTF-8")
