"""Values between commas or tabs (RFC 4180): a header, quoted fields that may hold line breaks.

Pieces are ranges of bytes that begin at a row; finding them parses the file once.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from launcher.data.sources.kinds import kind
from launcher.data.sources.opening import LONGEST_BYTES, opened, text_start, too_long
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError

_ENCODING_HINT = "save the file as UTF-8"


def whole(file: File) -> Span:
    """All rows below the header."""
    start = text_start(file)
    with opened(file, start) as stream:
        records = _Records(stream, file, Span(start, None))
        _header(file, records)
        return Span(records.byte, None, records.line)


def spans(file: File, whole: Span, num_bytes: int) -> Iterator[Span]:
    """`whole` in parts of at least `num_bytes`, none without a row."""
    start: int | None = None
    line = 0
    with opened(file, whole.start) as stream:
        for byte, row_line, _ in _Records(stream, file, whole):
            if start is not None and byte - start < num_bytes:
                continue
            if start is not None:
                yield Span(start, byte, line)
            start, line = byte, row_line
    if start is not None:
        yield Span(start, whole.stop, line)


def rows(file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`: every value is text. Raises DataError for a quote that is never closed."""
    start = text_start(file)
    with opened(file, start) as stream:
        header = _header(file, _Records(stream, file, Span(start, None)))
    with opened(file, span.start) as stream:
        for _, line, fields in _Records(stream, file, span):
            where = f"{file.name}:{line}"
            if isinstance(fields, DataError):
                yield where, fields
            elif len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                yield (
                    where,
                    DataError(
                        f"{where}: {len(fields)} fields, and the header has {len(header)}",
                        hint="put a field that holds a separator or a line break between quotes",
                    ),
                )


def _header(file: File, records: _Records) -> list[str]:
    _, line, names = next(iter(records), (0, 1, []))
    if isinstance(names, DataError):
        raise names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{file.name}:{line}: the header names {', '.join(map(repr, twice))} twice",
            hint="give every column a name of its own",
        )
    return names


class _Records:
    """(first byte, first line, fields or what is wrong with them) of each record of `span` that is not blank."""

    def __init__(self, stream: BinaryIO, file: File, span: Span) -> None:
        self.byte, self.line = span.start, span.line
        self._stream, self._name, self._stop = stream, file.name, span.stop
        self._ended = self._broken = self._blank = False
        found = kind(file.name)
        self._delimiter = "\t" if found is not None and found.reader == "tsv" else ","

    def __iter__(self) -> Iterator[tuple[int, int, list[str] | DataError]]:
        # Of the whole process, but nothing else here reads CSV; the default of 128 KiB is less than a long answer.
        csv.field_size_limit(LONGEST_BYTES)
        reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        while self._stop is None or self.byte < self._stop:
            byte, line = self.byte, self.line
            self._broken = False
            fields: list[str] | DataError
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = self._wrong(line, error)
            else:
                if self._broken:
                    fields = DataError(f"{self._name}:{line}: not UTF-8", hint=_ENCODING_HINT)
                elif not fields or (self._blank and len(fields) == 1):
                    continue
            yield byte, line, fields

    def _lines(self) -> Iterator[str]:
        while raw := self._stream.readline(LONGEST_BYTES):
            if len(raw) == LONGEST_BYTES:
                raise too_long(f"{self._name}:{self.line}", "a line")
            self.byte += len(raw)
            self.line += 1
            self._blank = raw.isspace()
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                self._broken = True
                text = raw.decode(errors="replace")
            yield text
        self._ended = True

    def _wrong(self, line: int, error: csv.Error) -> DataError:
        where = f"{self._name}:{line}"
        if self._ended or "field limit" in str(error):
            # What follows the quote is one field; to drop that one would drop the rest of the file without a word.
            raise DataError(f"{where}: a quote that opens in this row is never closed", hint="close it, or double it")
        if "new-line character" in str(error):
            return DataError(
                f"{where}: a carriage return within a field", hint="put the field between quotes, or end lines with \\n"
            )
        rows = f" (the row goes on to line {self.line - 1})" if self.line - 1 > line else ""
        return DataError(f"{where}: {error}{rows}", hint='a quote within a quoted field is doubled: "say ""yes"""')
