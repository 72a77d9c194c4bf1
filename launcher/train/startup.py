"""Where the time before the first step goes: what ended when, from the command's own start on.

The launcher's parts travel to the workers with the Plan; the first rank adds its own and, after its first step, writes
them as one line of metrics.jsonl, kind "startup". Times are the hosts' clocks, which between two hosts may differ.
`python -m launcher.bench.startup` measures, and tells what of it is Ray's, packages' and ours.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from typing import Any

from launcher.train.beat import born

Ended = tuple[str, float]
"""A part and when it ended, seconds since 1970; it began where the one before it ended."""

BEGIN = "begin"
_ended: list[Ended] = []


def begin() -> None:
    """This process's own start is the beginning of all."""
    _ended[:] = [(BEGIN, process_start())]


def process_start() -> float:
    """When this process was started, seconds since 1970, to 0.01 s."""
    ticks = born(os.getpid())
    assert ticks is not None
    # Not psutil's create_time: it counts from the second in which the machine was started, and is up to 1 s early.
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def ended(part: str, at: float | None = None) -> None:
    """`part` ends now, or did at `at`. Nothing is kept in a process where nothing has begun."""
    if _ended:
        _ended.append((part, max(time.time() if at is None else at, _ended[-1][1])))


def so_far() -> list[Ended]:
    """What has ended, for the workers."""
    return list(_ended)


def go_on(before: list[Ended]) -> None:
    """In a worker: the launcher's parts, if there are any, come before those that have ended here."""
    here = list(_ended)
    _ended[:] = [(part, at) for part, at in before]
    for part, at in here:
        ended("worker process" if part == BEGIN else part, at)


def forget() -> None:
    """There is nothing to tell: these workers are not the launch's first."""
    _ended.clear()


def conclude() -> dict[str, Any] | None:
    """After the first step: {"seconds": in all, "parts": {part: seconds}}, in order; None where nothing has begun.

    A part that came more than once has the sum. There is nothing to tell after that.
    """
    if not _ended:
        return None
    first, last = _ended[0][1], _ended[-1][1]
    parts: dict[str, float] = {}
    for (_, before), (part, at) in pairwise(_ended):
        parts[part] = round(parts.get(part, 0.0) + at - before, 3)
    _ended.clear()
    return {"seconds": round(last - first, 3), "parts": parts}
