"""What a row means, whatever its format: who said what, with which tools, and what of it is learned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

END_MARKER = "<|endoftext|>"
"""Files made for GPT-3's fine-tuning end every completion with it, whatever the tokenizer at hand calls its own."""
SYSTEM_ROLES = ("system", "developer")


class ToolCall(NamedTuple):
    """A function that the assistant calls."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class Message(NamedTuple):
    """One turn."""

    role: str
    """system, developer, user, assistant or tool."""
    content: str
    """Empty where the assistant only calls tools."""
    reasoning: str = ""
    """What the assistant thinks before it answers."""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    """Which tool answers."""
    tool_call_id: str | None = None
    learn: bool | None = None
    """The row's own mark on an assistant's turn: learned, not learned, or nothing said."""


@dataclass(frozen=True)
class Conversation:
    """Messages of which the last is an assistant's; or plain text, all of which is learned."""

    messages: tuple[Message, ...]
    where: str = ""
    """`file:line` of the row, for messages to the user."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that may be called, as JSON schemas."""
    text: str | None = None
    """Plain text; there are no messages then."""
    parts: tuple[tuple[str, str], ...] = ()
    """The named parts of a row that a wording may join anew: (("instruction", ...), ("input", ...))."""
    label: str | None = None
    """The row's class, for stratified splits and balance."""
    group: str | None = None
    """Rows of one group are held out together."""
    slices: tuple[tuple[str, str], ...] = ()
    """(column, value) of the columns by which scores are told apart."""

    @property
    def answer(self) -> str:
        """The assistant's last words, or the text."""
        return self.messages[-1].content if self.messages else self.text or ""

    @property
    def words(self) -> str:
        """Everything that is said, a line a message: what is filtered by and compared."""
        if self.text is not None:
            return self.text
        said = (part for message in self.messages for part in (message.reasoning, message.content) if part)
        return "\n".join(said)

    def digest(self, marks: bool = False, system: bool = True) -> bytes:
        """16 bytes that rows with the same words have in common, whatever an end-of-text marker adds to them.

        `marks`: rows that are learned otherwise differ too. `system`: rows with other system prompts do.
        """
        if self.text is not None:
            return _hash(_bare(self.text))
        turns = [message for message in self.messages if system or message.role not in SYSTEM_ROLES]
        fields = 7 if marks else 6
        return _hash([self.tools, [_unmarked(message)[:fields] for message in turns]])

    def asked(self) -> bytes:
        """16 bytes that rows with the same question have in common: what is said before the last answer, however it is
        spaced, and whatever system prompt and tools stand before it."""
        turns = [message for message in self.messages[:-1] if message.role not in SYSTEM_ROLES]
        if self.text is not None or not any(message.role in ("user", "tool") for message in turns):
            return self.digest()  # rows that only begin alike ask nothing
        return _hash([[message.role, " ".join(_unmarked(message).content.split())] for message in turns])


def _unmarked(message: Message) -> Message:
    return message._replace(content=_bare(message.content)) if message.role == "assistant" else message


def _bare(text: str) -> str:
    """Without white space at the end, and an end-of-text marker before it."""
    return text.rstrip().removesuffix(END_MARKER).rstrip()


def _hash(said: Any) -> bytes:
    words = json.dumps(said, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(words.encode()).digest()[:16]
