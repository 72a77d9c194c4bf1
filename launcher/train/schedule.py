"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from launcher.plan.plan import SchedulePlan


def warmup_steps(schedule: SchedulePlan, total_steps: int) -> int:
    """Steps of warm-up: `warmup` itself from 1 on, a share of all steps (rounded up) below."""
    if schedule.warmup >= 1:
        return min(int(schedule.warmup), total_steps)
    return math.ceil(schedule.warmup * total_steps)


def lr_factor(schedule: SchedulePlan, step: int, total_steps: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses.

    The warm-up is linear and reaches the peak in its last step; no step has rate zero but the end of a decay to zero.
    Cosine as in Loshchilov and Hutter, 2017, without restarts.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    decay = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * decay
