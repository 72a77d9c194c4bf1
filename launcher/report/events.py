"""What happened to a run, in words: from lines of metrics.jsonl that are neither steps nor measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.report.text import cut

Tone = Literal["plain", "good", "bad"]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """One of them."""

    kind: str
    time: float
    """Seconds since 1970."""
    step: int | None
    words: str
    tone: Tone


def event(record: Record, before: Record | None) -> Event | None:
    """A line as an event, None where it tells of nothing out of the ordinary; `before` is the line of the start before
    it."""
    kind = str(record["kind"])
    if kind in ("best", "audit", "startup", "checkpoint", "failed") or (kind == "start" and before is None):
        return None
    tone, words = _WORDS.get(kind, ("plain", _message))
    if kind == "start" and before is not None and _launch(before) != _launch(record):
        tone = "plain"  # somebody resumed it
    said, step = cut(words(record)), record.get("step")
    return Event(kind, float(record["time"]), step if isinstance(step, int) else None, said, tone) if said else None


def _launch(start: Record) -> str:
    return str(start.get("attempt")).partition(".")[0]


def _message(record: Record) -> str:
    """The line's own words; none for a kind that has none."""
    return str(record.get("message") or "")


def _start(record: Record) -> str:
    size = record["world_size"]
    where = f"on {size} worker{'s' * (size > 1)}"
    if not record["step"]:
        return f"began again {where}: there was no checkpoint yet"
    return f"went on from the checkpoint of step {record['step']:,} {where}"


def _resize(record: Record) -> str:
    return f"{record['to']} worker{'s' * (record['to'] != 1)} instead of {record['from']}: {record['why']}"


def _spike(record: Record) -> str:
    loss, mean = record.get("loss"), record.get("mean")
    figures = f"loss {_number(loss)}" + (f", {_number(mean)} before it on average" if mean is not None else "")
    return "; ".join(part for part in (_message(record) or figures, _DONE.get(str(record.get("action")), "")) if part)


def _rollback(record: Record) -> str:
    return _message(record) or f"rolled back to the checkpoint of step {record['to_step']:,}"


def _unfreeze(record: Record) -> str:
    layers = record.get("last_layers")
    which = "everything" if layers in (None, "all") else f"the last {layers} layers"
    parameters = record.get("parameters")
    return f"{which} trained from here on" + (f": {parameters:,} parameters" if isinstance(parameters, int) else "")


def _checkpoint_failed(record: Record) -> str:
    return f"the checkpoint of step {record['step']:,} could not be written: {record['message']}"


def _audit_finding(record: Record) -> str:
    return f"audit: {record['what']}: {record['detail']}"


_DONE = {"skip": "the step was left out", "stop": "the run was ended"}
"""What a spike's action did; a rollback has a line of its own."""
_WORDS: dict[str, tuple[Tone, Callable[[Record], str]]] = {
    "start": ("bad", _start),
    "resize": ("plain", _resize),
    "hang": ("bad", lambda record: f"hang: {record['what']}"),
    "spike": ("bad", _spike),
    "rollback": ("bad", _rollback),
    "overfitting": ("bad", _message),
    "forgetting": ("bad", _message),
    "stopped_early": ("good", _message),
    "unfreeze": ("plain", _unfreeze),
    "checkpoint_failed": ("bad", _checkpoint_failed),
    "damaged_checkpoint": ("bad", lambda record: f"damaged checkpoint passed over: {record['message']}"),
    "last_save_waits": ("bad", lambda record: f"the end could not be saved yet: {record['message']}"),
    "metrics_lost": ("bad", lambda record: f"{record['lines']:,} lines of metrics.jsonl are lost"),
    "audit_finding": ("bad", _audit_finding),
    "run_failed": ("bad", lambda record: str(record["message"]).partition("\n")[0]),
}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
