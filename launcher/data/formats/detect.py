"""Rows of the shapes that instruction data comes in, turned into conversations.

| format            | told by these columns                                 | may have too                       |
|-------------------|-------------------------------------------------------|------------------------------------|
| messages          | `messages`, `conversations` or `conversation`:        | `tools` or `functions`             |
|                   | list of {role, content}, as OpenAI writes them        |                                    |
| sharegpt          | the same columns: list of {from, value}               | `tools` or `functions`             |
| self_instruct     | `instruction`, `instances`: list of {input, output},  |                                    |
|                   | each of them a conversation                           |                                    |
| alpaca            | `instruction`, `output`                               | `input`, `history`: list of pairs  |
| prompt_completion | `prompt` and `completion` or `response`: two texts,   | `tools` or `functions` with lists  |
|                   | or two lists of messages                              | of messages                        |
| question_answer   | `question`, `answer`                                  |                                    |
| classification    | `text`, `label`                                       |                                    |
| text              | `text`, beside nothing but `id`, `meta`, `metadata`,  |                                    |
|                   | `url` or `timestamp`                                  |                                    |

All but text may have `system`, the system prompt. Other columns are not read.

A list of messages comes before every other format, since data sets often keep the texts that it was made of beside it.
Which of its two formats it is say the keys of the first message; the column's name where those say nothing. Of the
others exactly one must fit: a row of two is refused, and `format` or `columns` in the recipe say which is meant. `text`
comes last. The first good row of a source decides for all of it.

What follows a row's last answer is left off. See messages.py for what is read from a message, values.py for what is no
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Literal

from launcher.data.conversation import SYSTEM_ROLES, Conversation, Message
from launcher.data.formats.messages import written_as_sharegpt
from launcher.data.formats.shapes import BESIDE_TEXT, CHAT, SHAPES
from launcher.data.formats.values import bad_row, is_blank, listed, refuse_media, scalar, text
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

Format = Literal[
    "messages",
    "sharegpt",
    "self_instruct",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "classification",
    "text",
]

TELLING: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("self_instruct", ("instruction", "instances")),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("prompt_completion", ("prompt", "response")),
    ("question_answer", ("question", "answer")),
    ("classification", ("text", "label")),
)
"""Columns that tell a format; of these exactly one must fit."""
_TOOLS = ("tools", "functions", "system")
NAMES: dict[Format, tuple[str, ...]] = {
    "messages": (*CHAT["messages"], *_TOOLS),
    "sharegpt": (*CHAT["sharegpt"], *_TOOLS),
    "self_instruct": ("instruction", "instances", "system"),
    "alpaca": ("instruction", "output", "input", "history", "system"),
    "prompt_completion": ("prompt", "completion", "response", *_TOOLS),
    "question_answer": ("question", "answer", "system"),
    "classification": ("text", "label", "system"),
    "text": ("text",),
}
"""Every column that a format knows: what `columns` in the recipe may name."""
_KNOWN = "; ".join(
    [
        f"messages or sharegpt ({', '.join(CHAT['messages'])})",
        *(f"{name} ({', '.join(columns)})" for name, columns in TELLING),
        "text (text alone)",
    ]
)


def detect(columns: Iterable[str], where: str = "") -> Format:
    """The format of a row, of which a mapping tells more than its names alone; see the table above. `renamed` first.

    Raises DataError, naming the columns, where none or more than one fits.
    """
    present = set(columns)
    chats = [column for column in CHAT["messages"] if column in present]
    if len(chats) == 1:
        sharegpt = written_as_sharegpt(columns[chats[0]]) if isinstance(columns, Mapping) else None
        return "sharegpt" if (chats[0] != "messages" if sharegpt is None else sharegpt) else "messages"
    fitting = [(name, needed) for name, needed in TELLING if present.issuperset(needed)]
    if len(fitting) == 1 and not chats:
        return fitting[0][0]
    if not fitting and not chats and "text" in present and BESIDE_TEXT.issuperset(present):
        return "text"
    found = listed(sorted(present))
    if chats or fitting:
        several = " and ".join(chats or [f"{name} ({', '.join(needed)})" for name, needed in fitting])
        raise bad_row(
            where,
            f"the format cannot be told from the columns: {found}; there are {several}",
            "say which is meant with the source's format",
        )
    raise bad_row(where, f"the format cannot be told from the columns: {found}", _what_lacks(present))


def check_source(source: SourcePlan, format: Format | None, *others: str | None) -> None:
    """Raise DataError where the recipe says what has no meaning for rows of `format`; None: for rows of any.

    `others` are names that `columns` may give in every format: those of `data.label` and `data.group`.
    """
    known = {name for names in ([NAMES[format]] if format else NAMES.values()) for name in names}
    known.update(name for name in others if name is not None)
    for name in source.columns:
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1)
            does_not = f"the format {format} has no" if format else "no format has a"
            raise DataError(
                f"{source.path}: columns.{name}: {does_not} column {name!r}",
                hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}",
            )
    meant = {
        "instruction": ("classification",),
        "labels": ("classification",),
        "system": tuple(name for name in NAMES if name != "text"),
    }
    for key, formats in meant.items():
        if format is not None and format not in formats and getattr(source, key):
            raise DataError(
                f"{source.path}: {key}: a row of format {format} has no place for it",
                hint=f"leave it out; it is for {', '.join(formats)}",
            )


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The row with the format's names for the file's, which go. Raises DataError where it lacks one of them."""
    if not columns:
        return row
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise bad_row(
            where,
            f"no column {missing[0]!r}, which the recipe's columns name",
            f"the row has {listed(row)}",
        )
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs}
    return kept | {name: row[column] for name, column in columns.items()}


