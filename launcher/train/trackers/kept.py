"""trackers.json in the run's folder: of each tracker the id of the run there, and how far it has been told.

{"wandb": {"id": "3f9a12bc", "attempt": [3, 1], "time": 1763791211.41, "at": 120, "steps": {"step": 120, "eval": 100}}}
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

from launcher.store.durable import replace_synced
from launcher.train.trackers.lines import ONCE_A_STEP, Line

log = logging.getLogger(__name__)

FILE = "trackers.json"


class File:
    """The file, for one process at a time and several threads in it."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._lock = run_dir / FILE, threading.Lock()
        self._values = _read(run_dir)

    def of(self, tracker: str) -> Kept:
        """What is kept of one tracker."""
        return Kept(self, self._values.setdefault(tracker, {}))

    def change(self, values: dict[str, Any], changes: dict[str, Any]) -> None:
        """Note and write. A disk that takes nothing costs lines that are told twice after a crash."""
        with self._lock:
            values |= changes
            try:
                replace_synced(self._path, json.dumps(self._values, indent=2).encode() + b"\n")
            except OSError as error:
                log.warning("%s cannot be written: %s", self._path, error.strerror or error)


class Kept:
    """What is kept of one tracker; every change is written at once."""

    def __init__(self, file: File, values: dict[str, Any]) -> None:
        self._file, self._values = file, values

    def get(self, name: str) -> Any:
        """None where there is nothing."""
        return self._values.get(name)

    def put(self, **changes: Any) -> None:
        """Note and write."""
        self._file.change(self._values, changes)

    def told(self, lines: list[Line]) -> None:
        """The tracker has these."""
        steps = {line.kind: line.step for line in lines if line.kind in ONCE_A_STEP}
        self.put(
            attempt=lines[-1].attempt,
            time=lines[-1].time,
            at=lines[-1].step,
            steps=(self.get("steps") or {}) | steps,
            failed=None,
        )


class News:
    """Tells, of one line after the other from the file's beginning, which a tracker has not been told."""

    def __init__(self, kept: Kept) -> None:
        self._until = [*(kept.get("attempt") or ()), kept.get("time") or 0.0]
        self._steps: dict[str, int] = dict(kept.get("steps") or {})

    def __call__(self, line: Line) -> bool:
        if line.kind in ONCE_A_STEP:
            if line.step <= self._steps.get(line.kind, -1):
                return False
            self._steps[line.kind] = line.step
            return True
        # By attempts first: a later one may have run on a machine whose clock is behind.
        return [*line.attempt, line.time] > self._until


def missed(run_dir: Path) -> list[str]:
    """What to say of trackers that could not be told everything."""
    failed = {tracker: kept.get("failed") for tracker, kept in _read(run_dir).items()}
    return [f"{tracker} has not been told everything: {why}" for tracker, why in failed.items() if why]


def _read(run_dir: Path) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((run_dir / FILE).read_bytes())
        if isinstance(found, dict):
            return found
    return {}
