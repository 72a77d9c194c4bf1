"""Rows of the four common shapes of instruction data, turned into conversations.

| format            | columns                                                    |
|-------------------|------------------------------------------------------------|
| messages          | `messages`: list of {role, content}, as OpenAI writes them |
| alpaca            | `instruction`, `input` (may be missing or empty), `output` |
| prompt_completion | `prompt`, `completion`                                     |
| question_answer   | `question`, `answer`                                       |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import DataError

Format = Literal["messages", "alpaca", "prompt_completion", "question_answer"]
Message = tuple[str, str]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in REQUIRED.items())


@dataclass(frozen=True)
class Conversation:
    """Who said what: `messages` are (role, content) pairs and the last one is an assistant's."""

    messages: tuple[Message, ...]
    where: str = ""
    """`file:line` of the row, for messages to the user."""

    @property
    def answer(self) -> str:
        """The assistant's last words."""
        return self.messages[-1][1]


def detect(columns: Iterable[str], where: str = "") -> Format:
    """The format whose required columns are all there. Raises DataError, naming the columns, where none is."""
    present = set(columns)
    for name, required in REQUIRED.items():
        if present.issuperset(required):
            return name
    found = ", ".join(sorted(present)) or "none"
    raise DataError(_at(where, f"the format cannot be told from the columns: {found}"), hint=f"known formats: {_KNOWN}")


def to_conversation(row: Mapping[str, Any], format: Format, where: str = "") -> Conversation:
    """One row as a conversation; what follows the last assistant turn is left off, since nothing in it can be learned.

    Raises DataError, beginning with `where`, for a missing column, a value of another type, an empty text or a
    conversation without an assistant turn.
    """
    missing = [column for column in REQUIRED[format] if column not in row]
    if missing:
        raise DataError(
            _at(where, f"no {' and no '.join(repr(column) for column in missing)} in a row of format {format}"),
            hint="every row of a file has the same columns; give data.*.format where `auto` took the wrong one",
        )
    match format:
        case "messages":
            return Conversation(_messages(row["messages"], where), where)
        case "alpaca":
            request = _text(row, "instruction", where)
            if row.get("input") not in (None, ""):
                request += "\n\n" + _text(row, "input", where)
            return _pair(request, _text(row, "output", where), where)
        case "prompt_completion":
            return _pair(_text(row, "prompt", where), _text(row, "completion", where), where)
        case "question_answer":
            return _pair(_text(row, "question", where), _text(row, "answer", where), where)


def _pair(request: str, answer: str, where: str) -> Conversation:
    return Conversation((("user", request), ("assistant", answer)), where)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            _at(where, f"{column!r} is {_kind(value)}, not text"), hint="write it as a JSON string, between quotes"
        )
    return _speakable(value, repr(column), where)


def _speakable(text: str, name: str, where: str) -> str:
    if not text.strip():
        raise DataError(_at(where, f"{name} is empty"), hint="fill it in, or leave the row out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            _at(where, f"{name} holds half of a surrogate pair, which is no character"),
            hint="the text was cut inside an emoji or read with the wrong encoding; write the file as UTF-8",
        ) from error
    return text


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(
            _at(where, f"'messages' is {_kind(value)}, not a list"), hint="[{role: ..., content: ...}, ...]"
        )
    messages = [_message(item, number, where) for number, item in enumerate(value)]
    spoken = [message for message in messages if message is not None]
    while spoken and spoken[-1][0] != "assistant":
        spoken.pop()
    if not spoken:
        raise DataError(
            _at(where, "no assistant turn, so there is nothing to learn"),
            hint="a conversation needs a message whose role is assistant; data.on_bad_row=drop leaves such rows out",
        )
    return tuple(spoken)


def _message(item: Any, number: int, where: str) -> Message | None:
    """One message; None for one that says nothing, such as an empty system prompt."""
    name = f"messages[{number}]"
    if not isinstance(item, Mapping) or "role" not in item:
        raise DataError(_at(where, f"{name} is no object with a role"), hint='{"role": "user", "content": "..."}')
    role = item["role"]
    if role not in ROLES:
        raise DataError(_at(where, f"{name} has the unknown role {role!r}"), hint=f"known roles: {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise DataError(
            _at(where, f"{name} calls a tool, and calls cannot be learned yet"),
            hint="write the call as the assistant's content, or leave the row out",
        )
    content = item.get("content")
    if isinstance(content, list):  # OpenAI's content parts
        content = _joined(content, name, where)
    if content is None or content == "":
        if role in ("system", "developer", "tool"):
            return None
        raise DataError(_at(where, f"the {role}'s {name} is empty"), hint="fill it in, or leave the row out")
    if not isinstance(content, str):
        raise DataError(_at(where, f"{name}.content is {_kind(content)}, not text"), hint="write it as a JSON string")
    return role, _speakable(content, f"{name}.content", where)


def _joined(parts: list[Any], name: str, where: str) -> str:
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            _at(where, f"{name}.content has a part that is not text"), hint="images and sound cannot be trained on"
        )
    return "".join(str(text) for text in texts)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _at(where: str, message: str) -> str:
    return f"{where}: {message}" if where else message
