"""The one number that `evaluate.metric` names, and which way it gets better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from launcher.errors import DataError


def smaller_is_better(metric: str) -> bool:
    """Whether a run is better where `metric` is smaller: so it is for losses and perplexities, by their names."""
    return metric.rpartition(".")[2].endswith(("loss", "perplexity"))


def better(metric: str, value: float, than: float, min_delta: float = 0.0) -> bool:
    """Whether `value` is better than `than` by more than `min_delta`. What is not a number is never better."""
    gain = than - value if smaller_is_better(metric) else value - than
    return gain > min_delta


def value_of(metric: str, evaluated: Mapping[str, Any] | None, answered: Mapping[str, Any] | None) -> float | None:
    """What `metric` is in the latest records `eval` and `answers`; None where the one that would have it is missing.

    The record `eval` comes first: `accuracy` is its; `classes.f1_macro` is of the other.

    Raises:
        DataError: the records are there, and neither has it.
    """
    if evaluated is not None and _is_number(evaluated.get(metric)):
        return float(evaluated[metric])
    if answered is not None and metric in (found := figures(answered)):
        return found[metric]
    leads_into = answered is not None and metric.partition(".")[0] in answered
    if answered is None or not (evaluated or leads_into):
        return None
    known = sorted(figures(evaluated or {}) | figures(answered))
    raise DataError(f"evaluate.metric names {metric}, which was not measured", hint=f"there is {', '.join(known)}")


def perplexity(loss: float) -> float:
    """e to the mean loss of a token, in nats; finite, as JSON has no infinity."""
    return math.exp(min(loss, 700.0))


def numbers(record: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a record by their dotted names, without what it tells of single classes and slices."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            if not all(isinstance(inner, Mapping) for inner in value.values()):  # of single classes, or slices
                found |= numbers(value, f"{before}{key}.")
        elif _is_number(value):
            found[before + key] = float(value)
    return found


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line `eval` or `answers` by the names that `evaluate.metric` gives them."""
    return {name: value for name, value in numbers(record).items() if name not in ("step", "time", "rows", "cut")}


def is_share(name: str) -> bool:
    """Whether a figure lies between 0 and 1, by its name."""
    kind = name.partition(".")[0]
    return kind in ("accuracy", "exact_match", "numeric", "classes", "rouge") or kind.endswith("_macro")


def shown(name: str, value: float) -> str:
    """A figure as people read it: what is a share in percent, anything else to four places."""
    return f"{value:.1%}" if is_share(name) else f"{value:.4g}"


def spoken(name: str) -> str:
    """The name of a figure in words: `rouge l`, `f1 macro`, and `own words` of what a function of the user's gives."""
    return re.sub("[._]", " ", name.removeprefix("rouge.").removeprefix("classes."))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
