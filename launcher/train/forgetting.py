"""Forgetting: the loss on rows of what the model could do before, against what it was before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.plan.plan import Lifecycle
from launcher.train.parts import Progress


@dataclass(frozen=True)
class Forgetting:
    """More is forgotten than the plan allows."""

    before: float
    """Loss on `evaluate.retain` before the first step."""
    now: float
    limit: float
    """The loss beyond which it is too much."""
    rise: float
    """Of the loss, as a share of what it was; infinite where that was nothing."""
    ends: bool
    """Whether the run ends."""
    message: str


def forgetting(progress: Progress, life: Lifecycle) -> Forgetting | None:
    """Whether the latest evaluation found more forgotten than `evaluate.retain.limit`. A loss that is no number is."""
    before, now = progress.retain_before, progress.retain_loss
    if life.retain is None or before is None or now is None:
        return None
    limit = before * (1 + life.retain.limit)
    if now <= limit:
        return None
    rise = now / before - 1 if before else math.inf
    message = (
        f"forgetting: the loss on evaluate.retain was {before:.4f} before the first step and is {now:.4f} now, "
        f"{rise:+.0%}; its limit is {life.retain.limit:+.0%}"
    )
    return Forgetting(before, now, limit, rise, life.retain.action == "stop", message)
