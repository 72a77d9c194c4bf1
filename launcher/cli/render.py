"""What people see: results on stdout, everything else on stderr. Rich honours NO_COLOR and pipes by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from launcher.errors import HostsError, Interrupted, RecipeError, SlipwayError
from launcher.report.text import visible

if TYPE_CHECKING:  # rich is a third of what `slipway check` may take to start
    from rich.console import Console

_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"


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
    print(json.dumps(value, indent=2, ensure_ascii=ascii_only()))


def print_log(text: str) -> None:
    """What another process has printed, on stdout and at once."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text in aligned columns on stdout, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """Rows on stdout, two spaces apart, under a header unless it is empty; `align`: l or r for each column."""
    from rich.cells import cell_len

    lines = [[printable(cell) for cell in row] for row in (header, *rows) if any(row)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for number, row in enumerate(lines):
        is_header = any(header) and not number
        cells = []
        for cell, width, side in zip(row, widths, align, strict=True):
            room = " " * (width - cell_len(cell))
            cells.append(room + cell if side == "r" else cell + room)
        out().print("  ".join(cells).rstrip(), markup=False, emoji=False, style="dim" if is_header else "")


def bar(share: float, width: int) -> str:
    """A bar of `share`, 0 to 1, of `width` cells: to an eighth of a cell, or of # where only ASCII can be shown."""
    if ascii_only():
        return "#" * (round(share * width) or int(share > 0))
    whole, rest = divmod(max(round(share * width * 8), int(share > 0)), 8)
    return _EIGHTHS[8] * whole + _EIGHTHS[rest] * (rest > 0)


def ascii_only() -> bool:
    """Whether stdout takes nothing but ASCII for sure."""
    return not (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def printable(text: str) -> str:
    """`text` with what is not `visible`, and what stdout cannot encode, written as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def note(message: str) -> None:
    """A line on stderr that is neither a result nor an error."""
    _labelled("note", "dim", message)


def failure(error: SlipwayError) -> None:
    """An error and its hint on stderr; of a recipe's or cluster's errors each as `file:line: key: message`."""
    if isinstance(error, RecipeError | HostsError):
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
