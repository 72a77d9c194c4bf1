"""A function of the user's own, from a row's messages to others: loaded from the one file that the recipe names."""

from __future__ import annotations

import hashlib
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from difflib import get_close_matches
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from launcher.data.conversation import Message
from launcher.data.formats.messages import read_conversation
from launcher.errors import DataError


class UserFunction:
    """`name` of the Python file `file`; raises DataError where there is none.

    Picklable, and other processes and machines run what was read here: the file's text travels along.
    """

    def __init__(self, file: str, name: str) -> None:
        self.file, self.name = file, name
        try:
            self._code = Path(file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: {error.strerror}", hint="data.augment.function is looked up beside the recipe"
            ) from error
        self.fingerprint = hashlib.sha256(self._code).hexdigest()
        """SHA-256 of the file."""
        self._function: Callable[..., Any] | None = self._load()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_function": None}

    def __call__(self, messages: Sequence[Message], rng: random.Random, where: str) -> tuple[Message, ...] | None:
        """What the function makes of the messages of the row at `where`; None: the row is left out.

        Raises DataError, beginning with `where`, for whatever it raises and for whatever is no conversation.
        """
        self._function = self._function or self._load()
        try:
            with redirect_stdout(sys.stderr):  # results of ours are on stdout
                made = self._function(_as_dicts(messages), rng)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{where}: {self.name} of {self._line(error)} raised {_said(error)}",
                hint="mend the function; it is called with a list of {role, content} and a random.Random",
            ) from error
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

    def _load(self) -> Callable[..., Any]:
        # Compiled from the bytes that were fingerprinted: the import system could take an older .pyc beside the file.
        title = f"slipway_user_{self.fingerprint[:16]}"
        spec = spec_from_file_location(title, self.file, loader=SourceFileLoader(title, self.file))
        assert spec is not None, "there is a spec wherever a loader is given"
        module = sys.modules[title] = module_from_spec(spec)
        try:
            with redirect_stdout(sys.stderr):
                exec(compile(self._code, self.file, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self._line(error)}: cannot be loaded: {_said(error)}", hint="run the file with python to see why"
            ) from error
        function = getattr(module, self.name, None)
        if not callable(function):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = get_close_matches(self.name, names, n=1)
            raise DataError(
                f"{self.file}: no function {self.name!r} in it",
                hint=f"did you mean {near[0]}?" if near else "def vary(messages, rng): return messages",
            )
        return function

    def _line(self, error: BaseException) -> str:
        """The file, with the line in it where `error` came up."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
        if isinstance(error, SyntaxError) and error.filename == self.file:
            lines.append(error.lineno)
        return f"{self.file}:{lines[-1]}" if lines else self.file


def _said(error: BaseException) -> str:
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return words if words.isprintable() else words.encode("unicode_escape").decode()


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
