"""Scores by the values of a column, and how far the best and the worst of them lie apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.evaluate.value import numbers

LEAST_ROWS = 20
"""Of a value that counts for the gap: a share of so many rows is uncertain by up to 11 points (its standard error)."""
GAP = "gap"


def score_slices(
    values: Mapping[str, Sequence[str]], score: Callable[[list[int]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{column: {value: {rows, what `score` says of its rows}, "gap": see `gap`}}.

    `values` has the value of each row by column; `score` is given the numbers of some of the rows.
    """
    found = {}
    for column, of_rows in values.items():
        rows: dict[str, list[int]] = {}
        for number, value in enumerate(of_rows):
            rows.setdefault(value, []).append(number)
        found[column] = with_gap({value: {"rows": len(rows[value])} | score(rows[value]) for value in sorted(rows)})
    return found


def with_gap(of_values: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """{value: its figures, "gap": {least_rows, figure: best - worst}}, the figures by their dotted names.

    Only values of at least `least_rows` rows count; there is no figure where fewer than two do.
    """
    counted = [numbers(figures) for figures in of_values.values() if figures["rows"] >= LEAST_ROWS]
    names = [name for name in counted[0] if name != "rows"] if len(counted) > 1 else []
    apart = {
        name: max(figures[name] for figures in counted) - min(figures[name] for figures in counted)
        for name in names
        if all(name in figures for figures in counted)
    }
    # A value that is called as the gap is set apart by its quotes.
    quoted = {f'"{value}"' if value == GAP else value: figures for value, figures in of_values.items()}
    return quoted | {GAP: {"least_rows": LEAST_ROWS} | apart}
