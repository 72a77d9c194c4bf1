"""How a run ended, written by the workers for whoever started them.

Ray restarts workers that raise. An end that a restart cannot change (a finished run, a loss that is not finite, a model
that is not there) is therefore no exception but a verdict: a file in the run's folder that the driver turns into an
exit code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from launcher.store.durable import replace_synced

log = logging.getLogger(__name__)

FILE = "verdict.json"
STOP_FILE = "stop"
Kind = Literal["finished", "stopped_early", "stopped", "out_of_time", "not_finite", "diverged", "unsaved", "error"]


@dataclass(frozen=True)
class Verdict:
    """`kind` decides the exit code; `message` and `hint` are for the user."""

    kind: Kind
    step: int
    message: str
    hint: str | None = None
    exit_code: int = 0
    launch: int = 0
    """Under which launch the run ended so; 0 where no launcher was."""

    def content(self) -> bytes:
        """What is in the file."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    def save(self, run_dir: Path) -> None:
        """Write it whole or not at all. Raises OSError."""
        replace_synced(run_dir / FILE, self.content())

    @classmethod
    def load(cls, run_dir: Path, launch: int | None = None) -> Verdict | None:
        """The latest verdict, or None: there is none that can be read whole, or it is not of `launch` where one is
        given."""
        try:
            content = (run_dir / FILE).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read: %s", run_dir / FILE, error)
            return None
        return cls.parse(content, launch)

    @classmethod
    def parse(cls, content: bytes, launch: int | None = None) -> Verdict | None:
        """As `load`, from a file's content."""
        try:
            verdict = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        numbers = (verdict.step, verdict.exit_code, verdict.launch)
        # A damaged kind must not pass for one that ends with exit code 0.
        if verdict.kind not in get_args(Kind) or not all(isinstance(number, int) for number in numbers):
            return None
        return verdict if launch in (None, verdict.launch) else None


def request_stop(run_dir: Path, reason: str) -> bool:
    """Ask the workers to save and end after the step they are in; they look once a step. False: the disk takes no
    request."""
    try:
        descriptor = os.open(run_dir / STOP_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        log.warning("no stop can be asked for in %s: %s", run_dir, error.strerror or error)
        return False
    # The name is the request: a full disk has room for that, if not for the reason.
    with contextlib.suppress(OSError), open(descriptor, "w", encoding="utf-8") as file:
        file.write(reason + "\n")
    return True


def stop_requested(run_dir: Path) -> bool:
    """Whether somebody asked; where the disk does not answer, nobody did."""
    return os.path.exists(run_dir / STOP_FILE)


def forget(run_dir: Path) -> None:
    """Clear the last launch's verdict and stop request, as far as the disk lets us."""
    for name in (FILE, STOP_FILE):
        try:
            (run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays: %s", run_dir / name, error.strerror or error)
