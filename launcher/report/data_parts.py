"""Data on a page: how it is spread, in plots, and its rows, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from launcher.report.data_rows import Piece, Row, ShownDocument
from launcher.report.data_tables import Chart, Table, charts
from launcher.report.markup import table_html
from launcher.report.text import escaped

if TYPE_CHECKING:
    from launcher.data.prepare.report import Report

MOST_TOKENS = 50_000
"""Tokens shown on a page: about 3 MB, which any browser opens at once."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 560, 200, 48, 24, 36, 8
"""Of a chart, and of the room around its bars, in the units of its viewBox."""
_MOST_LABELS = 7


def data_plots(report: Report) -> str:
    """Charts of what was counted, and of why rows were left out."""
    return "\n".join(
        [_chart(chart) for chart in charts(report)] + ([_reasons(report.dropped)] if report.dropped else [])
    )


def shown_rows(rows: Sequence[Row], most_tokens: int) -> str:
    """Rows with what is learned marked, `most_tokens` of them all at most, and what the marks mean."""
    parts = [
        '<p class="faint">Learned: <mark>green and underlined</mark>. Control tokens, which only the chat template '
        "writes: <b>framed</b>. Hold the pointer over a word for the numbers of its tokens.</p>"
    ]
    left = most_tokens
    for number, row in enumerate(rows):
        if left <= 0:
            parts.append(f'<p class="more">{len(rows) - number} more rows are not shown: the page is full.</p>')
            break
        documents = []
        for document in row:
            documents.append(_document(document, max(left, 0)))
            left -= document.num_tokens
        parts.append('<div class="row">\n' + "\n".join(documents) + "\n</div>")
    return "\n".join(parts)


def _document(document: ShownDocument, most: int) -> str:
    """A document of whose tokens at most about `most` are shown."""
    pieces = document.pieces[:most]
    words = "".join(
        f"<mark>{content}</mark>" if learned else content
        for learned, run in groupby(pieces, key=lambda piece: piece.learned)
        if (content := "".join(map(_piece, run)))
    )
    rest = len(document.pieces) - len(pieces)
    more = f'<p class="more">{rest:,} more words are not shown: the page is full.</p>' if rest else ""
    answer = ""
    if document.answer is not None:
        answer = f'<p class="faint">expected answer</p><div class="words" dir="auto">{escaped(document.answer)}</div>'
    return (
        f'<div class="document"><h3><strong>{escaped(document.where)}</strong> '
        f'<span class="faint">{escaped(document.figures)}</span></h3>\n'
        f'<div class="words" dir="auto">{words}</div>{more}{answer}</div>'
    )


def _piece(piece: Piece) -> str:
    """A token in its frame, its number at the pointer."""
    numbers = " ".join(map(str, piece.ids))
    kind = "b" if piece.control else "span"
    words = escaped(piece.text).replace("\n", '<i class="n"></i>\n')
    return f'<{kind} title="{numbers}">{words}</{kind}>'


def _chart(chart: Chart) -> str:
    """Bars for the first series, a line for another; each in shares of its own total."""
    names = list(chart.series)
    keys = "".join(
        f'<span><span class="key{" line" if i else ""}"></span> {escaped(name)}</span>'
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    figures = zip(*([f"{count:,}" for count in counts] for counts in chart.series.values()), strict=True)
    lines = tuple((label, *cells) for label, cells in zip(chart.labels, figures, strict=True))
    numbers = Table(chart.title, ("", *names), lines, "l" + "r" * len(names))
    return (
        f"<figure>\n<figcaption>{escaped(chart.title)}{keys}</figcaption>\n{_svg(chart)}\n"
        f"<details><summary>numbers</summary>{table_html(numbers)}</details>\n</figure>"
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
            f'height="{floor - y:.1f}"><title>{escaped(f"{label}: {count:,} {name} ({share:.1%})")}</title></rect>'
        )
    for other in shares[1:]:
        points = [at(i, share) for i, share in enumerate(other)]
        marks.append(f'<polyline class="other" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        marks += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    for i in range(0, num_bins, -(-num_bins // _MOST_LABELS)):
        x = at(i, 0)[0]
        marks.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escaped(chart.labels[i])}</text>')
    said = f"{chart.title}: a chart of {num_bins} bins, whose numbers are in the table below"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(said)}">\n{"".join(marks)}\n</svg>'


def _reasons(dropped: Mapping[str, int]) -> str:
    """How many rows each reason cost, as bars."""
    lines = [
        f'<tr><th scope="row">{escaped(reason)}</th><td class="r">{count:,}</td><td class="share">'
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" width="{100 * count / max(dropped.values()):.1f}" height="10"/></svg></td></tr>'
        for reason, count in dropped.items()
    ]
    content = "\n".join(lines)
    return f"<figure>\n<figcaption>rows left out, by reason</figcaption>\n<table>\n{content}\n</table>\n</figure>"
