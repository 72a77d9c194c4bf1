"""The data report as one page that needs nothing else, neither network nor script."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import launcher
from launcher.cli.data_rows import DroppedRow, Piece, Row, SetName, ShownDocument
from launcher.cli.data_tables import SET_NAMES, Chart, Table, charts, fact_table, tables, work
from launcher.cli.render import visible
from launcher.errors import UserError
from launcher.units import format_count

if TYPE_CHECKING:
    from launcher.data.prepare.report import Report
    from launcher.plan.plan import DataFacts

MOST_TOKENS = 50_000
"""Tokens shown on a page: about 3 MB, which any browser opens at once."""
_BEGINNING = "<!doctype html>\n"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser loads and runs nothing, even if a row found a way into the markup."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 560, 200, 48, 24, 36, 8
"""Of a chart, and of the room around its bars, in the units of its viewBox."""
_MOST_LABELS = 7
_WIDE_CHARACTERS = 70
"""In a table's longest line: beyond it the table takes the page's whole width."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --tile: #f0f2f5;
  --learned: #d9f2df; --learned-tile: #c4e9cd; --mark: #1a7f37; --control: #6639ba; --bar: #2f6fb3; --other: #bc4c00;
  --warn: #9a6700 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --faint: #9198a1;
  --line: #3d444d; --tile: #1b222b; --learned: #11351d; --learned-tile: #174828; --mark: #4ac26b; --control: #c297ff;
  --bar: #6cb0f5; --other: #f0883e; --warn: #d9a520 } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
