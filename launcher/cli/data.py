"""`slipway data`: the rows of a recipe as the model will see them, supervised tokens marked, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, Overrides, RecipeName
from launcher.report.data_rows import DroppedRow, Row, SetName, ShownDocument, dropped_rows, rows
from launcher.report.data_tables import Chart, Table, charts, fact_table, short, tables, work

if TYPE_CHECKING:
    from rich.text import Text

    from launcher.data.prepare.report import Report
    from launcher.plan.plan import DataFacts

SHOWN_ROWS, SHOWN_DROPPED = 3, 20
LEARNED, CONTROL, LEARNED_CONTROL = "green", "dim magenta", "green reverse"
_TRAILING = re.compile(r"([^\S\n]+(?=\n|\Z))")
"""White space that nobody sees: before a line break, a control token or a change between prompt and answer."""


def command(
    recipe: RecipeName,
    overrides: Overrides = None,
    number: Annotated[
        int | None,
        typer.Option("--rows", min=0, help=f"How many to show [default: {SHOWN_ROWS}; {SHOWN_DROPPED} with --dropped]"),
    ] = None,
    which: Annotated[SetName, typer.Option("--set", help="Rows of which set")] = "train",
    dropped: Annotated[bool, typer.Option("--dropped", help="Show the rows that were left out, and why")] = False,
    find: Annotated[
        str | None, typer.Option("--find", metavar="TEXT", help="Only documents with TEXT in them or in their place")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots, to be opened in a browser")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model will see them, and what the data is like.

    What the model learns is green, or between >> and << without colour; control tokens, which only the chat template
    writes, have a colour of their own, or the same text in a message a backslash before it.
    """
    from launcher.cli.progress import preparing
    from launcher.data.prepare.findings import findings
    from launcher.data.prepare.report import Report
    from launcher.driver.start import decide, new_run_folder, run_name
    from launcher.recipe.load import load

    loaded = load(recipe, overrides or ())
    with preparing(render.err()) as say:
        facts = decide(loaded, new_run_folder(loaded, None), say).facts
    folder, seed = Path(facts.folder), loaded.recipe.train.seed
    report = Report.load(folder / "report.json")
    found = findings(report) if report else []
    if report is None:
        render.note("prepared by another version of Slipway: there are no statistics, only counts")
    limit = number if number is not None else SHOWN_DROPPED if dropped else SHOWN_ROWS
    left_out = list(islice(_matching(folder, find if dropped else None), limit if dropped or html else 0))
    shown: Iterable[Row] = ()
    if find is not None and not dropped and (html or not as_json):
        with preparing(render.err()) as say:
            shown = list(rows(folder, which, seed, limit, find, say))
    elif not dropped:
        shown = rows(folder, which, seed, limit)

    if html is not None:
        from launcher.report.data_page import page
        from launcher.report.markup import write

        content = page(run_name(loaded), facts, report, found, which, list(shown), left_out, dropped_rows(folder))
        write(html, content, "--html")
        if not as_json:
            _print(str(html))
    if as_json:
        value: dict[str, Any] = {
            "facts": facts.model_dump(mode="json"),
            "report": report.model_dump(mode="json") if report else None,
            "findings": found,
        }
        render.print_json(value | ({"dropped": [vars(row) for row in left_out]} if dropped else {}))
    elif html is None and dropped:
        _show_dropped(left_out, sum(facts.dropped.values()), folder)
    elif html is None:
        _show_rows(shown, find)
        if find is None:
            _show_report(facts, report, found)


def _matching(folder: Path, find: str | None) -> Iterator[DroppedRow]:
    wanted = (find or "").casefold()
    return (row for row in dropped_rows(folder) if any(wanted in text.casefold() for text in vars(row).values()))


def _show_rows(shown: Iterable[Row], find: str | None) -> None:
    """Rows, and what their colours mean."""
    some = False
    for row in shown:
        _show(row)
        some = True
    if some:
        _show_legend()
    elif find is not None:
        render.note(f"no document of this set holds {find!r}")


def _show(row: Row) -> None:
    """A row's documents, each under its place."""
    if len(row) > 1:
        num_tokens = sum(document.num_tokens for document in row)
        _print(f"=== a row of {len(row)} documents, {num_tokens:,} tokens", "dim")
    for document in row:
        _print(f"--- {document.where}, {document.figures}", "dim")
        render.out().print(_text(document))
        if document.answer is not None:
            _print("--- expected answer", "dim")
            _print(document.answer)


