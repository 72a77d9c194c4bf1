"""A report in tables and charts, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from launcher.report.data_rows import DroppedRow, place
from launcher.units import format_seconds

if TYPE_CHECKING:
    from launcher.data.prepare.report import Histogram, Report, SetReport
    from launcher.plan.plan import DataFacts

SET_NAMES = {"train": "training", "replay": "replayed", "eval": "held out", "test": "test", "retain": "retained"}
NOTES = {
    "augmented": "documents varied by data.augment",
    "benchmark_rows_passed_over": "rows of benchmarks that could not be read, and so are not looked for",
    "control_tokens_as_text": "spelled-out control tokens taken as text",
    "control_tokens_stripped": "spelled-out control tokens taken out",
    "end_markers_removed": "answers from whose end a spelled-out end of text was taken",
    "language_undecided": "rows kept whose language could not be told",
    "mended": "rows whose encoding was mended",
    "partly_left_out": "rows of which some documents are left out, and some stay",
    "pieces_without_answer": "pieces of split conversations with nothing to learn, left out",
    "split": "conversations split at data.max_length",
    "system_turns_dropped": "system prompts left out",
    "system_turns_merged": "system prompts put before the first question",
    "thoughts_left_out": "learned answers whose thoughts the chat template does not write",
    "truncated": "conversations cut at data.max_length",
    "unrolled": "conversations that became several documents",
}
"""What the report's notes count; a note that is not here is shown by its name."""
_PERCENTILES = {"shortest": "min", "10%": "p10", "median": "p50", "90%": "p90", "99%": "p99", "longest": "max"}


