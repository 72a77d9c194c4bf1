"""How a stop reaches the loop where no driver writes the run's stop file on the same disk: as a signal to a process
that torchrun started, or through the object store that the run is kept in.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from launcher.store.store import Store
from launcher.train.verdict import STOP_FILE, request_stop

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
TOLD_TWICE_S = 2.0
"""A scheduler signals every process of a job, and torchrun passes on to its workers what it gets itself."""


class StopSignal:
    """Takes SIGTERM and SIGINT within its `with` block, in the main thread only; elsewhere nothing is ever received.

    The first is kept in `received`, for the loop to look at. One that comes more than `told_twice_s` later ends the
    process at once.
    """

    def __init__(self, told_twice_s: float = TOLD_TWICE_S) -> None:
        self.received: int | None = None
        """Number of the first signal."""
        self._told_twice_s = told_twice_s
        self._since = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not set from Python
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > self._told_twice_s:
            # Not as an exception: on its way out it would wait for ranks and files that may never answer.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextlib.contextmanager
def watch_store(store: Store, run_dir: Path, every_s: float = LOOK_EVERY_S) -> Iterator[None]:
    """Within the block, turn a stop request in the run's store into the stop file in `run_dir`, where the loop
    looks."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, run_dir, every_s, ended), name="stop-request", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=every_s)  # a server that does not answer keeps nobody


def _watch(store: Store, run_dir: Path, every_s: float, ended: threading.Event) -> None:
    failing = False
    while not ended.wait(every_s):
        try:
            reason = store.read(STOP_FILE)
        except FileNotFoundError:
            failing = False
        except Exception as error:  # of whatever kind: a server's bad day must not silence the watch for good
            if not failing:
                log.warning("%s cannot be asked for a stop request: %s", store, error)
            failing = True
        else:
            if request_stop(run_dir, reason.decode("utf-8", errors="replace").strip()):
                return
