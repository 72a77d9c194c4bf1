"""Reading local files: every kind gives the same rows, each with its place, whole or in pieces; and what is broken."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.sources import Row, fingerprint, pieces, pinned, read, read_all
from launcher.data.sources.json_window import Window
from launcher.data.sources.ranges import Span
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan
from tests.plans import source_plan as source

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DETERMINISTIC = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, compression: str) -> None:
    rows = [{"question": f"{n} é\n“?”", "answer": f'a "{n}", b\t'} for n in range(20)]
    path = tmp_path / f"data{kind}{compression}"
    path.write_bytes(COMPRESS[compression](WRITERS[kind](rows)))
    plan = source(path)
    found = list(read_all(plan))
    assert [row for _, row in found] == rows
    steps = {".json": 4, ".csv": 2, ".tsv": 2}  # lines that a row takes here
    first = {".json": 2, ".csv": 2, ".tsv": 2}.get(kind, 1)
    assert [where for where, _ in found] == [f"{path}:{first + n * steps.get(kind, 1)}" for n in range(20)]
    for size in (1, 7, 50, 10**9):
        assert cut(plan, size) == found
    assert cut(source(path, limit=13)) == found[:13]
    whole = len(pieces(plan, 0, num_bytes=10**9, num_rows=10**9))
    parts = len(pieces(plan, 0, num_bytes=1, num_rows=1))
    assert whole == 1
    assert parts == (1 if compression and kind in TABLES else 10 if compression else 20)


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


def test_jsonl_keeps_line_numbers_past_blank_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = list(read_all(source(path)))
    assert [where for where, _ in rows] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    assert rows[0][1] == {"a": "é"}
    assert rows[4][1] == {"a": 2}
    for (where, row), said in zip(rows[1:4], ("not JSON", "a row is an object, not list", "not UTF-8"), strict=True):
        assert isinstance(row, DataError)
        assert row.message.startswith(f"{where}: {said}")
        assert row.hint
    assert [where for where, _ in read_all(source(path, limit=1))] == [f"{path}:1"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a": ' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"a": "\x00"}', "not JSON: Invalid control character"),
        ('{"a": tru}', "not JSON: Expecting value"),
        ('{"a" 1}', "not JSON: Expecting ':' delimiter"),
        ('"a\\x"', "not JSON: Invalid \\escape"),
        ("nul", "not JSON: Expecting value"),
        ("17", "a row is an object, not int"),
        ("null", "a row is an object, not NoneType"),
    ],
)
@pytest.mark.parametrize("around", ["lines", "list", "object"])
def test_a_bad_row_leaves_the_others(tmp_path: Path, value: str, said: str, around: str) -> None:
    good = '{"a": "é"}'
    path = tmp_path / ("a.jsonl" if around == "lines" else "a.json")
    text = f"{good}\n{value}\n{good}\n" if around == "lines" else f"[{good},\n{value},\n{good}]"
    path.write_text(f'{{"v": 1, "rows": {text}}}' if around == "object" else text)
    found = list(read_all(source(path)))
    assert [where for where, _ in found] == [f"{path}:{line}" for line in (1, 2, 3)]
    bad = found[1][1]
    assert isinstance(bad, DataError)
    assert bad.message.startswith(f"{path}:2: {said}")
    assert found[0][1] == found[2][1] == {"a": "é"}
    assert shown(cut(source(path))) == shown(found)


def test_formats_decide_about_odd_but_good_json(tmp_path: Path) -> None:
    text = '{"a": 1, "a": 2, "b": "\\ud83d", "c": "\\u0000"}'
    for name, content in [("a.jsonl", text), ("a.json", f"[{text}]")]:
        (tmp_path / name).write_text(content)
        assert [row for _, row in read_all(source(tmp_path / name))] == [{"a": 2, "b": "\ud83d", "c": "\0"}]


def test_bytes_that_are_no_utf8_are_one_bad_row(tmp_path: Path) -> None:
    for name, content in [
        ("a.json", b'[{"a": "\xc3\xa9"}, {"a": "\xff\xc3"}, {"a": "\xf0\x9f\x98\x80"}]'),
        ("a.csv", b"a\n\xc3\xa9\n\xff\xc3\n\xf0\x9f\x98\x80\n"),
        ("a.jsonl", b'{"a": "\xc3\xa9"}\n{"a": "\xff\xc3"}\n{"a": "\xf0\x9f\x98\x80"}\n'),
    ]:
        (tmp_path / name).write_bytes(content)
        (_, first), (where, bad), (_, last) = read_all(source(tmp_path / name))
        assert (first, last) == ({"a": "é"}, {"a": "😀"})
        assert isinstance(bad, DataError)
        assert bad.message.startswith(f"{where}: not UTF-8")
        assert len(cut(source(tmp_path / name))) == 3


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_a_row_of_ten_megabytes(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "é ☃ and so on\n" * 650_000}, {"text": "short"}]
    path = tmp_path / f"a{kind}"
    path.write_bytes(rows[0]["text"].encode() if kind == ".txt" else WRITERS[kind](rows))
    assert path.stat().st_size > 1e7 or kind == ".parquet"
    assert [row for _, row in cut(source(path))] == rows[: 1 if kind == ".txt" else 2]


def test_json_list_knows_each_row_s_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  {"a":\n 1},\n\n  {"a": 2}, 3\n]\n')
    (first, one), (second, two), (third, three) = read_all(source(path))
    assert [first, second, third] == [f"{path}:2", f"{path}:5", f"{path}:5"]
    assert (one, two) == ({"a": 1}, {"a": 2})
    assert isinstance(three, DataError)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ('{"a": 1}', ":1", "not a JSON list"),
        ('[{"a": 1}\n\n{"a": 2}]', ":3", "expected , or ]"),
        ('[{"a": 1},\n]', ":2", "not JSON"),
        ('[{"a": 1}', ":1", "expected , or ]"),
        ('[{"a": 1},\n{"a": "x', ":2", "not JSON: the file ends within"),
        ('[{"a": 1},\n{"a": [1}]', ":2", "not JSON: the brackets"),
        ('[{"a": 1}]\n[{"a": 2}]', ":2", "not a JSON list: something follows it"),
        ('{"a": [{}],\n"b": [{}]}', ":1", "not a JSON list: an object with several lists in it: a, b"),
        ('{"a": [{}]', ":1", "expected , or }"),
        ('{"a": [{}], 1: 2}', ":1", "not JSON: expected a name"),
        ('\n"text"', ":2", "not a JSON list: expected ["),
        ("[]", "", "no rows in it"),
        ('{"a": []}', "", "no rows in it"),
        ("", "", "no rows in it"),
        (" \n", "", "no rows in it"),
    ],
)
def test_bad_json_lists(tmp_path: Path, text: str, place: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    error = refused(source(path))
    assert error.message.startswith(f"{path}{place}: ")
    assert said in error.message


def test_what_a_json_file_may_hold(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "?"}], "tools": []}
    for content, lines in [
        (f"{json.dumps(row)}\n{json.dumps(row)}\n", [1, 2]),
        (f"\n{json.dumps(row)}\n\nnot json\n", [2, 4]),
        (f"{json.dumps(row)[:-1]}\n{json.dumps(row)}\n", [1, 2]),
        (json.dumps(row), [1]),
        (f'{{"data": [{json.dumps(row)},\n{json.dumps(row)}\n]}}', [1, 2]),
        ("\n" + json.dumps(row, indent=1), [2]),
        (json.dumps({"version": "1", "data": [row, row]}), [1, 1]),
        (json.dumps({"data": [row, row], "version": [1][0]}, indent=0), [3, 12]),
    ]:
        path = tmp_path / "a.json"
        path.write_text(content)
        found = list(read_all(source(path)))
        assert [where for where, _ in found] == [f"{path}:{line}" for line in lines], content
        assert all(value == row or isinstance(value, DataError) for _, value in found)
        assert shown(cut(source(path))) == shown(found)


def test_a_json_list_is_read_through_a_window(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = json.dumps({"a": "x" * 10_000, "b": ["{", "]"]})
    path.write_text("[" + ",\n".join([row] * 3000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_all(source(path))) == 3000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()
    text = '[{"a": "x\\"]"}, -1.5e3, "é}", [[1], {"b": null}], tru, false]'.encode()
    for block in range(1, 12):  # the window's end falls anywhere
        window = Window(io.BytesIO(text), "f", Span(0, None), block_bytes=block)
        window.take("[")
        values = [window.value()]
        while window.take(",]") == ",":
            values.append(window.value())
        assert isinstance(values.pop(4), DataError)
        assert values == [{"a": 'x"]'}, -1500.0, "é}", [[1], {"b": None}], False]
        assert window.byte == len(text)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (b'a,b\n1,2\n"3,4\n5,6\n', ":3", "a quote that opens in this row is never closed"),
        (b"a,a\n1,2\n", ":1", "the header names 'a' twice"),
        (b'"a,b\n1,2\n', ":1", "a quote that opens in this row is never closed"),
        (b"a,\xff\n1,2\n", ":1", "not UTF-8"),
        (b"a,b\n", "", "no rows in it"),
        (b"a,b\n\n \n", "", "no rows in it"),
        (b"", "", "no rows in it"),
        ("a,b\n1,2\n".encode("utf-16"), "", "this is UTF-16"),
    ],
)
def test_bad_delimited_files(tmp_path: Path, text: bytes, place: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    assert refused(source(path)).message.startswith(f"{path}{place}: {said}")


def test_bad_delimited_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1\r\n\n"2\n2",2\n3,3,3\n"4\n4"x,4\n5,5\r5\n6\0,6\n \n7,7')
    found = list(read_all(source(path)))
    assert [where for where, _ in found] == [f"{path}:{line}" for line in (2, 4, 6, 7, 9, 10, 12)]
    said = ["1 fields, and the header has 2", None, "3 fields", "',' expected after", "a carriage return", None, None]
    for (where, row), words in zip(found, said, strict=True):
        assert isinstance(row, DataError) == (words is not None)
        assert words is None or str(row).startswith(f"{where}: {words}")
    assert "goes on to line 8" in str(found[3][1])
    assert [row for _, row in found if isinstance(row, dict)] == [
        {"a": "2\n2", "b": "2"},
        {"a": "6\0", "b": "6"},
        {"a": "7", "b": "7"},
    ]
    assert shown(cut(source(path))) == shown(found)
    (tmp_path / "b.csv").write_text('a\n""\n\nx\n')
    assert [row for _, row in read_all(source(tmp_path / "b.csv"))] == [{"a": ""}, {"a": "x"}]


def test_values_of_tables_become_plain(tmp_path: Path) -> None:
    as_json = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array(['{"x": 1}', "[2]"], pa.json_()))
    table = pa.table(
        {
            "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
            "json": pa.array(['{"x": [1]}', None], pa.json_()),
            "list": as_json,
            "struct": pa.array([{"a": None}, {"a": [1.5]}]),
            "word": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    expected = [
        {"map": {"k": 1}, "json": {"x": [1]}, "list": [{"x": 1}], "struct": {"a": None}, "word": "a"},
        {"map": None, "json": None, "list": [[2]], "struct": {"a": [1.5]}, "word": "b"},
    ]
    pq.write_table(table, tmp_path / "a.parquet")
    pa.feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        assert [row for _, row in read_all(source(tmp_path / name))] == expected


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3)))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    path = tmp_path / "a.arrow"
    table = pa.table({"s": text})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    (_, first), (where, bad), (_, last) = cut(source(path))
    assert (first, last) == ({"s": "a"}, {"s": "b"})
    assert isinstance(bad, DataError)
    assert bad.message.startswith(f"{where}: a value cannot be read")
    assert where == f"{path}:2"


def test_damaged_tables_end_in_a_message(tmp_path: Path) -> None:
    """Random bytes changed; the process lives, and every outcome is rows or a DataError."""
    random.seed(17)
    rows = [{"question": f"{n}?", "answers": [str(n)] * (n % 3)} for n in range(50)]
    for name, content in [("a.parquet", as_parquet(rows)), ("a.arrow", as_arrow(rows, stream=False)[:])]:
        path = tmp_path / name
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(random.choice([1, 5])):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            path.write_bytes(damaged[: random.choice([len(damaged), random.randrange(len(damaged))])])
            try:
                for _, row in read_all(source(path)):
                    assert isinstance(row, dict | DataError)
            except DataError as error:
                said = error.message
            else:
                said = str(path)
            assert str(path) in said


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffOnce é\r\n\nupon".encode())
    (tmp_path / "a.txt").write_bytes(b"x\n\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (_, bad), second, third = cut(source(tmp_path))
    assert isinstance(bad, DataError)
    assert bad.message == f"{tmp_path / 'a.txt'}:1: not UTF-8 in line 2"
    assert second == (f"{tmp_path / 'b.txt'}:1", {"text": "Once é\r\n\nupon"})
    assert third == (f"{tmp_path / 'c.txt'}:1", {"text": ""})


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_broken_compression_names_the_line(tmp_path: Path, suffix: str) -> None:
    random.seed(17)
    whole = as_lines([{"n": n, "noise": random.randbytes(40).hex()} for n in range(4_000)])
    path = tmp_path / f"a.jsonl{suffix}"
    packed = COMPRESS[suffix](whole)
    for content in (
        packed[: len(packed) * 2 // 3],
        packed[: len(packed) // 2] + b"damage" + packed[len(packed) // 2 :],
    ):
        path.write_bytes(content)
        error = refused(source(path))
        place, line = error.message.split(": ")[0].rsplit(":", 1)
        assert place == str(path)
        assert 1_000 < int(line) < 3_500
    path.write_bytes(b'{"a": 1}\n')
    assert refused(source(path)).message.startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\xff\xfe{\0", "this is UTF-16"),
        ("a.jsonl", gzip.compress(b"{}"), "this is gzip data"),
        ("a.json", b"PAR1", "this is a Parquet file"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "this is a web page"),
        ("a.parquet", b"PAR1nonsense", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.arrow", b"", "not an Arrow file"),
        ("a.arrow", b"ARROW1\0\0", "not an Arrow file"),
        ("a.feather", b"nonsense", "not an Arrow file"),
    ],
)
def test_files_of_another_kind_than_their_name_says(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(source(tmp_path / name)).message.startswith(f"{tmp_path / name}: {said}")


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    table = pa.table([[1], [2]], names=["a", "a"])
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert "'a' twice among its columns" in refused(source(tmp_path / "a.arrow")).message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n \n")
    (tmp_path / "train.doc").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "leads-nowhere").mkdir()
    (tmp_path / "leads-nowhere" / "a.jsonl").symlink_to(tmp_path / "gone")
    for name, said, hint in [
        ("train.jsonl", "no rows in it", "one JSON object"),
        ("tran.jsonl", "no such file", f"did you mean {tmp_path / 'train.jsonl'}"),
        ("else/where.jsonl", "no such file", "looked up beside the recipe"),
        ("train.jsonl/x", "no such file", "looked up beside the recipe"),
        ("a\0b", "no such file", "looked up beside the recipe"),
        ("train.doc", "unknown kind of file '.doc'", ".jsonl"),
        ("folder", "no data in it", ".jsonl"),
        ("*.csv", "nothing matches", "**"),
        ("d*", "matches folders only", "/**"),
        ("*.d*", "files of no known kind: train.doc", "pattern"),
    ]:
        error = refused(source(tmp_path / name))
        assert error.message.startswith(f"{tmp_path / name}: {said}"), name
        assert hint in str(error.hint)
    assert refused(source(tmp_path / "pipe.jsonl")).message.endswith("not a regular file")
    assert refused(source(tmp_path / "leads-nowhere")).message.endswith("No such file or directory")
    for name in ("train.jsonl", "folder", "*.jsonl"):
        assert "a file has no split 'test'" in refused(source(tmp_path / name, split="test")).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "folder" / "a.jsonl"):
        path.write_text("{}\n")
    (tmp_path / "a.jsonl").chmod(0)
    (tmp_path / "folder").chmod(0)
    try:
        for name in ("a.jsonl", "folder", "folder/a.jsonl"):
            assert "Permission denied" in refused(source(tmp_path / name)).message
    finally:
        (tmp_path / "folder").chmod(0o700)


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.csv", "sub/deeper/c.json.gz", ".hidden.jsonl", ".git/x.jsonl", "README.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"csv": b"n\nx\n", "gz": gzip.compress(b'[{"n": "x"}]')}.get(path.suffix[1:], b'{"n": "x"}\n')
        path.write_bytes(content)
    for name in ("LICENSE", "dataset_infos.json", "Readme.md", "sub/_SUCCESS"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    places = [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/sub/a.csv:2", f"{tmp_path}/sub/deeper/c.json.gz:1"]
    for path in (tmp_path, tmp_path / "**"):
        found = list(read_all(source(path)))
        assert [where for where, _ in found if "/loop/" not in where] == places
        assert cut(source(path)) == found
        assert cut(source(path, limit=2)) == found[:2]
    assert [where for where, _ in read_all(source(tmp_path / "*" / "a.*"))] == places[1:2]
    (tmp_path / "sub" / "notes.docx").write_text("x")
    (tmp_path / "sub" / "Makefile").write_text("x")
    assert "files of no known kind: sub/Makefile, sub/notes.docx" in refused(source(tmp_path)).message


def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path: Path) -> None:
    for name in ("gsm8k_train.jsonl", "test-00000.jsonl"):
        (tmp_path / name).write_text('{"n": 1}\n')
    error = refused(source(tmp_path))
    assert "holds several splits: gsm8k_train.jsonl, test-00000.jsonl" in error.message
    assert len(cut(source(tmp_path / "*train*"))) == 1
    (tmp_path / "test-00000.jsonl").rename(tmp_path / "training-2.jsonl")
    assert len(cut(source(tmp_path))) == 2


def test_datasets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(3)]
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "test")})
    both.save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    found = list(read_all(source(tmp_path / "one")))
    assert found == [(f"{tmp_path}/one:{n + 1}", rows[n]) for n in range(3)]
    assert cut(source(tmp_path / "one")) == found
    assert cut(source(tmp_path / "one", limit=2)) == list(read_all(source(tmp_path / "one", limit=2))) == found[:2]
    assert next(iter(cut(source(tmp_path / "both", split="test"))))[0] == f"{tmp_path}/both/test:1"
    for split, said in [(None, "several splits and none asked for"), ("dev", "no split 'dev'")]:
        error = refused(source(tmp_path / "both", split=split))
        assert said in error.message
        assert "train, test" in str(error.hint)
    assert "no split 'test' in a folder that holds one" in refused(source(tmp_path / "one", split="test")).message
    assert "belongs to a folder written by datasets.save_to_disk" in refused(source(tmp_path)).message
    before = fingerprint(source(tmp_path / "both", split="test"))
    (tmp_path / "both" / "train" / "state.json").write_text("{")
    assert fingerprint(source(tmp_path / "both", split="test")) == before
    assert "damaged" in refused(source(tmp_path / "both" / "train")).message
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"nonsense")
    assert "not a folder written by datasets.save_to_disk" in refused(source(tmp_path / "one")).message


def test_datasets_keep_what_needs_other_packages_as_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "tools": datasets.List(datasets.Json())})
    table = pa.table({"picture": [{"bytes": b"\x89PNG", "path": None}], "tools": [['{"name": "f", "arguments": {}}']]})
    datasets.Dataset(table.cast(features.arrow_schema)).save_to_disk(tmp_path / "saved")
    ((_, row),) = read_all(source(tmp_path / "saved"))
    assert row == {"picture": {"bytes": b"\x89PNG", "path": None}, "tools": [{"name": "f", "arguments": {}}]}


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"a": 1}\n{"a": 2}\n')
    two.write_text('{"a": 1}\n{"a": 3}\n')
    assert fingerprint(source(one)) == fingerprint(source(one))
    assert fingerprint(source(one)).digest != fingerprint(source(two)).digest
    assert fingerprint(source(one)).num_bytes == 18
    folder = fingerprint(source(tmp_path))
    assert folder.num_bytes == 36
    assert folder == fingerprint(source(tmp_path / "*.jsonl"))
    (tmp_path / "README.md").write_text("x")
    assert fingerprint(source(tmp_path)) == folder
    two.rename(tmp_path / "three.jsonl")
    assert fingerprint(source(tmp_path)) != folder
    assert pinned(source(one)) == source(one)


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


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "json_window", "delimited", "document"):
        monkeypatch.setattr(f"launcher.data.sources.{module}.LONGEST_BYTES", 1000)
    long = "x" * 5000
    for name, text, line in [
        ("a.jsonl", f'{{"a": 1}}\n{{"a": "{long}"}}\n', 2),
        ("a.json", f'[{{"a": 1}},\n{{"a": "{long}"}}]', 2),
        ("a.csv", f'a\n1\n"{long}"\n', 3),
        ("a.txt", long, 1),
    ]:
        path = tmp_path / name
        path.write_text(text)
        plan = source(path)
        if name == "a.json":
            window = Window(io.BytesIO(text.encode()), str(path), Span(0, None), block_bytes=64)
            window.take("[")
            window.value()
            window.take(",")
            with pytest.raises(DataError) as error:
                window.value()
        else:
            with pytest.raises(DataError) as error:
                list(read_all(plan))
        assert error.value.message.startswith(f"{path}:{line}: ")


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


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data is not here")
def test_real_files() -> None:
    for path in sorted(DATA.rglob("*.jsonl")):
        with path.open("rb") as stream:
            expected = [(f"{path}:{n}", json.loads(line)) for n, line in enumerate(stream, 1)]
        assert list(read_all(source(path))) == expected
        found = pieces(source(path), 0, num_bytes=1 << 18)
        assert [row for piece in found for row in read(source(path), piece)] == expected
        assert (
            len(found) == 1 or max(piece.span.stop - piece.span.start for piece in found if piece.span.stop) < 1 << 19
        )
    assert refused(source(DATA / "gsm8k")).message.startswith(f"{DATA}/gsm8k: holds several splits")
