"""Tables in Parquet files and in Arrow files and streams, read a thousand rows at a time.

Pieces are ranges of rows. A Parquet row group is decoded from its start on, so a large one is cut into few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from launcher.data.sources.arrow_rows import python_rows
from launcher.data.sources.kinds import kind
from launcher.data.sources.opening import seekable
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError

_BATCH_ROWS = 1000
_MOST_PARTS = 16
"""Of a row group or batch."""


def whole(file: File) -> Span:
    """All rows."""
    return Span(0, None)


def spans(file: File, whole: Span, num_rows: int) -> Iterator[Span]:
    """`whole` in parts of about `num_rows`; a compressed file is one part, since each part would decompress it all."""
    with _groups(file) as groups:
        counts = [count for count, _ in groups]
    found = kind(file.name)
    if found is not None and found.compression is not None:
        num_rows = max(1, sum(counts))
    return _cut(counts, num_rows)


def rows(file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`, with their number in the file."""
    first = 0
    with _groups(file) as groups:
        for count, batches in groups:
            end = first + count
            if span.stop is not None and first >= span.stop:
                return
            if end > span.start:
                yield from _within(batches, file.name, first, span)
            first = end


def _within(batches: Iterable[Any], name: str, first: int, span: Span) -> Iterator[Row]:
    for batch in batches:
        if span.stop is not None and first >= span.stop:
            return
        skipped = max(0, span.start - first)
        stop = batch.num_rows if span.stop is None else min(batch.num_rows, span.stop - first)
        for start in range(skipped, stop, _BATCH_ROWS):
            part = batch.slice(start, min(_BATCH_ROWS, stop - start))
            yield from python_rows(part, name, first + start)
        first += batch.num_rows


def _cut(counts: Iterable[int], num_rows: int) -> Iterator[Span]:
    """Groups of rows as parts of about `num_rows`: small ones together, large ones cut."""
    start = stop = 0
    for count in counts:
        if stop - start + count > num_rows and stop > start:
            yield Span(start, stop)
            start = stop
        stop += count
        if stop - start > num_rows:  # one large group: every part but the last decodes what is before it too
            size = max(num_rows, -(-count // _MOST_PARTS))
            while stop - start > size:
                yield Span(start, start + size)
                start += size
    if stop > start:
        yield Span(start, stop)


@contextmanager
def _groups(file: File) -> Iterator[Iterator[tuple[int, Iterable[Any]]]]:
    """(rows, batches) of each row group of a Parquet file or batch of an Arrow one; batches are read when asked for."""
    import pyarrow

    found = kind(file.name)
    assert found is not None
    with seekable(file) as path:
        try:
            yield _parquet(path, file.name) if found.reader == "parquet" else _arrow(path, file.name)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = "a Parquet file" if found.reader == "parquet" else "an Arrow file or stream"
            raise DataError(
                f"{file.name}: not {what}, or damaged: {str(error).strip().splitlines()[0]}",
                hint="write the file again, or give it the name of what it is",
            ) from error


def _parquet(path: str, name: str) -> Iterator[tuple[int, Iterable[Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        _require_names(table.schema_arrow.names, name)
        for number in range(table.num_row_groups):
            batches = table.iter_batches(_BATCH_ROWS, row_groups=[number])
            yield table.metadata.row_group(number).num_rows, batches


def _arrow(path: str, name: str) -> Iterator[tuple[int, Iterable[Any]]]:
    import pyarrow

    with pyarrow.memory_map(path) as mapped:
        if mapped.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(mapped)
            _require_names(table.schema.names, name)
            # Rows are counted by the first column alone: a batch may be compressed.
            options = pyarrow.ipc.IpcReadOptions(included_fields=[0]) if table.schema.names else None
            counted = pyarrow.ipc.open_file(mapped, options=options)
            for number in range(table.num_record_batches):
                yield counted.get_batch(number).num_rows, _later(table, number)
        else:
            mapped.seek(0)
            stream = pyarrow.ipc.open_stream(mapped)
            _require_names(stream.schema.names, name)
            for batch in stream:
                yield batch.num_rows, [batch]


def _later(table: Any, number: int) -> Iterator[Any]:
    yield table.get_batch(number)


def _require_names(names: list[str], name: str) -> None:
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise DataError(
            f"{name}: has {', '.join(map(repr, twice))} twice among its columns",
            hint="give every column a name of its own",
        )
