"""When a run hangs and who is to blame, on made-up beats; what is seen of real processes that stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.driver.hang import Hang, Watched, beat_every_s, excused, report, sentence
from launcher.driver.stacks import Process, Seen, answer_signals, end, examine, training_frame
from launcher.train.beat import ENDED, LOADING, OPENING, SUMS, Beat, born

TIMEOUT_S = 100.0
EVERY_S = beat_every_s(TIMEOUT_S)


def beat(rank: int, **values: Any) -> Beat:
    """A rank in the midst of step 12, two to a host."""
    loop: dict[str, Any] = {
        "attempt": "1.2",
        "part": "backward",
        "step": 12,
        "marks": 90,
        "patient": False,
        "entered": 345,
    }
    return Beat(rank, f"host{rank // 2 + 1}", f"node{rank // 2 + 1}", 1000 + rank, 7, **(loop | values))


def seen(rank: int, state: str = "S", cpu_s: float = 0.0, **values: Any) -> Seen:
    rest: dict[str, Any] = {
        "traced": False,
        "kernel": "",
        "io_bytes": 0,
        "seconds": 1.0,
        "stack": "stack",
        "frame": None,
    }
    return Seen(rank, state, cpu_s=cpu_s, **(rest | values))


class Room:
    """A watch whose clock is turned by hand. `says` is what each rank tells from now on, None of one that is silent."""

    def __init__(self, says: list[Beat | None], timeout_s: float = TIMEOUT_S) -> None:
        self.watched, self.now, self.says = Watched(timeout_s), 0.0, says
        for one in says:
            if one is not None:
                self.watched.hear(1.0, one, 0.0)

    def after(self, seconds: float) -> Hang | None:
        """The first verdict within so many seconds of beats that all say the same, if there is any."""
        until = self.now + seconds
        while self.now < until:
            self.now += EVERY_S
            for one in self.says:
                if one is not None:
                    self.watched.hear(1.0, one, self.now)
            if (hang := self.watched.verdict(self.now)) is not None:
                return hang
        return None


def test_a_stopped_process_is_the_one_that_no_longer_answers() -> None:
    waiting = [beat(rank, waits_in="all_reduce 345") for rank in (0, 2, 3)]
    room = Room([beat(0), beat(1), beat(2), beat(3)])
    room.says = [waiting[0], None, *waiting[1:]]
    assert room.after(TIMEOUT_S - EVERY_S) is None
    hang = room.after(3 * EVERY_S)
    assert hang is not None
    assert (hang.why, [culprit.rank for culprit in hang.culprits]) == ("silent", [1])
    assert sentence(hang, {1: seen(1, "T")}) == (
        "rank 1 on host1 made no progress for 105 s: stopped (SIGSTOP), last heard of in backward of step 12; "
        "the others waited in all_reduce 345"
    )
    assert "busy, and no other thread of it runs, last heard of in backward of step 12" in sentence(
        hang, {1: seen(1, "R", 1.0)}
    )
    assert "its host does not answer, last heard of in backward of step 12" in sentence(hang, {})


def test_who_has_entered_fewest_collectives_is_behind() -> None:
    ahead = [beat(rank, entered=346, part=SUMS, waits_in="all_reduce 346") for rank in (0, 1)]
    room = Room([*ahead, beat(2, entered=345, part="forward"), beat(3, entered=346, waits_in="all_reduce 346")])
    hang = room.after(2 * TIMEOUT_S)
    assert hang is not None
    assert (hang.why, [culprit.rank for culprit in hang.culprits]) == ("behind", [2])
    found = {2: seen(2, "R", 1.0, frame="forward (modeling.py:9)")}
    assert sentence(hang, found) == (
        "rank 2 on host2 made no progress for 105 s: busy in forward of step 12, at forward (modeling.py:9); "
        "the others waited in all_reduce 346"
    )
    assert excused(hang, found) is None, "a step computes, and that is no progress"


def test_who_is_in_no_collective_while_the_others_wait() -> None:
    hang = Room([beat(0, waits_in="all_gather 9"), beat(1, part="data")]).after(2 * TIMEOUT_S)
    assert hang is not None
    assert (hang.why, [culprit.rank for culprit in hang.culprits]) == ("outside", [1])
    assert "waiting reading the rows of step 12" in sentence(hang, {1: seen(1)})


def test_all_in_the_same_collective_is_the_network() -> None:
    hang = Room([beat(rank, waits_in="all_reduce 345") for rank in range(4)]).after(2 * TIMEOUT_S)
    assert hang is not None
    assert (hang.why, hang.culprits) == ("all wait", ())
    assert sentence(hang, {}) == (
        "none of the 4 ranks made progress for 105 s, and no single one is to blame: all wait in all_reduce 345, "
        "in backward of step 12; look at the network between host1 and host2"
    )


def test_a_single_rank_has_nobody_to_wait_for() -> None:
    hang = Room([beat(0, part="forward")]).after(2 * TIMEOUT_S)
    assert hang is not None
    assert [culprit.rank for culprit in hang.culprits] == [0]


def test_as_long_as_one_goes_on_nobody_hangs() -> None:
    """An evaluation whose batches take 40 s each, on one rank more of them than on the others."""
    room = Room([beat(0, part="evaluate"), beat(1, waits_in="all_reduce 345", entered=346)])
    for i in range(30):
        room.says[0] = beat(0, part="evaluate", marks=100 + i)
        assert room.after(40.0) is None


def test_loading_for_twenty_minutes_is_no_hang_while_the_process_reads_or_computes() -> None:
    room = Room([])
    for i in range(240):
        at_work = {"cpu_s": 0.6 * room.now} if i % 2 else {"io_bytes": int(2e6 * room.now)}
        rest = {"part": LOADING, "patient": True, "clock_s": room.now, "marks": 3}
        room.says = [beat(0, **rest, **at_work), beat(1, **rest | {"entered": 346}, waits_in="all_gather 346")]
        assert room.after(EVERY_S) is None
    room.says[0] = beat(0, part=LOADING, patient=True, marks=3)
    hang = room.after(2 * TIMEOUT_S)
    assert hang is not None
    assert [culprit.rank for culprit in hang.culprits] == [0]
    assert sentence(hang, {0: seen(0, "D")}).startswith(
        "rank 0 on host1 made no progress for 105 s: waiting for a disk (state D) loading the model; "
    )


def test_a_rank_that_computes_while_it_waits_is_not_at_work() -> None:
    """NCCL spins; the rank that is waited for does nothing."""
    room = Room([])
    hang = None
    while hang is None and room.now < 5 * TIMEOUT_S:
        spins = beat(0, part=LOADING, patient=True, entered=346, clock_s=room.now, cpu_s=room.now)
        room.says = [spins, beat(1, part=LOADING, patient=True, clock_s=room.now)]
        hang = room.after(EVERY_S)
    assert hang is not None
    assert [culprit.rank for culprit in hang.culprits] == [1]


def test_one_call_that_reads_a_large_file_lets_no_other_thread_send_beats() -> None:
    room = Room([beat(0, part=LOADING, patient=True), beat(1, part=LOADING, patient=True, entered=346)])
    room.says = [None, room.says[1]]
    hang = room.after(2 * TIMEOUT_S)
    assert hang is not None
    reading = seen(0, "R", io_bytes=10**8)
    assert excused(hang, {0: reading, 1: seen(1)}) == "rank 0 is at work, loading the model"
    assert excused(hang, {0: seen(0, "D"), 1: seen(1)}) is None


def test_a_debugger_a_dead_process_and_a_network_of_our_own_are_no_hangs() -> None:
    hang = Room([beat(0), beat(1)]).after(2 * TIMEOUT_S)
    assert hang is not None
    assert excused(hang, {0: seen(0), 1: seen(1, traced=True)}) == "a debugger is attached to rank 1"
    assert excused(hang, {0: seen(0), 1: seen(1, "")}) == "the process of rank 1 is gone"
    assert excused(hang, {}) == "no host answers: it is this machine's own network"
    assert excused(hang, {0: seen(0)}) is None


def test_a_checkpoint_may_take_three_times_as_long_and_blames_who_writes_it() -> None:
    saving = {"part": "checkpoint", "patient": True}
    room = Room([beat(0, **saving, entered_saves=5), beat(1, **saving, entered_saves=6, waits_in="all_gather 6")])
    assert room.after(3 * TIMEOUT_S - EVERY_S) is None
    hang = room.after(3 * EVERY_S)
    assert hang is not None
    assert [culprit.rank for culprit in hang.culprits] == [0]


def test_what_passes_while_the_watch_is_stopped_counts_for_nobody() -> None:
    room = Room([beat(0), beat(1)])
    room.after(10 * EVERY_S)
    room.now += 10 * TIMEOUT_S
    assert room.watched.verdict(room.now) is None
    assert room.after(10 * EVERY_S - EVERY_S) is None
    assert room.after(TIMEOUT_S) is not None


def test_a_new_group_of_workers_takes_the_place_of_the_old() -> None:
    room = Room([beat(0), beat(1), beat(2), beat(3)])
    room.after(TIMEOUT_S - EVERY_S)
    room.watched.hear(2.0, beat(0, part=OPENING), room.now)
    room.watched.hear(1.0, beat(3), room.now)
    assert sorted(room.watched.ranks) == [0]
    assert room.watched.verdict(room.now + EVERY_S) is None


def test_ranks_that_have_ended_are_waited_for_by_nobody() -> None:
    room = Room([beat(0, part=ENDED), beat(1, part=ENDED)])
    assert room.after(3 * TIMEOUT_S) is None


def test_the_report_has_a_line_a_rank_and_the_culprits_stack_first() -> None:
    hang = Room([beat(0, waits_in="all_reduce 345", entered=345), beat(1, entered=344)]).after(2 * TIMEOUT_S)
    assert hang is not None
    text = report(hang, {0: seen(0, stack="waits"), 1: seen(1, "T", kernel="do_signal_stop", stack="loops")}, "what")
    assert "attempt 1.2, step 12\nwhat\n" in text
    assert "1  host1  1001  T do_signal_stop  in backward of step 12  344 + 0 of checkpoints  -" in text
    assert text.index("==== rank 1 on host1, process 1001\nloops") < text.index("==== rank 0 on host1")


@pytest.fixture
def child(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Process]]:
    """A process that spins in `train_worker`."""
    code = "def train_worker():\n    print('here', flush=True)\n    while True: pass\ntrain_worker()"
    prelude = "from launcher.driver.stacks import answer_signals\nanswer_signals()\n"
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, stderr=out, text=True
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        try:
            started = born(process.pid)
            assert started is not None
            yield process, Process(3, process.pid, started, str(log))
        finally:
            process.kill()


def test_a_busy_and_a_stopped_process_show_their_state_and_stack(
    child: tuple[subprocess.Popen[str], Process],
) -> None:
    process, known = child
    busy = examine([known])[0]
    assert (busy.rank, busy.state, busy.busy) == (3, "R", True)
    assert "train_worker (<string>:5)" in busy.stack
    assert busy.frame == "train_worker (<string>:5)"
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    stopped = examine([known])[0]
    assert (stopped.state, stopped.busy, stopped.traced) == ("T", False, False)
    assert "train_worker (<string>:5)" in stopped.stack


def test_without_py_spy_a_process_writes_its_stack_itself(
    child: tuple[subprocess.Popen[str], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.driver.stacks._spied", lambda pid: None)
    assert 'File "<string>", line 5 in train_worker' in examine([child[1]])[0].stack


def test_only_the_very_process_is_killed(child: tuple[subprocess.Popen[str], Process]) -> None:
    process, known = child
    other = Process(known.rank, known.pid, known.born - 1, known.log)
    assert examine([other])[0].state == ""
    assert end([other]) == [3], "that one is gone"
    time.sleep(0.05)
    assert process.poll() is None
    assert end([known]) == [3]
    assert process.wait(5) == -signal.SIGKILL


def test_the_frame_that_tells_most() -> None:
    stack = (
        'Thread 1 (idle): "MainThread"\n    poll (ray/x.py:1)\n'
        'Thread 2 (active): "t"\n    all_reduce (torch/distributed/distributed_c10d.py:3245)\n'
        "    agree (launcher/train/loop.py:204)\n    train_worker (launcher/driver/worker.py:80)\n"
    )
    assert training_frame(stack) == "agree (launcher/train/loop.py:204)"
    assert training_frame("no stack: ...") is None
    below = "/home/ray/lib/python3.11/site-packages/launcher/driver/worker.py:90"
    assert training_frame(f'Thread 12 (idle): "MainThread"\n    train_worker ({below})\n') is None


@pytest.mark.parametrize(("timeout_s", "every_s"), [(3, 0.5), (100, 5), (600, 10), (6000, 10)])
def test_beats_are_rare_enough_for_a_thousand_ranks(timeout_s: float, every_s: float) -> None:
    assert beat_every_s(timeout_s) == every_s


def test_answering_signals_does_not_end_the_process() -> None:
    answer_signals()
