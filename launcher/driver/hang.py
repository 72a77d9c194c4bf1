"""Whether a run hangs, and which rank is to blame: plain data in, a verdict out. `driver/watch.py` brings the data.

A run hangs when none of its ranks has made progress for as long as the recipe allows. One rank that stands still brings
the others to a halt at their next collective; as long as anyone goes on, somebody is only slow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.driver.stacks import Seen
from launcher.train.beat import ENDED, GENERATE, IN_A_STEP, Beat

SAVING_TIMES = 3
"""A checkpoint may take so many times as long: while `fsync` waits for a slow disk nothing is seen to move."""
BUSY_CPUS = 0.1
"""CPUs that a process uses which computes. A worker that only waits uses a hundredth of one."""
BUSY_BYTES_S = 64 * 2**10
"""Bytes a second that a process moves which reads."""
PLACES = {
    "data": "reading the rows of step {}",
    "forward": "in forward of step {}",
    "backward": "in backward of step {}",
    "step": "in the optimizer of step {}",
    "evaluate": "evaluating after step {}",
    "checkpoint": "saving step {}",
    GENERATE: "generating answers after step {}",
}


def beat_every_s(timeout_s: float) -> float:
    """Seconds between two beats: a twentieth of the time allowed, and never so often that it costs anything."""
    return min(10.0, max(0.5, timeout_s / 20))


def place(beat: Beat) -> str:
    """Where a rank is, in words."""
    if beat.part in PLACES:
        return PLACES[beat.part].format(beat.step)
    return f"in the {beat.part} of step {beat.step}" if beat.part in IN_A_STEP else beat.part


def computes(seconds: float, cpu_s: float, io_bytes: int) -> bool:
    """Whether a process that used so much in so many seconds is at work."""
    return seconds > 0 and (cpu_s > BUSY_CPUS * seconds or io_bytes > BUSY_BYTES_S * seconds)


@dataclass
class Rank:
    """What is known of one, in seconds of the watch's clock."""

    beat: Beat
    heard: float
    """When its latest beat came."""
    moved: float
    """When its counts had last risen."""
    worked: float
    """When it was last seen to compute or read in a part where that is progress."""


Why = Literal["silent", "behind", "outside", "all wait", "none waits"]


@dataclass(frozen=True)
class Hang:
    """None of the ranks has made progress for `stood_s` seconds."""

    ranks: tuple[Rank, ...]
    culprits: tuple[Beat, ...]
    """Of the ranks to blame; empty where it may be any."""
    why: Why
    stood_s: float

    @property
    def beats(self) -> tuple[Beat, ...]:
        return tuple(rank.beat for rank in self.ranks)

    @property
    def step(self) -> int:
        return max(beat.step for beat in self.beats)

    @property
    def attempt(self) -> str:
        return max(beat.attempt for beat in self.beats)


