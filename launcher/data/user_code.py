"""A function of the user's own, loaded from the one file that the recipe names; what it does wrong is told with its
line."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from launcher.errors import DataError


class UserCode:
    """`name` of the Python file `file`; raises DataError where there is none.

    Picklable, and other processes and machines run what was read here: the file's text travels along.
    """

    def __init__(self, file: str, name: str, key: str, example: str) -> None:
        """`key` is the recipe's that names the file, `example` a function as it should be."""
        self.file, self.name, self.example = file, name, example
        try:
            self._code = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}", hint=f"{key} is looked up beside the recipe") from error
        self.fingerprint = hashlib.sha256(self._code).hexdigest()
        """SHA-256 of the file."""
        self._function: Callable[..., Any] | None = self._load()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_function": None}

    def run(self, *arguments: Any, before: str, hint: str) -> Any:
        """What the function returns. Raises DataError, beginning with `before`, for whatever it raises."""
        self._function = self._function or self._load()
        try:
            with redirect_stdout(sys.stderr):  # results of ours are on stdout
                return self._function(*arguments)
        except (Exception, SystemExit) as error:
            raise DataError(f"{before}{self.name} of {self._line(error)} raised {_said(error)}", hint) from error

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
                hint=f"did you mean {near[0]}?" if near else self.example,
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
