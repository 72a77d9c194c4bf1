"""How a run ended, written by the workers for whoever started them.

Ray restarts workers that raise. An end that a restart cannot change (a finished run, a loss that is not finite, a model
that is not there) is therefore no exception but a verdict: a file in the run's folder that the driver turns into an
exit code.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FILE = "verdict.json"
STOP_FILE = "stop"


@dataclass(frozen=True)
class Verdict:
    """`kind` decides the exit code; `message` and `hint` are for the user."""

    kind: Literal["finished", "stopped", "out_of_time", "not_finite", "error"]
    step: int
    message: str
    hint: str | None = None
    exit_code: int = 0

    def save(self, run_dir: Path) -> None:
        """Write it whole or not at all."""
        staging = run_dir / f".{FILE}.{os.getpid()}"
        staging.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        staging.replace(run_dir / FILE)

    @classmethod
    def load(cls, run_dir: Path) -> Verdict | None:
        """The verdict of the latest attempt, or None while there is none."""
        path = run_dir / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def request_stop(run_dir: Path, reason: str) -> None:
    """Ask the workers to save and end after the step they are in; they look once a step."""
    (run_dir / STOP_FILE).write_text(reason + "\n", encoding="utf-8")


def stop_requested(run_dir: Path) -> bool:
    """Whether somebody asked."""
    return (run_dir / STOP_FILE).exists()


def forget(run_dir: Path) -> None:
    """Clear the last attempt's verdict and stop request."""
    (run_dir / FILE).unlink(missing_ok=True)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