header p { margin: .2rem 0 }
.faint, figcaption span, footer { color: var(--faint) }
#findings ul { list-style: none; padding: 0 }
#findings li { border-left: .25rem solid var(--warn); padding: .2rem .8rem; margin: .4rem 0; background: var(--tile) }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1rem 2.5rem }
figure { margin: 0; max-width: 44rem; break-inside: avoid }
figcaption, caption { font-weight: 600; text-align: left; padding: .2rem 0 }
figcaption span { font-weight: 400; margin-left: .8rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font-size: 12px }
.axis { stroke: var(--line) } .bar { fill: var(--bar) } .other { stroke: var(--other); stroke-width: 2; fill: none }
.dot { fill: var(--other) } .key { display: inline-block; width: .8em; height: .8em; background: var(--bar) }
.key.line { height: 0; border-top: .2em solid var(--other); background: none; vertical-align: middle }
.scroll { overflow-x: auto; break-inside: avoid } .wide { grid-column: 1 / -1 }
table { border-collapse: collapse; margin: .3rem 0 }
td, th { padding: .15rem .9rem .15rem 0; vertical-align: top; overflow-wrap: anywhere }
th { color: var(--faint); font-weight: 400; text-align: left; overflow-wrap: normal }
.r { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.share { width: 14rem; vertical-align: middle } .share svg { height: .9em }
details summary { color: var(--faint); cursor: pointer }
.row { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: 0 1rem }
.document + .document { border-top: 2px dashed var(--line) } .document h3 { font: inherit; margin: .5rem 0 0 }
.words { font: 14px/1.75 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; margin: .3rem 0 .8rem; tab-size: 4; print-color-adjust: exact }
.words span:nth-child(even) { background: var(--tile) }
mark { color: inherit; background: var(--learned); text-decoration: underline; text-decoration-color: var(--mark);
  text-decoration-thickness: 2px; text-underline-offset: .25em }
mark span:nth-child(even) { background: var(--learned-tile) }
b { font-weight: 400; color: var(--control); border: 1px dashed var(--control); border-radius: .25em; padding: 0 .15em;
  direction: ltr; unicode-bidi: isolate }
i.n::before { content: "\\21b5"; color: var(--faint) } .more { color: var(--warn) }
@media print { body { max-width: none; padding: 0; font-size: 11px } .words { font-size: 10px }
  .grid { grid-template-columns: 1fr 1fr } h2 { break-after: avoid } details { display: none } }
"""


def page(
    name: str,
    facts: DataFacts,
    report: Report | None,
    findings: Sequence[str],
    which: SetName,
    rows: Sequence[Row],
    dropped: Sequence[DroppedRow],
    all_dropped: Iterable[DroppedRow] = (),
) -> str:
    """The page of data called `name`: its report, `rows` of the set `which`, and some `dropped` rows.

    `all_dropped` is walked through for the first row of each reason. The same arguments give the same page.
    """
    found = tables(report, all_dropped) if report else [fact_table(facts)]
    parts = [
        _header(name, facts),
        _findings(findings, report),
        _plots(report) if report else "",
        _section("numbers", "Numbers", "\n".join(map(_table, found)), "grid"),
        _rows(which, rows) if rows else "",
        _dropped(dropped, sum(facts.dropped.values())) if dropped else "",
        _footer(facts, report),
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>Data of {_text(name)}</title>\n<style>{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'{_BEGINNING}<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all, over an older page but over nothing else.

    Raises:
        UserError: `path` is something else, or cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.read_bytes().startswith(_BEGINNING.encode()):
            raise UserError(f"{path} is no page of ours, and would be lost", hint="give another file to --html")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", hint="give --html a file in a folder that is there"
        ) from error


def _text(text: str) -> str:
    """Text that a page shows as it is."""
    return escape(visible(text))


def _header(name: str, facts: DataFacts) -> str:
    share = facts.train_supervised_tokens / max(facts.train_tokens, 1)
    figures = [
        f"{facts.train_documents:,} training documents",
        f"{format_count(facts.train_tokens)} tokens, {share:.1%} of them learned",
        f"{facts.train_rows:,} rows",
        f"{facts.eval_documents:,} held out",
    ]
    return f"<header>\n<h1>Data of {_text(name)}</h1>\n<p>{' · '.join(figures)}</p>\n</header>"


def _footer(facts: DataFacts, report: Report | None) -> str:
    how = f"prepared in {work(report)}; " if report else ""
    return f"<footer>\n<p>Slipway {launcher.__version__}; {_text(how)}kept in {_text(facts.folder)}</p>\n</footer>"


def _section(identity: str, title: str, content: str, kind: str = "") -> str:
    inner = f'<div class="{kind}">\n{content}\n</div>' if kind else content
    return f'<section id="{identity}">\n<h2>{title}</h2>\n{inner}\n</section>'


def _findings(findings: Sequence[str], report: Report | None) -> str:
    if report is None:
        old = "<p>Prepared by another version of Slipway: there are no statistics, only counts.</p>"
        return _section("findings", "Findings", old)
    items = "".join(f"<li>{_text(finding)}</li>\n" for finding in findings)
    return _section("findings", "Findings", f"<ul>\n{items}</ul>" if items else "<p>Nothing stands out.</p>")


def _plots(report: Report) -> str:
    plots = [_chart(chart) for chart in charts(report)] + ([_reasons(report.dropped)] if report.dropped else [])
    return _section("plots", "Plots", "\n".join(plots), "grid")


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_side(side)}>{_text(cell)}</th>' for cell, side in zip(table.header, table.align, strict=True)
    )
    lines = [f"<thead><tr>{head}</tr></thead>"] if any(table.header) else []
    lines.append("<tbody>")
    for first, *rest in table.rows:
        cells = "".join(
            f"<td{_side(side)}>{_text(cell)}</td>" for cell, side in zip(rest, table.align[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    lines.append("</tbody>")
    content = "\n".join(lines)
    longest = max((sum(map(len, row)) for row in table.rows), default=0)
    kind = "scroll wide" if longest > _WIDE_CHARACTERS else "scroll"
    return f'<div class="{kind}"><table>\n<caption>{_text(table.title)}</caption>\n{content}\n</table></div>'


def _side(side: str) -> str:
    return ' class="r"' if side == "r" else ""


def _chart(chart: Chart) -> str:
    """Bars for the first series, a line for another; each in shares of its own total."""
    names = list(chart.series)
    keys = "".join(
        f'<span><span class="key{" line" if i else ""}"></span> {_text(name)}</span>'
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    figures = zip(*([f"{count:,}" for count in counts] for counts in chart.series.values()), strict=True)
    lines = tuple((label, *cells) for label, cells in zip(chart.labels, figures, strict=True))
    numbers = Table(chart.title, ("", *names), lines, "l" + "r" * len(names))
    return (
        f"<figure>\n<figcaption>{_text(chart.title)}{keys}</figcaption>\n{_svg(chart)}\n"
        f"<details><summary>numbers</summary>{_table(numbers)}</details>\n</figure>"
    )


def _svg(chart: Chart) -> str:
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in chart.series.values()]
    top = max(max(part) for part in shares) or 1.0
    num_bins = len(chart.labels)
    step = (_WIDTH - _LEFT - _RIGHT) / num_bins
    floor, height = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def at(i: int, share: float) -> tuple[float, float]:
        return _LEFT + (i + 0.5) * step, floor - share / top * height

    marks = []
    for share in (0.0, top / 2, top):
        y = at(0, share)[1]
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.3g}%</text>')
    name, counts = next(iter(chart.series.items()))
    for i, (label, count, share) in enumerate(zip(chart.labels, counts, shares[0], strict=True)):
        x, y = at(i, share)
        marks.append(
            f'<rect class="bar" x="{x - 0.42 * step:.1f}" y="{y:.1f}" width="{0.84 * step:.1f}" '
            f'height="{floor - y:.1f}"><title>{_text(f"{label}: {count:,} {name} ({share:.1%})")}</title></rect>'
        )
    for other in shares[1:]:
        points = [at(i, share) for i, share in enumerate(other)]
        marks.append(f'<polyline class="other" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        marks += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    for i in range(0, num_bins, -(-num_bins // _MOST_LABELS)):
        x = at(i, 0)[0]
        marks.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{_text(chart.labels[i])}</text>')
    said = f"{chart.title}: a chart of {num_bins} bins, whose numbers are in the table below"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(said)}">\n{"".join(marks)}\n</svg>'


def _reasons(dropped: Mapping[str, int]) -> str:
    """How many rows each reason cost, as bars."""
    lines = [
        f'<tr><th scope="row">{_text(reason)}</th><td class="r">{count:,}</td><td class="share">'
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" width="{100 * count / max(dropped.values()):.1f}" height="10"/></svg></td></tr>'
        for reason, count in dropped.items()
    ]
    content = "\n".join(lines)
    return f"<figure>\n<figcaption>rows left out, by reason</figcaption>\n<table>\n{content}\n</table>\n</figure>"


def _rows(which: SetName, rows: Sequence[Row]) -> str:
    parts = [
        '<p class="faint">Learned: <mark>green and underlined</mark>. Control tokens, which only the chat template '
        "writes: <b>framed</b>. Hold the pointer over a word for the numbers of its tokens.</p>"
    ]
    left = MOST_TOKENS
    for number, row in enumerate(rows):
        if left <= 0:
            parts.append(f'<p class="more">{len(rows) - number} more rows are not shown: the page is full.</p>')
            break
        documents = []
        for document in row:
            documents.append(_document(document, max(left, 0)))
            left -= document.num_tokens
        parts.append('<div class="row">\n' + "\n".join(documents) + "\n</div>")
    return _section("rows", f"Rows: {SET_NAMES[which]}", "\n".join(parts))


def _document(document: ShownDocument, most: int) -> str:
    """A document of whose tokens at most about `most` are shown."""
    pieces = document.pieces[:most]
    words = "".join(
        f"<mark>{content}</mark>" if learned else content
        for learned, run in groupby(pieces, key=lambda piece: piece.learned)
        if (content := "".join(map(_piece, run)))
    )
    spelled_out = f", spelled out in it: {' '.join(document.spelled_out)}" if document.spelled_out else ""
    figures = f"{document.num_tokens:,} tokens, {document.num_learned:,} learned{spelled_out}"
    rest = len(document.pieces) - len(pieces)
    more = f'<p class="more">{rest:,} more words are not shown: the page is full.</p>' if rest else ""
    answer = ""
    if document.answer is not None:
        answer = f'<p class="faint">expected answer</p><div class="words" dir="auto">{_text(document.answer)}</div>'
    return (
        f'<div class="document"><h3><strong>{_text(document.where)}</strong> '
        f'<span class="faint">{_text(figures)}</span></h3>\n'
        f'<div class="words" dir="auto">{words}</div>{more}{answer}</div>'
    )


def _piece(piece: Piece) -> str:
    """A token in its frame, its number at the pointer."""
    numbers = " ".join(map(str, piece.ids))
    kind = "b" if piece.control else "span"
    words = _text(piece.text).replace("\n", '<i class="n"></i>\n')
    return f'<{kind} title="{numbers}">{words}</{kind}>'


def _dropped(dropped: Sequence[DroppedRow], total: int) -> str:
    lines = tuple((row.where, row.reason, row.detail, row.text) for row in dropped)
    title = f"{len(dropped):,} of {total:,}"
    table = Table(title, ("place", "why", "in detail", "how it begins"), lines, "llll")
    return _section("dropped", "Rows that were left out, one by one", _table(table))
