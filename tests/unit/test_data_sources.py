"""Reading local files: every kind gives the same rows, each with its place."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from launcher.data.sources import fingerprint, pieces, pinned, read, read_all
from launcher.data.sources.json_window import Window
from launcher.data.sources.ranges import Span
from launcher.errors import DataError
from tests.plans import source_plan as source
from tests.unit.written_rows import COMPRESS, TABLES, WRITERS, cut, refused, shown

DATA = Path(__file__).parents[2].parent / "shared" / "data"


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


def test_formats_decide_about_odd_but_good_json(tmp_path: Path) -> None:
    text = '{"a": 1, "a": 2, "b": "\\ud83d", "c": "\\u0000"}'
    for name, content in [("a.jsonl", text), ("a.json", f"[{text}]")]:
        (tmp_path / name).write_text(content)
        assert [row for _, row in read_all(source(tmp_path / name))] == [{"a": 2, "b": "\ud83d", "c": "\0"}]


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


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffOnce é\r\n\nupon".encode())
    (tmp_path / "a.txt").write_bytes(b"x\n\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (_, bad), second, third = cut(source(tmp_path))
    assert isinstance(bad, DataError)
    assert bad.message == f"{tmp_path / 'a.txt'}:1: not UTF-8 in line 2"
    assert second == (f"{tmp_path / 'b.txt'}:1", {"text": "Once é\r\n\nupon"})
    assert third == (f"{tmp_path / 'c.txt'}:1", {"text": ""})


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.csv", "sub/deeper/c.json.gz", ".hidden.jsonl", ".git/x.jsonl", "README.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"csv": b"n\nx\n", "gz": gzip.compress(b'[{"n": "x"}]')}.get(path.suffix[1:], b'{"n": "x"}\n')
        path.write_bytes(content)
    (tmp_path / "license").mkdir()  # a folder of that name is no license
    (tmp_path / "license" / "d.jsonl").write_text('{"n": "x"}\n')
    for name in ("LICENSE", "dataset_infos.json", "Readme.md", "sub/_SUCCESS"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    places = [
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/license/d.jsonl:1",
        f"{tmp_path}/sub/a.csv:2",
        f"{tmp_path}/sub/deeper/c.json.gz:1",
    ]
    for path in (tmp_path, tmp_path / "**"):
        found = list(read_all(source(path)))
        assert [where for where, _ in found if "/loop/" not in where] == places
        assert cut(source(path)) == found
        assert cut(source(path, limit=2)) == found[:2]
    assert [where for where, _ in read_all(source(tmp_path / "*" / "a.*"))] == places[2:3]
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
