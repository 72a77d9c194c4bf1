"""metrics.jsonl: one line a step, an evaluation or an event, for people, plots and the progress bar.

Append only. After a restart the steps since the last checkpoint appear again: the last line of a step counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

FILE = "metrics.jsonl"


class MetricsLog:
    """The writing end; only rank 0 has one that writes."""

    def __init__(self, run_dir: Path, writes: bool) -> None:
        self.file: TextIO | None = None
        if writes:
            path = run_dir / FILE
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self.file = path.open("a", encoding="utf-8", buffering=1)
            if torn:  # a killed writer left half a line
                self.file.write("\n")

    def write(self, kind: str, **values: Any) -> None:
        """Append {"kind", "time", **values}; floats at full precision, so that equal runs have equal lines."""
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "time": round(time.time(), 3)} | values) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's metrics, in order; a torn one is skipped."""
    path = run_dir / FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def last_of_each_step(run_dir: Path, kind: str = "step") -> dict[int, dict[str, Any]]:
    """{step: its line that counts} of one kind."""
    return {record["step"]: record for record in read(run_dir) if record["kind"] == kind}
