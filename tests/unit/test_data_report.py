"""The data report: its numbers against plain counting, its file, and what it warns of."""

from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.prepare.findings import findings
from launcher.data.prepare.report import (
    VERSION,
    Duplicates,
    Histogram,
    LabelReport,
    Report,
    SourceReport,
    build,
    describe_long,
    describe_packs,
    describe_set,
    length_edges,
)
from launcher.errors import DataError
from tests.plans import data_plan, source_plan

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def bins(values: list[int], edges: tuple[int, ...]) -> list[int]:
    """How many values are above each edge and at most the next, counted one by one."""
    last = len(edges) - 2
    return [
        sum((value > low or i == 0) and (value <= high or i == last) for value in values)
        for i, (low, high) in enumerate(pairwise(edges))
    ]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(lengths=LENGTHS, max_length=st.integers(1, 400))
def test_a_set_is_what_plain_counting_finds(lengths: list[int], max_length: int) -> None:
    targets = [length // 2 for length in lengths]
    turns = [1 + length % 30 for length in lengths]
    report = describe_set(np.array(lengths), np.array(targets), np.array(turns, np.int32), max_length)
    assert (report.documents, report.tokens) == (len(lengths), sum(lengths))
    assert report.supervised_tokens == sum(targets)
    assert report.supervised_share == sum(targets) / sum(lengths)
    assert sum(report.turns.values()) == len(lengths)
    assert report.turns.get(1, 0) == turns.count(1)
    assert report.turns.get(20, 0) == sum(number >= 20 for number in turns)
    spread = report.lengths
    assert spread is not None
    ordered = sorted(lengths)
    for percent, found in ((10, spread.p10), (50, spread.p50), (90, spread.p90), (99, spread.p99)):
        assert found == ordered[math.ceil(len(ordered) * percent / 100) - 1]
    assert (spread.min, spread.max) == (ordered[0], ordered[-1])
    assert spread.mean == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)
    assert spread.histogram.edges == length_edges(max_length)
    assert list(spread.histogram.counts) == bins(lengths, spread.histogram.edges)
    coarse = spread.histogram.coarser()
    assert list(coarse.counts) == bins(lengths, coarse.edges)


@pytest.mark.parametrize("max_length", [1, 2, 3, 100, 512, 2048, 131_072])
def test_edges_follow_from_max_length_alone(max_length: int) -> None:
    edges = length_edges(max_length)
    assert list(edges) == sorted(set(edges))
    assert (edges[0], edges[-1]) == (0, max_length)
    halves = {round(max_length / 2**n) for n in range(int(math.log2(max_length)) + 1)}
    assert halves <= set(edges)
    coarse = Histogram(edges=edges, counts=(1,) * (len(edges) - 1)).coarser()
    assert (coarse.edges[0], coarse.edges[-1]) == (0, max_length)
    assert sum(coarse.counts) == len(edges) - 1


def test_a_set_of_nothing_and_one_without_targets() -> None:
    empty = describe_set(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), 64)
    assert (empty.documents, empty.tokens, empty.lengths, empty.supervised, empty.turns) == (0, 0, None, None, {})
    assert empty.supervised_share == 0
    prompts = describe_set(np.array([3, 5]), None, None, 64)
    assert (prompts.tokens, prompts.supervised_tokens, prompts.supervised) == (8, 0, None)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=4), min_size=1, max_size=30))
def test_packs_are_what_plain_counting_finds(rows: list[list[int]]) -> None:
    tokens, documents = np.array([sum(row) for row in rows]), np.array([len(row) for row in rows])
    report = describe_packs(tokens, documents, 100)
    assert report is not None
    total = sum(map(sum, rows))
    assert (report.rows, report.capacity, report.tokens) == (len(rows), 100, total)
    assert report.padding_share == pytest.approx(sum(100 - sum(row) for row in rows) / (100 * len(rows)))
    assert report.lower_bound_rows == math.ceil(total / 100)
    assert report.mean_documents == pytest.approx(sum(map(len, rows)) / len(rows))
    assert report.max_documents == max(map(len, rows))
    assert list(report.fill.counts) == bins([sum(row) for row in rows], report.fill.edges)
    assert describe_packs(np.empty(0, int), np.empty(0, int), 100) is None


