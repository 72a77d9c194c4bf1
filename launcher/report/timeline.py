"""Where the time of a run went: what trained, and what else took how long.

From the lines of metrics.jsonl alone. The seconds of a step are those of its own line; around the steps the clock
of the first rank's host counts. What lies between two launches of a run belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from launcher.report.curves import Curve
from launcher.train.metrics import attempt_of

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
    LOST: "steps that were done again, left out or rolled back; waits and restarts after failures",
}
_BEFORE_THE_LOOP = ("answers before training", "first step")
"""Parts of the line `startup` that are counted by what the loop itself writes."""
_KINDS = {
    **dict.fromkeys(("eval", "answers", "exact_match"), EVALUATING),
    **dict.fromkeys(("spike", "rollback", "hang", "run_failed"), LOST),
    "unfreeze": STARTING,
}
"""What the time before a line went to, after the last step; otherwise it was saved."""


class Timeline:
    """Hears the lines that count, one after the other."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(MEANINGS, 0.0)
        self._laps = {kind: Curve() for kind in (TRAINING, SAVING, EVALUATING)}
        """Seconds of each step that counts so far."""
        self._first_laps: list[tuple[float, float]] = []
        """Step and training seconds of each first step."""
        self._attempt: tuple[int, ...] = ()
        """The latest that has started."""
        self._started = self._last = 0.0
        """When it did, and its latest line."""
        self._done = 0
        """The last step that it wrote a line of, or the one that it started from."""
        self._stepped = self._answered = False
        """Whether there were steps, and answers before them, since then."""
        self._rebuilding = 0.0
        """Seconds of the next step's own in which the engine was built anew."""
        self._left_out = 0
        """Steps since the last line of one from which nothing was learned, or nothing stayed."""
        self._rolled_back = False
        """Since then."""
        self._tail: dict[str, float] = {}
        """Since the latest step: the next step's own seconds hold it as well."""
        self.launches = self.attempts = 0

    def hear(self, record: Mapping[str, Any]) -> None:
        """Take the next line."""
        kind, time = record["kind"], float(record.get("time", self._last))
        if kind == "system" or self._is_ahead(record):
            return
        if kind == "start":
            self._start(record, time)
        elif kind == "startup":
            parts = {part: s for part, s in record["parts"].items() if part not in _BEFORE_THE_LOOP}
            self._spent[STARTING] += sum(parts.values())
        elif kind == "step":
            self._step(record["step"], record["seconds"], time)
        else:
            self._between(record, time)
        self._last = max(time, self._last)

    def seconds(self) -> dict[str, float]:
        """{what it was: seconds}, all of them."""
        spent = dict(self._spent)
        for kind, laps in self._laps.items():
            spent[kind] += sum(laps.values)
        for kind, seconds in self._tail.items():
            spent[kind] += seconds
        if not self._stepped:
            spent[EVALUATING if self._answered else STARTING] += self._last - self._started
        if len(self._laps[TRAINING]) < 3:
            return spent
        usual = median(self._laps[TRAINING].values)
        for _, seconds in self._first_laps:
            longer = min(max(seconds - usual, 0.0), spent[TRAINING])
            spent[TRAINING] -= longer
            spent[STARTING] += longer
        return spent

    def _between(self, record: Mapping[str, Any], time: float) -> None:
        """A line that is neither a step nor a start."""
        kind = record["kind"]
        if kind == "spike":
            self._left_out += record.get("action") in ("skip", "rollback")
        elif kind == "rollback":
            self._roll_back(record["step"], record["to_step"])
        elif kind == "unfreeze":
            self._rebuilding += float(record.get("seconds", 0.0))
        if self._stepped:
            what = _KINDS.get(kind, SAVING)
            self._tail[what] = self._tail.get(what, 0.0) + max(time - self._last, 0.0)
        elif kind == "run_failed":
            self._spent[LOST] += max(time - self._started, 0.0)
            self._started = time
        else:
            self._answered = self._answered or kind in ("answers", "exact_match", "eval")

    def _is_ahead(self, record: Mapping[str, Any]) -> bool:
        """Whether a line is of an attempt that has not started yet: what goes before a start is in its line `startup`,
        or lost. Hangs and failures are said by the launcher, of whichever attempt of its own was the last."""
        attempt = attempt_of(record) or ()
        if record["kind"] in ("hang", "run_failed"):
            return attempt[:1] != self._attempt[:1]
        return record["kind"] != "start" and attempt > self._attempt

    def _start(self, record: Mapping[str, Any], time: float) -> None:
        attempt, step = attempt_of(record) or (), record["step"]
        for kind, seconds in self._tail.items():
            self._spent[kind if step >= self._done else LOST] += seconds
        self._lose(step + 1)
        again = self.attempts > 0 and attempt[:1] == self._attempt[:1]
        if self.attempts and not self._stepped:
            self._spent[LOST] += self._last - self._started
        if again:
            self._spent[LOST] += max(time - self._last, 0.0)
        else:
            self.launches += 1
        self.attempts += 1
        self._attempt, self._started, self._last, self._done, self._tail = attempt, time, time, step, {}
        self._stepped = self._answered = self._rolled_back = False
        self._rebuilding, self._left_out = 0.0, 0

    def _step(self, step: int, seconds: Mapping[str, float], time: float) -> None:
        saving, evaluating = seconds.get("checkpoint", 0.0), seconds.get("evaluate", 0.0)
        rebuilding = min(self._rebuilding, saving)  # it goes through a checkpoint
        saving -= rebuilding
        training = max(seconds["total"] - saving - rebuilding - evaluating, 0.0)
        lost = training * min(self._left_out / max(step - self._done, 1), 1.0)
        training -= lost
        if self._rolled_back:
            lost, saving = lost + saving, 0.0
        self._spent[STARTING] += rebuilding
        self._spent[LOST] += lost
        if not self._stepped:
            before = max(time - seconds["total"] - self._started, 0.0)
            self._spent[EVALUATING if self._answered else STARTING] += before
            self._first_laps.append((step, training))
        for kind, value in ((TRAINING, training), (SAVING, saving), (EVALUATING, evaluating)):
            self._laps[kind].add(step, value)
        self._stepped, self._rolled_back, self._done, self._tail = True, False, step, {}
        self._rebuilding, self._left_out = 0.0, 0

    def _roll_back(self, step: int, to_step: int) -> None:
        self._lose(to_step + 1)
        self._rolled_back = True
        # Its spike has counted the last of them already.
        self._left_out += max(step - max(to_step, self._done) - 1, 0)

    def _lose(self, step: int) -> None:
        """What was done from `step` on was for nothing."""
        for laps in self._laps.values():
            self._spent[LOST] += laps.since(step)
            laps.cut(step)
        self._first_laps = [lap for lap in self._first_laps if lap[0] < step]
