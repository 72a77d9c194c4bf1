"""The data report as one page that needs nothing else, neither network nor script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import launcher
from launcher.report.data_parts import MOST_TOKENS, data_plots, shown_rows
from launcher.report.data_rows import DroppedRow, Row, SetName
from launcher.report.data_tables import SET_NAMES, Table, fact_table, tables, work
from launcher.report.markup import STYLE, frame, section, table_html
from launcher.report.text import escaped
from launcher.units import format_count

if TYPE_CHECKING:
    from launcher.data.prepare.report import Report
    from launcher.plan.plan import DataFacts

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


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
        section("plots", "Plots", data_plots(report), "grid") if report else "",
        section("numbers", "Numbers", "\n".join(map(table_html, found)), "grid"),
        section("rows", f"Rows: {SET_NAMES[which]}", shown_rows(rows, MOST_TOKENS)) if rows else "",
        _dropped(dropped, sum(facts.dropped.values())) if dropped else "",
        _footer(facts, report),
    ]
    return frame(f"Data of {name}", _POLICY, STYLE, "\n".join(part for part in parts if part))


def _header(name: str, facts: DataFacts) -> str:
    share = facts.train_supervised_tokens / max(facts.train_tokens, 1)
    figures = [
        f"{facts.train_documents:,} training documents",
        f"{format_count(facts.train_tokens)} tokens, {share:.1%} of them learned",
        f"{facts.train_rows:,} rows",
        f"{facts.eval_documents:,} held out",
    ]
    return f"<header>\n<h1>Data of {escaped(name)}</h1>\n<p>{' · '.join(figures)}</p>\n</header>"


def _footer(facts: DataFacts, report: Report | None) -> str:
    how = f"prepared in {work(report)}; " if report else ""
    return f"<footer>\n<p>Slipway {launcher.__version__}; {escaped(how)}kept in {escaped(facts.folder)}</p>\n</footer>"


def _findings(findings: Sequence[str], report: Report | None) -> str:
    if report is None:
        old = "<p>Prepared by another version of Slipway: there are no statistics, only counts.</p>"
        return section("findings", "Findings", old)
    items = "".join(f"<li>{escaped(finding)}</li>\n" for finding in findings)
    return section("findings", "Findings", f"<ul>\n{items}</ul>" if items else "<p>Nothing stands out.</p>")


def _dropped(dropped: Sequence[DroppedRow], total: int) -> str:
    lines = tuple((row.where, row.reason, row.detail, row.text) for row in dropped)
    title = f"{len(dropped):,} of {total:,}"
    table = Table(title, ("place", "why", "in detail", "how it begins"), lines, "llll")
    return section("dropped", "Rows that were left out, one by one", table_html(table))
