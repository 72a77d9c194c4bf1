"""Damaged files: every row is used as it is meant or refused at its place, and no row beside it changes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.data.conversation import Conversation
from launcher.data.formats import detect, to_conversations
from launcher.data.sources import read_all
from launcher.errors import DataError
from tests.plans import source_plan
from tests.unit.mutations import GOOD, Damaged, damaged_rows, mutations

SEED = 3


def loaded(path: Path) -> list[tuple[str, list[Conversation] | DataError]]:
    """Every row of a file, or what is wrong with it; the first row that can be used tells the format."""
    source = source_plan(path)
    format, found = None, []
    for where, row in read_all(source):
        result: list[Conversation] | DataError
        try:
            if isinstance(row, DataError):
                raise row
            format = format or detect(row, where)
            result = to_conversations(row, format, source, where)
        except DataError as error:
            result = error
        found.append((where, result))
    return found


def check_error(error: DataError, where: str) -> None:
    assert error.message.startswith(f"{where}: ")
    assert len(error.message) < 1000
    assert error.hint
    for words in (error.message, error.hint):
        assert words.isprintable(), words


def check_conversation(conversation: Conversation, where: str) -> None:
    """Nothing in it is silently wrong: it can be rendered, tokenized and learned."""
    assert conversation.where == where
    if conversation.text is not None:
        assert conversation.text.strip()
        assert not conversation.messages
        conversation.text.encode()
        return
    assert conversation.messages[-1].role == "assistant"
    assert {message.role for message in conversation.messages} - {"assistant"}
    for message in conversation.messages:
        assert message.role in ("system", "developer", "user", "assistant", "tool")
        assert message.content.strip() or message.tool_calls or message.role == "tool"
        assert message.role == "assistant" or not (message.reasoning or message.tool_calls or message.learn)
        assert message.learn in (None, True, False)
        for text in (message.content, message.reasoning, message.name or "", message.tool_call_id or ""):
            text.encode()
            assert "\0" not in text
        for call in message.tool_calls:
            assert isinstance(call.arguments, dict)
    json.dumps([conversation.tools, conversation.messages], ensure_ascii=False, allow_nan=False).encode()
    assert all(tool["function"]["name"] for tool in conversation.tools)
    assert len(conversation.digest()) == 16


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Conversation]]:
    """What a good row of each kind becomes."""
    found = {}
    for kind, row in GOOD.items():
        path = tmp_path_factory.mktemp("good") / "good.jsonl"
        path.write_text(json.dumps(row))
        [(where, result)] = loaded(path)
        assert isinstance(result, list), result
        for conversation in result:
            check_conversation(conversation, where)
        found[kind] = result
    return found


def check(
    found: list[tuple[str, list[Conversation] | DataError]],
    path: Path,
    damaged: Damaged,
    line: int,
    expected: list[Conversation],
) -> bool:
    """Assert that row `line` is refused or sound and that the others are `expected`; whether it is refused."""
    assert [where for where, _ in found] == [f"{path}:{number}" for number in (1, 2, 3)]
    for number, (where, result) in enumerate(found, start=1):
        if number != line:
            assert result == [replace(conversation, where=where) for conversation in expected]
        elif isinstance(result, DataError):
            assert damaged.bad is not False, result
            check_error(result, where)
        else:
            assert damaged.bad is not True, result
            for conversation in result:
                check_conversation(conversation, where)
    return isinstance(found[line - 1][1], DataError)


def test_damaged_rows_are_refused_at_their_place(tmp_path: Path, expected: dict[str, list[Conversation]]) -> None:
    path = tmp_path / "rows.jsonl"
    seen: Counter[tuple[str, bool]] = Counter()
    for damaged, (content, description) in zip(damaged_rows(SEED), mutations(SEED), strict=True):
        path.write_bytes(content)
        try:
            refused = check(loaded(path), path, damaged, 2, expected[damaged.kind])
        except Exception as error:
            raise AssertionError(f"{description}: {damaged.line[:300]!r}") from error
        seen[damaged.kind, refused] += 1
    assert seen.total() >= 1000
    # Each kind has been both refused and borne.
    assert set(seen) == {(kind, refused) for kind in GOOD for refused in (True, False)}
    print(f"{seen.total()} mutations, {sum(n for (_, refused), n in seen.items() if refused)} refused")


def test_a_damaged_first_row_tells_no_format(tmp_path: Path, expected: dict[str, list[Conversation]]) -> None:
    """Where the first row is no JSON, the second tells the format."""
    path = tmp_path / "rows.jsonl"
    for damaged in damaged_rows(SEED + 1, num_random=0):
        if damaged.description.startswith(("cut", "half", "0xff", "UTF-16", "single", "a comma", "nested", "a number")):
            good = json.dumps(GOOD[damaged.kind]).encode()
            path.write_bytes(b"\n".join([damaged.line, good, good]))
            assert check(loaded(path), path, damaged, 1, expected[damaged.kind])


def test_mutations_are_the_same_for_the_same_seed() -> None:
    first, again, other = (list(damaged_rows(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
