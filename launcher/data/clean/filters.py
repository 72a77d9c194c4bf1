"""Filters on a row alone, and the mending of its encoding."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.clean.extra import require
from launcher.data.clean.language import foreign, is_told, prose
from launcher.data.conversation import Conversation, Message
from launcher.errors import DataError
from launcher.plan.plan import CleanPlan

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

TOO_LONG, NOT_INCLUDED, EXCLUDED = "too many characters", "not included by pattern", "excluded by pattern"
LANGUAGE = "language"
_SHOWN_CHARACTERS = 80


class Dropped(NamedTuple):
    """A row that is left out."""

    reason: str
    """One of few, for counting."""
    detail: str
    """What it is about this row."""


class Filters:
    """What the recipe says of single rows. A function of the row and the plan, and picklable.

    Raises DataError for a pattern that is no regular expression, and where a library is missing.
    """

    def __init__(self, clean: CleanPlan) -> None:
        self._max_chars = clean.max_chars
        self._include = None if clean.include is None else _compiled(clean.include, "data.clean.include")
        self._exclude = [
            _compiled(pattern, f"data.clean.exclude.{number}") for number, pattern in enumerate(clean.exclude)
        ]
        self._languages = frozenset(clean.languages)
        self._mend = clean.mend_encoding
        if self._languages:
            require("py3langid", "data.clean.languages")
        if self._mend:
            require("ftfy", "data.clean.mend_encoding")

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        """The conversation itself; another one where its encoding was mended; or why it is left out."""
        if self._mend:
            conversation = mended(conversation)
        text = conversation.words
        if self._max_chars is not None:
            num_chars = len(text) + sum(_characters_of_calls(message) for message in conversation.messages)
            if num_chars > self._max_chars:
                return Dropped(TOO_LONG, f"{num_chars} characters, and data.clean.max_chars is {self._max_chars}")
        if self._include is not None and not self._include.search(text):
            return Dropped(NOT_INCLUDED, f"nothing in it matches {self._include.pattern}")
        for pattern in self._exclude:
            if found := pattern.search(text):
                return Dropped(EXCLUDED, f"{found.group()[:_SHOWN_CHARACTERS]!r} matches {pattern.pattern}")
        if self._languages and (language := foreign(prose(conversation), self._languages)):
            return Dropped(LANGUAGE, f"{language}, not {' or '.join(sorted(self._languages))}")
        return conversation

    def keeps_untold(self, conversation: Conversation) -> bool:
        """Whether the row is kept only because it is too short to tell its language."""
        return bool(self._languages) and not is_told(prose(conversation))


def mended(conversation: Conversation) -> Conversation:
    """With text that was read in the wrong encoding (`cafÃ©`) put right, and in NFC; the same object if it was right.

    Everything else that ftfy can change stays: quotes, HTML entities, ligatures, line breaks.
    """
    names = ("messages", "tools", "text", "parts", "label", "group")
    found = {name: getattr(conversation, name) for name in names}
    changes = {name: new for name, value in found.items() if (new := _mended(value)) != value}
    return replace(conversation, **changes) if changes else conversation


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        if value.isascii():
            return value
        from ftfy import fix_text

        return fix_text(value, _conservative())
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a Message or a ToolCall
        return value._make(_mended(item) for item in value)
    if isinstance(value, list | tuple):
        return type(value)(_mended(item) for item in value)
    if isinstance(value, dict):
        return {name: _mended(item) for name, item in value.items()}
    return value


@cache
def _conservative() -> TextFixerConfig:
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        replace_lossy_sequences=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization="NFC",
        explain=False,
    )


def _characters_of_calls(message: Message) -> int:
    return sum(len(call.name) + len(str(call.arguments)) for call in message.tool_calls)


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # such as "possible nested set": it means what it says today
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        hint = "write it in Python's syntax; in YAML, between single quotes"
        raise DataError(f"{key}: {pattern!r} is no regular expression: {error}", hint) from error