def _text(document: ShownDocument) -> Text:
    """A document's words in the style of their kind, or with marks where there is no colour."""
    from rich.text import Text

    text = Text()
    colour = _coloured()
    for learned, run in groupby(document.pieces, key=lambda piece: piece.learned):
        text.append(">>" if learned and not colour else "")
        for control, pieces in groupby(run, key=lambda piece: piece.control):
            words = "".join(piece.text for piece in pieces)
            if control:
                text.append(render.printable(words), LEARNED_CONTROL if learned else CONTROL)
                continue
            for spelled_out in () if colour else document.spelled_out:
                words = words.replace(spelled_out, "\\" + spelled_out)
            _append(text, words, LEARNED if learned else "")
        text.append("<<" if learned and not colour else "")
    if text.plain.endswith("\n"):
        text.right_crop(1)
        text.append(_mark("\n"), "dim")
    return text


def _append(text: Text, words: str, style: str) -> None:
    """Add words, white space at the ends of their lines made visible."""
    for i, stretch in enumerate(_TRAILING.split(words)):
        if i % 2:
            text.append("".join(map(_mark, stretch)), f"{style} dim")
        else:
            text.append(render.printable(stretch), style)


def _mark(space: str) -> str:
    """What white space is shown as."""
    marks = {} if render.ascii_only() else {" ": "·", "\t": "→", "\n": "↵"}
    return marks.get(space) or f"\\x{ord(space):02x}"


def _coloured() -> bool:
    console = render.out()
    return console.color_system is not None and not console.no_color


def _show_legend() -> None:
    """Which style is what."""
    from rich.text import Text

    if _coloured():
        parts = [("learned", LEARNED), ("<control token>", CONTROL), ("<learned control token>", LEARNED_CONTROL)]
        render.out().print(Text("   ").join([Text("---", "dim"), *(Text(*part) for part in parts)]))


def _show_dropped(left_out: list[DroppedRow], total: int, folder: Path) -> None:
    """Rows that were left out, each with its reason."""
    for row in left_out:
        _print(f"{row.where}: {row.reason}" + (f": {row.detail}" if row.detail else ""))
        if row.text:
            _print(f"    {short(row.text)}", "dim")
    _print(f"{len(left_out):,} of {total:,} rows that were left out; all are in {folder / 'dropped.jsonl'}", "dim")


def _show_report(facts: DataFacts, report: Report | None, found: Sequence[str]) -> None:
    """What the data is like; only counts where there is no report."""
    for table in tables(report, dropped_rows(Path(facts.folder))) if report else [fact_table(facts)]:
        _show_table(table)
    for chart in charts(report, coarse=True) if report else []:
        _show_chart(chart)
    if found:
        print()
        _print("findings", "bold")
        for finding in found:
            _print(f"- {finding}")
    print()
    if report:
        _print(f"prepared in {work(report)}")
    _print(f"kept in {facts.folder}")


def _show_table(table: Table) -> None:
    print()
    _print(table.title, "bold")
    render.print_table(table.header, table.rows, table.align)


def _show_chart(chart: Chart) -> None:
    """A bar a bin for the first series, with its counts and shares; shares alone for another."""
    print()
    _print(chart.title, "bold")
    (name, counts), *others = chart.series.items()
    figures = [[f"{count:,}", _share(count, sum(counts))] for count in counts]
    for _, other in others:
        for cells, count in zip(figures, other, strict=True):
            cells.append(_share(count, sum(other)))
    header = (name, "", *(other for other, _ in others)) if others else ("",) * 2
    used = max(map(len, chart.labels)) + sum(max(map(len, column)) + 2 for column in zip(header, *figures, strict=True))
    width = max(min(render.out().width - used - 2, 40), 8)
    table = [
        (label, render.bar(count / max(*counts, 1), width), *cells)
        for label, count, cells in zip(chart.labels, counts, figures, strict=True)
    ]
    render.print_table(("", "", *header), table, "rlr" + "r" * (len(header) - 1))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _print(text: str, style: str = "") -> None:
    """A line of text on stdout, nothing in it obeyed."""
    render.out().print(render.printable(text), markup=False, emoji=False, style=style)
