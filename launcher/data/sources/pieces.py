"""Reading a source: whole, or in pieces that are the same however many processes and machines share them out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from launcher.data.sources import columnar, delimited, document, hub, json_file, lines, saved_dataset
from launcher.data.sources.files import local_files
from launcher.data.sources.kinds import kind
from launcher.data.sources.ranges import File, Row, Span
from launcher.data.sources.remote import fetch
from launcher.data.sources.remote_files import remote_files
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

PIECE_BYTES = 8 << 20
"""Of text, decompressed."""
PIECE_ROWS = 20_000
"""Of tables."""
_MOST_COMPRESSED_PIECES = 16
"""Of a compressed text: each decompresses everything before it, eight times the file in all."""

_READERS: dict[str, Any] = {
    "lines": lines,
    "list": json_file,
    "csv": delimited,
    "tsv": delimited,
    "text": document,
    "parquet": columnar,
    "arrow": columnar,
    "dataset": saved_dataset,
}
"""Each has `whole(file)`, `spans(file, whole, size)` and `rows(file, span)`; `hub` has them too, with the source."""
_TABLES = ("parquet", "arrow", "dataset", "hub")


@dataclass(frozen=True)
class Piece:
    """A range of one source, enough to read it in any process on any machine that has the source."""

    source: int
    """Number of the source in its list."""
    file: File
    reader: str
    span: Span
    rows: int | None = None
    """At most so many rows, where the source's `limit` ends within it."""


def pieces(source: SourcePlan, index: int, *, num_bytes: int = PIECE_BYTES, num_rows: int = PIECE_ROWS) -> list[Piece]:
    """`source`, number `index` of its list, in pieces of about `num_bytes` of text or `num_rows` of a table.

    Costs a pass over the text: counting line ends of .jsonl and .txt, parsing .csv, decoding .json, decompressing what
    is compressed; with `limit` only as far as it reaches, and those rows are parsed once to count them. Of tables only
    the counts are read. A file has at least one piece, a compressed one at most 16.

    Raises DataError for a file that is missing, unreadable, broken or of an unknown kind, and for a source without a
    row.
    """
    cut = chain.from_iterable(_cut(source, whole, num_bytes, num_rows) for whole in _wholes(source, index))
    found = list(cut if source.limit is None else _limited(source, cut, source.limit))
    if not found:
        raise _empty(source)
    return found


def read(source: SourcePlan, piece: Piece) -> Iterator[Row]:
    """The rows of `piece`, in order; those of all pieces are those of `read_all`.

    A single row that cannot be used is yielded as a DataError that begins with its `file:line`. Raises DataError for a
    file that is broken, or that is no longer the one of which `piece` was cut.
    """
    found = hub.rows(source, piece.file, piece.span) if piece.reader == "hub" else _rows(piece)
    return islice(found, piece.rows)


def read_all(source: SourcePlan) -> Iterator[Row]:
    """The rows of `source` in order, at most `source.limit` of them, without a first pass.

    Raises DataError as `pieces` and `read` do.
    """
    every = chain.from_iterable(read(source, whole) for whole in _wholes(source, 0))
    empty = True
    for row in islice(every, source.limit):
        empty = False
        yield row
    if empty:
        raise _empty(source)


def _wholes(source: SourcePlan, index: int) -> Iterator[Piece]:
    """Each file of `source` as one piece."""
    if source.kind == "hub":
        file = hub.hub_file(source)
        yield Piece(index, file, "hub", hub.whole(source, file))
        return
    found = (fetch(remote) for remote in remote_files(source)) if source.kind == "url" else local_files(source)
    for file in found:
        reader = _reader(file)
        if reader == "json":
            reader, span = json_file.layout(file)
        else:
            span = _READERS[reader].whole(file)
        yield Piece(index, file, reader, span)


def _reader(file: File) -> str:
    found = None if not file.remote and os.path.isdir(file.name) else kind(file.name)
    return found.reader if found is not None else "dataset"


def _rows(piece: Piece) -> Iterator[Row]:
    rows: Iterator[Row] = _READERS[piece.reader].rows(piece.file, piece.span)
    return rows


def _cut(source: SourcePlan, whole: Piece, num_bytes: int, num_rows: int) -> Iterator[Piece]:
    if whole.reader == "hub":
        spans = hub.spans(whole.span, num_rows)
    else:
        size = num_rows if whole.reader in _TABLES else num_bytes
        spans = _READERS[whole.reader].spans(whole.file, whole.span, size)
        found = kind(whole.file.name)
        if whole.reader not in _TABLES and found is not None and found.compression is not None:
            spans = _joined(list(spans))
    return (replace(whole, span=span) for span in spans)


def _joined(spans: list[Span]) -> Iterator[Span]:
    """Neighbours together, so that few are left."""
    step = -(-len(spans) // _MOST_COMPRESSED_PIECES) or 1
    for first in range(0, len(spans), step):
        last = spans[min(first + step, len(spans)) - 1]
        yield spans[first]._replace(stop=last.stop)


def _limited(source: SourcePlan, cut: Iterator[Piece], limit: int) -> Iterator[Piece]:
    left = limit
    for piece in cut:
        start, stop, _ = piece.span
        if piece.reader in _TABLES and stop is not None:
            count = min(left, stop - start)
        else:
            count = sum(1 for _ in islice(read(source, piece), left))
        left -= count
        if left == 0:
            yield replace(piece, rows=count)
            return
        yield piece


def _empty(source: SourcePlan) -> DataError:
    return DataError(f"{source.path}: no rows in it", hint="write one JSON object a line")
