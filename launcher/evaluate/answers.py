"""The test rows and what a model answered to them: the figures of a record `answers`, and the answers themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.data.loader import TestRow
from launcher.evaluate.generate import Answer
from launcher.evaluate.metrics import correct, score
from launcher.evaluate.slices import score_slices

_ENDS_OF_LINES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
"""To str.splitlines and others, beside those that JSON spells out itself."""


def scored(
    rows: Sequence[TestRow], answers: Sequence[Answer], metrics: Sequence[str], slices: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({rows, cut, <metric>: ..., slices?}, a line {where, prompt, reference, answer, correct, cut} of each answer).

    `cut` counts the answers that `max_new_tokens` has cut off: where there are many, the figures say little.

    Raises:
        DataError: a metric that says nothing about these references, or a function of the user's that fails.
    """

    def of_rows(numbers: Sequence[int]) -> dict[str, Any]:
        return score(metrics, [answers[i].text for i in numbers], [rows[i].answer for i in numbers])

    figures = {"rows": len(rows), "cut": sum(answer.cut for answer in answers)} | of_rows(range(len(rows)))
    if slices:
        figures["slices"] = score_slices({column: [row.slices[column] for row in rows] for column in slices}, of_rows)
    lines = [
        {
            "where": row.where,
            "prompt": row.prompt_text,
            "reference": row.answer,
            "answer": answer.text,
            "correct": correct(metrics, answer.text, row.answer),
            "cut": answer.cut,
        }
        | ({"slices": row.slices} if row.slices else {})
        for row, answer in zip(rows, answers, strict=True)
    ]
    return figures, lines


def as_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """A line of JSON for each; what is no character, as a model may write it, or the end of a line, is spelled out."""
    text = "".join(json.dumps(line, ensure_ascii=False).translate(_ENDS_OF_LINES) + "\n" for line in lines)
    return text.encode("utf-8", errors="backslashreplace")


def try_out(rows: Sequence[TestRow], metrics: Sequence[str], slices: Sequence[str] = ()) -> None:
    """Score the references as if they were the answers, so that a metric which fails does so before the first step.

    Raises DataError as `scored` does.
    """
    scored(rows, [Answer(row.answer, False) for row in rows], metrics, slices)
