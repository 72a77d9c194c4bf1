"""What a row means, whatever its format: who said what, with which tools, and what of it is learned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple


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

    def digest(self, without_answer: bool = False) -> bytes:
        """16 bytes that equal words have in common, wherever they stand; `without_answer`: of what is asked."""
        if self.text is not None:
            said: Any = self.text
        else:
            messages = self.messages[:-1] if without_answer else self.messages
            said = [self.tools, [message[:6] for message in messages]]
        words = json.dumps(said, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(words.encode()).digest()[:16]
