"""metrics.jsonl: one line a step, an evaluation or an event, for people, plots and the progress bar.

Append only. After a restart the steps since the last checkpoint appear again: the last line of a step counts. Each line
names the attempt that wrote it; what an orphan still writes after its successor has started counts for nothing. A disk
that takes no lines ends no training: they wait in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
MOST_KEPT = 10_000
"""Lines that wait in memory; beyond them the oldest are dropped, and counted in a line `metrics_lost`."""


class MetricsLog:
    """The writing end, for one thread; only rank 0 has one that writes. No method raises OSError."""

    def __init__(self, run_dir: Path, attempt: str, writes: bool, name: str = FILE) -> None:
        """`attempt` as `str(Attempt)` gives it, such as "3.2"; `name` of a file below the run's folder. The file is
        made with the first line, its folder never."""
        self.attempt, self.writes = attempt, writes
        self._path = run_dir / name
        self._folder = _identity(self._path.parent)
        self._descriptor: int | None = None
        self._torn = False
        """Whether the file may end in half a line."""
        self._kept: deque[bytes] = deque()
        self._dropped = 0
        self._failing = False

    def write(self, kind: str, **values: Any) -> None:
        """Append {"kind", "time", "attempt", **values}; floats at full precision, so that equal runs have equal
        lines."""
        if self.writes:
            self._kept.append(self._line(kind, values))
            self._flush()

    def close(self) -> None:
        """Write what still waits, if that is possible now."""
        if self._kept:
            self._flush()
        if self._kept:
            log.warning("%d lines of %s are lost", len(self._kept) + self._dropped, self._path)
        self._let_go()
        self.writes = False

    def _line(self, kind: str, values: dict[str, Any]) -> bytes:
        head = {"kind": kind, "time": round(time.time(), 3), "attempt": self.attempt}
        return (json.dumps(head | values) + "\n").encode()

    def _flush(self) -> None:
        try:
            if self._dropped:
                self._append(self._line("metrics_lost", {"lines": self._dropped}))
                self._dropped = 0
            while self._kept:
                self._append(self._kept[0])
                self._kept.popleft()
        except OSError as error:
            self._let_go()
            if not self._failing:
                log.warning("%s cannot be written (%s): its lines wait in memory", self._path, error.strerror or error)
            self._failing = True
            while len(self._kept) > MOST_KEPT:
                self._kept.popleft()
                self._dropped += 1
        else:
            if self._failing:
                log.info("%s can be written again", self._path)
            self._failing = False

    def _append(self, line: bytes) -> None:
        """Raises OSError where the line is not there whole; a part of it may be."""
        if self._descriptor is None:
            self._descriptor = self._open()
        elif os.fstat(self._descriptor).st_nlink == 0:  # the kernel would go on writing into the deleted file
            raise FileNotFoundError(errno.ENOENT, "the file was deleted", str(self._path))
        if self._torn:
            line = b"\n" + line
        self._torn = True
        done = 0
        try:
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
        except OSError:
            if done < len(line) - 1:
                raise
            return  # whole but for its end, with which the next line begins
        self._torn = False

    def _open(self) -> int:
        # Where a mount has vanished its mount point is left, and a file made there would split the run's metrics in
        # two. On what is mounted later under the same name the file is there already.
        create = os.O_CREAT if _identity(self._path.parent) == self._folder else 0
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | create, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                self._torn = True  # by a writer that was killed
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _let_go(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every line of a run's metrics that counts, in order.

    Torn lines do not, nor do those of an attempt that a later one's line `start` precedes. Raises OSError where the
    file is there and cannot be read.
    """
    counts = Counting()
    yield from (record for record in _records(run_dir / FILE) if counts(record))


class Counting:
    """Tells, of one line after the other, which count."""

    def __init__(self) -> None:
        self._latest: tuple[int, ...] = ()

    def __call__(self, record: dict[str, Any]) -> bool:
        attempt = attempt_of(record)
        if attempt is None:
            return True
        if attempt < self._latest:
            return False
        if record["kind"] == "start":
            self._latest = attempt
        return True


def follow(path: Path, whole: bool = False) -> Iterator[list[dict[str, Any]]]:
    """At each `next`, the whole lines that were added to a JSON-lines file since the last; begins at its present end,
    or where `whole` is wanted at its beginning."""
    position = path.stat().st_size if path.exists() and not whole else 0
    rest = b""
    while True:
        records = []
        with contextlib.suppress(OSError):  # not there yet, or not now: a mount that has vanished may come back
            with path.open("rb") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    if isinstance(record, dict):  # and no half of a torn line
                        records.append(record)
        yield records


def last_of_each_step(run_dir: Path, kind: str = "step") -> dict[int, dict[str, Any]]:
    """{step: its line that counts} of one kind."""
    return {record["step"]: record for record in read(run_dir) if record["kind"] == kind}


def latest_start(run_dir: Path) -> dict[str, Any] | None:
    """The line of the latest start; None where there is none, or none that can be read."""
    latest = None
    with contextlib.suppress(OSError), (run_dir / FILE).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"kind": "start"' in line:  # the other lines of a long run are not worth the second they take
                with contextlib.suppress(json.JSONDecodeError):
                    latest = json.loads(line)
    return latest


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and "kind" in record:
                    yield record


def attempt_of(record: Mapping[str, Any]) -> tuple[int, ...] | None:
    """(3, 2) for a line of attempt "3.2"; None in a line of a Slipway that wrote none."""
    parts = str(record.get("attempt")).split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def _identity(folder: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(folder)
        return found.st_dev, found.st_ino
    return None
