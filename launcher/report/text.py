"""Text of users' rows, models and logs, made harmless for whatever shows it."""

from __future__ import annotations

import re
from html import escape

from launcher.recipe.addresses import without_secrets

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Control characters but tab and newline, marks that turn the direction of writing, halves of surrogate pairs."""

MOST_CHARACTERS = 2000
"""Of one text in a page."""


def visible(text: str) -> str:
    """`text` without anything that a terminal or page would obey rather than show: such characters as \\x1b or \\u202e.

    Line breaks and tabs stay.
    """
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escaped(text: str) -> str:
    """Text that a page shows as it is, but for passwords in URLs: a page is sent to others."""
    return escape(visible(without_secrets(text)))


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text`, or its beginning where it is longer than `most` characters."""
    return text if len(text) <= most else text[:most] + " ..."
