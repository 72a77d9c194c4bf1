"""JSON lines: an object a line. Pieces are ranges of bytes that begin and end at a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from launcher.data.sources.json_value import DECODER, RAW_DECODE, not_json, row_object, too_deep
from launcher.data.sources.opening import LONGEST_BYTES, opened, text_start, too_long
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError


def whole(file: File) -> Span:
    """All of `file`."""
    return Span(text_start(file), None)


def spans(file: File, whole: Span, num_bytes: int) -> Iterator[Span]:
    """`whole` in parts of at least `num_bytes`, in one pass that only looks for line ends; none without a row."""
    start, line = whole.start, whole.line
    with opened(file, start) as stream:
        while block := stream.read(num_bytes):
            rest = stream.readline(LONGEST_BYTES)
            if len(rest) == LONGEST_BYTES:
                raise too_long(f"{file.name}:{line + block.count(10)}", "a line")
            stop = start + len(block) + len(rest)
            if not block.isspace() or (rest and not rest.isspace()):
                yield Span(start, stop, line)
            start, line = stop, line + block.count(b"\n") + rest.count(b"\n")


def rows(file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`; blank lines are none."""
    name, number = file.name, span.line
    left = sys.maxsize if span.stop is None else span.stop - span.start
    with opened(file, span.start) as stream:
        while left > 0 and (raw := stream.readline(LONGEST_BYTES)):
            size = len(raw)
            if size == LONGEST_BYTES:
                raise too_long(f"{name}:{number}", "a line")
            if not raw.isspace():
                where = f"{name}:{number}"
                yield where, _parse(raw, where)
            left -= size
            number += 1


def _parse(raw: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        text = raw.decode()
        try:
            value, end = RAW_DECODE(text)
        except json.JSONDecodeError:
            end = 0
        # `decode` looks for spaces on both sides with regular expressions, which takes as long as a short row itself.
        if end == 0 or not text[end:].isspace():
            value = DECODER.decode(text)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 at byte {error.start + 1} of the line", hint="save the file as UTF-8")
    except json.JSONDecodeError as error:
        hint = "one JSON object a line; data.on_bad_row=drop leaves such rows out"
        if raw.lstrip().startswith(b"["):
            hint = "a list over several lines belongs in a file named .json"
        return DataError(f"{where}: not JSON: {error.msg} at column {error.colno}", hint=hint)
    except RecursionError:
        return too_deep(where)
    except ValueError as error:
        return not_json(where, error)
    return value if type(value) is dict else row_object(value, where)
