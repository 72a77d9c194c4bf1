"""Rows and files that cannot be read: each has its place, its reason and a hint, and nothing after it is lost."""

from __future__ import annotations

import gzip
import io
import os
import random
from pathlib import Path

import pyarrow as pa
import pytest

from launcher.data.sources import read_all
from launcher.data.sources.json_window import Window
from launcher.data.sources.ranges import Span
from launcher.errors import DataError
from tests.plans import source_plan as source
from tests.unit.written_rows import COMPRESS, as_arrow, as_lines, as_parquet, cut, refused, shown


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
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "this is gzip data"),
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
