"""A start of another size than the one before, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def resized(before: Mapping[str, Any] | None, attempt: str, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"from", "to", "why"} of a start of `workers` after the one whose line of metrics.jsonl is `before`; empty where
    their number is the same."""
    if before is None or before["world_size"] == len(workers):
        return {}
    return {"from": before["world_size"], "to": len(workers), "why": _why(before, attempt, workers)}


def _why(before: Mapping[str, Any], attempt: str, workers: Sequence[Mapping[str, Any]]) -> str:
    if str(before["attempt"]).partition(".")[0] != attempt.partition(".")[0]:
        return "it was resumed so"
    old, new = (Counter(worker["host"] for worker in ranks) for ranks in (before["workers"], workers))
    changes = [f"{host} is gone" for host in old if host not in new]
    changes += [f"{host} joined" for host in new if host not in old]
    changes += [f"{host} has room for {new[host]} instead of {old[host]}" for host in new if 0 < old[host] != new[host]]
    return ", ".join(changes)
