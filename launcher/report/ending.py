"""How a run ended, or that it has not, in words."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from launcher.checkpoint.lease import held_by
from launcher.driver.resume import latest_verdict
from launcher.errors import Interrupted, SlipwayError
from launcher.plan.plan import Plan
from launcher.report.history import History
from launcher.store.location import open_store

State = Literal["finished", "stopped", "failed", "running", "killed"]


@dataclass(frozen=True)
class Ending:
    """Where a run is now."""

    state: State
    words: str
    """One line; of a failure its root cause."""
    detail: str = ""
    """Further lines, such as the last ones that the culprit has printed."""
    hint: str = ""


def ending(plan: Plan, history: History, error: SlipwayError | None = None, over: bool = False) -> Ending:
    """As the files of a run tell; `error` is what its launcher, which still holds it and is about to end, has met.
    `over`: this launcher holds it, and has met none."""
    if error is not None:
        return _failed(error.message, error.hint, "stopped" if isinstance(error, Interrupted) else "failed")
    verdict, resume = latest_verdict(plan.location), f"slipway resume {plan.location}"
    if verdict is not None:
        if verdict.exit_code or verdict.kind in ("not_finite", "unsaved", "error"):
            return _failed(verdict.message, verdict.hint, "failed")
        unfinished = verdict.kind in ("stopped", "out_of_time")
        return Ending(
            "stopped" if unfinished else "finished", verdict.message, hint=resume if verdict.kind == "stopped" else ""
        )
    done = f"step {history.step:,} of {plan.lifecycle.total_steps:,}"
    holder = None
    if not over:
        with contextlib.suppress(OSError, SlipwayError):
            holder = held_by(open_store(plan.location))
    if holder is not None:
        return Ending("running", f"running: {done}", holder)
    if history.failure is not None:
        return _failed(str(history.failure["message"]), history.failure.get("hint"), "failed")
    return Ending("killed", f"ended without a word at {done}: killed, or its machine was lost", hint=resume)


def _failed(message: str, hint: str | None, state: State) -> Ending:
    first, _, rest = message.partition("\n")
    return Ending(state, first, rest, hint or "")
