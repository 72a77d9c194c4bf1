"""What each format makes of a row: one function a format, from columns to who said what. The table is in detect.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from launcher.data.conversation import Conversation, Message
from launcher.data.formats.messages import read_conversation, read_messages, read_tools, up_to_last_answer
from launcher.data.formats.values import bad_row, is_blank, kind, listed, scalar, short, text
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

CHAT = {
    "messages": ("messages", "conversations", "conversation"),
    "sharegpt": ("conversations", "conversation", "messages"),
}
"""Where a list of messages is looked for, in order."""
BESIDE_TEXT = frozenset({"text", "id", "meta", "metadata", "url", "timestamp"})
"""All that a row may have for `auto` to take it for plain text."""


def joined(parts: Iterable[tuple[str, str]]) -> str:
    """The parts of a question as they are put where no wording says otherwise: with a blank line between them."""
    return "\n\n".join(words for _, words in parts)


def _chat(row: Mapping[str, Any], format: str, where: str) -> list[Conversation]:
    column = next((name for name in CHAT[format] if name in row), None)
    if column is None:
        raise _lacks(row, format, CHAT[format][:1], where)
    return [Conversation(read_conversation(row[column], column, where), where, read_tools(row, where))]


def _messages(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    return _chat(row, "messages", where)


def _sharegpt(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    return _chat(row, "sharegpt", where)


def _self_instruct(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    _need(row, "self_instruct", ("instruction", "instances"), where)
    instances = row["instances"]
    if not isinstance(instances, list) or not instances:
        found = "an empty list" if instances == [] else f"{kind(instances)}, not a list"
        raise bad_row(where, f"'instances' is {found}", '[{"input": "...", "output": "..."}, ...]')
    said = []
    for number, instance in enumerate(instances):
        name = f"instances[{number}]"
        if not isinstance(instance, dict) or "output" not in instance:
            raise bad_row(where, f"{name} is no object with an output", '{"input": "...", "output": "..."}')
        parts = _parts(row["instruction"], instance.get("input"), f"{name}.input", where)
        said.append(_pair(joined(parts), text(instance["output"], f"{name}.output", where), where, parts))
    return said


def _alpaca(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    _need(row, "alpaca", ("instruction", "output"), where)
    parts = _parts(row["instruction"], row.get("input"), "'input'", where)
    said = _pair(joined(parts), text(row["output"], "'output'", where), where, parts)
    if is_blank(row.get("history")) or row["history"] == []:
        return [said]
    return [replace(said, messages=(*_history(row["history"], where), *said.messages))]


def _history(value: Any, where: str) -> list[Message]:
    """Earlier turns as LLaMA-Factory writes them: [[question, answer], ...]."""
    hint = '[["question", "answer"], ...]'
    if not isinstance(value, list):
        raise bad_row(where, f"'history' is {kind(value)}, not a list", hint)
    messages = []
    for number, pair in enumerate(value):
        name = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise bad_row(where, f"{name} is no pair of texts", hint)
        messages.append(Message("user", text(pair[0], f"{name}[0]", where)))
        messages.append(Message("assistant", text(pair[1], f"{name}[1]", where)))
    return messages


def _prompt_completion(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    answer = "response" if "response" in row and "completion" not in row else "completion"
    _need(row, "prompt_completion", ("prompt", answer), where)
    prompt, completion = row["prompt"], row[answer]
    if row.get("label") is False:  # unpaired preferences, as TRL writes them for KTO
        raise bad_row(where, "its label says that the completion was rejected", "only what was accepted can be learned")
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = read_messages(prompt, "prompt", where), read_messages(completion, answer, where)
        if not before or not any(message.role == "assistant" for message in after):
            empty, needs = ("prompt", "a message") if not before else (answer, "an assistant turn")
            raise bad_row(where, f"{empty!r} has no message to learn from", f"give it {needs}, or leave the row out")
        # The row's shape says what is learned of it, as for TRL: nothing that was said before the completion.
        said_before = [m._replace(learn=bool(m.learn)) if m.role == "assistant" else m for m in before]
        return [Conversation(up_to_last_answer([*said_before, *after], where), where, read_tools(row, where))]
    if isinstance(prompt, list) or isinstance(completion, list):
        raise bad_row(
            where,
            f"'prompt' is {kind(prompt)} and {answer!r} is {kind(completion)}",
            "write texts or lists of messages",
        )
    return [_pair(text(prompt, "'prompt'", where), text(completion, repr(answer), where), where)]


def _question_answer(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    _need(row, "question_answer", ("question", "answer"), where)
    return [_pair(text(row["question"], "'question'", where), text(row["answer"], "'answer'", where), where)]


def _classification(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    _need(row, "classification", ("text", "label"), where)
    given = ("input", text(row["text"], "'text'", where))
    parts = (("instruction", source.instruction), given) if source.instruction else (given,)
    word = _word(row["label"], source.labels, where)
    return [replace(_pair(joined(parts), word, where, parts), label=word)]


def _word(label: Any, labels: tuple[str, ...], where: str) -> str:
    """The word for a row's class: a text is its own; numbers, also as text, and truth values are named by `labels`."""
    if not labels:
        if isinstance(label, int | float) and not isinstance(label, bool):
            raise bad_row(
                where, f"'label' is the number {short(label)}", "name the classes: labels: [negative, positive]"
            )
        return scalar(label, "label", where)
    if isinstance(label, str) and label in labels:
        return label
    numbers = [str(number) for number in range(len(labels))]
    number = numbers.index(label) if isinstance(label, str) and label in numbers else label
    if not (isinstance(number, int | float) and number in range(len(labels))):
        raise bad_row(
            where,
            f"'label' is {short(label)}, which is none of the {len(labels)} labels",
            f"the recipe's labels are {', '.join(labels)}, numbered from 0",
        )
    return labels[int(number)]


def _text(row: Mapping[str, Any], source: SourcePlan, where: str) -> list[Conversation]:
    _need(row, "text", ("text",), where)
    # A first row without its label would otherwise make plain text of a whole file of classes.
    if source.format == "auto" and not BESIDE_TEXT.issuperset(row):
        more = listed(sorted(row.keys() - BESIDE_TEXT))
        raise bad_row(where, f"plain text, as the first row is, but with {more}", "name the source's format")
    return [Conversation((), where, text=text(row["text"], "'text'", where))]


def _pair(request: str, answer: str, where: str, parts: tuple[tuple[str, str], ...] = ()) -> Conversation:
    return Conversation((Message("user", request), Message("assistant", answer)), where, parts=parts)


def _parts(instruction: Any, given: Any, name: str, where: str) -> tuple[tuple[str, str], ...]:
    """The named parts of a question; the input is none where it says nothing."""
    asked = ("instruction", text(instruction, "'instruction'", where))
    return (asked,) if is_blank(given) else (asked, ("input", text(given, name, where)))


def _need(row: Mapping[str, Any], format: str, columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if column not in row:
            raise _lacks(row, format, columns, where)


def _lacks(row: Mapping[str, Any], format: str, columns: tuple[str, ...], where: str) -> DataError:
    missing = " and no ".join(repr(column) for column in columns if column not in row)
    return bad_row(
        where,
        f"no {missing} in a row of format {format}",
        "every row of a file has the same columns; give data.*.format where `auto` took the wrong one",
    )


SHAPES: dict[str, Callable[[Mapping[str, Any], SourcePlan, str], list[Conversation]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "self_instruct": _self_instruct,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "classification": _classification,
    "text": _text,
}
