"""Where the time of a run went: every second once, whatever happened in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report.timeline import EVALUATING, LOST, SAVING, STARTING, TRAINING, Timeline


def test_start_up_compiling_saving_and_the_pause_between_two_launches_are_told_apart() -> None:
    timeline = Timeline()
    lines: list[dict[str, Any]] = [
        {"kind": "start", "time": 100.0, "attempt": "1.1", "step": 0},
        {"kind": "step", "time": 115.0, "step": 1, "seconds": {"total": 15.0}},  # of which 10 compile
        {
            "kind": "startup",
            "time": 115.0,
            "seconds": 45.0,
            "parts": {"ray.init": 8.0, "model": 22.0, "first step": 15.0},
        },
        {"kind": "step", "time": 120.0, "step": 2, "seconds": {"total": 5.0}},
        {"kind": "step", "time": 130.0, "step": 3, "seconds": {"total": 10.0, "checkpoint": 2.0, "evaluate": 3.0}},
        {"kind": "step", "time": 135.0, "step": 4, "seconds": {"total": 5.0}},
        {"kind": "eval", "time": 139.0, "step": 4},
        {"kind": "checkpoint", "time": 140.0, "step": 4},
        {"kind": "start", "time": 9000.0, "attempt": "2.1", "step": 4},
        {"kind": "step", "time": 9006.0, "step": 5, "seconds": {"total": 5.0}},
    ]
    for line in lines:
        timeline.hear(line)
    spent = timeline.seconds()
    assert spent == pytest.approx({TRAINING: 25.0, STARTING: 30 + 10 + 1, SAVING: 3.0, EVALUATING: 7.0, LOST: 0.0})
    assert timeline.launches == 2


def spent(*lines: dict[str, Any]) -> dict[str, float]:
    """Where the time of a run went that has these lines; without an attempt they are of the first."""
    timeline = Timeline()
    for line in lines:
        timeline.hear({"attempt": "1.1"} | line)
    return timeline.seconds()


def step(number: int, time: float, **seconds: float) -> dict[str, Any]:
    return {"kind": "step", "time": time, "step": number, "seconds": {"total": 1.0} | seconds}


START: dict[str, Any] = {"kind": "start", "time": 0.0, "step": 0}


def test_a_rollback_loses_what_it_undoes_once_and_the_way_back() -> None:
    """The line of the step that was the spike comes last: with what loading the checkpoint took."""
    found = spent(
        START,
        *(step(n, n) for n in range(1, 10)),
        {"kind": "spike", "time": 12.0, "step": 10, "action": "rollback"},
        {"kind": "rollback", "time": 12.0, "step": 10, "to_step": 6},
        step(10, 12.0, total=3.0, checkpoint=2.0),
        step(11, 13.0),
    )
    assert found == pytest.approx({TRAINING: 7, LOST: 3 + 3, STARTING: 0, SAVING: 0, EVALUATING: 0})


def test_a_step_that_is_left_out_is_lost_also_where_a_line_is_of_several() -> None:
    spike = {"kind": "spike", "time": 2.0, "step": 2, "action": "skip"}
    assert spent(START, step(1, 1), spike, step(2, 2), step(3, 3))[LOST] == 1
    found = spent(START, spike, step(4, 4, total=4.0), spike | {"action": "warn"}, step(8, 8, total=4.0))
    assert (found[LOST], found[TRAINING]) == (1, 7)


def test_unfreezing_counts_once_though_it_goes_through_a_checkpoint() -> None:
    unfreeze = {"kind": "unfreeze", "time": 8.0, "step": 2, "seconds": 4.0}
    found = spent(START, step(1, 1), step(2, 2), unfreeze, step(3, 9, total=7.0, checkpoint=6.0))
    assert found == pytest.approx({TRAINING: 3, STARTING: 4, SAVING: 2, EVALUATING: 0, LOST: 0})


def test_what_comes_before_a_start_is_lost_after_a_failure_and_nobodys_between_two_launches() -> None:
    lines = START, step(1, 1), step(2, 2), {"kind": "eval", "time": 5.0, "step": 2}
    audit = {"kind": "audit", "time": 60.0, "seconds": 1.0}
    start = {"kind": "start", "time": 70.0, "step": 0}
    again = spent(*lines, audit | {"attempt": "1.2"}, start | {"attempt": "1.2"})
    assert again == pytest.approx({TRAINING: 0, EVALUATING: 0, LOST: 70, STARTING: 0, SAVING: 0})
    other = spent(*lines, audit | {"attempt": "2.1"}, start | {"attempt": "2.1", "step": 2})
    assert other == pytest.approx({TRAINING: 2, EVALUATING: 3, LOST: 0, STARTING: 0, SAVING: 0})


def test_a_failure_is_lost_time_from_the_last_line_on_and_at_most_since_the_launch() -> None:
    failed = {"kind": "run_failed", "time": 30.0}
    assert spent(START, step(1, 1), failed)[LOST] == 29
    assert spent(START, {"kind": "answers", "time": 9.0}, failed)[LOST] == 30, "before its first step"
    assert sum(spent(START, step(1, 1), failed | {"attempt": "2.0"}).values()) == 1, "the next day, before its start"


class Loop:
    """Writes the lines that training writes, in its order, and measures by a clock of its own."""

    def __init__(self, log_every: int) -> None:
        self.lines: list[dict[str, Any]] = []
        self.clock = self.wall = self.lap = 0.0
        self.log_every, self.step, self.saved = log_every, 0, 0
        self.launch, self.attempt = 1, 0
        self.parts: dict[str, float] = {}
        self.start(again=False)

    def write(self, kind: str, **values: Any) -> None:
        attempt = f"{self.launch}.{self.attempt}"
        self.lines.append({"kind": kind, "time": self.clock, "attempt": attempt, "step": self.step} | values)

    def spend(self, seconds: float, part: str | None = None) -> None:
        self.clock += seconds
        if part is not None:
            self.parts[part] = self.parts.get(part, 0.0) + seconds

    def start(self, again: bool) -> None:
        """After a failure of the same launch, or of a new one."""
        ended = self.lines[-1]["time"] if self.lines else 0.0
        if not again and self.lines:
            self.launch, self.attempt = self.launch + 1, 0
            self.wall += ended - self.launched
        self.attempt, self.step = self.attempt + 1, self.saved
        self.spend(7.0)
        self.write("audit")
        self.spend(5.0)
        if not again:
            self.launched = self.clock
        self.write("start")
        self.lap, self.parts = self.clock, {}

    def train(self, what: str) -> None:
        """A step, and what comes with it."""
        self.step += 1
        self.spend(1.0)
        if what in ("skip", "rollback"):
            self.write("spike", action=what)
        if what == "rollback" and self.saved:
            self.spend(2.0, "checkpoint")
            self.write("rollback", to_step=self.saved)
        if self.step % self.log_every == 0:
            self.write("step", seconds={"total": self.clock - self.lap} | self.parts)
            self.lap, self.parts = self.clock, {}
        if what == "eval":
            self.spend(3.0, "evaluate")
            self.write("eval")
        if what in ("save", "unfreeze"):
            self.spend(0.5, "checkpoint")
            self.write("checkpoint")
            self.saved = self.step
        if what == "unfreeze":
            self.spend(4.0, "checkpoint")
            self.write("unfreeze", seconds=4.0)

    def took(self) -> float:
        """Seconds of all launches, each to its last line."""
        return self.wall + self.lines[-1]["time"] - self.launched


EVENTS = ("step", "step", "step", "eval", "save", "skip", "rollback", "unfreeze", "fail", "launch")


@given(st.lists(st.sampled_from(EVENTS), max_size=40), st.integers(1, 4))
def test_whatever_happens_the_parts_add_up_to_the_clock(events: list[str], log_every: int) -> None:
    loop = Loop(log_every)
    for event in events:
        if event in ("fail", "launch"):
            loop.spend(6.0)
            loop.start(again=event == "fail")
        else:
            loop.train(event)
    found = spent(*loop.lines)
    assert sum(found.values()) == pytest.approx(loop.took())
    assert min(found.values()) > -1e-9
    assert found[TRAINING] <= loop.step + 1e-9, "of a second each"
