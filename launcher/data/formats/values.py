"""A row's values: text and JSON that can be learned, or what is wrong with them, with the row's place and a hint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.errors import DataError

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_KINDS = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text"}
# Not the six characters \u0000 of a text about JSON, whose backslash is written twice.
_NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def bad_row(where: str, message: str, hint: str) -> DataError:
    """What is wrong with the row at `where` (`file:line`)."""
    return DataError(f"{where}: {message}" if where else message, hint)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def flaw(value: Any) -> tuple[str, str] | None:
    """What keeps `value` from being learned as text, and what to do about it; None where nothing does.

    Text is a string that says something, can be written as UTF-8 and holds no NUL: a NUL is a file of another
    encoding or no text at all, and it would be learned letter for letter.
    """
    if not isinstance(value, str):
        one = "keep one of them a row" if isinstance(value, list) else "write it as a JSON string, between quotes"
        return f"is {kind(value)}, not text", one
    if not value or value.isspace():
        return "is empty", "fill it in, or leave the row out"
    if "\0" in value:
        return "holds a NUL, which is no letter", "the file was written as UTF-16 or is no text; save it as UTF-8"
    if not (value.isascii() or _is_utf8(value)):
        return (
            "holds half of a surrogate pair, which is no character",
            "the text was cut inside an emoji or read with the wrong encoding; write the file as UTF-8",
        )
    return None


def text(value: Any, name: str, where: str) -> str:
    """`value`, which is text. Raises DataError, naming it `name`, where it cannot be learned; see `flaw`."""
    if wrong := flaw(value):
        raise bad_row(where, f"{name} {wrong[0]}", wrong[1])
    assert isinstance(value, str)
    return value


def is_blank(value: Any) -> bool:
    """Whether `value` says nothing: null, or text without a letter."""
    return value is None or (isinstance(value, str) and (not value or value.isspace()))


def from_json(value: str) -> Any:
    """What the JSON text says. Raises ValueError where it is none; NaN and Infinity are none."""
    try:
        return json.loads(value, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def require_json(value: Any, name: str, where: str) -> None:
    """Raise DataError where `value` cannot be written as JSON in UTF-8, as chat templates write tools and calls."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise bad_row(
            where, f"{name} cannot be written as JSON: {error}", "use objects, lists, text and numbers"
        ) from error
    if _NUL_IN_JSON.search(written) or not _is_utf8(written):
        raise bad_row(
            where,
            f"{name} holds a NUL or half of a surrogate pair, which is no character",
            "the text was read with the wrong encoding; write the file as UTF-8",
        )


def refuse_media(columns: Mapping[str, Any], name: str, where: str) -> None:
    """Raise DataError where a row, or the message called `name`, holds pictures or sound beside its words."""
    if _MEDIA.isdisjoint(columns):
        return
    for column in sorted(_MEDIA.intersection(columns)):
        if not (is_blank(columns[column]) or columns[column] == []):
            at = f"{name}.{column}" if name else repr(column)
            raise bad_row(where, f"{at} holds more than text", "images, sound and video cannot be trained on")


def scalar(value: Any, column: str, where: str) -> str:
    """A class or group as text: the text itself, a number's digits, true or false.

    Raises DataError, naming the column, for a missing value (null, empty, not a number) and for a list or an object.
    """
    if is_blank(value) or (isinstance(value, float) and math.isnan(value)):
        raise bad_row(where, f"{column!r} is empty", "fill it in, or leave the row out")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        # A column of numbers with a gap in it comes as floats from some files and not from others.
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text(value, repr(column), where)


def short(value: Any) -> str:
    """A value as messages to the user show it: text and numbers themselves, of anything else what it is."""
    shown = repr(value) if isinstance(value, str | int | float) else kind(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def listed(columns: Iterable[str], at_most: int = 20) -> str:
    """Names of columns as messages to the user show them; a name may be no text that can be printed."""
    names = [name if name.isprintable() else ascii(name) for name in columns]
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return (", ".join(name[:40] for name in names[:at_most]) or "none") + more


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
