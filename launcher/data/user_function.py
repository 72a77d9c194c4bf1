"""A function of the user's own, from a row's messages to others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from launcher.data.conversation import Message
from launcher.data.formats.messages import read_conversation
from launcher.data.user_code import UserCode
from launcher.errors import DataError


class UserFunction(UserCode):
    """What `data.augment.function` names."""

    def __init__(self, file: str, name: str) -> None:
        super().__init__(file, name, "data.augment.function", "def vary(messages, rng): return messages")

    def __call__(self, messages: Sequence[Message], rng: random.Random, where: str) -> tuple[Message, ...] | None:
        """What the function makes of the messages of the row at `where`; None: the row is left out.

        Raises DataError, beginning with `where`, for whatever it raises and for whatever is no conversation.
        """
        hint = "mend the function; it is called with a list of {role, content} and a random.Random"
        made = self.run(_as_dicts(messages), rng, before=f"{where}: ", hint=hint)
        if made is None:
            return None
        if not isinstance(made, list):
            raise DataError(
                f"{where}: {self.name} of {self.file} returned {type(made).__name__}, not a list of messages",
                hint="return a list of {role, content}, or None to leave the row out",
            )
        try:
            return read_conversation(made, "messages", "")
        except DataError as error:
            raise DataError(f"{where}: {self.name} of {self.file} returned: {error.message}", error.hint) from error


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As OpenAI writes messages, so that they are read back as they were; the function may change them."""
    return [_as_dict(message) for message in messages]


def _as_dict(message: Message) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": deepcopy(call.arguments)}}
        | ({"id": call.id} if call.id else {})
        for call in message.tool_calls
    ]
    extras = {
        "reasoning_content": message.reasoning or None,
        "tool_calls": calls or None,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "train": message.learn,
    }
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    return said | {key: value for key, value in extras.items() if value is not None}
