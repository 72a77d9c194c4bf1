"""The process that tells trackers, as the run's first rank sees it: begun, and at the end waited for a little.

A process, and no thread: what such packages import and do to signals, output and the interpreter's lock stays out of
training. It ends when this end of its pipe is closed, by us or by the kernel after a kill, having told what there is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import launcher
from launcher.plan.plan import Plan

log = logging.getLogger(__name__)

FINISH_S = 30.0
"""How long a run's end waits for trackers to take the rest; what is missing then, the next start tells them."""


class Following:
    """The process, where the plan names trackers; nothing otherwise."""

    def __init__(self, plan: Plan, tells: bool) -> None:
        """`tells`: on the first rank."""
        self._process: subprocess.Popen[bytes] | None = None
        if not tells or not plan.lifecycle.trackers:
            return
        # A worker may have found the package by other means than its environment.
        paths = [str(Path(launcher.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher.train.trackers.follow", plan.run_dir],
                stdin=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the run, which has more to say before its end
            )
        except OSError as error:
            log.warning("the trackers are told nothing: %s", error)
            return
        self._say(plan.model_dump_json().encode() + b"\n")

    def finish(self, well: bool) -> None:
        """The run has ended, `well` or to be gone on with: let them have the rest, for at most FINISH_S."""
        process = self._process
        if process is None:
            return
        if well:
            self._say(b"well")
        self.let_go()
        try:
            process.wait(FINISH_S)
        except subprocess.TimeoutExpired:
            log.warning("the trackers do not take the rest of the run within %g s", FINISH_S)
            process.kill()
            process.wait()

    def let_go(self) -> None:
        """Leave it to itself: it tells what there is, and ends."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _say(self, words: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and said why in this rank's log
            self._process.stdin.write(words)
            self._process.stdin.flush()