class Watched:
    """The ranks of one worker group, as their beats tell."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.group = 0.0
        """When the worker group was started: beats of an older one count for nothing."""
        self.ranks: dict[int, Rank] = {}
        self._awake: float | None = None

    def hear(self, group: float, beat: Beat, now: float) -> None:
        """A beat has come."""
        self._wake(now)
        if group > self.group:
            self.group, self.ranks = group, {}
        if group < self.group:
            return
        rank = self.ranks.get(beat.rank)
        if rank is None or rank.beat.pid != beat.pid:
            self.ranks[beat.rank] = Rank(beat, now, now, now)
            return
        before, rank.beat, rank.heard = rank.beat, beat, now
        if beat.counts != before.counts or beat.part == ENDED:
            rank.moved = now
        if beat.patient and before.patient:
            spent = (beat.clock_s - before.clock_s, beat.cpu_s - before.cpu_s, beat.io_bytes - before.io_bytes)
            if computes(*spent):
                rank.worked = now

    def forgive(self, now: float) -> None:
        """Count anew from now on: what has been found is no hang, or has been dealt with."""
        for rank in self.ranks.values():
            rank.moved = rank.worked = rank.heard = now

    def verdict(self, now: float) -> Hang | None:
        """A hang, if there is one."""
        self._wake(now)
        ranks = [self.ranks[rank] for rank in sorted(self.ranks) if self.ranks[rank].beat.part != ENDED]
        if not ranks:
            return None
        fewest = min(rank.beat.entered for rank in ranks)
        stood_s = float("inf")
        for rank in ranks:
            # One that others are behind waits for them, and under NCCL it computes while it waits.
            last = max(rank.moved, rank.worked) if rank.beat.entered == fewest else rank.moved
            times = SAVING_TIMES if rank.beat.part == "checkpoint" else 1
            if now - last <= times * self.timeout_s:
                return None
            stood_s = min(stood_s, now - last)
        culprits, why = self._blame(ranks, now)
        return Hang(tuple(ranks), tuple(rank.beat for rank in culprits), why, stood_s)

    def _blame(self, ranks: Sequence[Rank], now: float) -> tuple[Sequence[Rank], Why]:
        silent = [rank for rank in ranks if now - rank.heard > self.timeout_s / 2]
        if silent:
            return silent, "silent"
        if len(ranks) == 1:
            return ranks, "none waits"
        outside = [rank for rank in ranks if rank.beat.waits_in is None]
        # Where all are at a checkpoint it is written on a group of its own.
        saving = all(rank.beat.part == "checkpoint" for rank in ranks)
        entered = [rank.beat.entered_saves if saving else rank.beat.entered for rank in ranks]
        if min(entered) < max(entered):
            behind = [rank for rank, number in zip(ranks, entered, strict=True) if number == min(entered)]
            return [rank for rank in behind if rank in outside] or behind, "behind"
        if len(outside) == len(ranks):
            return [], "none waits"
        return (outside, "outside") if outside else ([], "all wait")

    def _wake(self, now: float) -> None:
        """What passed while the watch itself was stopped or cut off counts for nobody."""
        slept = now - self._awake if self._awake is not None else 0.0
        if slept > 3 * beat_every_s(self.timeout_s):
            for rank in self.ranks.values():
                rank.heard, rank.moved, rank.worked = rank.heard + slept, rank.moved + slept, rank.worked + slept
        self._awake = now


def excused(hang: Hang, seen: Mapping[int, Seen]) -> str | None:
    """Why this is left alone all the same, from what was found of the ranks on their hosts; None: it is a hang."""
    for rank in seen.values():
        if rank.traced or rank.state == "t":
            return f"a debugger is attached to rank {rank.rank}"
        if not rank.state:
            return f"the process of rank {rank.rank} is gone"  # Ray sees that too
    if not seen:
        return "no host answers: it is this machine's own network"
    for beat in hang.culprits:
        found = seen.get(beat.rank)
        # No thread but one runs while that reads a large file in one call.
        if beat.patient and found is not None and computes(found.seconds, found.cpu_s, found.io_bytes):
            return f"rank {beat.rank} is at work, {place(beat)}"
    return None


def sentence(hang: Hang, seen: Mapping[int, Seen]) -> str:
    """What a user is told: who stands still, how and where, and what the others do. `seen` is what was found of the
    ranks on their hosts."""
    stood = f"progress for {hang.stood_s:.0f} s"
    if not hang.culprits:
        text = f"none of the {len(hang.beats)} ranks made {stood}, and no single one is to blame: "
        if hang.why == "none waits":
            return f"{text}none waits for another, they are {_usual(hang.beats)}"
        hosts = sorted({beat.host for beat in hang.beats})
        network = f"; look at the network between {_listed(hosts)}" if len(hosts) > 1 else ""
        return f"{text}all wait in {_usual(hang.beats)}, {place(hang.beats[0])}{network}"
    first = hang.culprits[0]
    found = seen.get(first.rank)
    # The last that was heard of it is older than its stack.
    where = f", last heard of {place(first)}" if hang.why == "silent" else f" {place(first)}"
    text = f"{_named(hang.culprits)} made no {stood}: {how(first, hang.why, found)}{where}"
    if found is not None and found.frame is not None:
        text += f", at {found.frame}"
    others = [beat for beat in hang.beats if beat not in hang.culprits]
    if others:
        waited = any(beat.waits_in for beat in others)
        text += f"; the others {'waited in' if waited else 'were'} {_usual(others)}"
    return text


def how(beat: Beat, why: Why, seen: Seen | None) -> str:
    """What keeps a culprit."""
    if seen is None:
        return "its host does not answer"
    if seen.state == "T":
        return "stopped (SIGSTOP)"
    if seen.state == "D":
        return "waiting for a disk (state D)"
    if why == "silent":
        return "busy, and no other thread of it runs" if seen.busy else "it does not answer"
    if beat.waits_in is not None:
        return f"waiting in {beat.waits_in}"
    return "busy" if seen.busy else "waiting"


def _usual(beats: Sequence[Beat]) -> str:
    """The collective that most of the ranks are in, or where most of them are."""
    collectives = Counter(beat.waits_in for beat in beats if beat.waits_in)
    return str((collectives or Counter(map(place, beats))).most_common(1)[0][0])


def _named(beats: Sequence[Beat]) -> str:
    """ "rank 1 on host2", "ranks 4 and 5 on host2"."""
    hosts = sorted({beat.host for beat in beats})
    ranks = _listed([str(beat.rank) for beat in beats])
    return f"rank{'s' * (len(beats) > 1)} {ranks} on {_listed(hosts)}"


def _listed(words: Sequence[str], most: int = 8) -> str:
    shown = list(words[:most]) + ([f"{len(words) - most} more"] if len(words) > most else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def report(hang: Hang, seen: Mapping[int, Seen], what: str) -> str:
    """What goes to the log: a line for each rank, then the stacks of all, those of the culprits first."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"{when}  attempt {hang.attempt or 'not begun'}, step {hang.step}", what, ""]
    lines += ["rank  host  pid  state  where  collectives  waits in"]
    for beat in hang.beats:
        found = seen.get(beat.rank)
        state = f"{found.state} {found.kernel}".strip() if found else "its host does not answer"
        entered = f"{beat.entered} + {beat.entered_saves} of checkpoints"
        waits = beat.waits_in or "-"
        lines.append("  ".join([str(beat.rank), beat.host, str(beat.pid), state, place(beat), entered, waits]))
    blamed = {beat.rank for beat in hang.culprits}
    for beat in sorted(hang.beats, key=lambda beat: (beat.rank not in blamed, beat.rank)):
        found = seen.get(beat.rank)
        lines += ["", f"==== rank {beat.rank} on {beat.host}, process {beat.pid}"]
        lines += [found.stack.rstrip() if found else "its host does not answer"]
    return "\n".join(lines) + "\n\n"
