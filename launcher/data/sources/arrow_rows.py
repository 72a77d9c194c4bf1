"""Rows of an Arrow table as plain Python values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from launcher.data.sources.ranges import Row
from launcher.errors import DataError

Restore = Callable[[Any], Any]


def python_rows(part: Any, name: str, first: int) -> Iterator[Row]:
    """The rows of a RecordBatch or Table, numbered from `first` (0 for the first row of the file).

    Maps become dicts, JSON columns what they spell. A row that holds what Python cannot, such as text that is no
    UTF-8 or a date after the year 9999, is a DataError.
    """
    restores = {field.name: restore for field in part.schema if (restore := _restore(field.type)) is not None}
    try:
        values = _values(part, restores)
    except _UNREADABLE:
        for number in range(part.num_rows):
            where = f"{name}:{first + number + 1}"
            try:
                yield where, _values(part.slice(number, 1), restores)[0]
            except _UNREADABLE as error:
                said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                yield where, DataError(f"{where}: a value cannot be read: {said}", hint="write the row again")
        return
    for number, row in enumerate(values, start=first + 1):
        yield f"{name}:{number}", row


_UNREADABLE = (ValueError, OverflowError, TypeError, KeyError, RecursionError)
"""ArrowInvalid, UnicodeDecodeError and JSONDecodeError are ValueErrors."""


def _values(part: Any, restores: dict[str, Restore]) -> list[dict[str, Any]]:
    part.validate(full=True)  # a damaged file's offsets may point anywhere, and reading there ends the process
    rows: list[dict[str, Any]] = part.to_pylist(maps_as_pydicts="strict")
    for column, restore in restores.items():
        for row in rows:
            row[column] = restore(row[column])
    return rows


def _restore(kind: Any) -> Restore | None:
    """What turns a value of this Arrow type into what its JSON spells; None where there is no JSON in it."""
    import pyarrow

    types = pyarrow.types
    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _restore(kind.value_type)
        return None if inner is None else lambda value: None if value is None else [inner(item) for item in value]
    if types.is_struct(kind):
        found = {kind.field(i).name: _restore(kind.field(i).type) for i in range(kind.num_fields)}
        fields = {field: restore for field, restore in found.items() if restore is not None}
        if fields:
            return lambda value: (
                None
                if value is None
                else {key: fields[key](item) if key in fields else item for key, item in value.items()}
            )
    return None