@settings(derandomize=True, max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_what_a_longer_max_length_would_keep(lengths: list[int]) -> None:
    over = [length for length in lengths if length > 100]
    report = describe_long(over, len(lengths), 100)
    assert (report.over, report.longest) == (len(over), max(over, default=0))
    for limit in (100, 200, 400, 800):
        kept = sum(length <= limit for length in lengths) / len(lengths)
        assert report.share_within(limit) == pytest.approx(kept)


def test_counting_takes_no_memory_to_speak_of() -> None:
    """Of 4 million documents one million is sorted at a time."""
    lengths = np.random.default_rng(0).integers(1, 2048, 4_000_000, dtype=np.int32)
    tracemalloc.start()
    try:
        report = describe_set(lengths, lengths, lengths, 2048)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.documents == 4_000_000
    assert peak < 8 * 2**20 < lengths.nbytes


def made(
    num_documents: int = 1000,
    held_out: int = 100,
    length: int = 100,
    supervised: float = 0.5,
    source: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    **changes: Any,
) -> Report:
    """A report of data without a fault, but for `changes`."""
    lengths = np.full(num_documents, length)
    targets = (lengths * supervised).astype(np.int64)
    turns = np.ones(num_documents, np.int32)
    parts: dict[str, Any] = {
        "key": "0123456789abcdef",
        "data": data_plan(source_plan("/data/a.jsonl"), **({"max_length": 512} | (plan or {}))),
        "sources": [
            SourceReport(
                **(
                    {"path": "/data/a.jsonl", "role": "train", "format": "messages", "rows": 1000, "used": 1000}
                    | {"dropped": {}}
                    | (source or {})
                )
            )
        ],
        "train": describe_set(lengths, targets, turns, 512),
        "held_out": describe_set(lengths[:held_out], targets[:held_out], turns[:held_out], 512),
        "test": describe_set(np.full(50, 40), None, None, 512),
        "long": describe_long([], 1000, 512),
        "packs": describe_packs(np.full(200, 500), np.full(200, 5), 512),
        "duplicates": Duplicates(exact=0, overlap_with_held_out=0),
        "labels": {},
        "notes": {"truncated": 0, "end_markers_removed": 3},
        "seconds": {"read": 1.0, "tokenize": 3.0},
        "workers": 2,
    }
    return build(**(parts | changes))


def test_totals_are_sums_of_the_parts() -> None:
    sources = [
        SourceReport(path="a", role="train", format="text", rows=9, used=4, dropped={"too long": 2, "bad row": 3}),
        SourceReport(path="b", role="eval", format="text", rows=9, used=7, dropped={"bad row": 2}),
    ]
    report = made(sources=sources)
    assert report.dropped == {"bad row": 5, "too long": 2}
    assert list(report.dropped) == ["bad row", "too long"], "the most frequent first"
    assert report.notes == {"end_markers_removed": 3}, "what did not happen is no note"
    assert report.tokens_per_s == (1000 * 100 + 100 * 100 + 50 * 40) / 4.0


def test_saved_and_loaded_are_equal(tmp_path: Path) -> None:
    report = made(labels={"a": LabelReport(rows=3, copies=6, weight=0.5)}, long=describe_long([600, 9000], 1000, 512))
    path = tmp_path / "report.json"
    assert Report.load(path) is None, "older data has none"
    report.save(path)
    assert Report.load(path) == report
    path.write_text(path.read_text().replace(f'"version": {VERSION}', '"version": 0'))
    assert Report.load(path) is None, "another version's is not read"
    path.write_text('{"version": 1')
    with pytest.raises(DataError, match="is damaged") as error:
        Report.load(path)
    assert str(tmp_path) in str(error.value.hint)


def test_good_data_raises_no_finding() -> None:
    assert findings(made()) == []


EVEN = {"a": LabelReport(rows=90, copies=90, weight=1), "b": LabelReport(rows=10, copies=10, weight=1)}
NONE = LabelReport(rows=0, copies=0, weight=1)
UNEVEN = {"much": LabelReport(rows=800, copies=800, weight=0.5), "little": LabelReport(rows=20, copies=800, weight=20)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out": 0}, ["no row is held out", "data.eval.split"]),
        ({"held_out": 7}, ["only 7 held-out documents", "noisy"]),
        ({"test": describe_set(np.full(8, 40), None, None, 512)}, ["only 8 test rows", "by 12 points"]),
        ({"num_documents": 60, "held_out": 55}, ["only 60 training documents"]),
        (
            {"train": describe_set(np.full(1000, 300), np.full(1000, 150), np.ones(1000, int), 512)},
            ["held-out documents have at most 100 tokens", "at most 300"],
        ),
        ({"duplicates": Duplicates(exact=120)}, ["12% of the training rows repeat earlier ones", "left out"]),
        (
            {
                "duplicates": Duplicates(exact=120),
                "plan": {"clean": data_plan().clean.model_copy(update={"duplicates": "keep"})},
            },
            ["12% of the training rows repeat", "set data.clean.duplicates to drop"],
        ),
        ({"duplicates": Duplicates(near=45)}, ["4% of the training rows nearly repeat"]),
        (
            {
                "duplicates": Duplicates(overlap_with_held_out=1),
                "plan": {"clean": data_plan().clean.model_copy(update={"overlap": "keep"})},
            },
            ["1 training row asking what a held-out row asks", "data.clean.overlap"],
        ),
        ({"duplicates": Duplicates(overlap_with_held_out=50)}, ["5% of the training rows ask what", "left out"]),
        ({"duplicates": Duplicates(contaminated=3)}, ["3 training rows left out", "benchmark", "--dropped"]),
        (
            {"long": describe_long([700] * 350 + [9000] * 30, 1000, 512), "plan": {"too_long": "truncate_end"}},
            ["38% of the training", "data.max_length 512", "cut at their end", "raise it to 1,024 to keep 97% whole"],
        ),
        ({"long": describe_long([9000] * 100, 1000, 512)}, ["10%", "left out", "the longest has 9,000 tokens"]),
        ({"supervised": 0.04}, ["the supervised share is 4%", "prompts"]),
        (
            {"packs": describe_packs(np.full(200, 300), np.full(200, 1), 512)},
            ["41% of the room", "lower data.max_length to 100"],
        ),
        (
            {"length": 500, "packs": describe_packs(np.full(200, 300), np.full(200, 1), 512)},
            ["41% of the room", "raise data.max_length to 1,024"],
        ),
        (
            {"source": {"used": 690, "dropped": {"too short": 310, "bad row": 5, "too long": 300}}},
            ["31% of the training rows are left out (too short)", "--dropped"],
        ),
        (
            {"source": {"used": 0, "rows": 3, "dropped": {"too long": 3}}},
            ["nothing of /data/a.jsonl is used", "too long"],
        ),
        ({"labels": UNEVEN}, ["class 'much' has 40 times the rows of class 'little'", "data.balance"]),
        (
            {"labels": UNEVEN, "plan": {"balance": "weights"}},
            ["'little' weighs 40 times one of class 'much'", "20 rows"],
        ),
        (
            {"labels": EVEN | {"odd": NONE}, "plan": {"head": (), "packing": False}, "packs": None},
            ["no training row is of class 'odd': the model cannot learn"],
        ),
        (
            {"labels": EVEN | {"B": EVEN["b"]}, "plan": {"head": (), "packing": False}, "packs": None},
            ["classes 'b' and 'B' differ in capitals alone"],
        ),
        (
            {"labels": EVEN | dict.fromkeys("xyz", NONE), "plan": {"head": (), "packing": False}, "packs": None},
            ["no training row is of class 'x' or of 2 more"],
        ),
        ({"labels": UNEVEN, "plan": {"balance": "oversample"}}, ["'little' comes 40 times an epoch", "by heart"]),
        ({"notes": {"control_tokens_as_text": 40}}, ["spelled out 40 times", "data.special_tokens: strip"]),
        ({"notes": {"language_undecided": 200}}, ["language of 200 rows"]),
    ],
)
def test_a_finding_says_what_and_what_to_do(changes: dict[str, Any], words: list[str]) -> None:
    found = findings(made(**changes))
    assert len(found) == 1
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"long": describe_long([700] * 40, 1000, 512)},
        {"duplicates": Duplicates(exact=15, near=10, overlap_with_held_out=15, contaminated=0)},
        {"packs": describe_packs(np.array([30]), np.array([1]), 512)},
        {"packs": None},
        {"labels": EVEN},
        {"labels": EVEN | {"odd": NONE}},
        {"labels": {"a": LabelReport(rows=90, copies=90, weight=1)}},
        {"labels": UNEVEN, "plan": {"balance": "undersample"}},
        {"source": {"used": 500, "dropped": {"source weight below 1": 500}}},
    ],
)
def test_what_is_usual_is_no_finding(changes: dict[str, Any]) -> None:
    assert findings(made(**changes)) == []
