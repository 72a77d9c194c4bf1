"""Good files of every format with one row damaged in each, in every way that files have been seen to be damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}


def _turns(who: str, what: str, user: str, assistant: str) -> list[dict[str, Any]]:
    said = [
        ("system", "You count."),
        (user, "What is 2+2, and why?"),
        (assistant, "4, because é🙂."),
        (user, "And 3+3?"),
    ]
    return [{who: role, what: words} for role, words in [*said, (assistant, "6.")]]


_CHAT = _turns("role", "content", "user", "assistant")
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": _CHAT, "id": 1},
    "messages with tools": {
        "messages": [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": None, "reasoning_content": "A sum.", "tool_calls": [CALL], "weight": 1},
            {"role": "tool", "tool_call_id": "call_1", "content": "4"},
            {"role": "assistant", "content": "4.", "train": True},
        ],
        "tools": [TOOL],
    },
    "sharegpt": {"conversations": _turns("from", "value", "human", "gpt"), "tools": "[]"},
    "self_instruct": {
        "instruction": "Add.",
        "instances": [{"input": "2 2", "output": "4"}, {"input": "", "output": "0"}],
    },
    "alpaca": {"instruction": "Add the numbers.", "input": "2 2", "output": "4", "history": [["Hi", "Hello é🙂"]]},
    "prompt_completion": {"prompt": "What is 2+2?\n\n###\n\n", "completion": " 4<|endoftext|>"},
    "conversational prompt_completion": {"prompt": _CHAT[:2], "completion": _CHAT[2:3]},
    "question_answer": {"question": "What is 2+2? é🙂", "answer": "<<2+2=4>>4\n#### 4", "id": "7"},
    "classification": {"text": "A lovely film.<br /><br />", "label": "positive"},
    "text": {"text": "Two and two is four. é🙂", "meta": {"url": "https://example.org"}},
}
"""A good row of each kind."""
MUST: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "messages with tools": ("messages",),
    "sharegpt": ("conversations",),
    "self_instruct": ("instruction", "instances"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "conversational prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""Columns without which nothing can be learned from a row."""
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "  \n", [], {}, [None], [[]], {"a": 1}),
    *(
        "\ud83d",
        "a\udc80b",
        "a\0b",
        "<|im_end|>",
        "\x1b[2J",
        "\u2028",
        "\ufeff",
        "\ufdd0",
        "a" * 5000,
        ["a"],
        "null",
        "{}",
    ),
)
TOKENS = ("<|im_start|>", "<|endoftext|>", "</s>", "[INST]", "<start_of_turn>", "<|eot_id|>", "\u202e", "e\u0301")
LONG = 10_000_000


class Damaged(NamedTuple):
    """A row that was damaged."""

    kind: str
    """The key in GOOD of what it was."""
    line: bytes
    """Its line of a .jsonl file, without the line break."""
    description: str
    bad: bool | None
    """Whether it cannot be used; None: either is right, as long as it is not silently wrong."""


def mutations(seed: int, num_random: int = 60) -> Iterator[tuple[bytes, str]]:
    """A .jsonl file of three rows, of which the second is damaged, and what was done to it."""
    for damaged in damaged_rows(seed, num_random):
        good = json.dumps(GOOD[damaged.kind]).encode()
        yield b"%b\n%b\n%b\n" % (good, damaged.line, good), f"{damaged.kind}: {damaged.description}"


def damaged_rows(seed: int, num_random: int = 60) -> Iterator[Damaged]:
    """Every kind of row in every known way, then `num_random` ways drawn for each kind; the same for the same seed."""
    for kind, good in GOOD.items():
        rng = random.Random(f"{seed} {kind}")
        for line, description, bad in [*_bytes(good, kind, rng), *_columns(good, kind), *_speakers(good)]:
            yield Damaged(kind, line, description, bad)
        for _ in range(num_random):
            yield Damaged(kind, *_drawn(good, rng), None)


def _bytes(good: dict[str, Any], kind: str, rng: random.Random) -> Iterator[tuple[bytes, str, bool | None]]:
    """The line as no JSON, or as no UTF-8."""
    line = json.dumps(good, ensure_ascii=False).encode()
    for _ in range(12):
        end = rng.randrange(1, len(line))
        yield line[:end], f"cut after byte {end}", True
    within = line.index(b'": "') + 5
    for name, put in {
        "half a letter": b"\xc3",
        "0xff": b"\xff",
        "overlong": b"\xc0\xaf",
        "NUL": b"\0",
        "tab": b"\t",
    }.items():
        yield line[:within] + put + line[within:], f"{name} within a text", True
    yield json.dumps(good).encode("utf-16-le"), "UTF-16", True
    yield line.replace(b'"', b"'"), "single quotes", True
    yield line[:-1] + b",}", "a comma too many", True
    yield line + line, "twice on a line", True
    for text in (b"null", b"[]", b"12", b'"text"', b"{}", b"[1, 2]", b"{null}", b"}", b"\\", b"#"):
        yield text, f"only {text.decode()}", True
    first = json.dumps(MUST[kind][0]).encode()
    for name, value in {
        "nested too deep": b"[" * 100_000 + b"]" * 100_000,
        "a number of 5,000 digits": b"1" * 5000,
        "NaN": b"NaN",
        "1e999": b"1e999",
    }.items():
        yield (
            b"{%b: %b, %b" % (first, value, line[1:].replace(first, b'"other"', 1)),
            f"{first.decode()} is {name}",
            True,
        )
    for _ in range(12):
        at, byte = rng.randrange(len(line)), rng.choice([i for i in range(256) if i not in b"\r\n"])
        yield line[:at] + bytes([byte]) + line[at + 1 :], f"byte {at} is {byte}", None


