"""A JSON value as strictly as the standard has it, and what is said of one that is no row."""

from __future__ import annotations

import json
from typing import Any

from launcher.errors import DataError


class NotJson(ValueError):
    """`NaN` and its like, which Python's decoder takes and JSON does not know."""


def _refuse(constant: str) -> Any:
    raise NotJson(constant)


DECODER = json.JSONDecoder(parse_constant=_refuse)
RAW_DECODE = DECODER.raw_decode


def row_object(value: Any, where: str) -> dict[str, Any] | DataError:
    """`value` if it is a row."""
    if isinstance(value, dict):
        return value
    return DataError(f"{where}: a row is an object, not {type(value).__name__}", hint='write {"column": "text", ...}')


def too_deep(where: str) -> DataError:
    """A row in which a thousand brackets are open at once."""
    return DataError(f"{where}: nested too deep to be read", hint="one flat JSON object a line")


def not_json(where: str, error: ValueError) -> DataError:
    """A number that JSON does not know, or that no computer does."""
    if isinstance(error, NotJson):
        return DataError(f"{where}: {error} is no JSON", hint="write null, or leave the column out")
    return DataError(f"{where}: not JSON: {error}", hint="write such a number as text, between quotes")
