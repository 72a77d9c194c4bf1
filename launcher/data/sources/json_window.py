"""JSON text of any size, seen through a window: values one after another, each with the line that it begins on."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from launcher.data.sources.json_value import RAW_DECODE, not_json, row_object, too_deep
from launcher.data.sources.opening import LONGEST_BYTES, too_long
from launcher.data.sources.ranges import Span
from launcher.errors import DataError

_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r'[^\s,:"\[\]{}]+')
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_TO_BRACKET = re.compile(rf'[^"\[\]{{}}]*+(?:{_STRING.pattern}[^"\[\]{{}}]*+)*+', re.DOTALL)
"""Everything up to the next bracket that is in no string."""
_CLOSES = {"{": "}", "[": "]"}
_ESCAPED = re.compile("[\udc80-\udcff]")
"""How bytes that are no UTF-8 stand in the window."""


class Window:
    """Holds some of the text of `span`, read from `stream` as needed. Raises DataError with `name` and the line."""

    def __init__(self, stream: BinaryIO, name: str, span: Span, block_bytes: int = _BLOCK_BYTES) -> None:
        self._stream, self._name, self._block = stream, name, block_bytes
        self._left = None if span.stop is None else span.stop - span.start
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._place = "", 0
        self._line, self._counted = span.line, 0
        self._bytes_before = span.start
        self._chars_before = 0
        self._began = 0
        self._ends = self._escapes = False

    @property
    def line(self) -> int:
        """Number of the line at the present place."""
        self._line += self._text.count("\n", self._counted, self._place)
        self._counted = self._place
        return self._line

    @property
    def byte(self) -> int:
        """Number of bytes before the present place."""
        return self._bytes_before + len(self._text[: self._place].encode(errors="surrogateescape"))

    @property
    def began_byte(self) -> int:
        """Number of bytes before the last value."""
        return self._bytes_before + len(self._text[: self._began].encode(errors="surrogateescape"))

    @property
    def began_char(self) -> int:
        """Number of characters before the last value; costs nothing."""
        return self._chars_before + self._began

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the text."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if self._ends:
                return ""
            self._more()

    def take(self, expected: str) -> str:
        """The next character that is no space, which must be one of `expected`."""
        char = self.peek()
        if not char or char not in expected:
            found = f"found {char!r}" if char else "the file ends"
            raise self.error(f"expected {' or '.join(expected)}, {found}")
        self._place += 1
        return char

    def value(self) -> Any | DataError:
        """The value that begins at the next character that is no space.

        One that cannot be read is a DataError, if its brackets show where it ends; otherwise this is raised.
        """
        self.peek()
        where = f"{self._name}:{self.line}"
        while (found := self._decode(where)) is None:
            if self._ends:
                raise self.error("not JSON: the file ends within the value that begins here")
            if len(self._text) - self._place > LONGEST_BYTES:
                raise too_long(where, "a value")
            self._more()
        value, end = found
        if self._escapes and _ESCAPED.search(self._text, self._place, end):
            value = DataError(f"{where}: not UTF-8", hint="save the file as UTF-8")
        self._began, self._place = self._place, end
        return value

    def row(self) -> tuple[int, dict[str, Any] | DataError]:
        """The line that the next value begins on, and the value if it is a row."""
        value = self.value()
        line = self._line  # counted where the value begins
        if isinstance(value, dict | DataError):
            return line, value
        return line, row_object(value, f"{self._name}:{line}")

    def error(self, message: str, hint: str = "mend the file here") -> DataError:
        """What is wrong at the present place."""
        return DataError(f"{self._name}:{self.line}: {message}", hint=hint)

    def _decode(self, where: str) -> tuple[Any | DataError, int] | None:
        """The value at the present place and where it ends; None where the window is too small to tell."""
        scalar = _SCALAR.match(self._text, self._place)
        if scalar is not None and scalar.end() == len(self._text) and not self._ends:
            return None  # a number could go on
        try:
            value, end = RAW_DECODE(self._text, self._place)
        except (ValueError, RecursionError) as error:
            closing = self._closing() if scalar is None else scalar.end()
            return None if closing is None else (self._problem(error, where), closing)
        return value, end

    def _problem(self, error: ValueError | RecursionError, where: str) -> DataError:
        if isinstance(error, json.JSONDecodeError):
            at = self._line + self._text.count("\n", self._counted, error.pos)
            return DataError(f"{where}: not JSON: {error.msg} in line {at}", hint="mend the file here")
        return too_deep(where) if isinstance(error, RecursionError) else not_json(where, error)

    def _closing(self) -> int | None:
        """Where the value at the present place ends, told by its brackets and strings alone; None: not in the window.

        Raises DataError for brackets that do not match.
        """
        text, place = self._text, self._place
        if text.startswith('"', place):
            string = _STRING.match(text, place)
            return string.end() if string is not None else None
        if not text.startswith(("{", "["), place):
            raise self.error("not JSON: expected a value")
        open_brackets: list[str] = []
        while True:
            match = _TO_BRACKET.match(text, place)
            assert match is not None
            place = match.end()
            bracket = text[place : place + 1]
            if bracket not in ("{", "[", "}", "]"):
                return None
            if bracket in _CLOSES:
                open_brackets.append(_CLOSES[bracket])
            elif bracket != open_brackets.pop():
                raise self.error("not JSON: the brackets of the value that begins here do not match")
            place += 1
            if not open_brackets:
                return place

    def _more(self) -> None:
        """Drop what is before the present place, and read at least as much as stays."""
        size = max(self._block, len(self._text) - self._place)
        raw = self._stream.read(size if self._left is None else min(size, self._left))
        if self._left is not None:
            self._left -= len(raw)
        self._ends = not raw
        new = self._decoded(raw)
        self._line = self.line
        self._bytes_before = self.byte
        self._chars_before += self._place
        self._text = self._text[self._place :] + new
        self._place = self._counted = self._began = 0

    def _decoded(self, raw: bytes) -> str:
        try:
            return self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError:
            self._escapes = True
            self._decoder.errors = "surrogateescape"
            try:
                return self._decoder.decode(raw, final=not raw)
            finally:
                self._decoder.errors = "strict"
