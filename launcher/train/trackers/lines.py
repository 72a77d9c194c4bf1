"""A line of metrics.jsonl as trackers take it: numbers by name, and an event's words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.plan.plan import Plan
from launcher.recipe.addresses import without_secrets
from launcher.train.metrics import attempt_of

MEASURES = ("step", "eval", "answers", "system", "startup")
"""Kinds of lines that say nothing but numbers."""
ONCE_A_STEP = ("step", "eval", "answers")
"""Of these a restart repeats what came after the last checkpoint, with the same numbers."""
_HEAD = ("kind", "time", "attempt", "step")


@dataclass(frozen=True)
class Line:
    """What is worth telling of one line."""

    kind: str
    step: int
    """The line's own, or the latest before it."""
    attempt: tuple[int, ...]
    """Which wrote it: (3, 2)."""
    time: float
    """Seconds since 1970."""
    numbers: dict[str, float]
    """{"eval/loss": 2.5, "answers/rouge/rouge_l": 0.31, ...}."""
    words: str | None
    """Of an event."""


def as_line(record: Mapping[str, Any], step: int) -> Line:
    """A record of metrics.jsonl; `step` is for one that names none."""
    kind = str(record["kind"])
    said = {name: value for name, value in record.items() if name not in _HEAD}
    return Line(
        kind=kind,
        step=int(record.get("step", step)),
        attempt=attempt_of(record) or (),
        time=float(record.get("time", 0.0)),
        numbers=dict(numbers(said, kind)),
        words=None if kind in MEASURES else words(kind, said),
    )


def settings(plan: Plan) -> dict[str, Any]:
    """The Plan as trackers show it: without origins, and without passwords in URLs."""
    values: dict[str, Any] = json.loads(without_secrets(plan.model_dump_json(exclude={"origins"})))
    return values


def numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in a record by its path. Of lists only those of numbered things, such as GPUs: numbers of rows and
    processes measure nothing."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, Mapping) and "index" in inner:
                own = {key: number for key, number in inner.items() if key != "index"}
                yield from numbers(own, f"{name}/{inner['index']}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def words(kind: str, said: Mapping[str, Any]) -> str:
    """An event as a sentence: its own message, or its values."""
    message = said.get("message")
    values = (f"{key} {value}" for key, value in said.items() if isinstance(value, str | int | float))
    return f"{kind}: {message or ', '.join(values)}"
