"""Ctrl-C and SIGTERM: what they mean before the workers train, while they do, and after."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from launcher.errors import Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM)
UNWIND_S = 15.0
"""After a signal: how long Ray, the model's process and the rest may take to be stopped. Schedulers kill after 30 s."""
_SIGACTION_BYTES = 512
"""More than C's struct sigaction takes anywhere: it is copied whole and never looked into."""
_LOOK_EVERY_S = 0.01
_AGAIN_S = 0.05

Handler = Callable[[int, FrameType | None], object]


class _Signalled(BaseException):
    """Raised wherever the main thread is; no `except Exception` of a library takes it for a fault of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """`handler` for both signals within the block."""
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within the block libraries cannot take the signals from Python.

    Ray's C++ does so while it connects: for a few tenths of a second a SIGTERM would print its stack, and abort the
    process if that has not ended three seconds later.
    """
    libc = ctypes.CDLL(None)
    ours = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in NUMBERS}
    found = ctypes.create_string_buffer(_SIGACTION_BYTES)
    for number, action in ours.items():
        libc.sigaction(int(number), None, action)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            for number, action in ours.items():
                libc.sigaction(int(number), None, found)
                if found.raw != action.raw:
                    libc.sigaction(int(number), action, None)

    thread = threading.Thread(target=keep, name="keep-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def ends_on_signals(message: str, hint: str | None = None) -> Iterator[None]:
    """Within the block either signal ends what is going on, as an error that is raised from here; a second one ends
    the process at once. Blocks may be nested: the innermost has the message.

    Raises:
        Interrupted: with `message` and `hint`, exit code 130 or 143.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a fork that prepares data has our handlers too
            os._exit(128 + number)
        if _is_lost(frame):
            threading.Timer(_AGAIN_S, os.kill, (owner, number)).start()
            return
        for other in NUMBERS:
            signal.signal(other, signal.SIG_DFL)
        must_end_soon(number, message)
        for child in multiprocessing.active_children():  # else their pool waits for what they are at
            child.kill()
        raise _Signalled(number)

    left = threading.Event()
    _blocks.append(left)
    try:
        with handled(end):
            yield
    except (_Signalled, SystemExit, KeyboardInterrupt) as ended:
        number = _number(ended)
        if number is None:
            raise
        raise Interrupted(message, hint, exit_code=128 + number) from None
    finally:
        left.set()
        _blocks.remove(left)


_blocks: list[threading.Event] = []
"""Of each `ends_on_signals` that this process is in, the outermost first: set once it is left."""


def must_end_soon(number: int, message: str) -> None:
    """After a signal: leave the outermost `ends_on_signals` within UNWIND_S, or end the process without more ado.

    Ray's end may hang, a pool may wait for a download of hours.
    """

    def leave(left: threading.Event) -> None:
        if not left.wait(UNWIND_S):
            os.write(2, f"{message}\n".encode())
            os._exit(128 + number)

    if _blocks:
        threading.Thread(target=leave, args=(_blocks[0],), name="unwind", daemon=True).start()


def _is_lost(frame: FrameType | None) -> bool:
    """Whether what is raised there is lost: Python drops it in a finalizer, and in logging's part of a fork."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_acquireLock", "_releaseLock"):
            return True
        frame = frame.f_back
    return False


def _number(ended: BaseException) -> int | None:
    if isinstance(ended, _Signalled):
        return ended.number
    if isinstance(ended, KeyboardInterrupt):
        return signal.SIGINT
    # While Ray connects, SIGTERM is its own: it leaves with the signal's number as the exit code.
    return signal.SIGTERM if ended.args == (signal.SIGTERM.value,) else None
