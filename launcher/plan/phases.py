"""Gradual unfreezing: how much is trained from which step on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.errors import ModelError
from launcher.plan.plan import MethodPlan


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same weights are trained."""

    begins: int
    """Steps done before its first one."""
    last_layers: int | None
    """Layers that are trained, counted from the last; None: everything."""


def phases(method: MethodPlan, total_steps: int) -> tuple[Phase, ...]:
    """The run's, in order: one, unless `method.unfreeze` names more. `total_steps` is the length of the run."""
    begins = [_steps(stage.at, total_steps) for stage in method.unfreeze]
    return tuple(map(Phase, (0, *begins), last_layers(method)))


def last_layers(method: MethodPlan) -> tuple[int | None, ...]:
    """How many of the last layers each phase trains; None: everything."""
    return (method.train_last_layers, *(stage.last_layers for stage in method.unfreeze))


def phase_at(method: MethodPlan, total_steps: int, step: int) -> int:
    """In which phase, from 0, the step after `step` done ones is taken."""
    return sum(phase.begins <= step for phase in phases(method, total_steps)) - 1


def refuse_useless(method: MethodPlan, total_steps: int) -> None:
    """Raise ModelError where a stage of `method.unfreeze` would train no step."""
    begins = [phase.begins for phase in phases(method, total_steps)]
    for stage, first, after in zip(method.unfreeze, begins[1:], [*begins[2:], total_steps], strict=False):
        if first >= after:
            what = "the run ends" if after == total_steps else "the next stage begins"
            raise ModelError(
                f"method.unfreeze: the stage at {stage.at:g} begins after step {first}, and {what} after step {after}",
                hint="give each stage some steps: a later `at` for the next one, or a longer run",
            )


def _steps(at: float, total_steps: int) -> int:
    """Steps done when a stage begins: `at` itself from 1 on, a share of all steps (rounded up) below."""
    # 0.07 * 100 is 7.000000000000001, and no eighth step.
    return int(at) if at >= 1 else math.ceil(round(at * total_steps, 9))
