"""`python -m launcher.train.trackers.follow RUN`: give a run's trackers what its metrics.jsonl has, as it is written.

Its standard input begins with a line, the Plan, and goes on until the run has ended, with "well" or without.
`< /dev/null` gives the trackers of plan.json what is there already.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from launcher.plan.plan import Plan
from launcher.recipe.addresses import without_secrets
from launcher.train.metrics import FILE as METRICS_FILE
from launcher.train.metrics import Counting
from launcher.train.metrics import follow as lines_of
from launcher.train.trackers.kept import File, Kept, News
from launcher.train.trackers.lines import Line, as_line

log = logging.getLogger(__name__)

POLL_S, RETRY_S = 2.0, 30.0
GIVE_UP_S = 25.0
"""After the run's end; whoever waits for this process does so a little longer."""
SETTINGS = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is gone is asked again by us; meanwhile the run may end.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Of the packages, read when they are imported; what the user has set stays."""
AT_ONCE = 50
"""Lines: of some twenty numbers each, within the thousand that MLflow takes in a request."""


class Tracker(Protocol):
    """One tracker's run. Any method may raise whatever its package does."""

    def tell(self, lines: list[Line]) -> None:
        """Give it these; when this returns, they count as told."""

    def close(self, well: bool) -> None:
        """The run has ended, `well` or to be gone on with."""


class Follower(threading.Thread):
    """Tells one tracker. Whatever goes wrong is tried again; it is said once."""

    def __init__(self, name: str, plan: Plan, kept: Kept, ended: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.well = False
        """How the run ended; known once `ended` is set."""
        self._plan, self._kept, self._ended = plan, kept, ended
        self._tracker: Tracker | None = None
        self._news = self._unheard()
        self._waiting: list[Line] = []

    def run(self) -> None:
        pause = 0.0
        while True:
            last = self._ended.wait(pause)
            try:
                self._tell()
                if last and self._tracker is not None:
                    self._tracker.close(self.well)
                pause = POLL_S
            except (Exception, SystemExit) as error:
                self._complain(error)
                pause = RETRY_S
            if last:
                return

    def _tell(self) -> None:
        self._waiting += next(self._news)
        if self._tracker is None:
            module = import_module(f"launcher.train.trackers.{self.name}")
            self._tracker = module.opened(self._plan, self._kept)
        while self._waiting:
            lines = self._waiting[:AT_ONCE]
            self._tracker.tell(lines)
            self._kept.told(lines)
            del self._waiting[:AT_ONCE]

    def _unheard(self) -> Iterator[list[Line]]:
        """At each `next` the lines that the tracker has not been told, from metrics.jsonl's beginning on."""
        counts, is_new, step = Counting(), News(self._kept), 0
        for records in lines_of(Path(self._plan.run_dir) / METRICS_FILE, whole=True):
            lines = []
            for record in records:
                if "kind" in record and counts(record):
                    lines.append(as_line(record, step))
                    step = lines[-1].step
            yield [line for line in lines if is_new(line)]

    def _complain(self, error: BaseException) -> None:
        said = without_secrets(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        if self._kept.get("failed") is None:
            log.warning("%s takes nothing, which changes nothing for the run: %s", self.name, said)
        self._kept.put(failed=said)


def main(run_dir: Path) -> None:
    """Follow until standard input ends, then end this process."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.environ.update(SETTINGS | os.environ)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    said = sys.stdin.buffer.readline().decode()
    plan = Plan.model_validate_json(said) if said else Plan.load(run_dir / "plan.json")
    plan = plan.model_copy(update={"run_dir": str(run_dir)})
    with FileLock(run_dir / ".trackers.lock"):  # of an attempt that was killed, one may be at the rest still
        file, ended = File(run_dir), threading.Event()
        followers = [Follower(name, plan, file.of(name), ended) for name in plan.lifecycle.trackers]
        for follower in followers:
            follower.start()
        last_word = sys.stdin.buffer.read()
        deadline = time.monotonic() + GIVE_UP_S
        for follower in followers:
            follower.well = last_word == b"well"
        ended.set()
        for follower in followers:
            follower.join(max(0.0, deadline - time.monotonic()))
    sys.stderr.flush()
    os._exit(0)  # a thread that still waits for its server holds nobody up


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
