"""Where the time of a run went: what trained, and what else took how long.

From the lines of metrics.jsonl alone. The seconds of a step are those of its own line; around the steps the clock
of the first rank's host counts. What lies between two launches of a run belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from launcher.report.curves import Curve

TRAINING, STARTING, SAVING, EVALUATING, LOST = (
    "training",
    "starting and compiling",
    "saving",
    "evaluating",
    "lost",
)
MEANINGS = {
    TRAINING: "steps that counted",
    STARTING: "up to the first step of each launch, what that took longer than the others, and every unfreezing",
    SAVING: "the loop waited for checkpoints",
    EVALUATING: "held-out rows and generated answers",
    LOST: "steps that were done again, waits and restarts after failures, steps that were rolled back",
}
_BEFORE_THE_LOOP = ("answers before training", "first step")
"""Parts of the line `startup` that are counted by what the loop itself writes."""
_KINDS = {"eval": EVALUATING, "answers": EVALUATING, "exact_match": EVALUATING, "hang": LOST}
"""What the time before a line went to, after the last step; otherwise it was saved."""


class Timeline:
    """Hears the lines that count, one after the other."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(MEANINGS, 0.0)
        self._laps = {kind: Curve() for kind in (TRAINING, SAVING, EVALUATING)}
        """Seconds of each step that counts so far."""
        self._first_laps: list[tuple[float, float]] = []
        """Step and training seconds of each first step."""
        self._launch: str | None = None
        self._started = self._last = 0.0
        """When the latest start was, and its latest line."""
        self._stepped = self._answered = False
        """Whether there were steps, and answers before them, since then."""
        self._rebuilding = 0.0
        """Seconds of the next step's own in which the engine was built anew."""
        self._tail: dict[str, float] = {}
        """Since the latest step: the next step's own seconds hold it as well."""
        self.launches = self.attempts = 0

    def hear(self, record: Mapping[str, Any]) -> None:
        """Take the next line."""
        kind, time = record["kind"], float(record.get("time", self._last))
        if kind == "start":
            self._start(record, time)
        elif kind == "startup":
            parts = {part: s for part, s in record["parts"].items() if part not in _BEFORE_THE_LOOP}
            self._spent[STARTING] += sum(parts.values())
        elif kind == "step":
            self._step(record["step"], record["seconds"], time)
        elif kind == "rollback":
            self._lose(record["to_step"] + 1)
        elif kind == "unfreeze" and self._stepped:
            self._rebuilding += float(record.get("seconds", 0.0))
        elif kind != "system":
            self._answered = self._answered or kind in ("answers", "exact_match", "eval")
            if self._stepped:
                what = _KINDS.get(kind, SAVING)
                self._tail[what] = self._tail.get(what, 0.0) + max(time - self._last, 0.0)
        if kind != "system":
            self._last = max(time, self._last)

    def seconds(self) -> dict[str, float]:
        """{what it was: seconds}, all of them."""
        spent = dict(self._spent)
        for kind, laps in self._laps.items():
            spent[kind] += sum(laps.values)
        for kind, seconds in self._tail.items():
            spent[kind] += seconds
        if len(self._laps[TRAINING]) < 3:
            return spent
        usual = median(self._laps[TRAINING].values)
        for _, seconds in self._first_laps:
            longer = min(max(seconds - usual, 0.0), spent[TRAINING])
            spent[TRAINING] -= longer
            spent[STARTING] += longer
        return spent

    def _start(self, record: Mapping[str, Any], time: float) -> None:
        launch = str(record.get("attempt")).partition(".")[0]
        for kind, seconds in self._tail.items():
            self._spent[kind] += seconds
        self._lose(record["step"] + 1)
        if launch == self._launch:
            self._spent[LOST] += max(time - self._last, 0.0)
        else:
            self.launches += 1
        self.attempts += 1
        self._launch, self._started, self._tail = launch, time, {}
        self._stepped = self._answered = False

    def _step(self, step: int, seconds: Mapping[str, float], time: float) -> None:
        saving, evaluating = seconds.get("checkpoint", 0.0), seconds.get("evaluate", 0.0)
        training = max(seconds["total"] - saving - evaluating - self._rebuilding, 0.0)
        self._spent[STARTING] += self._rebuilding
        self._rebuilding = 0.0
        if not self._stepped:
            before = max(time - seconds["total"] - self._started, 0.0)
            self._spent[EVALUATING if self._answered else STARTING] += before
            self._first_laps.append((step, training))
        for kind, value in ((TRAINING, training), (SAVING, saving), (EVALUATING, evaluating)):
            self._laps[kind].add(step, value)
        self._stepped, self._tail = True, {}

    def _lose(self, step: int) -> None:
        """What was done from `step` on was for nothing."""
        for laps in self._laps.values():
            self._spent[LOST] += laps.since(step)
            laps.cut(step)
        self._first_laps = [lap for lap in self._first_laps if lap[0] < step]
