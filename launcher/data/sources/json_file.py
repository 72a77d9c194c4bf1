"""A .json file: a list of rows, an object around one such list, or JSON lines under the wrong name.

The list is read value by value, so it may be of any size. Pieces are ranges of bytes that begin at a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from launcher.data.sources import lines
from launcher.data.sources.json_window import Window
from launcher.data.sources.opening import opened, text_start
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError

_TURN = {"role", "from"}
"""A list of objects with one of these is a conversation."""
_HINT = "write [{...}, {...}], or one object a line in a file named .jsonl"


def layout(file: File) -> tuple[Literal["lines", "list"], Span]:
    """What the file holds: JSON lines, or a list and where its values are.

    An object is read through to know whether a single list is in it, which is then the rows, or whether one is made of
    turns, and the object itself is the only row. Raises DataError for everything else.
    """
    start = text_start(file)
    with opened(file, start) as stream:
        window = Window(stream, file.name, Span(start, None))
        first = window.peek()
        if first == "[":
            window.take("[")
            return "list", Span(window.byte, None, window.line)
        if first not in ("", "{"):
            raise window.error("not a JSON list: expected [", _HINT)
    return _layout_of_object(file, start) if first else ("lines", Span(start, None))


def spans(file: File, whole: Span, num_bytes: int) -> Iterator[Span]:
    """`whole` in parts of about `num_bytes`; this decodes every row, only to see where it ends."""
    start: int | None = None
    line = chars = 0
    with opened(file, whole.start) as stream:
        window = Window(stream, file.name, whole)
        for row_line, _ in _rows(window, whole):
            if start is not None and window.began_char - chars < num_bytes:
                continue
            if start is not None:
                yield Span(start, window.began_byte, line)
            start, line, chars = window.began_byte, row_line, window.began_char
    if start is not None:
        yield Span(start, whole.stop, line)


def rows(file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`. Raises DataError where the list itself is broken, so that no row after it can be found."""
    name = file.name
    with opened(file, span.start) as stream:
        for line, row in _rows(Window(stream, name, span), span):
            yield f"{name}:{line}", row


def _rows(window: Window, span: Span) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    closed = span.stop is None
    yield from _values(window, closed)
    if closed and window.peek():
        raise window.error("not a JSON list: something follows it", _HINT)


def _values(window: Window, closed: bool) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The values of a list, up to its ] if it is `closed` in the window, otherwise up to the window's end."""
    if closed and window.peek() == "]":
        window.take("]")
        return
    while closed or window.peek():
        yield window.row()
        if not closed and not window.peek():
            return
        if window.take(",]" if closed else ",") == "]":
            return


class _Object(NamedTuple):
    """An object at the top of a file."""

    span: Span
    lists: list[tuple[str, Span]]
    """Its members that are lists, and where their values are."""
    is_row: bool
    """One of the lists is made of turns."""
    follows: bool
    """Something comes after it."""


def _layout_of_object(file: File, start: int) -> tuple[Literal["lines", "list"], Span]:
    everything = Span(start, None)
    try:
        found = _walk(file, start)
    except DataError:
        # JSON lines whose first row is bad, or a broken object? In the latter no line is a whole row.
        second = next(islice(lines.rows(file, everything), 1, None), None)
        if second is not None and isinstance(second[1], dict):
            return "lines", everything
        raise
    if found.follows:
        return "lines", everything
    if found.is_row:
        return "list", found.span
    if len(found.lists) == 1:
        return "list", found.lists[0][1]
    names = ", ".join(name for name, _ in found.lists)
    inside = f"with several lists in it: {names}" if names else "without a list in it"
    raise DataError(f"{file.name}:{found.span.line}: not a JSON list: an object {inside}", hint=_HINT)


def _walk(file: File, start: int) -> _Object:
    lists: list[tuple[str, Span]] = []
    is_row = False
    with opened(file, start) as stream:
        window = Window(stream, file.name, Span(start, None))
        window.take("{")
        begin, line = window.byte - 1, window.line
        closing = "" if window.peek() != "}" else window.take("}")
        while closing != "}":
            name = window.value()
            if not isinstance(name, str):
                raise window.error("not JSON: expected a name in quotes before this")
            window.take(":")
            if window.peek() == "[":
                window.take("[")
                inside, inside_line = window.byte, window.line
                for number, (_, item) in enumerate(_values(window, closed=True)):
                    is_row = is_row or (number == 0 and isinstance(item, dict) and not item.keys().isdisjoint(_TURN))
                lists.append((name, Span(inside, window.byte - 1, inside_line)))
            elif isinstance(value := window.value(), DataError):
                raise value
            closing = window.take(",}")
        return _Object(Span(begin, window.byte, line), lists, is_row, follows=bool(window.peek()))
