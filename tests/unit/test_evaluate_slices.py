"""Scores by the values of a column, the gap between them, and the number that `evaluate.metric` names."""

from __future__ import annotations

import math

import pytest

from launcher.data.loader import TestRow
from launcher.errors import DataError
from launcher.evaluate.answers import scored, try_out
from launcher.evaluate.generate import Answer
from launcher.evaluate.slices import score_slices
from launcher.evaluate.value import better, figures, perplexity, shown, smaller_is_better, value_of


def row(number: int, answer: str, **slices: str) -> TestRow:
    return TestRow(f"t.jsonl:{number}", f"ask {number}", [number], answer, slices)


def test_scores_by_value_and_the_gap_between_the_best_and_the_worst() -> None:
    languages = ["en"] * 30 + ["de"] * 25 + ["is"] * 5
    right = [True] * 24 + [False] * 6 + [True] * 10 + [False] * 15 + [False] * 5
    found = score_slices({"language": languages}, lambda rows: {"share": sum(right[i] for i in rows) / len(rows)})
    assert found == {
        "language": {
            "de": {"rows": 25, "share": 0.4},
            "en": {"rows": 30, "share": 0.8},
            "is": {"rows": 5, "share": 0.0},
            "gap": {"least_rows": 20, "share": pytest.approx(0.4)},  # five rows are too few to be the worst
        }
    }


def test_a_gap_needs_two_values_and_a_value_may_be_called_gap() -> None:
    found = score_slices({"kind": ["gap"] * 30 + ["b"] * 3}, lambda rows: {"share": 1.0})["kind"]
    assert found == {'"gap"': {"rows": 30, "share": 1.0}, "b": {"rows": 3, "share": 1.0}, "gap": {"least_rows": 20}}


def test_a_record_of_answers() -> None:
    rows = [row(i, "yes" if i % 2 else "no", kind="odd" if i % 2 else "even") for i in range(40)]
    answers = [Answer("yes", cut=i < 3) for i in range(40)]
    record, lines = scored(rows, answers, ["exact_match", "classes"], ["kind"])
    assert (record["rows"], record["cut"], record["exact_match"], record["classes"]["accuracy"]) == (40, 3, 0.5, 0.5)
    assert record["slices"]["kind"]["odd"]["exact_match"] == 1.0
    assert record["slices"]["kind"]["even"]["classes"]["of"] == {
        "no": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 20}
    }
    gap = record["slices"]["kind"]["gap"]
    assert (gap["least_rows"], gap["exact_match"], gap["classes.accuracy"]) == (20, 1.0, 1.0)
    assert lines[1] == {
        "where": "t.jsonl:1",
        "prompt": "ask 1",
        "reference": "yes",
        "answer": "yes",
        "correct": True,
        "cut": True,
        "slices": {"kind": "odd"},
    }
    assert set(figures(record)) == {
        *("exact_match", "classes.accuracy", "classes.precision_macro", "classes.recall_macro", "classes.f1_macro")
    }
    assert "slices" not in scored([row(0, "a")], [Answer("b", False)], ["exact_match"])[1][0]


def test_metrics_are_tried_on_all_references_and_slices() -> None:
    rows = [row(0, "5", kind="a"), row(1, "Paris", kind="b")]
    try_out(rows, ["exact_match", "rouge", "bleu"], ["kind"])
    with pytest.raises(DataError, match="no number in the reference 'Paris'"):
        try_out(rows, ["numeric"])


def test_the_metric_that_is_named() -> None:
    evaluated = {"loss": 2.0, "accuracy": 0.5, "perplexity": 7.4, "retain_loss": 1, "slices": {"k": {"a": {"x": 1}}}}
    answered = {"rows": 9, "exact_match": 0.25, "rouge": {"rouge_l": 0.125}, "accuracy": 0.75, "own": {"a.b": 1.5}}
    for metric, value in (
        ("loss", 2.0),
        ("accuracy", 0.5),  # of the evaluation, whatever a function is called
        ("retain_loss", 1.0),
        ("exact_match", 0.25),
        ("rouge.rouge_l", 0.125),
        ("own.a.b", 1.5),
    ):
        assert value_of(metric, evaluated, answered) == value
    assert value_of("exact_match", evaluated, None) is None
    assert value_of("loss", None, answered) is None
    assert value_of("loss", {}, answered) is None
    with pytest.raises(DataError, match="names own.c"):
        value_of("own.c", {}, answered)
    with pytest.raises(DataError, match=r"evaluate.metric names rouge, which was not measured") as caught:
        value_of("rouge", evaluated, answered)
    expected = "there is accuracy, exact_match, loss, own.a.b, perplexity, retain_loss, rouge.rouge_l"
    assert caught.value.hint == expected


def test_which_way_is_better() -> None:
    for metric in ("loss", "perplexity", "retain_loss"):
        assert smaller_is_better(metric)
        assert better(metric, 1.0, than=1.5, min_delta=0.4)
        assert not better(metric, 1.0, than=1.5, min_delta=0.5)
    for metric in ("accuracy", "classes.f1_macro", "bleu", "exact_match", "own.part"):
        assert not smaller_is_better(metric)
        assert better(metric, 1.0, than=0.5)
    assert not better("loss", math.nan, than=1.0)
    assert not better("accuracy", 0.5, than=0.5)


def test_figures_as_people_read_them() -> None:
    assert shown("classes.f1_macro", 0.87654) == "87.7%"
    assert shown("bleu", 12.34567) == "12.35"
    assert shown("own", 3.0) == "3"
    assert perplexity(2.0) == math.exp(2.0)
    assert math.isfinite(perplexity(1e6)), "JSON has no infinity"
