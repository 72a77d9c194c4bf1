"""Rows and files: four formats, and every way they can be wrong, with the place and a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.formats import Conversation, detect, to_conversation
from launcher.data.sources import fingerprint, read
from launcher.data.split import is_held_out
from launcher.errors import DataError
from tests.plans import source_plan as source


def conversation(row: dict[str, Any]) -> Conversation:
    return to_conversation(row, detect(row), "rows.jsonl:3")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "2+2?", "answer": "4", "id": 7}, (("user", "2+2?"), ("assistant", "4"))),
        ({"prompt": "2+2?\n", "completion": " 4"}, (("user", "2+2?\n"), ("assistant", " 4"))),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, (("user", "Add\n\n2 2"), ("assistant", "4"))),
        ({"instruction": "Add", "input": "", "output": "4"}, (("user", "Add"), ("assistant", "4"))),
        ({"instruction": "Add", "output": "4"}, (("user", "Add"), ("assistant", "4"))),
    ],
)
def test_pairs(row: dict[str, Any], messages: tuple[tuple[str, str], ...]) -> None:
    assert conversation(row).messages == messages
    assert conversation(row).where == "rows.jsonl:3"


def test_messages_end_with_the_last_answer_and_drop_what_says_nothing() -> None:
    row = {
        "messages": [
            {"role": "system", "content": None},
            {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]},
            {"role": "assistant", "content": "4", "tool_calls": None},
            {"role": "tool", "content": "calculator: 4"},
            {"role": "assistant", "content": "Still 4"},
            {"role": "user", "content": "Thanks"},
        ]
    }
    assert conversation(row).messages == (
        ("user", "2+2?"),
        ("assistant", "4"),
        ("tool", "calculator: 4"),
        ("assistant", "Still 4"),
    )
    assert conversation(row).answer == "Still 4"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "2+2=4"}, "the format cannot be told from the columns: text"),
        ({"question": "2+2?", "answer": 4}, "'answer' is a number, not text"),
        ({"question": "", "answer": "4"}, "'question' is empty"),
        ({"question": "2+2?", "answer": "\ud83d"}, "'answer' holds half of a surrogate pair"),
        ({"messages": "hello"}, "'messages' is text, not a list"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, "no assistant turn"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "4"}]}, "the user's messages[0] is empty"),
        ({"messages": [{"role": "human", "content": "2+2?"}]}, "messages[0] has the unknown role 'human'"),
        ({"messages": [{"content": "2+2?"}]}, "messages[0] is no object with a role"),
        ({"messages": [{"role": "assistant", "content": {"a": 1}}]}, "messages[0].content is an object, not text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "has a part that is not text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0] calls a tool"),
    ],
)
def test_bad_rows_name_their_place(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        to_conversation(row, detect(row, "rows.jsonl:3"), "rows.jsonl:3")
    assert error.value.message.startswith("rows.jsonl:3: ")
    assert said in error.value.message
    assert error.value.hint


def test_a_row_without_the_columns_of_its_file() -> None:
    with pytest.raises(DataError, match="rows.jsonl:3: no 'answer' in a row of format question_answer"):
        to_conversation({"question": "2+2?"}, "question_answer", "rows.jsonl:3")


def test_jsonl_keeps_line_numbers_past_blank_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = list(read(source(path)))
    assert [where for where, _ in rows] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    assert rows[0][1] == {"a": "é"}
    assert rows[4][1] == {"a": 2}
    for (where, row), said in zip(rows[1:4], ("not JSON", "a row is an object, not list", "not UTF-8"), strict=True):
        assert isinstance(row, DataError)
        assert row.message.startswith(f"{where}: {said}")
        assert row.hint
    assert [where for where, _ in read(source(path, limit=1))] == [f"{path}:1"]


def test_json_list_knows_each_row_s_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  {"a":\n 1},\n\n  {"a": 2}, 3\n]\n')
    (first, one), (second, two), (third, three) = read(source(path))
    assert [first, second, third] == [f"{path}:2", f"{path}:5", f"{path}:5"]
    assert (one, two) == ({"a": 1}, {"a": 2})
    assert isinstance(three, DataError)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ('{"a": 1}', ":1", "not a JSON list"),
        ('[{"a": 1}\n\n{"a": 2}]', ":3", "expected , or ]"),
        ('[{"a": 1},\n{"a" 2}]', ":2", "not JSON"),
        ('[{"a": 1}', ":1", "expected , or ]"),
        ("[]", "", "no rows in it"),
        ("", "", "no rows in it"),
    ],
)
def test_bad_json_lists(tmp_path: Path, text: str, place: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read(source(path)))
    assert error.value.message.startswith(f"{path}{place}: ")
    assert said in error.value.message
    assert error.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n \n")
    (tmp_path / "train.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    for name, said, hint in [
        ("train.jsonl", "no rows in it", "one JSON object"),
        ("tran.jsonl", "no such file", f"did you mean {tmp_path / 'train.jsonl'}"),
        ("else/where.jsonl", "no such file", "looked up beside the recipe"),
        ("train.csv", "unknown kind of file '.csv'", ".jsonl"),
        ("folder", "not a folder written by datasets.save_to_disk", "save_to_disk"),
    ]:
        with pytest.raises(DataError) as error:
            list(read(source(tmp_path / name)))
        assert error.value.message.startswith(f"{tmp_path / name}: {said}")
        assert hint in str(error.value.hint)
    with pytest.raises(DataError, match="a file has no split 'test'"):
        list(read(source(tmp_path / "train.jsonl", split="test")))


def test_datasets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(3)]
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "test")})
    both.save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert list(read(source(tmp_path / "one", limit=2))) == [(f"{tmp_path}/one:{n + 1}", rows[n]) for n in range(2)]
    assert next(read(source(tmp_path / "both", split="test")))[0] == f"{tmp_path}/both/test:1"
    for split, said in [(None, "several splits and none asked for"), ("dev", "no split 'dev'")]:
        with pytest.raises(DataError, match=said) as error:
            list(read(source(tmp_path / "both", split)))
        assert "train, test" in str(error.value.hint)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"a": 1}\n{"a": 2}\n')
    two.write_text('{"a": 1}\n{"a": 3}\n')
    assert fingerprint(source(one)) == fingerprint(source(one))
    assert fingerprint(source(one))[0] != fingerprint(source(two))[0]
    assert fingerprint(source(one))[1] == 2
    assert fingerprint(source(one, limit=1))[1] == 1


def test_held_out_rows_stay_when_rows_are_added() -> None:
    rows = [Conversation((("user", str(n)), ("assistant", json.dumps(n)))) for n in range(4000)]
    held_out = {row.messages for row in rows if is_held_out(row, 0.1)}
    assert 330 < len(held_out) < 470  # 400 within three and a half standard deviations
    assert {row.messages for row in rows[::-2] if is_held_out(row, 0.1)} <= held_out
    assert not any(is_held_out(row, 0.0) for row in rows)
    assert all(is_held_out(row, 1.0) for row in rows)
    # The same words fall on the same side wherever they stand.
    assert is_held_out(Conversation(rows[0].messages, "elsewhere:9"), 0.1) == is_held_out(rows[0], 0.1)
