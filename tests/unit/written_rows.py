"""Rows written in every kind of file, and ways to read them back, for the tests of reading."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.sources import Row, pieces, read, read_all
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": lambda raw: bz2.compress(raw, 1),  # blocks of 100 KB
    ".xz": lzma.compress,
    ".zst": lambda raw: bytes(pa.compress(raw, codec="zstd", asbytes=True)),
}


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], row_group_size: int = 3) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=row_group_size)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]], stream: bool, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".json": as_list,
    ".lines.json": as_lines,
    ".csv": lambda rows: as_delimited(rows, ","),
    ".tsv": lambda rows: as_delimited(rows, "\t"),
    ".parquet": as_parquet,
    ".arrow": lambda rows: as_arrow(rows, stream=False),
    ".feather": lambda rows: as_arrow(rows, stream=False, compression="lz4"),
    ".stream.arrow": lambda rows: as_arrow(rows, stream=True),
}

TABLES = (".parquet", ".arrow", ".feather", ".stream.arrow")


def cut(plan: SourcePlan, size: int = 1) -> list[Row]:
    """All rows, read in pieces of `size` bytes or rows, the pieces sent through pickle."""
    found = pickle.loads(pickle.dumps(pieces(plan, 7, num_bytes=size, num_rows=size)))
    assert all(piece.source == 7 for piece in found)
    assert found == pieces(plan, 7, num_bytes=size, num_rows=size)
    return [row for piece in found for row in read(plan, piece)]


def shown(rows: list[Row]) -> list[tuple[str, Any]]:
    """Errors compare by what they say."""
    return [(where, (row.message, row.hint) if isinstance(row, DataError) else row) for where, row in rows]


def refused(plan: SourcePlan) -> DataError:
    with pytest.raises(DataError) as error:
        list(read_all(plan))
    assert error.value.hint
    with pytest.raises(DataError):
        cut(plan)
    return error.value