@dataclass(frozen=True)
class Table:
    """Cells of text under a header; `align` has l or r for each column."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str


@dataclass(frozen=True)
class Chart:
    """How many lie in each of B bins, for one or two sets of documents."""

    title: str
    labels: tuple[str, ...]
    """B of them."""
    series: Mapping[str, tuple[int, ...]]
    """{name: B counts}."""


def fact_table(facts: DataFacts) -> Table:
    """What is known of data without a report."""
    rows = [
        ("documents", f"{facts.train_documents:,}"),
        ("rows", f"{facts.train_rows:,}"),
        ("tokens", f"{facts.train_tokens:,}"),
        ("supervised", _share(facts.train_supervised_tokens, facts.train_tokens)),
        ("held out", f"{facts.eval_documents:,}"),
        ("test", f"{facts.test_documents:,}"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in facts.dropped.items()),
        *((f"format of {place(path)}", kind) for path, kind in facts.formats.items()),
    ]
    return Table("data", ("", ""), tuple(rows), "lr")


def tables(report: Report, dropped: Iterable[DroppedRow]) -> list[Table]:
    """Everything that is counted; of `dropped` the first of each reason is named."""
    found = [_sets(report), _lengths(report), _packs(report), _sources(report), _classes(report), _repeats(report)]
    found += [_left_out(report, dropped), _notes(report)]
    return [table for table in found if table is not None]


def charts(report: Report, coarse: bool = False) -> list[Chart]:
    """How lengths, learned tokens, turns and the rest are spread; `coarse`: in half as many bins."""
    sets = {SET_NAMES[name]: getattr(report.sets, name) for name in ("train", "eval")}
    sets = {name: part for name, part in sets.items() if part.documents}
    lengths = {name: part.lengths.histogram for name, part in sets.items()}
    supervised = {name: part.supervised.histogram for name, part in sets.items() if part.supervised}
    found = [
        _spread("tokens a document", lengths, coarse),
        _spread("supervised tokens a document", supervised, coarse),
        _turns(sets),
    ]
    if report.long.over:
        title = f"tokens of the conversations beyond data.max_length {report.settings.max_length:,}"
        found.append(_spread(title, {"conversations": report.long.histogram}, coarse))
    if report.packs:
        found.append(_spread("per cent of a row filled", {"rows": report.packs.fill}, coarse))
    return [chart for chart in found if chart is not None]


def _sets(report: Report) -> Table:
    shown = {
        SET_NAMES[name]: part
        for name in SET_NAMES
        if (part := getattr(report.sets, name)) is not None and (part.documents or name == "train")
    }
    rows = [
        ("documents", *(f"{part.documents:,}" for part in shown.values())),
        ("tokens", *(f"{part.tokens:,}" for part in shown.values())),
        ("supervised tokens", *(f"{part.supervised_tokens:,}" if part.supervised else "-" for part in shown.values())),
        ("supervised share", *(f"{part.supervised_share:.1%}" if part.supervised else "-" for part in shown.values())),
    ]
    return Table("documents", ("", *shown), tuple(rows), "l" + "r" * len(shown))


def _lengths(report: Report) -> Table:
    parts = [(SET_NAMES[name], part) for name in SET_NAMES if (part := getattr(report.sets, name)) is not None]
    spreads = [(name, part.lengths) for name, part in parts]
    spreads += [(f"{name}, supervised", part.supervised) for name, part in parts]
    rows = tuple(
        (name, *(f"{getattr(spread, field):,}" for field in _PERCENTILES.values()), f"{spread.mean:,.1f}")
        for name, spread in spreads
        if spread is not None
    )
    return Table("tokens a document", ("", *_PERCENTILES, "mean"), rows, "lrrrrrrr")


def _packs(report: Report) -> Table | None:
    packs = report.packs
    if packs is None:
        return None
    rows = (
        ("rows", f"{packs.rows:,}"),
        ("no fewer than", f"{packs.lower_bound_rows:,}"),
        ("tokens a row", f"{packs.capacity:,}"),
        ("padding", f"{packs.padding_share:.2%}"),
        ("documents a row", f"{packs.mean_documents:.1f}, at most {packs.max_documents:,}"),
    )
    return Table("packed rows", ("", ""), rows, "lr")


def _sources(report: Report) -> Table:
    rows = tuple(
        (
            SET_NAMES[source.role],
            source.format,
            f"{source.rows:,}",
            f"{source.used:,}",
            f"{sum(source.dropped.values()):,}",
            place(source.path),
        )
        for source in report.sources
    )
    return Table("sources", ("for", "format", "rows", "used", "left out", "from"), rows, "llrrrl")


def _classes(report: Report) -> Table | None:
    total = sum(label.rows for label in report.labels.values())
    rows = tuple(
        (name, f"{label.rows:,}", _share(label.rows, total), f"{label.copies:,}", f"{label.weight:.3g}")
        for name, label in sorted(report.labels.items(), key=lambda item: -item[1].rows)
    )
    header = ("class", "rows", "share", "documents an epoch", "weight")
    return Table("classes of the training rows", header, rows, "lrrrr") if rows else None


def _repeats(report: Report) -> Table | None:
    found = report.duplicates
    rows = [
        (label, f"{count:,}")
        for label, count in (
            ("the words of an earlier row", found.exact),
            ("nearly those of an earlier row", found.near),
            ("what a held-out row asks", found.overlap_with_held_out),
            ("13 words of a benchmark", found.contaminated),
        )
        if count is not None
    ]
    return Table("training rows that repeat", ("", "rows"), tuple(rows), "lr") if rows else None


def _left_out(report: Report, dropped: Iterable[DroppedRow]) -> Table | None:
    first: dict[str, DroppedRow] = {}
    if report.dropped:
        for row in dropped:
            first.setdefault(row.reason, row)
            if len(first) == len(report.dropped):
                break
    rows = tuple(
        (reason, f"{count:,}", f"{first[reason].where}: {short(first[reason].detail)}" if reason in first else "")
        for reason, count in report.dropped.items()
    )
    return Table("left out", ("why", "rows", "the first"), rows, "lrl") if rows else None


def short(text: str, most: int = 100) -> str:
    """The first line of `text`, and of that the first `most` characters."""
    line = text.partition("\n")[0]
    return line if len(line) <= most else line[: most - 3] + "..."


def _notes(report: Report) -> Table | None:
    rows = tuple((NOTES.get(name, name), f"{count:,}") for name, count in report.notes.items())
    return Table("changed or seen", ("", "times"), rows, "lr") if rows else None


def work(report: Report) -> str:
    """How long preparing took, in a line."""
    phases = ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in report.seconds.items())
    processes = "1 process" if report.workers == 1 else f"{report.workers} processes"
    total = format_seconds(sum(report.seconds.values()))
    return f"{total} by {processes} ({phases}): {report.tokens_per_s:,.0f} tokens a second"


def _spread(title: str, histograms: Mapping[str, Histogram], coarse: bool) -> Chart | None:
    """Histograms of the same edges beside each other, without the empty bins at both ends."""
    found = {name: part.coarser() if coarse else part for name, part in histograms.items()}
    filled = [i for part in found.values() for i, count in enumerate(part.counts) if count]
    if not filled:
        return None
    kept = slice(min(filled), max(filled) + 1)
    edges = next(iter(found.values())).edges
    labels = tuple(_label(low, high) for low, high in pairwise(edges))[kept]
    return Chart(title, labels, {name: part.counts[kept] for name, part in found.items()})


def _label(low: int, high: int) -> str:
    return f"{high:,}" if low + 1 == high else f"{low + 1:,}-{high:,}"


def _turns(sets: Mapping[str, SetReport]) -> Chart | None:
    numbers = sorted({turns for part in sets.values() for turns in part.turns})
    if len(numbers) < 2:
        return None
    counts = {name: tuple(part.turns.get(turns, 0) for turns in numbers) for name, part in sets.items()}
    return Chart("learned assistant turns a document", tuple(map(str, numbers)), counts)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
