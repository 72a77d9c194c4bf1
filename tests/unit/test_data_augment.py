"""Variations of rows: drawn from each row alone, in the shares asked for, and never into what cannot be learned."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from launcher.data.augment import Augment
from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.data.formats import to_conversations
from launcher.errors import DataError
from tests.plans import augment_plan, source_plan

ROWS = 2000
SEED = 17


def augment(seed: int = SEED, **plan: Any) -> Augment:
    return Augment(augment_plan(**plan), seed)


def varied(augment: Augment, conversation: Conversation, copy: int = 0) -> Conversation:
    """A variation that is not left out."""
    made = augment(conversation, copy)
    assert made is not None
    return made


def said(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def chat(number: int, answers: int = 3, system: bool = True) -> Conversation:
    turns = [Message(role, f"{role} {number}.{i}") for i in range(answers) for role in ("user", "assistant")]
    return Conversation((*([Message("system", "Count.")] if system else []), *turns), f"rows.jsonl:{number}")


def alpaca(number: int, given: str | None = "2 2") -> Conversation:
    row = {"instruction": f"Add {number}", "input": given, "output": "4"}
    return to_conversations(row, "alpaca", source_plan("rows.jsonl"), f"rows.jsonl:{number}")[0]


def written(folder: Path, code: str, name: str = "vary") -> dict[str, Any]:
    path = folder / "mine.py"
    path.write_text(code)
    return {"function_file": str(path), "function_name": name}


def close(count: int, share: float, of: int = ROWS) -> bool:
    """Within three standard deviations of a binomial's mean."""
    return abs(count - share * of) <= 3 * sqrt(of * share * (1 - share))


def test_nothing_asked_for_changes_nothing() -> None:
    assert not augment().active
    assert augment().fingerprint is None
    row = chat(1)
    assert augment()(row, 0) is row
    everything = augment(truncate_turns=1.0, drop_system=1.0, wordings=("{instruction}",))
    assert everything.active
    text = Conversation((), "rows.jsonl:1", text="2+2=4")
    one_answer = chat(1, answers=1, system=False)
    assert everything(text, 0) is text
    assert everything(one_answer, 0) is one_answer


def test_shares_are_those_asked_for() -> None:
    rows = [chat(number) for number in range(ROWS)]
    cut = [varied(augment(truncate_turns=0.3), row) for row in rows]
    lengths = Counter(len(row.messages) for row in cut)
    assert set(lengths) == {3, 5, 7}
    assert close(ROWS - lengths[7], 0.3)
    assert close(lengths[3], 0.15)
    assert all(row.messages == rows[i].messages[: len(row.messages)] for i, row in enumerate(cut))
    dropped = [varied(augment(drop_system=0.2), row) for row in rows]
    assert close(sum(row.messages[0].role == "user" for row in dropped), 0.2)
    wordings = ("{instruction}: {input}", "{input}\n{instruction}", "<{instruction}>", "{instruction}!")
    reworded = augment(wordings=wordings)
    starts = Counter(said(varied(reworded, alpaca(number)))[0][0] for number in range(ROWS))
    assert close(starts["A"], 0.5)
    assert close(starts["2"], 0.5)
    bare = [said(varied(reworded, alpaca(number, None)))[0] for number in range(ROWS)]
    assert close(sum(words.startswith("<") for words in bare), 0.5)
    assert all(words.strip("<>!") == f"Add {number}" for number, words in enumerate(bare))


def test_each_variation_is_drawn_apart() -> None:
    rows = [chat(number) for number in range(200)]
    alone, both = augment(truncate_turns=0.5), augment(truncate_turns=0.5, drop_system=0.5)
    assert [said(varied(alone, row))[-1] for row in rows] == [said(varied(both, row))[-1] for row in rows]
    for other in (augment(SEED + 1, truncate_turns=0.5), alone):
        copy = 0 if other is not alone else 1
        assert [varied(alone, row) for row in rows] != [varied(other, row, copy) for row in rows]
    # What stands around a row, and where it stands, has no say.
    assert [varied(alone, row) for row in rows[::-1]] == [varied(alone, row) for row in rows][::-1]
    moved = [Conversation(row.messages, "elsewhere:1") for row in rows]
    assert [said(varied(alone, row)) for row in moved] == [said(varied(alone, row)) for row in rows]


CODE = """
from dataclasses import dataclass

@dataclass
class Word:
    word: "str"

def vary(messages, rng):
    if rng.random() < 0.1:
        return None
    messages[-1]["content"] += Word(rng.choice([" Yes.", " No.", ""])).word
    return messages
"""