def to_conversations(
    row: Mapping[str, Any],
    format: Format,
    source: SourcePlan,
    where: str = "",
    label: str | None = None,
    group: str | None = None,
) -> list[Conversation]:
    """A row of `format` as conversations: several for self_instruct, one for every other format.

    `label` and `group` name columns, by the file's names or the format's, whose values every conversation gets as text;
    a classification row's label is its own answer unless another column is named.
    Raises DataError, beginning with `where`, for a row that lacks a column, for values that cannot be learned, for a
    conversation without an assistant turn, and for a missing label or group.
    """
    named = row
    if source.columns:
        if not (source.columns.keys() - {label, group}).issubset(NAMES[format]):
            check_source(source, format, label, group)
        named = renamed(row, source.columns, where)
    if format != "text":
        refuse_media(named, "", where)
    found = SHAPES[format](named, source, where)
    if format != "text" and (source.system or "system" in named):
        found = [replace(one, messages=_with_system(one.messages, named, source, where)) for one in found]
    if label is not None and (format != "classification" or label not in ("label", source.columns.get("label"))):
        value = _class(label, row, named, where)
        found = [replace(one, label=value) for one in found]
    if group is not None:
        value = _class(group, row, named, where)
        found = [replace(one, group=value) for one in found]
    return found


def _with_system(
    messages: tuple[Message, ...], row: Mapping[str, Any], source: SourcePlan, where: str
) -> tuple[Message, ...]:
    """The messages behind the row's system prompt, or behind the recipe's where the row has none."""
    own = None if is_blank(row.get("system")) else text(row["system"], "'system'", where)
    prompt = own or source.system
    if not prompt:
        return messages
    turn = next((message.content for message in messages if message.role in SYSTEM_ROLES), None)
    if turn is None:
        return (Message("system", prompt), *messages)
    if own is not None and own != turn:
        raise bad_row(where, "a system turn and another text in 'system'", "keep one of them")
    return messages


def _class(column: str, row: Mapping[str, Any], named: Mapping[str, Any], where: str) -> str:
    """The text of a label or group, by the file's name of its column or by the format's."""
    place = row if column in row else named
    if column not in place:
        raise bad_row(
            where,
            f"no column {column!r}, which data.label or data.group names",
            f"the row has {listed(row)}",
        )
    return scalar(place[column], column, where)


def _what_lacks(present: set[str]) -> str:
    """What the format that fits best still needs, then what every format needs."""
    name, needed = max(TELLING, key=lambda telling: len(present.intersection(telling[1])))
    missing = [column for column in needed if column not in present]
    if len(missing) == len(needed):
        return f"name the columns with the source's columns: {{prompt: ..., completion: ...}}; known formats: {_KNOWN}"
    other = ", ".join(f"{column}: ..." for column in missing)
    return f"{name} needs the source's columns: {{{other}}} too; known formats: {_KNOWN}"
