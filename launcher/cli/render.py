"""What people see: results on stdout, everything else on stderr. Rich honours NO_COLOR and pipes by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from launcher.errors import Interrupted, RecipeError, SlipwayError

if TYPE_CHECKING:  # rich is a third of what `slipway check` may take to start
    from rich.console import Console


@cache
def out() -> Console:
    """The console of results: what a script may read."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@cache
def err() -> Console:
    """The console of progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON value on stdout, for `--json`."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text in aligned columns on stdout, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def note(message: str) -> None:
    """A line on stderr that is neither a result nor an error."""
    _labelled("note", "dim", message)


def failure(error: SlipwayError) -> None:
    """An error and its hint on stderr; of a recipe's errors each as `file:line: key: message`."""
    if isinstance(error, RecipeError):
        for problem in error.problems:
            err().print(str(problem), markup=False, style="bold")
            if problem.hint:
                _labelled("hint", "cyan", problem.hint)
        return
    if isinstance(error, Interrupted):
        err().print(error.message, markup=False)
    else:
        _labelled("error", "bold red", error.message)
    if error.hint:
        _labelled("hint", "cyan", error.hint)


def _labelled(label: str, style: str, message: str) -> None:
    err().print(f"[{style}]{label}:[/]", end=" ")
    err().print(message, markup=False)
