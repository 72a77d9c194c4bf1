"""Is a step's loss a spike? Pure functions of the losses before it: every rank, and a resumed run, judges alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.plan.plan import GuardPlan

LEAST_SPREAD = 0.01
"""Of the mean. Losses that hardly differ have a standard deviation of next to nothing, and any other is far away."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient is not to be trusted; equal on all ranks."""

    step: int
    """Counted from 1."""
    loss: float
    mean: float | None
    """Of the steps before it; None where the loss or the gradient norm is no number."""
    deviations: float | None
    """How far above the mean, in standard deviations."""
    action: Literal["warn", "skip", "rollback", "stop"]
    message: str

    @property
    def finite(self) -> bool:
        return self.mean is not None

    @property
    def left_out(self) -> bool:
        """Whether the weights stay as they were before the step."""
        return self.action in ("skip", "rollback")


def judge(guard: GuardPlan, recent: Sequence[float], step: int, loss: float, finite: bool) -> Spike | None:
    """Whether the loss of `step` (from 1) is a spike after the `recent` ones, oldest first.

    `finite`: of every micro batch. Before there are `guard.window` losses only one that is no number counts.
    """
    if not finite:
        return _no_number(guard, step, loss, f"the loss of step {step} is {loss}")
    if len(recent) < guard.window:
        return None
    mean = math.fsum(recent) / len(recent)
    variance = math.fsum((earlier - mean) ** 2 for earlier in recent) / len(recent)
    spread = max(math.sqrt(variance), LEAST_SPREAD * abs(mean), 1e-12)
    deviations = (loss - mean) / spread
    if deviations <= guard.deviations:
        return None
    far = f"{deviations:.1f} standard deviations above the mean of the {len(recent)} steps before it ({mean:.4f})"
    return Spike(step, loss, mean, deviations, guard.spikes, f"the loss of step {step} is {loss:.4f}, {far}")


def judge_norm(guard: GuardPlan, step: int, loss: float, norm: float) -> Spike:
    """The same of a gradient norm that is no number."""
    return _no_number(guard, step, loss, f"the gradient norm of step {step} is {norm}, its loss {loss:.4f}")


def _no_number(guard: GuardPlan, step: int, loss: float, message: str) -> Spike:
    # Nothing can be learned from it, so a warning is not enough.
    action = guard.spikes if guard.spikes in ("skip", "rollback") else "stop"
    return Spike(step, loss, None, None, action, message)


def remember(recent: list[float], loss: float, window: int) -> None:
    """Add the loss of a step that was taken; what is older than `window` steps goes."""
    recent.append(loss)
    del recent[:-window]