def test_every_process_draws_the_same(tmp_path: Path) -> None:
    ours = augment(truncate_turns=0.4, drop_system=0.4, wordings=("{input} {instruction}",), **written(tmp_path, CODE))
    rows = [chat(number) for number in range(ROWS // 2)] + [alpaca(number) for number in range(ROWS // 2)]
    here = [ours(row, copy) for row in rows for copy in (0, 1)]
    assert here == [ours(row, copy) for row in rows for copy in (0, 1)]
    assert close(here.count(None), 0.1, of=2 * ROWS)
    # The other process has the code from here, not from the file, which may have changed meanwhile.
    (tmp_path / "mine.py").write_text("raise RuntimeError")
    code = (
        "import pickle, sys\naugment, rows = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps([augment(row, copy) for row in rows for copy in (0, 1)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((ours, rows)),
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
    )
    assert pickle.loads(done.stdout) == here


def test_wordings_put_every_part_and_nothing_else() -> None:
    braces = alpaca(1, "{instruction} {0} {")
    assert said(varied(augment(wordings=("{{{input}}} {instruction}",)), braces))[0] == "{{instruction} {0} {} Add 1"
    only_without_input = augment(wordings=("Please: {instruction}",))
    assert only_without_input(braces, 0) is braces
    assert said(varied(only_without_input, alpaca(1, None)))[0] == "Please: Add 1"
    only_with_input = augment(wordings=("{instruction} ({input})",))
    assert said(varied(only_with_input, alpaca(1, None)))[0] == "Add 1"
    row = {"text": "Lovely.", "label": "good"}
    (bare,) = to_conversations(row, "classification", source_plan("rows.jsonl"))
    assert said(varied(augment(wordings=("Review: {input}", "{instruction}: {input}")), bare))[0] == "Review: Lovely."
    history = {"instruction": "And 3?", "output": "7", "history": [["And 3?", "5"]]}
    (row_with_history,) = to_conversations(history, "alpaca", source_plan("rows.jsonl"))
    assert said(varied(augment(wordings=("{instruction}!",)), row_with_history)) == ["And 3?", "5", "And 3?!", "7"]
    same = augment(wordings=("{instruction}\n\n{input}",))
    assert same(braces, 0) is braces


@pytest.mark.parametrize(
    ("wording", "words", "hint"),
    [
        ("{instruction} {inputs}", "unknown name 'inputs'", "did you mean {input}?"),
        ("{}", "unknown name ''", "name {instruction} and {input}"),
        ("{0}", "unknown name '0'", "name {instruction} and {input}"),
        ("{instruction.__class__}", "unknown name 'instruction.__class__'", "{instruction}"),
        ("{instruction!r}", "a part is put in as it is", "{instruction}"),
        ("{instruction:>{input}}", "a part is put in as it is", "{instruction}"),
        ("{instruction", "expected '}' before end of string", "write {{ for a brace"),
        ("Say it", "it names no part of a row", "{instruction}"),
    ],
)
def test_a_wording_that_cannot_be(wording: str, words: str, hint: str) -> None:
    with pytest.raises(DataError) as error:
        augment(wordings=(wording,))
    assert words in error.value.message
    assert hint in str(error.value.hint)


def test_cuts_leave_something_to_learn() -> None:
    always = augment(truncate_turns=1.0)

    def ends(*marks: bool | None) -> set[int]:
        turns = [Message("user", "?") if i % 2 == 0 else Message("assistant", "!") for i in range(2 * len(marks))]
        for place, mark in enumerate(marks):
            turns[2 * place + 1] = turns[2 * place + 1]._replace(learn=mark)
        return {len(varied(always, Conversation(tuple(turns)), copy).messages) // 2 for copy in range(50)}

    assert ends(None, None, None) == {1, 2}
    assert ends(False, None, None) == {2}
    assert ends(None, True, True, None) == {2, 3}
    assert ends(False, False) == {2}
    assert ends(True) == {1}


def test_only_a_leading_system_prompt_goes() -> None:
    always = augment(drop_system=1.0)
    system, user, answer = Message("system", "s"), Message("user", "u"), Message("assistant", "a")
    for before, after in [
        ((system, user, answer), (user, answer)),
        ((Message("developer", "d"), system, user, answer), (user, answer)),
        ((user, system, answer), (user, system, answer)),
        ((system, answer), (system, answer)),
    ]:
        assert varied(always, Conversation(before)).messages == after


def test_a_function_of_the_user_s_own(tmp_path: Path) -> None:
    code = "def vary(messages, rng):\n    return messages"
    same = augment(**written(tmp_path, code))
    calls = (ToolCall("add", {"a": [2]}, "c1"), ToolCall("now", {}))
    full = Conversation(
        (
            Message("system", "s"),
            Message("user", "u"),
            Message("assistant", "", "Hm.", calls, learn=False),
            Message("tool", "", name="add", tool_call_id="c1"),
            Message("assistant", "a", learn=True),
        ),
        "rows.jsonl:1",
    )
    assert same(full, 0) is full  # read back as it was written
    assert same.fingerprint == hashlib.sha256(code.encode()).hexdigest()
    before = pickle.dumps(full)
    adds = "messages[2]['tool_calls'][0]['function']['arguments']['a'].append(rng.random())"
    changed = varied(augment(**written(tmp_path, f"def vary(messages, rng):\n    {adds}\n    return messages")), full)
    assert len(changed.messages[2].tool_calls[0].arguments["a"]) == 2
    assert pickle.dumps(full) == before
    # A question that the function wrote is not written over by a wording.
    code = "def vary(messages, rng):\n    messages[0]['content'] = 'Mine'\n    return messages"
    assert said(varied(augment(wordings=("{input} {instruction}",), **written(tmp_path, code)), alpaca(1))) == [
        "Mine",
        "4",
    ]
    assert augment(**written(tmp_path, "def vary(messages, rng): return None"))(full, 0) is None
    assert not list(tmp_path.glob("__pycache__"))


def test_the_function_s_chance_is_the_row_s(tmp_path: Path) -> None:
    code = "def vary(messages, rng):\n    messages[-1]['content'] = str(rng.random())\n    return messages"
    mine = augment(**written(tmp_path, code))
    drawn = [said(varied(mine, chat(number)))[-1] for number in range(ROWS)]
    assert len(set(drawn)) == ROWS
    assert close(sum(float(number) < 0.5 for number in drawn), 0.5)
    again = [varied(mine, chat(5), copy) for copy in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    random.seed(0)
    assert varied(mine, chat(5)) == again[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('four')", ":2 raised ValueError: four"),
        ("raise SystemExit(3)", ":2 raised SystemExit: 3"),
        ("return vary(messages, rng)", ":2 raised RecursionError"),
        ("raise ValueError('a\\nb\\ud83d')", ":2 raised ValueError: a\\nb\\ud83d"),
        ("yield messages", " returned generator, not a list of messages"),
        ("return 'hello'", " returned str, not a list of messages"),
        ("return []", " returned: no assistant turn"),
        ("return [m for m in messages if m['role'] == 'user']", " returned: no assistant turn"),
        ("return messages[:-1] + [{'role': 'assistant', 'content': 4}]", " returned: messages[1].content is a number"),
        ("return messages[:-1] + [{'role': 'assistant', 'content': ' '}]", " returned: the assistant's messages[1] is"),
        ("return messages[:-1] + [{'role': 'assistant', 'content': '\\udc80'}]", "half of a surrogate pair"),
    ],
)
def test_what_a_function_does_wrong_is_said_with_its_row(tmp_path: Path, code: str, words: str) -> None:
    mine = augment(**written(tmp_path, f"def vary(messages, rng):\n    {code}"))
    with pytest.raises(DataError) as error:
        mine(chat(9, answers=1, system=False), 0)
    assert error.value.message.startswith(f"rows.jsonl:9: vary of {tmp_path / 'mine.py'}")
    assert words in error.value.message
    assert error.value.message.isprintable()
    assert error.value.hint


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        ("def very(messages, rng): ...", "no function 'vary' in it", "did you mean very?"),
        ("vary = 3", "no function 'vary' in it", "def vary(messages, rng)"),
        ("\ndef vary(:", ":2: cannot be loaded: SyntaxError", "run the file"),
        ("\n\nimport no_such_module", ":3: cannot be loaded: ModuleNotFoundError", "run the file"),
        ("exit()", "cannot be loaded: SystemExit", "run the file"),
        (None, "No such file", "looked up beside the recipe"),
    ],
)
def test_a_function_that_is_not_there(tmp_path: Path, code: str | None, words: str, hint: str) -> None:
    plan = written(tmp_path, code or "")
    if code is None:
        (tmp_path / "mine.py").unlink()
    with pytest.raises(DataError) as error:
        augment(**plan)
    assert error.value.message.startswith(str(tmp_path / "mine.py"))
    assert words in error.value.message
    assert hint in str(error.value.hint)


def test_function_then_wording_then_turns_then_system(tmp_path: Path) -> None:
    code = "def vary(messages, rng):\n    messages[-1]['content'] = messages[0]['content']\n    return messages"
    row = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Count.", "history": [["Hi", "Hello"]]}
    (found,) = to_conversations(row, "alpaca", source_plan("rows.jsonl"))
    one = augment(wordings=("{input}: {instruction}",), **written(tmp_path, code))
    assert said(varied(one, found)) == ["Count.", "Hi", "Hello", "2 2: Add", "Count."]
    every = augment(
        wordings=("{input}: {instruction}",), truncate_turns=1.0, drop_system=1.0, **written(tmp_path, code)
    )
    assert said(varied(every, found)) == ["Hi", "Hello"]
    assert varied(every, found).parts == ()
