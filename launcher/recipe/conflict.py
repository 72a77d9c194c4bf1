"""A mistake that no single key shows, and what finds one in a text with a form of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Conflict:
    """A mistake in how keys go together. The first key is where it is reported."""

    keys: tuple[str, ...]
    message: str
    hint: str | None


def in_pattern(key: str, pattern: str) -> Iterator[Conflict]:
    """What is wrong with a regular expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        hint = "write it in Python's syntax; in YAML, between single quotes"
        yield Conflict((key,), f"'{pattern}' is no regular expression: {error}", hint)
