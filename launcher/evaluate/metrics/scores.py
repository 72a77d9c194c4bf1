"""From answers and references to a record's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from launcher.evaluate.metrics.classes import class_figures
from launcher.evaluate.metrics.exact import exact_match, numeric, same_number, same_words
from launcher.evaluate.metrics.overlap import bleu, rouge
from launcher.evaluate.metrics.user_metric import UserMetric

Metric = Callable[[Sequence[str], Sequence[str]], Any]

METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "classes": class_figures,
    "rouge": rouge,
    "bleu": bleu,
}
"""From answers and references to a number or a dictionary of them: 0 to 1, for BLEU 0 to 100, greater is better."""


def score(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """{metric: number, or nested numbers} of at least one answer.

    `names` as `GeneratePlan.metrics` has them; a function of the user's is called what it is called in its file.

    Raises:
        DataError: references that a metric says nothing about, such as words for `numeric`; a function of the user's
            that cannot be loaded, that raises, or that returns no numbers.
    """
    assert len(answers) == len(references) > 0
    return {name.rpartition(":")[2]: _metric(name)(answers, references) for name in names}


def correct(names: Sequence[str], answer: str, reference: str) -> bool:
    """Whether an answer is right: by its number where `numeric` is asked for, otherwise by its words."""
    return same_number(answer, reference) if "numeric" in names else same_words(answer, reference)


def _metric(name: str) -> Metric:
    return METRICS.get(name) or _user_metric(name)


@cache  # once a process: what the file says later belongs to another run
def _user_metric(name: str) -> UserMetric:
    file, _, function = name.rpartition(":")
    return UserMetric(file, function)
