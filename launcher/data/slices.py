"""The columns of `evaluate.slices`: held-out rows keep their values, so that scores can be told apart by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.data.formats.values import is_blank, scalar
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

NO_VALUE = "(none)"
"""Of a row that lacks the column, or has nothing in it."""
MOST_VALUES = 50
"""Beyond so many, a slice is a few rows, and its score a matter of luck."""


def slices_of(
    row: Mapping[str, Any], columns: Sequence[str], source: SourcePlan, where: str
) -> tuple[tuple[str, str], ...]:
    """(column, value as text) of a row, the columns by the file's names or the format's.

    Raises DataError for a list or an object.
    """
    found = []
    for column in columns:
        value = row.get(column, row.get(source.columns.get(column, column)))
        missing = is_blank(value) or value != value  # what files of numbers have for a gap is not equal to itself
        found.append((column, NO_VALUE if missing else scalar(value, column, where)))
    return tuple(found)


def check_slices(columns: Sequence[str], held_out: Sequence[Mapping[str, str]]) -> None:
    """Raise DataError where the held-out rows' values of a column tell nothing apart, or too much."""
    for column in columns:
        values = {row[column] for row in held_out}
        if values == {NO_VALUE}:
            raise DataError(
                f"evaluate.slices: no held-out row has a column {column!r}",
                hint="name a column of the rows of data.eval or data.test",
            )
        if len(values) > MOST_VALUES:
            raise DataError(
                f"evaluate.slices: {len(values)} different values in {column!r}, such as {min(values)[:40]!r}",
                hint=f"name a column of at most {MOST_VALUES} values",
            )
