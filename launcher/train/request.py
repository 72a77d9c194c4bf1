"""What the controller asks of running workers: a checkpoint now, so that nothing is repeated when the run changes size.

Ray calls `ask_for_checkpoint` in the first rank's process while its loop is at work.
"""

from __future__ import annotations

import threading

_asked = threading.Event()


def ask_for_checkpoint() -> None:
    """Have one begun after the step that is being computed."""
    _asked.set()


def checkpoint_asked_for() -> bool:
    """Whether somebody has asked since the last time that this was asked."""
    asked = _asked.is_set()
    _asked.clear()
    return asked