def _columns(good: dict[str, Any], kind: str) -> Iterator[tuple[bytes, str, bool | None]]:
    """Columns that are missing, of another type, empty, no text; and what must be borne."""
    for column in MUST[kind]:
        yield _line({name: value for name, value in good.items() if name != column}), f"no {column}", True
        junk: list[Any] = [None, 7, 0.5, "", "  \n", [], {}, [None], [[]], ["a"], {"a": 1}, "\ud83d", "a\0b"]
        if column != "label":
            junk += [True, float("nan")]
        for value in junk:
            yield _line(good | {column: value}), f"{column} is {value!a}", True
        yield json.dumps(good | {column: "\udcff"}, ensure_ascii=False).encode("utf-8", "surrogatepass"), "CESU", True
    for place in _texts(good):
        for tokens in (" ".join(TOKENS), "\x1b[31m\u2028\x85", "\U0010ffff\ufffd"):
            if kind != "messages with tools" or place[-1] == "content":
                yield _line(_with(good, place, _at(good, place) + tokens)), f"{place} with {tokens!a}", False
    place = next(place for place in _texts(good) if place[-1] not in ("role", "from"))
    yield _line(_with(good, place, "ten " * (LONG // 4))), f"{place} of {LONG} characters", False
    yield _line(good | {"another": ["column"]}), "another column", None if kind == "text" else False


def _speakers(good: dict[str, Any]) -> Iterator[tuple[bytes, str, bool | None]]:
    """Turns of nobody, of nothing, in another order."""
    column = next((name for name in ("messages", "conversations") if name in good), None)
    if column is None:
        return
    turns = good[column]
    who, what = ("role", "content") if "role" in turns[0] else ("from", "value")
    speakers = [turn[who] for turn in turns]
    asks, answers = next((i, i + 1) for i, who in enumerate(speakers) if who in ("user", "human"))
    for place in (asks, answers):
        for value in (None, "", "nobody", 3, [], {}, ["user"], True):
            yield _line(_with(good, (column, place, who), value)), f"turn {place} by {value!r}", True
        for turn in (None, [], "user", {}, {who: speakers[place]} if place == asks else 0):
            yield _line(_with(good, (column, place), turn)), f"turn {place} is {turn!r}", True
    for value in (None, "", " ", 7, [], {}, True, [{"type": "image_url"}], "\ud83d", [None]):
        yield _line(_with(good, (column, asks, what), value)), f"turn {asks} says {value!a}", True
    system = {who: "system", what: "Be brief."}
    for description, changed, bad in [
        ("two system turns", [system, system, *turns], False),
        ("a system turn of null", [{who: "system", what: None}, *turns], False),
        ("a system turn at the end", [*turns, system], False),
        ("the assistant begins", [{who: speakers[answers], what: "Hello."}, *turns], False),
        ("a question at the end", [*turns, turns[asks]], False),
        ("no answer", [turn for turn in turns if turn[who] not in ("assistant", "gpt")], True),
        ("only answers", [turn for turn in turns if turn[who] in ("assistant", "gpt")], True),
        ("a list of lists", [turns], True),
        ("an object of turns", {"0": turns[0]}, True),
    ]:
        yield _line(good | {column: changed}), description, bad


def _drawn(good: dict[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """One to three changes anywhere in the row."""
    row, done = deepcopy(good), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(row))
        if not places:
            break
        place = rng.choice(places)
        *outer, last = place
        inside, value = _at(row, tuple(outer)), deepcopy(rng.choice(JUNK))
        match rng.randrange(5):
            case 0:
                done.append(f"no {place}")
                del inside[last]
            case 1 if isinstance(inside, list):
                done.append(f"{place} twice")
                inside.append(deepcopy(inside[last]))
            case 2 if isinstance(inside, dict):
                name = rng.choice(("role", "from", "content", "value", "input", "tool_calls", "Role", "name", "\ud83d"))
                done.append(f"{place} called {name!a}")
                inside[name] = inside.pop(last)
            case 3:
                done.append(f"{place} in a list")
                inside[last] = [inside[last]]
            case _:
                done.append(f"{place} is {value!a}"[:100])
                inside[last] = value
    return _line(row), ", ".join(done)


def _line(row: Any) -> bytes:
    return json.dumps(row).encode()


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value within `value` is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*place, name)
        yield from _places(inner, (*place, name))


def _texts(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Where text is that is learned or shown."""
    names = {"content", "value", "instruction", "input", "output", "prompt", "completion", "question", "answer", "text"}
    return [place for place in _places(row) if place[-1] in names and isinstance(_at(row, place), str)]


def _at(row: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        row = row[name]
    return row


def _with(row: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = deepcopy(row)
    _at(changed, place[:-1])[place[-1]] = value
    return changed
