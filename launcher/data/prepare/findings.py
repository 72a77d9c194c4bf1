"""What a careful engineer would say about a report before training on it: plain words, each with what to do.

The limits are judgements, not measurements.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.data.prepare.report import Report, SourceReport

CUT_SHARE = 0.05
"""Conversations beyond data.max_length: one in twenty is more than the odd outlier."""
WHOLE_SHARE = 0.95
"""A larger max_length is proposed that keeps so many whole: the last few per cent may cost as much as all others."""
LEFT_OUT_SHARE = 0.1
"""Training rows left out for one reason: beyond a tenth a filter, or the file, is rarely what was meant."""
REPEATED_SHARE = 0.02
"""Repeated rows: more than a slip of whoever put the files together."""
OVERLAP_SHARE = 0.02
"""Training rows that ask what a held-out row asks: beyond chance in any but templated data."""
SUPERVISED_SHARE = 0.1
"""Below it nine tenths of the forward pass teaches nothing."""
PADDING_SHARE = 0.05
"""Room in packed rows beyond what any packing leaves: best-fit reaches 1% where lengths are mixed."""
LABEL_RATIO = 10
"""Rows of the most frequent class to one of the rarest: beyond it a model does well by never naming the rare one."""
FEW_DOCUMENTS = 100
"""Fewer documents than this are learned by heart within a few epochs."""
FEW_HELD_OUT = 50
"""The mean loss of few documents says more about which ones they are than about the model."""
FEW_TEST_ROWS = 20
"""With fewer a single answer moves the exact match by more than 5 points."""
LENGTH_RATIO = 2.0
"""Medians of training and held-out lengths that differ more: the two come from different places."""
SPELLED_OUT_SHARE = 0.01
"""Control tokens spelled out in messages: people write one now and then, a rendered chat template in every row."""
UNDECIDED_SHARE = 0.1
"""Rows whose language could not be told: short answers, mostly; beyond a tenth the filter does little."""

_CUT = {
    "drop": "left out",
    "truncate_end": "cut at their end",
    "truncate_start": "cut at their start",
    "split": "split",
}
_EXPLAINED = {
    *("too long", "duplicate", "near duplicate", "asks what a held-out row asks", "contamination"),
    "source weight below 1",
}
"""Reasons that a finding of their own speaks of, and the one that only does what the recipe says."""


def findings(report: Report) -> list[str]:
    """Warnings about the data of `report`, the weightiest first; none for data that is as it should be."""
    of_training = [source for source in report.sources if source.role == "train"]
    return [
        *_held_out(report),
        *_repeats(report, sum(source.rows for source in of_training)),
        *_lengths(report),
        *_left_out(of_training),
        *_classes(report),
        *_amount(report),
        *_text(report),
    ]


def _held_out(report: Report) -> Iterator[str]:
    train, held_out, test = report.sets.train, report.sets.eval, report.sets.test
    if not held_out.documents:
        yield "no row is held out, so nothing tells learning from memorizing: set data.eval.split to 0.02, say"
    elif held_out.documents < FEW_HELD_OUT:
        yield f"only {_count(held_out.documents, 'held-out document')}: the loss on so few is noisy"
    if 0 < test.documents < FEW_TEST_ROWS:
        yield (
            f"only {_count(test.documents, 'test row')}: "
            f"one answer moves the exact match by {100 / test.documents:.0f} points"
        )
    if train.lengths and held_out.lengths:
        shorter, longer = sorted([train.lengths.p50, held_out.lengths.p50])
        if longer >= LENGTH_RATIO * shorter:
            yield (
                f"half of the held-out documents have at most {held_out.lengths.p50:,} tokens, half of the training "
                f"documents at most {train.lengths.p50:,}: the held-out loss speaks of other data than is trained on"
            )


def _repeats(report: Report, num_rows: int) -> Iterator[str]:
    found = report.duplicates
    kept = report.settings.duplicates == "keep"
    if _over(found.exact, num_rows, REPEATED_SHARE):
        share = _percent(found.exact, num_rows)
        yield f"{share} of the training rows repeat earlier ones" + (
            " and are kept: set data.clean.duplicates to drop" if kept else "; they are left out"
        )
    if _over(found.near, num_rows, REPEATED_SHARE):
        yield f"{_percent(found.near, num_rows)} of the training rows nearly repeat earlier ones; they are left out"
    if found.overlap_with_held_out and report.settings.overlap == "keep":
        yield (
            f"{_count(found.overlap_with_held_out, 'training row')} asking what a held-out row asks: the held-out loss "
            "looks better than it is; set data.clean.overlap to drop"
        )
    elif _over(found.overlap_with_held_out, num_rows, OVERLAP_SHARE):
        share = _percent(found.overlap_with_held_out, num_rows)
        yield f"{share} of the training rows ask what a held-out row asks, and are left out: do the files overlap?"
    if found.contaminated:
        yield (
            f"{_count(found.contaminated, 'training row')} left out for sharing 13 words in a row with a benchmark: "
            "look at a few with --dropped, the source may hold more of it in other words"
        )


def _lengths(report: Report) -> Iterator[str]:
    limit, long, train, packs = report.settings.max_length, report.long, report.sets.train, report.packs
    cut_often = _over(long.over, long.conversations, CUT_SHARE)
    if cut_often:
        cut = _CUT.get(report.settings.too_long, report.settings.too_long)
        yield (
            f"{_percent(long.over, long.conversations)} of the training conversations are longer than data.max_length "
            f"{limit:,} and are {cut}: {_raise(report)}"
        )
    if train.documents and train.supervised_share < SUPERVISED_SHARE and not report.settings.classifies:
        share = _percent(train.supervised_tokens, train.tokens)
        yield f"the supervised share is {share}: most of the compute goes to prompts, little is learned from a row"
    # Where much is cut, raising max_length for that mends the packing too.
    wasteful = packs is not None and packs.rows - packs.lower_bound_rows >= PADDING_SHARE * packs.rows
    if packs and train.lengths and wasteful and not cut_often:
        longest = train.lengths.max
        better = (
            f"lower data.max_length to {longest:,}"
            if longest <= 0.9 * limit
            else f"raise data.max_length to {2 * limit:,}"
        )
        share = _percent(round(packs.padding_share * 1000), 1000)
        yield f"{share} of the room in packed rows stays empty, since few documents fit beside each other: {better}"


def _raise(report: Report) -> str:
    """Which data.max_length would keep nearly all whole."""
    limit, long = report.settings.max_length, report.long
    for times in (2, 4, 8):
        if (share := long.share_within(times * limit)) >= WHOLE_SHARE:
            kept = _percent(round(share * long.conversations), long.conversations)
            return f"raise it to {times * limit:,} to keep {kept} whole"
    return f"the longest has {long.longest:,} tokens"


def _left_out(sources: list[SourceReport]) -> Iterator[str]:
    num_rows = sum(source.rows for source in sources)
    reasons = dict.fromkeys(reason for source in sources for reason in source.dropped)
    for reason in reasons:
        count = sum(source.dropped.get(reason, 0) for source in sources)
        if reason not in _EXPLAINED and _over(count, num_rows, LEFT_OUT_SHARE):
            yield f"{_percent(count, num_rows)} of the training rows are left out ({reason}): look with --dropped"
    for source in sources:
        if source.rows and not source.used:
            reason = max(source.dropped, key=source.dropped.__getitem__, default="")
            yield f"nothing of {source.path} is used" + (f", mostly for one reason: {reason}" if reason else "")


def _classes(report: Report) -> Iterator[str]:
    labels = {name: label for name, label in report.labels.items() if label.rows}
    if report.settings.classifies and (unseen := [name for name in report.labels if name not in labels]):
        more = f" or of {len(unseen) - 1} more" if len(unseen) > 1 else ""
        yield f"no training row is of class {unseen[0]!r}{more}: the model cannot learn to tell it"
    if report.settings.classifies:
        alike: dict[str, str] = {}
        for name in report.labels:
            if (other := alike.setdefault(name.casefold(), name)) != name:
                yield f"classes {other!r} and {name!r} differ in capitals alone: write them alike if they are one class"
    if len(labels) < 2:
        return
    most, least = (choose(labels, key=lambda name: labels[name].rows) for choose in (max, min))
    ratio = labels[most].rows / labels[least].rows
    if ratio < LABEL_RATIO:
        return
    match report.settings.balance:
        case "none":
            yield (
                f"class {most!r} has {ratio:,.0f} times the rows of class {least!r}: data.balance evens them out, "
                "by weights or by repeating"
            )
        case "weights":
            yield (
                f"a row of class {least!r} weighs {labels[least].weight / labels[most].weight:,.0f} times one of class "
                f"{most!r}: {_count(labels[least].rows, 'row')} decide as much as {labels[most].rows:,}"
            )
        case "oversample":
            yield (
                f"a row of class {least!r} comes {labels[least].copies / labels[least].rows:,.0f} times an epoch: "
                "such rows are learned by heart; more of them, or data.balance: weights, would not be"
            )


def _amount(report: Report) -> Iterator[str]:
    if report.sets.train.documents < FEW_DOCUMENTS:
        yield f"only {_count(report.sets.train.documents, 'training document')}: so few are learned by heart"


def _text(report: Report) -> Iterator[str]:
    documents = report.sets.train.documents + report.sets.eval.documents
    spelled_out = report.notes.get("control_tokens_as_text", 0)
    if _over(spelled_out, documents, SPELLED_OUT_SHARE):
        yield (
            f"control tokens are spelled out {_count(spelled_out, 'time')} and learned as text: were the rows rendered "
            "by a chat template before? data.special_tokens: strip takes such text out"
        )
    if _over(undecided := report.notes.get("language_undecided", 0), documents, UNDECIDED_SHARE):
        yield f"the language of {_count(undecided, 'row')} could not be told; data.clean.languages keeps such rows"


def _over(part: int | None, whole: int, share: float) -> bool:
    return part is not None and 0 < part >= share * whole


def _percent(part: int | None, whole: int) -> str:
    """Whole per cent, but never 0 for something nor 100 for less than all."""
    percent = 100 * (part or 0) / max(whole, 1)
    if 0 < percent < 1:
        return f"{max(percent, 0.1):.1f}%"
    return f"{min(percent, 99) if percent < 100 else percent:.0f}%"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)
