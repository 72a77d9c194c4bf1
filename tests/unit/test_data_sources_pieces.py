"""Reading in pieces is reading whole, however the pieces fall: rows, places and limits."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.sources import pieces, read, read_all
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan
from tests.plans import source_plan as source
from tests.unit.written_rows import cut, refused, shown

DETERMINISTIC = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON lines, mostly good, with every kind of line end, blank line and bad row."""
    line = st.one_of(
        st.builds(lambda a: json.dumps({"a": a}).encode(), st.text(max_size=6)),
        st.builds(lambda a: json.dumps({"a": a}, ensure_ascii=False).encode(), st.text("é☃\u2028\x85ab", max_size=6)),
        st.sampled_from([b"", b"  ", b'{"a": ', b"[1]", b'{"a": "\xff"}', b'{"a": NaN}', b"\x00", b'  {"a": 1}  ']),
    )
    lines = draw(st.lists(line, min_size=1, max_size=12))
    ends = draw(st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=len(lines), max_size=len(lines)))
    text = b"".join(part for pair in zip(lines, ends, strict=True) for part in pair)
    start = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return start + (text if draw(st.booleans()) else text.rstrip(b"\r\n"))


@DETERMINISTIC
@given(text=texts(), size=st.integers(1, 40), limit=st.none() | st.integers(1, 8), gz=st.booleans())
def test_pieces_of_lines(tmp_path: Path, text: bytes, size: int, limit: int | None, gz: bool) -> None:
    path = tmp_path / ("a.jsonl.gz" if gz else "a.jsonl")
    path.write_bytes(gzip.compress(text) if gz else text)
    plan = source(path, limit=limit)
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()][:limit]
    if not expected:
        assert "no rows in it" in refused(plan).message
        return
    found = list(read_all(plan))
    assert [where for where, _ in found] == [where for where, _ in expected]
    for (where, row), (_, line) in zip(found, expected, strict=True):
        if isinstance(row, DataError):
            assert row.message.startswith(f"{where}: ")
        else:
            assert row == json.loads(line)
    assert shown(cut(plan, size)) == shown(found)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[],é\n', max_size=5) | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{", max_size=2), inner, max_size=3),
    max_leaves=5,
)


@DETERMINISTIC
@given(
    values=st.lists(JSON_VALUES, min_size=1, max_size=6),
    indent=st.none() | st.integers(0, 2),
    around=st.booleans(),
    size=st.integers(1, 30),
)
def test_pieces_of_lists(tmp_path: Path, values: list[Any], indent: int | None, around: bool, size: int) -> None:
    path = tmp_path / "a.json"
    values = [{"row": value} if n % 2 else value for n, value in enumerate(values)]
    path.write_text(json.dumps({"version": 1, "data": values, "x": {}} if around else values, indent=indent))
    if around and isinstance(values[0], dict) and {"role", "from"} & set(values[0]):
        return
    found = list(read_all(source(path)))
    rows = [None if isinstance(row, DataError) else row for _, row in found]
    assert rows == [value if isinstance(value, dict) else None for value in values]
    assert shown(cut(source(path), size)) == shown(found)


@DETERMINISTIC
@given(
    rows=st.lists(st.lists(st.text('ab",\n\r\té', max_size=5), min_size=1, max_size=3), min_size=1, max_size=8),
    size=st.integers(1, 30),
    tsv=st.booleans(),
)
def test_pieces_of_delimited_rows(tmp_path: Path, rows: list[list[str]], size: int, tsv: bool) -> None:
    path = tmp_path / ("a.tsv" if tsv else "a.csv")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t" if tsv else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["x", "y"], *rows])
    found = list(read_all(source(path)))
    assert [None if isinstance(row, DataError) else row for _, row in found] == [
        dict(zip("xy", row, strict=True)) if len(row) == 2 else None for row in rows
    ]
    assert shown(cut(source(path), size)) == shown(found)


@DETERMINISTIC
@given(groups=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 12), limit=st.integers(1, 20))
def test_pieces_of_tables(tmp_path: Path, groups: list[int], size: int, limit: int) -> None:
    tables = [pa.table({"n": list(range(count)), "s": ["x"] * count}) for count in groups]
    with pq.ParquetWriter(tmp_path / "a.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "b.arrow", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    expected = [row for table in tables for row in table.to_pylist()]
    for name in ("a.parquet", "b.arrow"):
        plan = source(tmp_path / name)
        assert cut(plan, size) == [(f"{tmp_path / name}:{n}", row) for n, row in enumerate(expected, 1)]
        assert cut(replace_limit(plan, limit), size) == cut(plan)[:limit]
        spans = [piece.span for piece in pieces(plan, 0, num_rows=size)]
        assert all(span.stop is not None and span.stop - span.start <= size for span in spans)


def replace_limit(plan: SourcePlan, limit: int) -> SourcePlan:
    return plan.model_copy(update={"limit": limit})


def test_a_large_row_group_is_cut_into_few(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(1000)}), path)
    assert len(pieces(source(path), 0, num_rows=10)) == 16
    assert [row["n"] for _, row in cut(source(path), 10) if isinstance(row, dict)] == list(range(1000))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    first, second = pieces(source(path), 0, num_bytes=1)
    assert len(list(read(source(path), first))) == 1
    path.write_text('{"a": 1}\n{"a": 3}\n')
    with pytest.raises(DataError, match="has changed since the preparation began"):
        list(read(source(path), second))
    rows = read_all(source(path))
    next(rows)
    with path.open("a") as stream:
        stream.write('{"a": 4}\n')
    with pytest.raises(DataError, match="has changed since the preparation began"):
        list(rows)


def test_a_piece_says_where_the_limit_ends(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"n": 1}\n\nbad\n{"n": 2}\n')
    for limit in range(1, 8):
        plan = source(tmp_path, limit=limit)
        found = list(read_all(plan))
        assert len(found) == min(limit, 6)
        for size in (1, 5, 10**6):
            assert shown(cut(plan, size)) == shown(found)
    last = pieces(source(tmp_path, limit=4), 0)[-1]
    assert last.rows == 1
    assert len(list(read(source(tmp_path), replace(last, rows=None)))) == 3
