"""`slipway diff`: what differs between two runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json
from launcher.report.data_tables import short

if TYPE_CHECKING:
    from launcher.report.compare import Difference

MOST_CHARACTERS = 60
"""Of a value in the table; --json has all of it."""


def command(
    one: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URL", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="RUN", help="Another one's", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what differs between two runs: settings, data, environment and result. What is equal is not listed."""
    from launcher.driver.resume import existing_plan
    from launcher.report.compare import compare

    found = compare(existing_plan(one), existing_plan(other))
    if as_json:
        render.print_json({name: [difference.as_dict() for difference in part] for name, part in found.items()})
        return
    if not any(found.values()):
        print("nothing differs")
    names = one.rstrip("/").rpartition("/")[2], other.rstrip("/").rpartition("/")[2]
    for name, part in found.items():
        if part:
            _show(name, part, names if names[0] != names[1] else (one, other))


def _show(name: str, part: list[Difference], runs: tuple[str, str]) -> None:
    """One section as a table."""
    rows = [(difference.key, *map(_text, difference.values), _origins(difference)) for difference in part]
    with_origins = any(row[-1] for row in rows)
    header = (name, *runs, "from") if with_origins else (name, *runs)
    shown = rows if with_origins else [row[:-1] for row in rows]
    render.print_table(header, shown, "l" * len(header))
    print()


def _origins(difference: Difference) -> str:
    return " | ".join(dict.fromkeys(origin for origin in difference.origins if origin))


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.5g}" if isinstance(value, float) else _as_yaml(value)
    return short(" ".join(text.split()), MOST_CHARACTERS)  # a chat template has many lines
